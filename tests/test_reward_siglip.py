"""SigLIPScore is transformers' own SiglipModel on PIL's own pictures, and has a gradient."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_towers import save_siglip
from torch import Tensor
from transformers import PreTrainedTokenizerFast, SiglipModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from flowalign.pictures import to_images
from flowalign.records import Media, Prompts
from rewards.pixels import BICUBIC, BILINEAR, Kernel, normalise
from rewards.siglip import HALF, SigLIPScore, Squash

TEXTS = ("a red circle", "Two BLUE squares", "", "red " * 30, "a cross", "two circle", "blue")


def prompts(*texts: str) -> Prompts:
    return Prompts(texts, ({},) * len(texts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_siglip(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="module")
def reward(folder: Path) -> SigLIPScore:
    return SigLIPScore(str(folder), batch_size=3)


def test_cosine_and_logit_are_transformers(reward: SigLIPScore, folder: Path) -> None:
    pixels = torch.rand(7, 3, 24, 40)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    lower = [text.lower() for text in TEXTS]
    tokens = tokenizer(lower, padding="max_length", truncation=True, max_length=9, return_tensors="pt")
    prepared = SiglipImageProcessorPil.from_pretrained(folder)(to_images(pixels), return_tensors="pt")
    with torch.no_grad():
        logits = SiglipModel.from_pretrained(folder).eval()(input_ids=tokens.input_ids, **prepared).logits_per_image
    scores = reward(Media(pixels), prompts(*TEXTS))
    torch.testing.assert_close(scores.parts["siglip_logit"], logits.diagonal(), rtol=0, atol=1e-4)
    assert scores.total.std() > 0.01
    torch.testing.assert_close(scores.total, (logits.diagonal() + 3) / torch.tensor(2.0).exp(), rtol=0, atol=1e-5)
    assert torch.equal(scores.parts["siglip_score"], scores.total)


def test_texts_are_padded_to_the_models_length(reward: SigLIPScore) -> None:
    """As in training: the last place is read, which without padding would be the last word's."""
    ids = reward.tokenizer(["a red circle"], return_tensors="pt").input_ids
    with torch.no_grad():
        bare = F.normalize(reward.model.get_text_features(input_ids=ids).pooler_output, dim=1)
    ours = reward.embed_texts(["A red circle"], torch.device("cpu"))
    assert ours.shape == (1, 24)
    assert (ours * bare).sum() < 0.99
    lower = reward.embed_texts(["a red circle"], torch.device("cpu"))
    torch.testing.assert_close(ours, lower, rtol=0, atol=1e-6)


def test_a_score_depends_on_nothing_but_its_own(reward: SigLIPScore) -> None:
    pixels, order = torch.rand(7, 3, 24, 24), [3, 0, 6, 2, 5, 1, 4]
    together = reward(Media(pixels), prompts(*TEXTS)).total
    for chunk in (1, 3):
        alone = reward(Media(pixels), prompts(*TEXTS), chunk=chunk).total
        torch.testing.assert_close(alone, together, rtol=0, atol=1e-6)
    shuffled = reward(Media(pixels[order]), prompts(*(TEXTS[i] for i in order))).total
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-6)


def smooth(reward: SigLIPScore, pixels: Tensor, text: Tensor) -> Tensor:
    """The score without rounding to 8 bit, in the model's precision."""
    features = reward.model.get_image_features(pixel_values=normalise(pixels, HALF, HALF)).pooler_output
    return (F.normalize(features, dim=1) * text).sum()


def test_gradient_against_finite_differences(folder: Path) -> None:
    reward = SigLIPScore(str(folder))
    levels = torch.randint(0, 256, (1, 3, 16, 16)).div(255).requires_grad_()
    reward(Media(levels), prompts("a red circle"), grad=True).total.sum().backward()
    text = reward.embed_texts(["a red circle"], torch.device("cpu")).double()
    reward.model.double()
    pixels = levels.detach().double().requires_grad_()
    smooth(reward, pixels, text).backward()
    assert levels.grad is not None
    assert pixels.grad is not None
    torch.testing.assert_close(levels.grad.double(), pixels.grad, rtol=1e-3, atol=1e-6)
    assert levels.grad.norm() > 1e-3
    with torch.no_grad():
        for _ in range(8):
            step = 1e-5 * torch.randn_like(pixels)
            difference = (smooth(reward, pixels + step, text) - smooth(reward, pixels - step, text)).item() / 2
            assert difference == pytest.approx((pixels.grad * step).sum().item(), rel=1e-3)


def test_prefix(folder: Path) -> None:
    media = Media(torch.rand(2, 3, 16, 16))
    bare = SigLIPScore(str(folder))(media, prompts("a red", "a blue")).total
    assert torch.equal(SigLIPScore(str(folder), prefix="a ")(media, prompts("red", "blue")).total, bare)


def test_a_broken_picture_has_no_score(reward: SigLIPScore) -> None:
    pixels = torch.rand(3, 3, 20, 16)
    pixels[1, 0, 3, 3] = torch.nan
    assert reward(Media(pixels), prompts("a", "b", "c")).valid.tolist() == [True, False, True]


def copied(folder: Path, to: Path, leave_out: str = "nothing") -> Path:
    for file in folder.iterdir():
        if leave_out not in file.name:
            (to / file.name).write_bytes(file.read_bytes())
    return to


def test_without_a_preprocessor_config(folder: Path, tmp_path: Path) -> None:
    assert SigLIPScore(str(copied(folder, tmp_path, "processor"))).prepare == Squash(16, 16, HALF, HALF)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"shortest_edge": 16}}, "does not resize to a fixed height and width"),
        ({"do_center_crop": True}, "does not resize to a fixed height and width"),
        ({"resample": 1}, "resizes with PIL's filter 1; known are bilinear"),
    ],
)
def test_another_way_to_prepare_pictures(folder: Path, tmp_path: Path, change: dict, message: str) -> None:
    file = copied(folder, tmp_path) / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        SigLIPScore(str(tmp_path))


@pytest.mark.parametrize(("resample", "kernel"), [(2, BILINEAR), (3, BICUBIC)])
def test_the_resize_is_that_of_the_config(folder: Path, tmp_path: Path, resample: int, kernel: Kernel) -> None:
    """SigLIP 2's files ask for 2, bilinear; as transformers' own processor does it with PIL."""
    processor = SiglipImageProcessorPil(size={"height": 16, "width": 16}, resample=resample)
    processor.save_pretrained(copied(folder, tmp_path))
    reward, pixels = SigLIPScore(str(tmp_path)), torch.rand(3, 3, 24, 40)
    assert reward.prepare == Squash(16, 16, HALF, HALF, kernel)
    expected = processor(to_images(pixels), return_tensors="pt").pixel_values
    torch.testing.assert_close(reward.prepare(pixels), expected, rtol=0, atol=1e-6)


def test_what_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the Siglip model 'no-one/nothing' can be had neither") as told:
        SigLIPScore("no-one/nothing")
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match="tokenizer") as told:
        SigLIPScore(str(copied(folder, tmp_path, "tokenizer")))
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        SigLIPScore(str(folder), batch_size=0)
