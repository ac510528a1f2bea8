"""PickScore: the scaled cosine, as transformers' own CLIPModel computes it, with tokenizer and weights apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer
from tiny_towers import tiny_clip
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flowalign.pictures import to_images
from flowalign.records import Media, Prompts
from rewards import PickScore, WeightedSum

TEXTS = ("a red circle", "two blue squares", "a red circle", "nothing")


def prompts(*texts: str) -> Prompts:
    return Prompts(texts, tuple({} for _ in texts))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny CLIPModel with random weights and no tokenizer, and a folder of its processor."""
    model, tokenizer = tiny_clip(side=16)
    model.logit_scale.data.fill_(3.5)
    weights, processor = tmp_path_factory.mktemp("weights"), tmp_path_factory.mktemp("processor")
    model.save_pretrained(weights)
    tokenizer.save_pretrained(processor)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16).save_pretrained(processor)
    return weights, processor


@pytest.fixture(scope="module")
def reward(folders: tuple[Path, Path]) -> PickScore:
    return PickScore(str(folders[0]), str(folders[1]), batch_size=3)


def test_it_is_the_logit_of_the_clip_model(reward: PickScore, folders: tuple[Path, Path]) -> None:
    pixels = torch.rand(4, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    scores = reward.score(Media(pixels), prompts(*TEXTS))
    model = CLIPModel.from_pretrained(folders[0]).eval()
    prepared = CLIPImageProcessorPil.from_pretrained(folders[1])(to_images(pixels), return_tensors="pt")
    tokens = byte_tokenizer()(list(TEXTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens, pixel_values=prepared["pixel_values"]).logits_per_image
    assert torch.allclose(scores.total, logits.diagonal(), atol=2e-4)
    assert logits.diagonal().std() > 0.1  # so that the comparison could fail
    assert model.logit_scale.exp().item() == pytest.approx(33.1, abs=0.1)
    assert list(scores.parts) == ["pickscore"]
    assert scores.valid.all()


def test_the_gradient_leads_to_higher_scores(reward: PickScore) -> None:
    pixels = (0.3 + 0.4 * torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))).requires_grad_()
    before = reward.score(Media(pixels), prompts("a red circle")).total
    (slope,) = torch.autograd.grad(before.sum(), pixels)
    with torch.no_grad():
        after = reward.score(Media(pixels + 0.05 * slope / slope.abs().max()), prompts("a red circle")).total
    assert after > before + 0.01


def test_flow_grpos_scale_leaves_the_part_as_it_is(reward: PickScore) -> None:
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    plain = reward.score(Media(pixels), prompts(*TEXTS[:2]))
    scaled = WeightedSum([reward], [1 / 26]).score(Media(pixels), prompts(*TEXTS[:2]))
    assert torch.allclose(scaled.total * 26, plain.total)
    assert torch.equal(scaled.parts["pickscore"], plain.total)


def test_a_picture_that_is_not_finite_has_no_score(reward: PickScore) -> None:
    pixels = torch.full((2, 3, 16, 16), 0.5)
    pixels[1, 0, 3, 3] = torch.nan
    assert reward.score(Media(pixels), prompts(*TEXTS[:2])).valid.tolist() == [True, False]


def test_a_folder_without_tokenizer_is_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        PickScore(str(folders[0]), str(folders[0]))
