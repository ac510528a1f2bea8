"""Gradients through rollouts against closed forms and finite differences; what they keep, and what they leave alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from flowalign.differentiate import Drawn, differentiable_rollout, reference_velocity
from flowalign.gradient_plans import LastSteps, LateStep
from flowalign.memory_estimate import Peak
from flowalign.models.gaussian import GaussianModel
from flowalign.models.sd3 import SD3
from flowalign.randomness import key_noise
from flowalign.records import Condition
from flowalign.rollout import Policy, rollout
from flowalign.schedules import flow_match_euler, linear
from flowalign.transitions import DDIM, exact_kl, velocity_mse_kl
from tests.families import CASES
from tests.tiny import randomise_policy, tiny_sd3
from trainers.draft import path_kl
from trainers.path_steps import Scored

STEPS = 6
TOLD = Condition(torch.zeros(4, 1, 1))


class Constant(GaussianModel):
    """v = theta, whatever the latents."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def network(
        self,
        latents: Tensor,
        sigma: float,
        condition: Condition,
        negative: bool = False,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        return self.theta.expand_as(latents)


def gaussian(grid: list[float]) -> GaussianModel:
    """In float64, with a policy that is off its start."""
    model = GaussianModel(0.7, 0.5, 3, grid)
    model.gain, model.bias = (nn.Parameter(one.detach().double()) for one in (model.gain, model.bias))
    randomise_policy(model, 0.3)
    return model


def noise(step: int = -1) -> Tensor:
    return key_noise(0, "test", step, shape=(4, 3)).double()


def drawn(model: GaussianModel, grid: list[float], plan: LastSteps, recompute: bool = True) -> Drawn:
    path = plan.resolve(len(grid) - 1, 0, 0)
    return differentiable_rollout(model, TOLD, noise(), grid, path, Policy(), noise, recompute)


def reward(latents: Tensor) -> Tensor:
    return -(latents - 1.5).square().sum() + latents.sin().sum()


@pytest.mark.parametrize("grid", [linear(STEPS), flow_match_euler(STEPS, 3.0)], ids=["linear", "sd3"])
@pytest.mark.parametrize("count", [1, 2, 4, None])
def test_the_gradient_of_a_constant_field_is_the_length_of_its_steps(grid, count):
    model = Constant()
    made = drawn(model, grid, LastSteps(count))
    (gradient,) = torch.autograd.grad(made.latents[0, 0], model.theta)
    first = STEPS - (count or STEPS)
    assert gradient.item() == pytest.approx(-sum(a - b for a, b in zip(grid[first:], grid[first + 1 :], strict=False)))
    assert gradient.item() == pytest.approx(-grid[first], rel=1e-14)


def gradients(model: GaussianModel, value: Tensor) -> list[Tensor]:
    return [*torch.autograd.grad(value, [*model.trainable().values()])]


def differences(model: GaussianModel, value: Callable[[], Tensor], width: float = 1e-6) -> list[Tensor]:
    """Central differences of a number in every parameter."""
    found = []
    for parameter in model.trainable().values():
        slopes = torch.zeros_like(parameter)
        for i in range(len(parameter)):
            sides = []
            for sign in (1, -1):
                parameter.data[i] += sign * width
                sides.append(value().item())
                parameter.data[i] -= sign * width
            slopes[i] = (sides[0] - sides[1]) / (2 * width)
        found.append(slopes)
    return found


@pytest.mark.parametrize("plan", [LastSteps(), LastSteps(transition=DDIM(1.0))], ids=["ode", "ddim"])
def test_all_steps_have_the_gradient_of_finite_differences(plan):
    grid = linear(STEPS)
    model = gaussian(grid)
    exact = gradients(model, reward(drawn(model, grid, plan).latents))
    for one, other in zip(exact, differences(model, lambda: reward(drawn(model, grid, plan).latents)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert min(float(one[:-1].abs().min()) for one in exact) > 1e-3  # of every step but the grid's end


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_steps_have_the_full_gradient_with_earlier_velocities_held(count):
    grid = linear(STEPS)
    model = gaussian(grid)
    latents = noise()
    for i, (sigma, sigma_next) in enumerate(zip(grid, grid[1:], strict=False)):
        velocity = model.network(latents, sigma, TOLD)
        latents = latents + (velocity.detach() if i < STEPS - count else velocity) * (sigma_next - sigma)
    made = drawn(model, grid, LastSteps(count))
    torch.testing.assert_close(made.latents, latents, rtol=0, atol=1e-12)
    for one, other in zip(gradients(model, reward(made.latents)), gradients(model, reward(latents)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        assert not one[: STEPS - count].any()
        assert one[STEPS - count : -1].all()


@pytest.mark.parametrize("count", [1, 2, None])
def test_only_the_last_steps_have_gradient(count):
    grid = linear(STEPS)
    model, many = gaussian(grid), count or STEPS
    made = drawn(model, grid, LastSteps(count), recompute=False)
    assert [visit.interval.index for visit in made.visits] == [*range(STEPS - many, STEPS)]
    assert (model.meter.calls["forward"], model.meter.calls["gradient"]) == (STEPS - many, many)
    assert not made.visits[0].latents.requires_grad
    assert all(visit.latents.requires_grad for visit in made.visits[1:])


def test_the_start_has_gradient_where_all_steps_do():
    grid = linear(STEPS)
    model, start = gaussian(grid), noise().requires_grad_()
    path = LastSteps().resolve(STEPS, 0, 0)
    made = differentiable_rollout(model, TOLD, start, grid, path)
    (gradient,) = torch.autograd.grad(reward(made.latents), start)
    other = noise()
    other[1, 2] += 1e-6
    moved = differentiable_rollout(model, TOLD, other, grid, path).latents
    assert gradient[1, 2].item() == pytest.approx((reward(moved) - reward(made.latents)).item() / 1e-6, rel=1e-4)


def test_one_late_step_jumps_to_the_end_and_the_later_ones_are_not_made():
    grid = linear(STEPS)
    model, plan = gaussian(grid), LateStep(2, 4)
    for epoch in range(6):
        path = plan.resolve(STEPS, epoch, 0)
        step = path.gradient_from
        model.meter.take()
        made = differentiable_rollout(model, TOLD, noise(), path.grid(grid), path, recompute=False)
        calls, _, _ = model.meter.take()
        assert (calls["forward"], calls["gradient"], len(made.visits)) == (step, 1, 1)
        (visit,) = made.visits
        assert visit.interval.sigma == grid[step]
        torch.testing.assert_close(made.latents, visit.latents - grid[step] * visit.velocity, rtol=0, atol=0)
        whole = rollout(model, TOLD, noise().float(), grid, LastSteps().resolve(STEPS, 0, 0), keep_path=True)
        torch.testing.assert_close(visit.latents.float(), whole.path[step], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kl", [velocity_mse_kl, exact_kl], ids=["velocity", "exact"])
def test_a_path_s_kl_has_the_gradient_of_finite_differences_through_its_latents(kl):
    """Over three steps with noise; a reference without gradient in its latents would fail."""
    grid = linear(STEPS)
    model = gaussian(grid)
    path = LastSteps(3, DDIM(1.0)).resolve(STEPS, 0, 0)

    def value() -> Tensor:
        made = differentiable_rollout(model, TOLD, noise(), grid, path, Policy(), noise)
        visits = made.visits[:-1]  # the last one goes to sigma 0 and has no density
        references = tuple(reference_velocity(model, visit, TOLD) for visit in visits)
        return path_kl(kl, Scored(torch.zeros(4, dtype=torch.float64), visits, references), Policy()).sum()

    exact = gradients(model, value())
    held = differences(model, value)
    for one, other in zip(exact, held, strict=True):
        assert not one[: STEPS - 3].any()  # finite differences see the steps before too
        torch.testing.assert_close(one[STEPS - 3 :], other[STEPS - 3 :], rtol=1e-4, atol=1e-7)
    assert value() > 0


def test_on_the_reference_the_kl_is_zero_and_has_no_gradient():
    grid = linear(STEPS)
    model = GaussianModel(0.7, 0.5, 3, grid)
    made = drawn(model, grid, LastSteps(3))
    references = tuple(reference_velocity(model, visit, TOLD) for visit in made.visits)
    total = path_kl(velocity_mse_kl, Scored(torch.zeros(4), made.visits, references), Policy()).sum()
    assert total == 0
    assert not any(one.any() for one in gradients(model, total))


@pytest.fixture(scope="module")
def tiny() -> SD3:
    model = SD3(tiny_sd3(), max_sequence_length=0)
    randomise_policy(model)
    return model


def tiny_drawn(model: SD3, steps: int, count: int, recompute: bool, both: bool = True, scale: float = 1.0) -> Tensor:
    path, told = LastSteps(count).resolve(steps, 0, 0), model.encode(["a red circle", "a star"])
    start = key_noise(0, "test", shape=(2, *model.latent_shape))
    policy = Policy(scale, unconditional_grad=both)
    return differentiable_rollout(model, told, start, linear(steps), path, policy, None, recompute).latents


@pytest.mark.parametrize("both", [True, False])
def test_the_reference_is_guided_as_the_policy_is(both):
    """A policy at its start is the reference, to the last bit."""
    model, start = SD3(tiny_sd3(), max_sequence_length=0), key_noise(0, "test", shape=(2, 4, 4, 4))
    path, told = LastSteps(2).resolve(3, 0, 0), model.encode(["a red circle", "a star"])
    policy = Policy(3.0, unconditional_grad=both)
    made = differentiable_rollout(model, told, start, linear(3), path, policy)
    for visit in made.visits:
        assert torch.equal(reference_velocity(model, visit, told, policy), visit.velocity)
        assert not torch.equal(reference_velocity(model, visit, told), visit.velocity)


@pytest.mark.parametrize("name", ["sd1.5 ddim", "sdxl"])
def test_it_ends_where_the_plain_rollout_does(name):
    """Of a model on a table of alphas, whose last sigma is not 0."""
    case = next(case for case in CASES if case.name == name)
    model = case.adapt(case.make(), **case.options)  # type: ignore[arg-type]
    told, sigmas = model.encode(["a red circle", "a star"]), model.sigmas(4)
    start, path = model.start(key_noise(0, "test", shape=(2, *model.latent_shape)), sigmas[0]), LastSteps(2)
    made = differentiable_rollout(model, told, start, sigmas, path.resolve(4, 0, 0))
    plain = rollout(model, told, key_noise(0, "test", shape=(2, *model.latent_shape)), sigmas, path.resolve(4, 0, 0))
    torch.testing.assert_close(made.latents.detach(), plain.latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("both", [True, False])
def test_checkpointing_changes_no_bit(both, tiny):
    def all_of_it(recompute: bool) -> list[Tensor]:
        latents = tiny_drawn(tiny, 4, 3, recompute, both, 3.0)
        made = torch.autograd.grad(tiny.decode(latents).square().sum(), [*tiny.trainable().values()])
        return [latents.detach(), *made]

    kept, anew = all_of_it(False), all_of_it(True)
    assert all(torch.equal(one, other) for one, other in zip(kept, anew, strict=True))
    assert any(one.any() for one in kept[1:])


def test_the_unconditional_half_has_gradient_or_not(tiny):
    def norm(both: bool) -> float:
        latents = tiny_drawn(tiny, 3, 1, True, both, 3.0)
        made = torch.autograd.grad(latents.square().sum(), [*tiny.trainable().values()])
        return float(torch.stack([one.norm() for one in made]).norm())

    assert abs(norm(True) - norm(False)) > 0.01 * norm(True)


def saved(model: SD3, steps: int, count: int) -> int:
    """Bytes that autograd keeps of a rollout without checkpointing, parameters not counted."""
    known = {value.untyped_storage().data_ptr() for value in model.module.parameters()}
    total, seen = 0, dict[int, Tensor]()

    def pack(value: Tensor) -> Tensor:
        nonlocal total
        place = value.untyped_storage().data_ptr()
        if place not in known and place not in seen:
            total += value.untyped_storage().nbytes()
            seen[place] = value
        return value

    with saved_tensors_hooks(pack, lambda value: value):
        tiny_drawn(model, steps, count, recompute=False)
    return total


def test_what_is_kept_does_not_grow_with_the_steps_and_grows_with_those_with_gradient(tiny):
    one, two, three = (saved(tiny, 6, count) for count in (1, 2, 3))
    assert one > 10_000
    assert three - two == pytest.approx(two - one, rel=0.01)
    assert two - one == pytest.approx(one, rel=0.1)
    assert saved(tiny, 3, 2) == saved(tiny, 12, 2) == two


def test_with_checkpointing_a_step_keeps_its_latents_alone(tiny):
    def peak(count: int, recompute: bool) -> int:
        with Peak() as held:
            tiny_drawn(tiny, 5, count, recompute).square().sum().backward()
        for value in tiny.trainable().values():
            value.grad = None
        return held.most

    latents = 4 * 2 * 4 * 4 * 4  # bytes
    fewer, more = peak(2, True), peak(4, True)  # from two on the policy's gradient is there too
    assert abs(more - fewer) <= 4 * 2 * latents
    assert peak(4, False) > 1.5 * more


def test_a_path_that_does_not_fit_the_grid_is_refused():
    grid = linear(STEPS)
    with pytest.raises(ValueError, match="a grid of 6 steps needs a path of as many"):
        differentiable_rollout(gaussian(grid), TOLD, noise(), grid, LastSteps().resolve(5, 0, 0))
    path = LastSteps(1, DDIM(1.0)).resolve(STEPS, 0, 0)
    with pytest.raises(ValueError, match="are stochastic and need step_noise"):
        differentiable_rollout(gaussian(grid), TOLD, noise(), grid, path)
