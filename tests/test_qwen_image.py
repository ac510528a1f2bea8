"""Qwen-Image: prompts of different lengths, guidance that keeps lengths, its sigmas and its VAE."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from flowalign.models import QwenImage
from flowalign.rollout import Policy, rollout
from flowalign.schedules import Path
from flowalign.transitions import ODE
from tests.families import seeded
from tests.tiny_qwen_image import tiny_qwen_image

MAKE = seeded(tiny_qwen_image)
LONG, SHORT = "a big red circle over two blue squares", "a dot"


def noise(model: QwenImage, rows: int) -> torch.Tensor:
    return torch.randn(rows, *model.latent_shape, generator=torch.Generator().manual_seed(0))


def sampled(model: QwenImage, prompts: list[str], start: torch.Tensor) -> torch.Tensor:
    return rollout(model, model.encode(prompts), start, model.sigmas(3), Path((ODE(),) * 3), Policy(4.0)).latents


def test_prompts_of_different_lengths_in_one_batch_are_as_alone() -> None:
    model = QwenImage(MAKE(), max_sequence_length=48)
    start = noise(model, 2)
    both = sampled(model, [LONG, SHORT], start)
    for row, prompt in enumerate((LONG, SHORT)):
        alone = sampled(model, [prompt], start[row : row + 1])
        torch.testing.assert_close(both[row : row + 1], alone, atol=2e-6, rtol=0)
        theirs = MAKE()(
            [prompt], negative_prompt=[""], latents=model.pack(start[row : row + 1]), num_inference_steps=3,
            height=32, width=32, true_cfg_scale=4.0, output_type="latent",
        ).images  # fmt: skip
        torch.testing.assert_close(model.pack(both[row : row + 1]), theirs, atol=5e-6, rtol=0)


def test_padding_says_nothing_however_much_there_is() -> None:
    model, wide = QwenImage(MAKE(), max_sequence_length=48), QwenImage(MAKE(), max_sequence_length=64)
    start, condition = noise(model, 2), model.encode([LONG, SHORT])
    assert condition.prompt_mask is not None
    assert condition.prompt_mask.sum(1).diff().abs() > 20
    assert condition.prompt_embeds[~condition.prompt_mask].abs().max() == 0
    filled = torch.where(condition.prompt_mask[..., None], condition.prompt_embeds, 7.0)
    with torch.no_grad():
        expected = model.network(start, 0.5, condition)
        other = model.network(start, 0.5, replace(condition, prompt_embeds=filled))
        torch.testing.assert_close(other, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(wide.network(start, 0.5, wide.encode([LONG, SHORT])), expected, atol=2e-6, rtol=0)
        everything = replace(condition, prompt_mask=torch.ones_like(condition.prompt_mask))
        assert (model.network(start, 0.5, everything) - expected).abs().max() > 1e-4


def test_a_long_prompt_is_cut_where_the_pipeline_cuts_it() -> None:
    model, pipe = QwenImage(MAKE(), max_sequence_length=8), MAKE()
    with torch.no_grad():
        theirs, _ = pipe.encode_prompt([LONG], max_sequence_length=8)
    condition = model.encode([LONG])
    torch.testing.assert_close(condition.prompt_embeds, theirs, atol=1e-5, rtol=0)
    assert condition.prompt_mask is not None
    assert condition.prompt_mask.all()


def test_guidance_turns_each_token_and_keeps_its_length() -> None:
    """By hand on one token of 2 x 2: v_c = (3, 4), v_u = (3, 0); at w = 2 the sum (3, 8) is 73^.5 long, not 5."""
    model = QwenImage(MAKE())
    conditional, unconditional = torch.zeros(1, *model.latent_shape), torch.zeros(1, *model.latent_shape)
    conditional[:] = unconditional[:] = 1.0
    conditional[0, :, 4:6, 2:4] = unconditional[0, :, 4:6, 2:4] = 0.0
    conditional[0, 0, 4, 2], conditional[0, 3, 5, 3] = 3.0, 4.0
    unconditional[0, 0, 4, 2] = 3.0
    guided = model.combine(conditional, unconditional, 2.0)
    assert float(guided[0, 0, 4, 2]) == pytest.approx(3 * 5 / math.sqrt(73))
    assert float(guided[0, 3, 5, 3]) == pytest.approx(8 * 5 / math.sqrt(73))
    guided[0, :, 4:6, 2:4] = 1.0
    torch.testing.assert_close(guided, torch.ones_like(guided))


def test_sigmas_are_shifted_by_resolution_and_end_where_the_scheduler_says() -> None:
    """The tiny scheduler's line has .5 at 16 tokens and .9 at 128; then 1 - sigma is stretched to end at .98."""
    for height, width, mu in ((32, 32, 0.5), (64, 128, 0.9)):
        model = QwenImage(MAKE(), height=height, width=width)
        assert model.resolution_shift() == pytest.approx(mu)
        bent = [1 - math.exp(mu) / (math.exp(mu) + 1 / s - 1) for s in (1.0, 0.75, 0.5, 0.25)]
        expected = [1 - one * 0.98 / bent[-1] for one in bent]
        assert model.sigmas(4) == pytest.approx([*expected, 0.0], abs=1e-5)


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="says guidance_embeds, but diffusers' class has no layer"):
        QwenImage(tiny_qwen_image(guidance_embeds=True))
    with pytest.raises(ValueError, match="max_sequence_length is 1025, but Qwen-Image reads at most 1024"):
        QwenImage(MAKE(), max_sequence_length=1025)
    model = QwenImage(MAKE(), max_sequence_length=8)
    with pytest.raises(ValueError, match="lacks the prompts' masks"):
        model.network(noise(model, 1), 1.0, replace(model.encode(["a"]), prompt_mask=None))
