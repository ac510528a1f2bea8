"""Calls that a backward pass makes anew: with the adapters of their forward pass, whichever are in use by then."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from flowalign.adapters import LoRA
from flowalign.differentiate import velocity_at
from flowalign.models import SD3, PipelineModel, StableDiffusion
from flowalign.models.gaussian import GaussianModel
from flowalign.rollout import Policy
from flowalign.schedules import linear
from tests.families import ddim, tiny_sd
from tests.tiny import randomise_policy, tiny_sd3
from trainers.optim import Optimizer, PolicyOptimizer

Made = Callable[[bool], PipelineModel]  # with gradient checkpointing or without
FAMILIES = {
    "sd3": lambda lora, on: SD3(tiny_sd3(), lora=lora, max_sequence_length=12, gradient_checkpointing=on),
    "unet": lambda lora, on: StableDiffusion(tiny_sd(ddim())(), lora=lora, gradient_checkpointing=on),
}
both = pytest.mark.parametrize("again", [False, True], ids=["kept", "anew"])  # `recompute` of the call as a whole


@pytest.fixture(scope="module", params=[(f, r) for f in FAMILIES for r in ("base", "start")], ids="-".join)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Models of a family and a reference, whose policy is off both."""
    family, reference = request.param
    start = tmp_path_factory.mktemp("start")
    first = FAMILIES[family](LoRA(), False)
    randomise_policy(first)
    first.save(start)
    models: dict[bool, PipelineModel] = {}
    for on in (False, True):
        models[on] = FAMILIES[family](LoRA(start=str(start), reference=reference), on)
        randomise_policy(models[on], 0.2)
    return models.__getitem__


def latents_of(model: PipelineModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, *model.latent_shape, generator=generator).requires_grad_()


def call(model: PipelineModel, latents: Tensor, again: bool, reference: bool) -> Tensor:
    return velocity_at(model, latents, 0.5, model.encode(["a", "b"]), Policy(3.0), again, reference)


def slopes(model: PipelineModel, again: bool, work: Callable[[PipelineModel, Tensor, bool], Tensor]) -> list[Tensor]:
    """Of what a piece of work makes, in its latents and in the policy."""
    latents = latents_of(model)
    values = [latents, *model.trainable().values()]
    found = torch.autograd.grad(work(model, latents, again), values, allow_unused=True)
    assert all(value.requires_grad for value in values)
    return [torch.zeros_like(v) if slope is None else slope for v, slope in zip(values, found, strict=True)]


def divergence(model: PipelineModel, latents: Tensor, again: bool) -> Tensor:
    """Of policy and reference, as in a KL of latents that the policy has come to."""
    return (call(model, latents, again, False) - call(model, latents, again, True)).square().mean()


def of_reference(model: PipelineModel, latents: Tensor, again: bool) -> Tensor:
    return call(model, latents, again, True).square().mean()


def within_reference(model: PipelineModel, latents: Tensor, again: bool) -> Tensor:
    """A call that does not enter the reference itself, and is gone back through after it was left."""
    with model.reference():
        return call(model, latents, again, False).square().mean()


@both
@pytest.mark.parametrize("work", [of_reference, within_reference, divergence])
def test_checkpointing_changes_no_bit_of_a_gradient(work, again, made):
    exact = slopes(made(False), False, work)
    found = slopes(made(True), again, work)
    assert all(torch.equal(one, other) for one, other in zip(exact, found, strict=True))
    assert exact[0].any()
    assert any(one.any() for one in exact[1:]) == (work is divergence)


@both
@pytest.mark.parametrize("on", [False, True])
def test_the_policy_is_gone_back_through_while_the_reference_is_in_use(on, again, made):
    def within(model: PipelineModel, reference: bool) -> Tensor:
        latents = latents_of(model)
        value = call(model, latents, again, False).square().mean()
        with model.reference() if reference else nullcontext():
            (slope,) = torch.autograd.grad(value, latents)
        return slope

    assert torch.equal(within(made(on), True), within(made(False), False))


@both
def test_references_within_one_another_are_left_one_by_one(again, made):
    model, latents = made(True), latents_of(made(True))
    with torch.no_grad():
        policy, reference = (call(model, latents, False, other) for other in (False, True))
        with model.reference():
            with model.reference():
                pass
            torch.testing.assert_close(call(model, latents, again, False), reference, atol=1e-5, rtol=0)
        assert torch.equal(call(model, latents, again, False), policy)
    assert (policy - reference).abs().max() > 1e-2


@pytest.mark.parametrize(("on", "again"), [(False, False), (True, False), (False, True)])
def test_weights_that_have_changed_by_the_backward_pass_are_an_error(on, again, made):
    """As of an average that was in use in the forward pass: without checkpointing torch itself says so."""
    model = made(on)
    optimizer = PolicyOptimizer(model.trainable(), Optimizer(ema_decay=0.5))
    latents = latents_of(model)
    with optimizer.averaged():
        value = call(model, latents, again, False).square().mean()
    with pytest.raises((RuntimeError, AssertionError), match=r"inplace operation|weights have changed between forward"):
        value.backward()


def test_the_closed_form_model_is_gone_back_through_as_it_was():
    grid = linear(4)
    model = GaussianModel(0.3, 0.5, 3, grid)
    randomise_policy(model, 0.4)
    told, start = model.encode(["x"] * 2), torch.ones(2, 3, requires_grad=True)

    def slope(again: bool) -> Tensor:
        with model.reference():
            value = velocity_at(model, start, grid[1], told, Policy(), again).sum()
        (found,) = torch.autograd.grad(value, start)
        return found

    assert torch.equal(slope(True), slope(False))
    policy = velocity_at(model, start, grid[1], told, Policy(), False).sum()
    assert not torch.equal(slope(True), torch.autograd.grad(policy, start)[0])
