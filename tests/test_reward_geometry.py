"""Rewards of boxes: scores worked out by hand, shapes moved by known pixels; what is missing and misnamed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from flowalign.config import build
from flowalign.media import shown
from flowalign.records import Media, Prompts
from flowalign.shapes.scenes import COLORS, SHAPES, Placed, draw
from rewards import Clip, Position, Resize, ShapesFinder, Translation
from rewards.geometry import direction_of, displacement, resizing, staying, translation

ROOT_HALF = 0.5**0.5
FINDER = ShapesFinder()


def box(*corners: float) -> Tensor:
    return torch.tensor([corners], dtype=torch.float32)


def toward(text: str) -> Tensor:
    return torch.tensor([direction_of(text)])


def test_a_move_by_hand() -> None:
    """Boxes of 10 x 20 and 14 x 20; centres (15, 30) and (45, 70): the way is (30, 40), of length 50.

    The dead zone is 0.1 * 24 = 2.4 across and 4 down, so that (27.6, 36) / 50 is left.
    """
    before, after = box(10, 20, 20, 40), box(38, 60, 52, 80)
    torch.testing.assert_close(displacement(before, after), torch.tensor([[0.552, 0.72]]))
    for text, score in {"right": 0.552, "left": -0.552, "down": 0.72, "up": -0.72}.items():
        assert translation(before, after, toward(text)).item() == pytest.approx(score)
        assert translation(after, before, toward(text)).item() == pytest.approx(-score)  # the other way round
    diagonal = translation(before, after, toward("down right"))
    assert diagonal.item() == pytest.approx((0.552 + 0.72) * ROOT_HALF)
    for pair in ((before, after), (after, before)):
        assert staying(*pair).item() == pytest.approx(1 - (0.552 + 0.72) / 2)


def test_a_move_within_the_dead_zone_is_none() -> None:
    """Both boxes 10 wide: up to 2 pixels do not count, and 2.5 count as 0.5 of 2.5."""
    before = box(0, 0, 10, 10).repeat(4, 1)
    after = before + torch.tensor([0.0, 1.9, -1.9, 2.5])[:, None] * torch.tensor([1.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(
        translation(before, after, toward("right").repeat(4, 1)), torch.tensor([0.0, 0.0, 0.0, 0.2])
    )
    torch.testing.assert_close(staying(before, after), torch.tensor([1.0, 1.0, 1.0, 0.9]))


def test_a_resize_by_hand() -> None:
    """20 x 40 that becomes 30 x 100: ratios 1.5 and 2.5, each half off the factor 2."""
    before, after, double = box(0, 0, 20, 40), box(5, 5, 35, 105), torch.tensor([2.0])
    assert resizing(before, after, double).item() == pytest.approx(1 - (0.5 + 0.5) / 4)
    assert resizing(after, before, 1 / double).item() == pytest.approx(0.75)  # the other way round
    assert resizing(before, before, double).item() == pytest.approx(0.5)
    assert resizing(before, box(0, 0, 40, 80), double).item() == 1
    assert resizing(before, box(0, 0, 10, 20), double).item() == pytest.approx(1 - 3 / 4)  # halved, not doubled
    assert resizing(before, box(0, 0, 10, 20), 1 / double).item() == 1


def test_a_box_of_nan_gives_nan() -> None:
    known, lost = box(0, 0, 4, 4), torch.full((1, 4), torch.nan)
    for pair in ((known, lost), (lost, known), (lost, lost)):
        assert translation(*pair, toward("up")).isnan()
        assert staying(*pair).isnan()
        assert resizing(*pair, torch.tensor([0.5])).isnan()


@pytest.mark.parametrize(
    ("text", "vector"),
    [("left", (-1, 0)), ("Up", (0, -1)), ("up-left", (-ROOT_HALF, -ROOT_HALF)), ("right down", (ROOT_HALF, ROOT_HALF))],
)
def test_directions(text: str, vector: tuple[float, float]) -> None:
    assert direction_of(text) == pytest.approx(vector)


@pytest.mark.parametrize("text", ["", "left right", "up up", "forward", "to the left", "up down left"])
def test_no_direction(text: str) -> None:
    with pytest.raises(ValueError, match="a direction is left, right, up or down"):
        direction_of(text)


def scene(*placed: Placed) -> Tensor:
    return torch.from_numpy(draw(list(placed))).float() / 255


def edit(before: Tensor, after: Tensor, **told: object) -> tuple[Media, Prompts]:
    """One edit as a batch."""
    record = {"object": "red circle", **told}
    return Media(after[None], references=(before[None],)), Prompts(("move it",), (record,))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", ["red", "cyan", "black"])
def test_shapes_are_found_where_they_are(color: str, shape: str) -> None:
    """Of half extent 4 around (10, 12): eight pixels a side, among others and the bigger of two alike."""
    other = next(name for name in COLORS if name != color)
    same = Placed(other, shape, 24, 24, 6)
    pixels = scene(Placed(color, shape, 10, 12, 4), same, Placed(other, shape, 26, 6, 3.5))
    found = FINDER.find(torch.stack([pixels, pixels]), [f"{color} {shape}", f"{other} {shape}"])
    torch.testing.assert_close(found, torch.tensor([[6.0, 8, 14, 16], [18, 18, 30, 30]]), atol=1.0, rtol=0)
    if shape == "square":
        torch.testing.assert_close(found, torch.tensor([[6.0, 8, 14, 16], [18, 18, 30, 30]]))


MOVES = {"right": (14, 0), "left": (-14, 0), "down": (0, 14), "up": (0, -14)}


@pytest.mark.parametrize("text", MOVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_moved_by_known_pixels(shape: str, text: str) -> None:
    """14 pixels, of which twice a tenth of the side does not count: whole pixels keep the outline as it is."""
    dx, dy = MOVES[text]
    start, end = Placed("red", shape, 16 - dx / 2, 16 - dy / 2, 4), Placed("red", shape, 16 + dx / 2, 16 + dy / 2, 4)
    before, after = scene(start), scene(end)
    found = FINDER.find(before[None], [f"red {shape}"])[0]
    side = float(found[2] - found[0] if dx else found[3] - found[1])
    score = (14 - 0.2 * side) / 14
    assert 7 <= side <= 8
    reward = Translation(FINDER)
    told = {"object": f"red {shape}"}
    assert reward(*edit(before, after, **told, direction=text)).total.item() == pytest.approx(score)
    assert reward(*edit(after, before, **told, direction=text)).total.item() == pytest.approx(-score)
    aside = "up" if dx else "left"
    assert reward(*edit(before, after, **told, direction=aside)).total.item() == 0
    assert Position(FINDER)(*edit(before, after, **told)).total.item() == pytest.approx(1 - score / 2)
    assert Position(FINDER)(*edit(before, before, **told)).total.item() == 1
    talk2move = Clip(Translation(FINDER, missing=0.0), 0, 1)
    assert talk2move(*edit(after, before, **told, direction=text)).total.item() == 0
    assert talk2move(*edit(before, after, **told, direction=text)).total.item() == pytest.approx(score)


def test_a_shape_resized() -> None:
    """Squares of 8 and 12 pixels a side: 1.5 times is right, 2 is off by a half twice."""
    small, large = (scene(Placed("red", "square", 16, 16, radius)) for radius in (4, 6))
    told = {"object": "red square"}
    for pair, factor, score in (
        ((small, large), 1.5, 1.0),
        ((large, small), 2 / 3, 1.0),
        ((small, large), 2, 0.75),
        ((small, small), 2, 0.5),
        ((small, large), 0.5, 1 - (2 - 2 / 3) / 2),
    ):
        assert Resize(FINDER)(*edit(*pair, **told, factor=factor)).total.item() == pytest.approx(score)


@pytest.mark.parametrize("reward", [Translation, Resize, Position])
def test_what_is_not_found_has_no_score(reward: type[Translation | Resize | Position]) -> None:
    """Neither an object that is gone, nor one that was not there, nor a picture of nan; the second edit is scored."""
    there, gone = scene(Placed("red", "circle", 8, 16, 4)), scene(Placed("red", "cross", 8, 16, 4))
    after = torch.stack([gone, there, there, torch.full_like(there, torch.nan)])
    references = tuple(one[None] for one in (there, there, gone, there))
    record = {"object": "red circle", "direction": "left", "factor": 2}
    given = Media(after, references=references), Prompts(("",) * 4, (record,) * 4)
    scores = reward(FINDER)(*given)
    assert scores.valid.tolist() == [False, True, False, False]
    assert scores.total.isnan().tolist() == [True, False, True, True]
    found = scores.parts[f"{reward.name}/found"]
    assert found[:3].tolist() == [0, 1, 1]
    assert found[3].isnan(), "nothing was looked for in it"
    punished = reward(FINDER, missing=-1.0)(*given)
    assert punished.valid.tolist() == [True, True, False, False]
    assert punished.total[0] == -1
    assert punished.total[1] == scores.total[1]


class Everything:
    """Finds the middle half of any picture, and keeps what it was shown."""

    def __init__(self) -> None:
        self.seen = list[tuple[int, ...]]()

    def find(self, pixels: Tensor, names: list[str]) -> Tensor:
        self.seen.append(tuple(pixels.shape))
        height, width = pixels.shape[2:]
        return torch.tensor([[width / 4, height / 4, 3 * width / 4, 3 * height / 4]] * len(names))


def test_a_picture_before_of_another_size() -> None:
    """The same place and share of a picture of another size is no move, and a group's picture is looked at once."""
    finder, before, other = Everything(), torch.rand(1, 3, 20, 60), torch.rand(1, 3, 10, 12)
    media = Media(torch.rand(4, 3, 30, 40), references=(before, before, before, other))
    prompts = Prompts(("",) * 4, ({"object": "cup", "factor": 1.0},) * 4)
    assert Position(finder)(media, prompts).total.tolist() == [1] * 4
    assert finder.seen == [(1, 3, 20, 60), (1, 3, 10, 12), (4, 3, 30, 40)]
    assert Resize(finder)(media, prompts).total.tolist() == [1] * 4


def test_pictures_from_files(tmp_path: Path) -> None:
    """As a run has it: the prompt's record names the file, and its config the finder."""
    Image.fromarray(draw([Placed("blue", "square", 8, 16, 4)]).transpose(1, 2, 0)).save(tmp_path / "before.png")
    record = {"object": "blue square", "direction": "right", "references": [str(tmp_path / "before.png")]}
    prompts = Prompts(("",), (record,))
    reward = build(Translation, {"finder": "rewards.ShapesFinder", "missing": -1})
    scores = reward(shown(scene(Placed("blue", "square", 22, 16, 4))[None], prompts), prompts)
    assert scores.total.item() == pytest.approx((14 - 1.6) / 14)


@pytest.mark.parametrize(
    ("reward", "record", "message"),
    [
        (Translation, {"direction": "left"}, 'prompt 0 .* must name "object" in its record'),
        (Translation, {"object": "red circle"}, 'must name "direction" in its record, a text; got None'),
        (Translation, {"object": "red circle", "direction": "away"}, "prompt 0 .*: a direction is left"),
        (Resize, {"object": "red circle"}, 'must name "factor" in its record, a positive number'),
        (Resize, {"object": "red circle", "factor": 0}, "got 0"),
        (Resize, {"object": "red circle", "factor": True}, "got True"),
        (Resize, {"object": "red circle", "factor": math.inf}, "got inf"),
        (Position, {"object": "circle"}, 'a colour and a shape such as "red circle"'),
    ],
)
def test_records_that_say_too_little(reward: type, record: dict[str, object], message: str) -> None:
    media = Media(torch.rand(1, 3, 32, 32), references=(torch.rand(1, 3, 32, 32),))
    with pytest.raises(ValueError, match=message):
        reward(FINDER)(media, Prompts(("move",), (record,)))


def test_media_that_do_not_fit() -> None:
    prompts = Prompts(("",), ({"object": "red circle"},))
    with pytest.raises(ValueError, match="there are none: name their files"):
        Position(FINDER)(Media(torch.rand(1, 3, 32, 32)), prompts)
    with pytest.raises(ValueError, match="needs one reference, the picture before the edit, and got 2"):
        Position(FINDER)(Media(torch.rand(1, 3, 32, 32), references=(torch.rand(2, 3, 32, 32),)), prompts)
    with pytest.raises(ValueError, match="reads pictures of 32 x 32"):
        Position(FINDER)(Media(torch.rand(1, 3, 16, 16), references=(torch.rand(1, 3, 32, 32),)), prompts)
    with pytest.raises(ValueError, match="missing must be a finite number"):
        Position(FINDER, missing=math.nan)
