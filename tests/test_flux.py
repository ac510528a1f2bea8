"""FLUX: sigmas by resolution, guidance that the network is told, prompts' lengths of dev and schnell."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flowalign.models import Flux
from flowalign.schedules import linear
from tests.families import seeded
from tests.tiny_flux import tiny_flux

DEV, SCHNELL = seeded(tiny_flux), seeded(lambda: tiny_flux(guidance=False))
LINE = ((64, 64, 256, 0.5), (256, 256, 4096, 1.15), (128, 32, 256, 0.5), (8, 16, 8, 0.45802))
DYNAMIC = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)


def published(height: int, width: int) -> Flux:
    """With FLUX.1 dev's own line: .5 at 256 tokens, 1.15 at 4096."""
    pipe = DEV()
    pipe.scheduler = DYNAMIC
    return Flux(pipe, height=height, width=width, max_sequence_length=8)


def test_sigmas_are_shifted_by_the_number_of_tokens() -> None:
    """By hand, with 4 pixels a side to a token here, where FLUX's VAE makes it 16."""
    for height, width, tokens, mu in LINE:
        model = published(height, width)
        _, rows, columns = model.latent_shape
        assert rows * columns == 4 * tokens
        assert model.resolution_shift() == pytest.approx(mu, abs=1e-5)
        expected = [math.exp(mu) / (math.exp(mu) + 1 / s - 1) for s in (1.0, 0.75, 0.5, 0.25)]
        assert model.sigmas(4) == pytest.approx([*expected, 0.0], abs=1e-5)
    assert published(128, 128).sigmas(4)[1] < published(256, 256).sigmas(4)[1]


def test_schnell_s_sigmas_are_even_and_a_grid_of_one_s_own_is_shifted() -> None:
    assert Flux(SCHNELL()).sigmas(4) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    model = published(64, 64)
    pipe = DEV()
    pipe.scheduler = DYNAMIC
    told = Flux(pipe, height=64, width=64, grid=lambda steps: [1.0, *linear(steps)[2:], 0.0])
    assert told.sigmas(4)[1] == pytest.approx(model.sigmas(4)[2])


def test_guidance_is_told_and_takes_one_call() -> None:
    model = Flux(DEV(), max_sequence_length=8)
    condition = model.encode(["a red circle"])
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        at = {scale: model.velocity(latents, 0.5, condition, scale) for scale in (1.0, 3.5)}
        split = model.velocity_split(latents, 0.5, condition, 3.5)
    assert model.meter.rows.forward == 3
    assert torch.equal(split, at[3.5])
    assert (at[1.0] - at[3.5]).abs().max() > 1e-4
    blind = Flux(SCHNELL(), max_sequence_length=8)
    condition = blind.encode(["a red circle"])
    with torch.no_grad():
        assert torch.equal(blind.velocity(latents, 0.5, condition, 3.5), blind.velocity(latents, 0.5, condition, 1.0))


def test_prompts_have_the_length_of_the_model_as_published() -> None:
    assert (Flux(DEV()).max_sequence_length, Flux(SCHNELL()).max_sequence_length) == (512, 256)
    assert Flux(SCHNELL(), max_sequence_length=40).encode(["a"]).prompt_embeds.shape[1:] == (40, 16)


def test_tokens_are_two_by_two_latents_and_back() -> None:
    model = Flux(DEV(), height=16, width=24)
    latents = torch.arange(2 * 4 * 8 * 12.0).reshape(2, 4, 8, 12)
    tokens = model.pack(latents)
    assert tokens.shape == (2, 4 * 6, 16)
    assert torch.equal(tokens[1, 6 * 2 + 3].reshape(4, 2, 2), latents[1, :, 4:6, 6:8])
    assert torch.equal(model.unpack(tokens, latents), latents)


def test_what_another_family_encoded_is_refused() -> None:
    model = Flux(DEV(), max_sequence_length=8)
    condition = replace(model.encode(["a"]), pooled_prompt_embeds=None)
    with pytest.raises(ValueError, match="not encoded by a FLUX model"):
        model.network(torch.randn(1, *model.latent_shape), 1.0, condition)
    with pytest.raises(ValueError, match="height must be a multiple of 4, got 18"):
        Flux(DEV(), height=18)
