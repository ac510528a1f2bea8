"""HPSv3 and VideoReward alike: the authors' tokens and gradients, batches, templates, memory and precision."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from qwen2vl_tiny import (
    GOLDEN,
    TEXTS,
    TINY,
    make_hpsv3,
    make_video_reward,
    prompts,
    save_base,
    save_hpsv3,
    save_video_reward,
    some_pictures,
    some_videos,
)
from tiny_towers import check_bfloat16
from torch import Tensor

from flowalign.records import Media
from rewards.pixels import CLIP_MEAN, CLIP_STD, normalise
from rewards.qwen2vl import patchify
from rewards.qwen2vl_reward import Qwen2VLReward
from rewards.video_reward import three


@dataclass(frozen=True)
class Kind:
    """One of the two, with what was recorded of it; grid: of the recorded media's patches."""

    save: Callable[..., Path]
    make: Callable[..., Qwen2VLReward]
    media: Callable[..., Media]
    recorded: str
    outputs: str
    grid: tuple[int, int, int]
    placeholder: int  # transformers' token type of it


KINDS = {
    "hpsv3": Kind(save_hpsv3, make_hpsv3, some_pictures, "picture", "picture/outputs", (1, 4, 6), 1),
    "video": Kind(save_video_reward, make_video_reward, some_videos, "video", "video/three", (2, 2, 4), 2),
}
ASKED = prompts(*TEXTS[:2])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def model(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kind.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reward(kind: Kind, base: Path, model: Path) -> Qwen2VLReward:
    return kind.make(base, model)


def frames(media: Media) -> Tensor:
    return media.pixels if media.is_video else media.pixels[:, None]


def own(outputs: Tensor) -> Tensor:
    """Of each mark its own output, for three of them."""
    return outputs[:, 0] if outputs.shape[1] == 1 else three(outputs)


def slope(reward: Qwen2VLReward, media: Media) -> Tensor:
    pixels = media.pixels.clone().requires_grad_()
    return torch.autograd.grad(reward(Media(pixels, media.fps), ASKED, grad=True).total.sum(), pixels)[0]


def test_token_ids_are_the_old_processors(reward: Qwen2VLReward, kind: Kind) -> None:
    ids, mask = reward.scorer.tokenize(TEXTS[:2], math.prod(kind.grid) // 4)
    recorded = GOLDEN[f"{kind.recorded}/input_ids"].long()
    assert torch.equal(mask.bool(), recorded != 256)
    assert torch.equal(ids[mask.bool()], recorded[mask.bool()])


def test_gradient_is_that_of_the_authors_way(reward: Qwen2VLReward, kind: Kind) -> None:
    """Recorded to the patches; of a picture, to those of its first frame, since ours is doubled before."""
    recorded, again = GOLDEN[f"{kind.recorded}/gradient"], frames(kind.media())[0].clone().requires_grad_()
    patches = patchify(normalise(again, CLIP_MEAN, CLIP_STD))
    (patches if kind.recorded == "video" else patches.view(-1, 3, 2, 14, 14)[:, :, 0]).backward(recorded)
    assert again.grad is not None
    ours = slope(reward, kind.media())[0].view_as(again)
    assert (ours - again.grad).norm() <= 1e-4 * again.grad.norm()
    assert all(parameter.grad is None for parameter in reward.scorer.parameters())


def test_the_usual_call_of_qwen2vl_is_another_reward(reward: Qwen2VLReward, kind: Kind) -> None:
    """With the multimodal positions that transformers makes of token types, scores are off by more than a group's."""
    scorer, recorded = reward.scorer, GOLDEN[kind.outputs]
    patches = torch.cat([patchify(normalise(one, CLIP_MEAN, CLIP_STD)) for one in frames(kind.media())])
    grid = torch.tensor([kind.grid, kind.grid])
    ids, mask = scorer.tokenize(TEXTS[:2], math.prod(kind.grid) // 4)
    torch.testing.assert_close(own(scorer.outputs(patches, grid, ids, mask)), recorded, rtol=0, atol=1e-5)
    named = {"picture": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
    place = ids == TINY["image_token_id" if kind.recorded == "picture" else "video_token_id"]
    hidden = scorer.backbone(
        input_ids=ids, attention_mask=mask, mm_token_type_ids=kind.placeholder * place.int(),
        **dict(zip(named[kind.recorded], (patches, grid), strict=True)),
    ).last_hidden_state  # fmt: skip
    usual = scorer.rm_head(hidden[torch.isin(ids, torch.tensor(scorer.marks))]).view(2, len(scorer.marks), -1)
    assert (own(usual) - recorded).abs().max() > 0.05


def test_a_batch_is_its_singles(base: Path, model: Path, reward: Qwen2VLReward, kind: Kind) -> None:
    """Prompts of all lengths: padding on the right changes nothing."""
    given, asked = kind.media(7), prompts(*TEXTS)
    together = reward(given, asked).total
    assert together.std() > 0.1
    order = [3, 1, 6, 0, 5, 2, 4]
    mixed = kind.make(base, model, batch_size=3)(given.rows(order), asked.rows(order), chunk=5).total
    torch.testing.assert_close(mixed, together[order], rtol=0, atol=2e-5)
    alone = torch.cat([reward(given.rows([i]), asked.rows([i])).total for i in range(7)])
    torch.testing.assert_close(alone, together, rtol=0, atol=2e-5)


def test_recomputed_activations_give_the_same_gradient(
    base: Path, model: Path, reward: Qwen2VLReward, kind: Kind
) -> None:
    again = slope(kind.make(base, model, recompute=True), kind.media())
    torch.testing.assert_close(again, slope(reward, kind.media()), rtol=1e-5, atol=1e-7)
    assert not reward.scorer.rm_head.training, "there is dropout in the head"


def test_bfloat16_is_near(base: Path, model: Path, reward: Qwen2VLReward, kind: Kind) -> None:
    """Logits lie some units apart, not within one, and there are four layers: 10 %."""
    half = kind.make(base, model, dtype="bfloat16", offload=True)
    assert half.scorer.backbone.language_model.norm.weight.dtype == torch.bfloat16
    assert next(half.scorer.rm_head.parameters()).dtype == torch.float32
    check_bfloat16(reward, half, kind.media(), ASKED, 0.2)


def test_an_offloaded_one_is_the_same(base: Path, model: Path, reward: Qwen2VLReward, kind: Kind) -> None:
    offloaded = kind.make(base, model, offload=True)
    assert torch.equal(offloaded(kind.media(), ASKED).total, reward(kind.media(), ASKED).total)
    assert torch.equal(slope(offloaded, kind.media()), slope(reward, kind.media()))
    weight, device = offloaded.scorer.backbone.visual.patch_embed.proj.weight, torch.device("meta")
    assert offloaded.network.lend(device, lambda: offloaded.scorer.backbone.visual.patch_embed.proj.weight.is_meta)
    assert offloaded.scorer.backbone.visual.patch_embed.proj.weight is weight
    with pytest.raises(ValueError, match="recompute runs the model again in the backward pass, when offload has put"):
        kind.make(base, model, recompute=True, offload=True)


def test_prompts_cannot_bring_tokens(reward: Qwen2VLReward, kind: Kind) -> None:
    token = reward.scorer.tokenizer.convert_ids_to_tokens(reward.scorer.marks[0])
    media, clean = kind.media(), prompts("a cat here", "a cat here")
    dirty = prompts(f"a {token}cat<|video_pad|> here", f"a cat{token[:5]}<|im_end|>{token[5:]}<|image_pad|> here")
    assert torch.equal(reward(media, dirty).total, reward(media, clean).total)
    assert not torch.allclose(reward(media, prompts("a dog", "a dog")).total, reward(media, clean).total, atol=1e-3)


def test_without_a_template_scores_are_others(
    base: Path, model: Path, reward: Qwen2VLReward, kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "flowalign"):
        plain = kind.make(base, model, template=False)
    assert [record.message for record in caplog.records if "not those of the published" in record.message]
    assert len(caplog.records) == 1
    scores = plain(kind.media(), ASKED)
    assert scores.valid.all()
    assert not torch.allclose(scores.total, reward(kind.media(), ASKED).total, atol=0.01)


def test_what_is_broken_has_no_score(reward: Qwen2VLReward, kind: Kind) -> None:
    given, asked = kind.media(3), prompts(*TEXTS[:3])
    whole = reward(given, asked)
    given.pixels[1, ..., 0, 3, 3] = math.nan
    broken = reward(given, asked)
    assert broken.valid.tolist() == [True, False, True]
    assert torch.equal(broken.total[[0, 2]], whole.total[[0, 2]])
