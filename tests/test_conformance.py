"""Every family over a tiny random pipeline of its real classes: our loop must be the pipeline's own."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.models import SD3, PipelineModel, as_model
from flowalign.records import join_steps
from flowalign.rollout import Policy, replay, rollout
from flowalign.schedules import AllSteps, Path
from flowalign.transitions import ODE, FlowSDE
from tests.families import CASES, Case
from tests.tiny import randomise_policy

PROMPTS = ["a red circle", "two blue squares"]
VARIANTS = ("sd1.5 euler", "sd2.1 v, zero snr", "sdxl karras", "flux schnell", "pixart-alpha 1024, dpm-solver")
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# for what schedules have no part in: other schedules of a family are slow
family = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow if case.name in VARIANTS else ()) for case in CASES],
    ids=lambda case: case.name,
)


def adapted(case: Case, **more: Any) -> PipelineModel:
    return case.adapt(case.make(), **{**case.options, **case.sizes[0], **more})  # type: ignore[arg-type]


def noise(model: PipelineModel, rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(rows, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


def sampled(case: Case, model: PipelineModel, start: Tensor, guidance: float = 1.0) -> Tensor:
    path = Path((ODE(),) * case.steps)
    return rollout(model, model.encode(PROMPTS), start, model.sigmas(case.steps), path, Policy(guidance)).latents


def assert_same(case: Case, ours: Tensor, theirs: Tensor) -> None:
    """To the case's tolerance in units of the largest latent, to which rounding is relative: random eps models make
    latents of up to 70, trained ones of 4."""
    torch.testing.assert_close(ours, theirs, atol=case.tolerance * max(1.0, float(theirs.abs().max())), rtol=0)


def by_pipeline(case: Case, pipe: Any, model: PipelineModel, start: Tensor, guidance: float, output: str) -> Tensor:
    asked = {"num_inference_steps": case.steps, case.scale_name: case.scale(guidance), "output_type": output}
    made = pipe(
        [*PROMPTS], latents=case.packed(model, start.clone()), height=model.height, width=model.width,
        **asked, **case.options, **case.calls,
    )  # fmt: skip
    return made[0]


@each
def test_ode_rollout_is_the_pipeline(case: Case) -> None:
    plain = case.make()
    for size in case.sizes:
        model = adapted(case, **size)
        for guidance in (1.0, case.guided):
            start = noise(model)
            ours = sampled(case, model, start, guidance)
            theirs = by_pipeline(case, plain, model, start, guidance, "latent")
            assert (ours - start).abs().max() > 0.1
            assert_same(case, case.packed(model, ours), theirs)
            shown = by_pipeline(case, plain, model, start, guidance, "pt")
            assert_same(case, model.decode(ours), shown)


@each
def test_guidance_and_prompts_count(case: Case) -> None:
    model = adapted(case)
    start = noise(model)[:1].expand(2, *model.latent_shape)
    plain, guided = sampled(case, model, start), sampled(case, model, start, case.guided)
    assert (plain[0] - plain[1]).abs().max() > 1e-4
    if model.calls(case.guided, 0.9) == 2:  # else the network is told the scale
        assert torch.equal(sampled(case, model, start, 0.0), plain)  # up to 1 there is no guidance, as in diffusers
    assert ((plain - guided).abs().max() > 1e-4) == case.guides


@each
def test_first_ratio_is_exactly_one(case: Case) -> None:
    """Same calls, same shapes: the replay's log-probs are the rollout's, bit for bit, with gradient on."""
    model = adapted(case)
    randomise_policy(model)
    steps = max(case.steps, 2)
    path, sigmas, policy = AllSteps(FlowSDE(0.7)).resolve(steps, 0, 0), model.sigmas(steps), Policy(case.guided)
    condition = model.encode(PROMPTS)
    made = rollout(model, condition, noise(model), sigmas, path, policy, lambda i: noise(model, 2, i))
    assert made.steps
    for step in made.steps:
        again = replay(model, step, path.transitions[step.interval.index], condition, policy)
        assert again.log_probs.requires_grad
        assert (again.log_probs - step.log_probs).exp().sub(1).abs().max() == 0


@family
def test_ratios_do_not_depend_on_which_prompts_share_a_call(case: Case) -> None:
    """An update's micro-batches hold other rows together than the rollout's did, with prompts of other lengths."""
    model = adapted(case)
    texts = ["a dot", "a blue star", "a big blue star over two red ones", "one"]
    start, drawn = noise(model, 4), noise(model)
    sigmas, path, policy = model.sigmas(max(case.steps, 2))[:2], Path((FlowSDE(0.7),)), Policy(case.guided)
    halves = [
        rollout(model, model.encode(texts[at]), start[at], sigmas, path, policy, lambda step: drawn).steps[0]
        for at in (slice(2), slice(2, 4))
    ]
    step = join_steps(halves)
    for rows in ([0, 2], [3, 1]):
        asked = step.rows(torch.tensor(rows))
        again = replay(model, asked, path.transitions[0], model.encode([texts[i] for i in rows]), policy)
        assert torch.equal(again.log_probs, asked.log_probs)


@family
def test_gradients_flow_from_pixels_to_the_policy(case: Case) -> None:
    model = adapted(case)
    randomise_policy(model)
    condition, latents = model.encode(PROMPTS), noise(model)
    sigma = model.sigmas(max(case.steps, 2))[1]
    velocity = model.velocity(latents, sigma, condition, case.guided)
    pixels = model.decode(model.finish(latents - sigma * velocity, 0.0))
    assert pixels.shape[-2:] == (model.height, model.width)
    assert (pixels >= 0).all()
    assert (pixels <= 1).all()
    parameters = model.trainable()
    assert len({name.split(".lora_")[0] for name in parameters}) >= 4
    slopes = torch.autograd.grad(pixels.square().sum(), [*parameters.values()])
    without = {name for name, slope in zip(parameters, slopes, strict=True) if not slope.abs().max() > 0}
    assert {name.split(".lora_")[0] for name in without} == {*case.unused}


@family
def test_the_policy_loads_in_plain_diffusers(case: Case, tmp_path: FilePath) -> None:
    model = adapted(case)
    randomise_policy(model)
    start = noise(model)
    ours = sampled(case, model, start, case.guided)
    model.save(tmp_path)
    pipe: Any = case.make()
    case.load(pipe, tmp_path)
    theirs = by_pipeline(case, pipe, model, start, case.guided, "latent")
    assert_same(case, case.packed(model, ours), theirs)
    with model.reference():
        base = sampled(case, model, start, case.guided)
    expected = sampled(case, adapted(case), start, case.guided)
    assert torch.equal(base, expected)
    assert (base - ours).abs().max() > 1e-3


@family
def test_prompts_are_encoded_once_and_encoders_can_go(case: Case) -> None:
    model = adapted(case)
    calls: list[str] = []
    model.pipeline.text_encoder.register_forward_hook(lambda *_: calls.append("call"))
    first = model.encode([*PROMPTS, PROMPTS[0]])
    known = len(calls)
    assert known >= 1
    model.encode(PROMPTS)
    assert len(calls) == known
    alone = adapted(case).encode(PROMPTS[1:])
    assert torch.equal(alone.prompt_embeds[0], first.prompt_embeds[1])
    model.free_encoders()
    assert torch.equal(model.encode(PROMPTS[1:]).prompt_embeds[0], first.prompt_embeds[1])
    with pytest.raises(ValueError, match="'a green cross' was not encoded"):
        model.encode(["a green cross"])


@each
def test_the_family_is_found_by_its_pipeline(case: Case) -> None:
    assert type(as_model(case.make())) is case.adapt


def test_an_unknown_pipeline_is_told_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"no adapter for dict; .* subclass of flowalign\.models\.PipelineModel"):
        as_model({})
    with pytest.raises(ValueError, match="is a StableDiffusionPipeline, not a StableDiffusion3Pipeline"):
        SD3(CASES[1].make())
