"""HPSv3 is what its authors' code made of the same weights in transformers 4.45.2, from picture and prompt on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from qwen2vl_tiny import (
    GOLDEN,
    HPSV3_ROWS,
    HPSV3_TEMPLATE,
    TEXTS,
    make_hpsv3,
    prompts,
    published,
    save_base,
    save_hpsv3,
    shapes,
    some_pictures,
    weights,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2VLConfig

from flowalign.records import Media
from rewards.hpsv3 import FILE, MARK, PIXELS, HPSv3, head
from rewards.pixels import CLIP_MEAN, CLIP_STD, normalise
from rewards.qwen2vl import PICTURE, Qwen2VLScorer, load_base, smart_resize


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_base(tmp_path_factory.mktemp("base"))
    (folder / "template.txt").write_text(HPSV3_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hpsv3(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reward(base: Path, model: Path) -> HPSv3:
    return make_hpsv3(base, model)


def test_scores_are_those_of_the_authors_way(reward: HPSv3) -> None:
    scores = reward(some_pictures(), prompts(*TEXTS[:2]))
    recorded = GOLDEN["picture/outputs"]
    torch.testing.assert_close(scores.total, recorded[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.parts["sigma"], recorded[:, 1].exp(), rtol=1e-5, atol=0)
    assert torch.equal(scores.parts["hpsv3"], scores.total)
    assert (recorded[0] - recorded[1]).abs().min() > 0.1, "so that the comparison could fail"
    assert scores.valid.all()


def test_gradient_against_finite_differences(base: Path, tmp_path: Path) -> None:
    """On normalised pictures, behind the rounding to 8 bit, with a head whose first ReLUs are all open: no kinks."""
    state = weights(HPSV3_ROWS, head(32))
    save_file(state | {"rm_head.0.bias": state["rm_head.0.bias"] + 6}, tmp_path / FILE)
    reward = make_hpsv3(base, tmp_path)
    frames = normalise(some_pictures(1).pixels, CLIP_MEAN, CLIP_STD)[None].requires_grad_()

    def value(x: Tensor) -> Tensor:
        return reward.scorer(x, TEXTS[:1])[:, 0, 0].double().sum()

    (slope,) = torch.autograd.grad(value(frames), frames)
    noise = torch.randn(8, *frames.shape[1:], generator=torch.Generator().manual_seed(4))
    for direction in noise + 40 * slope / slope.norm():
        step = 5e-2 * direction[None] / direction.norm()
        with torch.no_grad():
            wide, near = (value(frames + k * step) - value(frames - k * step) for k in (2, 1))
        measured = (8 * near - wide) / 12  # fourth order
        assert measured.item() == pytest.approx((slope * step).sum().item(), rel=1e-3)


def test_the_gradient_leads_to_higher_scores_through_the_resize(base: Path, model: Path) -> None:
    reward = HPSv3(str(model), str(base), str(base / "template.txt"), dtype="float32", min_pixels=784, max_pixels=3136)
    pixels = (0.2 + 0.6 * torch.rand(2, 3, 100, 70)).requires_grad_()
    asked = prompts(*TEXTS[:2])
    before = reward(Media(pixels), asked, grad=True).total
    (slope,) = torch.autograd.grad(before.sum(), pixels)
    assert reward.prepare(pixels[:, None]).shape == (2, 1, 3, 56, 28)
    step = 0.02 * slope / slope.abs().amax((1, 2, 3), keepdim=True)
    up, down = (reward(Media(pixels.detach() + sign * step), asked).total for sign in (1, -1))
    assert (up > before).all()
    assert (down < before).all()


def test_sizes() -> None:
    """Small pictures grow, large ones shrink: 448 x 448 for squares."""
    expected = {(512, 512): (448, 448), (256, 256): (448, 448), (1024, 768): (504, 364), (200, 300): (392, 560)}
    for (height, width), size in expected.items():
        assert smart_resize(height, width, PIXELS, PIXELS) == size


def test_loading_at_full_size(base: Path) -> None:
    config = published(3584, 18944, 28, 4, 152064)
    read = Qwen2VLConfig(**config)
    read.text_config.vocab_size = 151658
    with torch.device("meta"):
        scorer = Qwen2VLScorer(read, head(3584), load_base(str(base), "x")[1], (MARK,), "", PICTURE)
        state = {name: torch.empty(shape) for name, shape in shapes(config, 151658).items()}
        sizes = {"0.weight": (1024, 3584), "0.bias": (1024,), "3.weight": (16, 1024), "3.bias": (16,),
                 "5.weight": (2, 16), "5.bias": (2,)}  # fmt: skip
        state |= {f"rm_head.{name}": torch.empty(shape) for name, shape in sizes.items()}
    scorer.load(state | {"lm_head.weight": torch.empty(1)}, "it", torch.bfloat16)
    assert {parameter.dtype for parameter in scorer.rm_head.parameters()} == {torch.float32}
    assert scorer.backbone.visual.blocks[31].mlp.fc1.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"it does not fit: missing rm_head\.5\.bias"):
        scorer.load({name: value for name, value in state.items() if name != "rm_head.5.bias"}, "it", torch.bfloat16)


def test_the_names_of_newer_transformers(base: Path, reward: HPSv3, tmp_path: Path) -> None:
    state = {}
    for name, value in weights(HPSV3_ROWS, head(32)).items():
        new = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
        state[f"model.{name}" if name.startswith("visual.") else new] = value
    save_file(state, tmp_path / FILE)
    scores = make_hpsv3(base, tmp_path)(some_pictures(), prompts(*TEXTS[:2]))
    assert torch.equal(scores.total, reward(some_pictures(), prompts(*TEXTS[:2])).total)


def test_videos_are_refused(reward: HPSv3) -> None:
    with pytest.raises(ValueError, match="HPSv3 scores pictures"):
        reward(Media(torch.rand(1, 2, 3, 28, 28), fps=2.0), prompts("a"))


def test_what_cannot_be_had(base: Path, model: Path, tmp_path: Path) -> None:
    template = str(base / "template.txt")
    for name, message in (("./none", "neither a file ./none"), ("no-one/no-such-model", "cannot be had from the hub")):
        with pytest.raises(ValueError, match=message) as caught:
            HPSv3(name, str(base), template)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=f"a folder of {FILE}"):
        HPSv3(str(tmp_path), str(base), template)
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        HPSv3(str(tmp_path), str(base), template)
    (tmp_path / "template.txt").write_text("{prompt}")
    with pytest.raises(ValueError, match="must hold each of"):
        HPSv3(str(model), str(base), str(tmp_path / "template.txt"))


def test_wrong_settings(base: Path, model: Path) -> None:
    for batch_size, least in ((0, 784), (1, 10**9)):
        with pytest.raises(ValueError, match="batch_size must be at least 1"):
            HPSv3(str(model), str(base), batch_size=batch_size, min_pixels=least)
