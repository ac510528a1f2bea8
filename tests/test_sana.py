"""Sana: its instruction stands before prompts alone, its sigmas, and networks that scale time or say a variance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from flowalign.models import Sana
from flowalign.models.sana import INSTRUCTION
from flowalign.rollout import Policy, rollout
from flowalign.schedules import Path
from flowalign.transitions import ODE
from rewards import Colourfulness
from tests.families import seeded
from tests.jobs import job, rows
from tests.tiny_sana import tiny_sana
from trainers import Evaluation

PROMPTS = ["a red circle", "two blue squares"]
LENGTH = 24


def make(scheduler: Any = None, **changes: Any) -> Any:
    return seeded(lambda: tiny_sana(scheduler, **changes))()


def small(pipe: Any = None, **settings: Any) -> Sana:
    return Sana(pipe or make(), **{"max_sequence_length": LENGTH} | settings)


def noise(model: Sana, count: int = 2) -> torch.Tensor:
    return torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(0))


def sampled(model: Sana, negatives: list[str | None] | None = None) -> torch.Tensor:
    told = model.encode(PROMPTS, negatives)
    return rollout(model, told, noise(model), model.sigmas(3), Path((ODE(),) * 3), Policy(4.5)).latents


def by_pipeline(model: Sana, pipe: Any, **more: Any) -> torch.Tensor:
    made = pipe(
        [*PROMPTS], latents=noise(model), num_inference_steps=3, guidance_scale=4.5, height=32, width=32,
        max_sequence_length=LENGTH, use_resolution_binning=False, output_type="latent", **more,
    )  # fmt: skip
    return made[0]  # type: ignore[no-any-return]


def test_negative_prompts_are_encoded_without_the_instruction() -> None:
    """And texts that are both are kept apart: as the pipeline encodes each, and as it samples with them."""
    model = small(negative_prompt="blurry")
    told = model.encode(PROMPTS, [None, PROMPTS[0]])
    assert told.negative_prompt_embeds is not None
    assert (told.prompt_embeds[0] - told.negative_prompt_embeds[1]).abs().max() > 1e-3
    settings = {"max_sequence_length": LENGTH, "complex_human_instruction": INSTRUCTION}
    embeds, _, away, _ = make().encode_prompt(PROMPTS, True, ["blurry", PROMPTS[0]], **settings)
    torch.testing.assert_close(told.prompt_embeds, embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(told.negative_prompt_embeds, away, atol=1e-5, rtol=0)
    for ours, theirs in ((None, "blurry"), (["dark", "ugly"], ["dark", "ugly"])):
        expected = by_pipeline(model, make(), negative_prompt=theirs)
        torch.testing.assert_close(sampled(model, ours), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def test_a_prompt_and_a_negative_prompt_outlive_their_encoder() -> None:
    model = small()
    before = model.encode(PROMPTS, ["dark", None])
    model.free_encoders()
    after = model.encode(PROMPTS[::-1], [None, "dark"])
    assert torch.equal(after.prompt_embeds, before.prompt_embeds.flip(0))
    assert after.negative_prompt_embeds is not None
    assert before.negative_prompt_embeds is not None
    assert torch.equal(after.negative_prompt_embeds, before.negative_prompt_embeds.flip(0))


def test_a_second_start_finds_both_kinds_in_the_store(tmp_path: Any) -> None:
    told, calls = [], list[int]()
    for turn in range(2):
        model = small(embeddings=str(tmp_path))
        model.pipeline.text_encoder.register_forward_hook(lambda *_, turn=turn: calls.append(turn))
        told.append(model.encode(PROMPTS, [PROMPTS[0], None]))
    assert {*calls} == {0}
    assert torch.equal(told[0].prompt_embeds, told[1].prompt_embeds)
    first, second = (one.negative_prompt_embeds for one in told)
    assert first is not None
    assert torch.equal(first, second)


@pytest.mark.parametrize("changes", [{"timestep_scale": 0.001}, {"out_channels": 8}], ids=str)
def test_scaled_times_and_variances_are_the_pipeline_s(changes: dict[str, Any]) -> None:
    model = small(make(**changes))
    expected = by_pipeline(model, make(**changes))
    torch.testing.assert_close(sampled(model), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def dpm_solver(**changes: Any) -> DPMSolverMultistepScheduler:
    """As Sana ships it."""
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return DPMSolverMultistepScheduler(**settings | changes)


def test_the_grid_is_that_of_the_shipped_scheduler() -> None:
    theirs = dpm_solver()
    theirs.set_timesteps(20)
    ours = small(make(dpm_solver())).sigmas(20)
    unshifted = [s / (3 - 2 * s) for s in (np.array(ours), theirs.sigmas.numpy())]
    assert np.abs(unshifted[0] - unshifted[1]).max() < 1.1e-3
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(20)
    assert small().sigmas(20) == [float(sigma) for sigma in euler.sigmas]
    assert "DPMSolverMultistepScheduler" in str(small(make(dpm_solver())).scheduler_note())


def test_what_is_no_sana_of_ours_is_refused() -> None:
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler does not say use_flow_sigmas"):
        small(make(dpm_solver(use_flow_sigmas=False)))
    with pytest.raises(ValueError, match="the transformer wants to be told the guidance scale"):
        small(make(guidance_embeds=True))
    with pytest.raises(ValueError, match="height must be a multiple of 32, got 48"):
        small(height=48)
    model = small()
    with pytest.raises(ValueError, match="lacks the prompts' masks"):
        model.network(noise(model), 1.0, replace(model.encode(PROMPTS), prompt_mask=None))


def test_two_epochs_of_training_change_the_policy(tmp_path: Any) -> None:
    """From pixels, through a reward of the package; the saved policy draws what the trained one does."""
    model = small()
    plain = sampled(model)
    job(tmp_path, model=model, reward=Colourfulness(), epochs=2, evaluation=Evaluation()).train(report=False)
    made = rows(tmp_path)
    assert [row["step"] for row in made] == [1, 2]
    assert all(row["grad_norm"] > 0 and row["skipped"] == 0 for row in made)
    trained = sampled(model)
    assert (trained - plain).abs().max() > 1e-3
    pipe = make()
    model.save(tmp_path / "lora")
    pipe.load_lora_weights(tmp_path / "lora")
    expected = by_pipeline(model, pipe)
    torch.testing.assert_close(trained, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
