"""Transitions against the exact law of a Gaussian model, against recorded numbers of three projects, and in the limits
where two of them must agree."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

from flowalign import transitions as T
from flowalign.records import Interval, intervals
from flowalign.schedules import flow_match_euler, linear, shifted
from flowalign.transitions import CPS, DDIM, ODE, DanceSDE, FlowSDE, Memoryless, Renoise, TableSDE

GOLDEN = Path(__file__).parent / "golden"
INPUTS = load_file(GOLDEN / "step_inputs.safetensors")
X, V = INPUTS["sample"], INPUTS["model_output"]
V_MOVED = V + 0.05 * INPUTS["perturb"]
SQRT2 = math.sqrt(2)


def close(actual: torch.Tensor | float, expected: torch.Tensor | float, atol: float = 1e-6, rtol: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


# The linear-Gaussian oracle. For data N(m, s2) per element every step is affine, so the law of the discrete sampler is
# an exact recursion. `propagate` runs our functions; `recursion` is derived on paper from Gaussian conditioning: with
# u = x - (1 - t) m, denoised = m + k u and noise = e u.


def propagate(transition: T.Transition, sigmas: list[float], m: float, s2: float, start: float) -> tuple[float, float]:
    mean, var = start, 1.0
    x = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for interval in intervals(sigmas):
        t = interval.sigma
        a = (t - (1 - t) * s2) / ((1 - t) ** 2 * s2 + t**2)
        moved, std = transition(x, a * (x - (1 - t) * m) - m, interval)
        slope = (moved[1] - moved[0]).item()
        mean, var = moved[0].item() + slope * mean, slope**2 * var + std**2
    return mean, var


def sde_step(g: float, t: float, t_next: float, k: float, e: float) -> tuple[float, float]:
    dt = t_next - t
    return 1 + (e - k) * dt + g**2 * e / (2 * t) * dt, g * math.sqrt(-dt)


def kept_step(std: float, t_next: float, k: float, e: float) -> tuple[float, float]:
    return (1 - t_next) * k + math.sqrt(max(t_next**2 - std**2, 0)) * e, std


def ddim_std(t: float, t_next: float) -> float:
    return math.sqrt(max(t_next**2 - (t_next * (1 - t) / t) ** 2 * t_next**2 / (1 - t_next) ** 2, 0)) if t_next else 0.0


def flow_g(a: float, t: float, first: float) -> float:
    return a * math.sqrt(t / (1 - first)) if t == 1 else a * math.sqrt(t / (1 - t))


TABLE = tuple(0.2 + 0.05 * (i % 7) for i in range(40))
# transition -> (slope, std) of u at step i from t to t_next, on a grid whose second value is `first`
CASES = {
    ODE(): lambda i, t, n, k, e, first: sde_step(0.0, t, n, k, e),
    FlowSDE(0.7): lambda i, t, n, k, e, first: sde_step(flow_g(0.7, t, first), t, n, k, e),
    FlowSDE(1.2): lambda i, t, n, k, e, first: sde_step(flow_g(1.2, t, first), t, n, k, e),
    Memoryless(): lambda i, t, n, k, e, first: sde_step(flow_g(SQRT2, t, first), t, n, k, e),
    DanceSDE(0.3): lambda i, t, n, k, e, first: sde_step(0.3, t, n, k, e),
    TableSDE(TABLE): lambda i, t, n, k, e, first: sde_step(TABLE[i], t, n, k, e),
    CPS(0.7): lambda i, t, n, k, e, first: kept_step(n * math.sin(0.35 * math.pi), n, k, e),
    Renoise(): lambda i, t, n, k, e, first: kept_step(n, n, k, e),
    DDIM(1.0): lambda i, t, n, k, e, first: kept_step(ddim_std(t, n), n, k, e),
    DDIM(0.5): lambda i, t, n, k, e, first: kept_step(0.5 * ddim_std(t, n), n, k, e),
}


def recursion(transition: T.Transition, sigmas: list[float], m: float, s2: float, start: float) -> tuple[float, float]:
    u, var = start, 1.0
    for i, (t, t_next) in enumerate(itertools.pairwise(sigmas)):
        total = (1 - t) ** 2 * s2 + t**2
        slope, std = CASES[transition](i, t, t_next, (1 - t) * s2 / total, t / total, sigmas[1])
        u, var = slope * u, slope**2 * var + std**2
    return m + u, var


@pytest.mark.parametrize("transition", CASES, ids=str)
@pytest.mark.parametrize("steps", [4, 10, 40])
def test_law_of_the_discrete_sampler(transition, steps):
    for shift in (1.0, 3.0, 5.0):
        for m, s2 in ((1.0, 1.0), (-2.0, 0.25), (0.5, 4.0)):
            for sigmas in (flow_match_euler(steps, shift), shifted(linear(steps), shift)):
                ours = propagate(transition, sigmas, m, s2, start=0.5)
                exact = recursion(transition, sigmas, m, s2, start=0.5)
                assert ours == pytest.approx(exact, abs=1e-9, rel=1e-9)


GRIDS = {"sd3_10": flow_match_euler(10, 3.0), "sd3_40": flow_match_euler(40, 3.0), "linear_1000": linear(1000)}


@pytest.mark.parametrize(
    ("transition", "grid", "variance"),
    [
        (ODE(), "sd3_10", 0.6685),
        (FlowSDE(0.7), "sd3_10", 0.7840),
        (FlowSDE(1.0), "sd3_10", 0.8327),
        (Memoryless(), "sd3_10", 0.8925),
        (DanceSDE(0.3), "sd3_10", 0.6791),
        (CPS(0.7), "sd3_10", 0.5001),
        (ODE(), "sd3_40", 0.9122),
        (FlowSDE(0.7), "sd3_40", 0.9533),
        (DanceSDE(0.3), "sd3_40", 0.9152),
        (CPS(0.7), "sd3_40", 0.6489),
        (ODE(), "linear_1000", 0.9974),
        (FlowSDE(0.7), "linear_1000", 1.0057),
        (Memoryless(), "linear_1000", 1.0000),
        (DanceSDE(1.0), "linear_1000", 0.9988),
        (CPS(0.7), "linear_1000", 0.7229),
    ],
    ids=str,
)
def test_known_variances_on_the_standard_normal(transition, grid, variance):
    mean, var = propagate(transition, GRIDS[grid], m=1.0, s2=1.0, start=0.0)
    assert mean == pytest.approx(1, abs=1e-9)
    assert var == pytest.approx(variance, abs=5.1e-5)


def test_noise_in_latents_of_one_image():
    """Point-mass data: the latents' std over what their sigma says, of Flow-SDE off most at SD3's .0089, of CPS never.

    What the last step adds stays in the image.
    """
    grid = flow_match_euler(10, 3.0)
    found = {
        rule: [math.sqrt(propagate(rule, grid[: k + 1], 1.0, 0.0, 1.0)[1]) / grid[k] for k in range(1, 10)]
        for rule in (FlowSDE(0.7), CPS(0.7))
    }
    assert found[CPS(0.7)] == pytest.approx([1.0] * 9, abs=1e-9)
    assert found[FlowSDE(0.7)][-2:] == pytest.approx([1.281, 27.87], rel=1e-3)
    assert all(1.04 < ratio < 1.13 for ratio in found[FlowSDE(0.7)][:-2])
    for sigmas, left in ((grid, 0.062), (shifted(linear(16), 3.0), 0.143), (shifted(linear(10), 3.0), 0.228)):
        assert math.sqrt(propagate(FlowSDE(0.7), sigmas, 1.0, 0.0, 1.0)[1]) == pytest.approx(left, abs=1e-3)


def test_first_step_of_flow_sde():
    x, v = X.double(), V.double()
    for first, a in ((0.9601, 0.7), (0.5, 1.2), (0.0, 0.3)):
        mean, std = T.flow_sde(x, v, 1.0, first, a, first)
        assert std == pytest.approx(a, abs=1e-15)
        close(mean, (1 - a**2 / 2) * x - (1 - first) * v, atol=1e-12)


@pytest.mark.parametrize(
    ("index", "of_x", "of_v", "std"),
    [(0, 0.755, -0.0399, 0.7), (1, 0.7125, -0.0582, 0.743), (8, 0.9087, -0.3351, 0.2254)],
)
def test_known_coefficients_of_flow_sde(index, of_x, of_v, std):
    interval = intervals(flow_match_euler(10, 3.0))[index]
    probes = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()
    mean, step_std = FlowSDE(0.7)(probes[0], probes[1], interval)
    close(mean, torch.tensor([of_x, of_v]).double(), atol=5.1e-5)
    assert step_std == pytest.approx(std, abs=5.1e-4)


@pytest.mark.parametrize("interval", intervals(flow_match_euler(6, 3.0)), ids=lambda i: f"{i.sigma:.3f}")
def test_rules_that_are_special_cases_of_others(interval):
    x, v = X.double(), V.double()
    s, n, first = interval.sigma, interval.sigma_next, interval.sigma_max
    euler = x + v * (n - s)
    pairs = [
        (T.memoryless(x, v, s, n, first), T.flow_sde(x, v, s, n, SQRT2, first)),
        (T.dance_sde(x, v, s, n, 0.4), T.table_sde(x, v, s, n, 0.4)),
        (T.cps(x, v, s, n, 1.0), T.renoise(x, v, s, n)),
        (ODE()(x, v, interval), (euler, 0.0)),
        (T.flow_sde(x, v, s, n, 0.0, first), (euler, 0.0)),
        (T.table_sde(x, v, s, n, 0.0), (euler, 0.0)),
        (T.cps(x, v, s, n, 0.0), (euler, 0.0)),
        (T.ddim(x, v, s, n, 0.0), (euler, 0.0)),
    ]
    for (mean, std), (expected, expected_std) in pairs:
        close(mean, expected, atol=1e-12)
        assert std == pytest.approx(expected_std, abs=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_the_step_of_diffusers(eta):
    # A variance-preserving x = alpha x_0 + s eps is a flow's after x / (alpha + s), sigma = s / (alpha + s).
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(10)
    x, noise_hat, draw = X.double(), V.double(), INPUTS["perturb"].double()
    for t, t_next in zip(scheduler.timesteps, scheduler.timesteps[1:], strict=False):
        theirs = scheduler.step(noise_hat, t, x, eta=eta, variance_noise=draw).prev_sample
        (alpha, s), (alpha_next, s_next) = (
            (scheduler.alphas_cumprod[i].sqrt().item(), (1 - scheduler.alphas_cumprod[i]).sqrt().item())
            for i in (t, t_next)
        )
        velocity = noise_hat - (x - s * noise_hat) / alpha
        mean, std = T.ddim(x / (alpha + s), velocity, s / (alpha + s), s_next / (alpha_next + s_next), eta)
        close(mean + std * draw, theirs / (alpha_next + s_next), atol=1e-9, rtol=1e-9)


def test_half_precision_is_cast_up_and_double_stays():
    interval = intervals(flow_match_euler(6, 3.0))[2]
    for transition in (ODE(), FlowSDE(), CPS(), DDIM()):
        mean, _ = transition(X.bfloat16(), V.bfloat16(), interval)
        expected, _ = transition(X.bfloat16().float(), V.bfloat16().float(), interval)
        assert mean.dtype == torch.float32
        assert torch.equal(mean, expected)
        assert transition(X.double(), V.double(), interval)[0].dtype == torch.float64


# Recorded numbers


def check_step(golden: dict, key: str, step, log_prob_of, scale: float, drawn: str) -> None:
    mean, std = step(V)
    if f"{key}/mean" in golden:
        close(mean, golden[f"{key}/mean"])
    if f"{key}/std" in golden:
        close(torch.tensor(std / scale).expand_as(golden[f"{key}/std"]), golden[f"{key}/std"])
    close(log_prob_of(golden[f"{key}/{drawn}"], mean, std), golden[f"{key}/log_prob"])
    if f"{key}/re_log_prob" not in golden:
        return
    velocity = V_MOVED.clone().requires_grad_()
    mean, std = step(velocity)
    log_probs = log_prob_of(golden[f"{key}/{drawn}"], mean, std)
    close(log_probs.detach(), golden[f"{key}/re_log_prob"])
    (gradient,) = torch.autograd.grad(log_probs.sum(), velocity)
    if f"{key}/re_grad_norm" in golden:
        close(gradient.flatten(1).norm(dim=1), golden[f"{key}/re_grad_norm"], rtol=1e-6)
    if f"{key}/re_grad" in golden:
        close(gradient, golden[f"{key}/re_grad"], atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize(("level", "index"), [(0.7, 0), (0.7, 5), (0.7, 9), (0.1, 9), (1.2, 0), (1.2, 5)])
def test_flow_grpo(level, index):
    golden = load_file(GOLDEN / "flow_grpo_sde_step.safetensors")
    interval = intervals(INPUTS["sigmas"].tolist())[index]
    key, scale = f"n{level}/s{index}", math.sqrt(-interval.dt)
    check_step(golden, key, lambda v: FlowSDE(level)(X, v, interval), T.gaussian_log_prob, scale, "prev_sample")


FACTORY = {
    "flow_sde": (FlowSDE, T.gaussian_log_prob, [(0.7, 0), (0.7, 5), (0.7, 9), (0.3, 8), (1.0, 3)]),
    "dance_sde": (DanceSDE, T.gaussian_log_prob, [(0.7, 0), (0.7, 5), (0.3, 8), (1.0, 3)]),
    "cps": (CPS, T.squared_error_log_prob, [(0.7, 0), (0.7, 5), (0.7, 8), (0.3, 8), (1.0, 3)]),
}


@pytest.mark.parametrize(("name", "level", "index"), [(n, *case) for n in FACTORY for case in FACTORY[n][2]])
def test_flow_factory(name, level, index):
    golden = load_file(GOLDEN / f"flow_factory_step_{name}.safetensors")
    rule, log_prob_of, _ = FACTORY[name]
    interval = intervals((INPUTS["timesteps"].double() / 1000).tolist() + [0.0])[index]
    scale = 1.0 if name == "cps" else math.sqrt(-interval.dt)
    key = f"n{level}/s{index}"
    check_step(golden, key, lambda v: rule(level)(X, v, interval), log_prob_of, scale, "next_latents")


@pytest.mark.parametrize("name", FACTORY)
def test_flow_factory_with_sigma_from_its_table(name):
    golden = load_file(GOLDEN / f"flow_factory_step_{name}.safetensors")
    rule, log_prob_of, _ = FACTORY[name]
    interval = intervals(INPUTS["sigmas"].tolist())[3]
    check_step(golden, "n1.0/lookup_s3", lambda v: rule(1.0)(X, v, interval), log_prob_of, 1.0, "next_latents")


def test_flow_factory_dance_step_at_small_sigma():
    # The peer divides by sigma^2 = 8e-5 in float32, which costs it 1e-5 in the mean: its formula in float32 gives its
    # numbers, in float64 ours.
    golden = load_file(GOLDEN / "flow_factory_step_dance_sde.safetensors")
    interval = intervals((INPUTS["timesteps"].double() / 1000).tolist() + [0.0])[9]

    def theirs(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        s, dt = torch.tensor(interval.sigma, dtype=x.dtype), torch.tensor(interval.dt, dtype=x.dtype)
        return x + (v + 0.7**2 / 2 * (x - (x - s * v) * (1 - s)) / s**2) * dt

    mean, std = DanceSDE(0.7)(X, V, interval)
    close(DanceSDE(0.7)(X.double(), V.double(), interval)[0], theirs(X.double(), V.double()), atol=1e-11)
    close(theirs(X, V), golden["n0.7/s9/mean"], atol=2e-6)
    close(mean, golden["n0.7/s9/mean"], atol=1e-5)
    close(T.gaussian_log_prob(golden["n0.7/s9/next_latents"], mean, std), golden["n0.7/s9/log_prob"], atol=2e-6)


@pytest.mark.parametrize("index", [0, 5, 9])
def test_flow_factory_ode(index):
    golden = load_file(GOLDEN / "flow_factory_step_ode.safetensors")
    interval = intervals((INPUTS["timesteps"].double() / 1000).tolist() + [0.0])[index]
    mean, std = ODE()(X, V, interval)
    close(mean, golden[f"n0.0/s{index}/mean"])
    assert std == 0 == golden[f"n0.0/s{index}/std"].abs().max()


@pytest.mark.parametrize(("level", "index"), [(0.3, 0), (0.3, 5), (0.3, 8), (0.7, 4)])
def test_dancegrpo(level, index):
    golden = load_file(GOLDEN / "dancegrpo_flux_step.safetensors")
    interval = intervals(INPUTS["dancegrpo_sigmas"].tolist())[index]
    key = f"eta{level}/s{index}"
    check_step(golden, key, lambda v: DanceSDE(level)(X, v, interval), T.gaussian_log_prob, 1.0, "prev_sample")
    if index == 5:  # what it calls x0 is the Euler step to 0
        close(T.ode(X, V, interval.sigma, 0.0)[0], golden[f"{key}/pred_x0"])


# Log-probs and KL


def drawn(
    transition: T.Transition, interval: Interval, velocity: torch.Tensor
) -> tuple[torch.Tensor, float, torch.Tensor]:
    mean, std = transition(X, velocity, interval)
    return mean, std, mean + std * INPUTS["perturb"]


STOCHASTIC = [t for t in CASES if t != ODE()]


@pytest.mark.parametrize("transition", STOCHASTIC, ids=str)
def test_replay_gives_the_same_log_prob_and_ratio_1(transition):
    for interval in intervals(flow_match_euler(8, 3.0))[:-1]:
        mean, std, x = drawn(transition, interval, V)
        again, std_again = transition(X, V.clone().requires_grad_(), interval)
        new, old = T.gaussian_log_prob(x, again, std_again), T.gaussian_log_prob(x, mean, std)
        assert torch.equal((new - old).exp(), torch.ones(len(X)))


def test_log_prob_is_that_of_torch_and_its_reductions():
    mean, std, x = drawn(FlowSDE(0.7), intervals(flow_match_euler(8, 3.0))[3], V)
    expected = Normal(mean.double(), std).log_prob(x.double()).flatten(1)
    close(T.gaussian_log_prob(x.double(), mean.double(), std), expected.mean(1), atol=1e-12)
    close(T.gaussian_log_prob(x.double(), mean.double(), std, T.sum_of_elements), expected.sum(1), atol=1e-9)
    close(T.squared_error_log_prob(x, mean, std), -(x - mean).square().flatten(1).mean(1))


def test_gradient_of_the_log_prob_goes_through_the_mean_only():
    std, elements = 0.3, X[0].numel()
    x, mean = X.clone().requires_grad_(), (X + 0.1 * V).requires_grad_()
    T.gaussian_log_prob(x, mean, std).sum().backward()
    assert x.grad is None
    close(mean.grad, (x - mean).detach() / (std**2 * elements), atol=1e-9, rtol=1e-5)


def test_a_step_without_noise_has_no_density():
    same, interval = (X, X, V, V), Interval(0, 0.5, 0.4, 0.9)
    for transition in (ODE(), CPS(0.7), Renoise(), DDIM(1.0)):
        mean, std = transition(X, V, Interval(9, 0.1, 0.0, 0.9))
        for log_prob in (T.gaussian_log_prob, T.squared_error_log_prob):
            with pytest.raises(ValueError, match=r"std is 0\.0"):
                log_prob(X, mean, std)
        for kl in (T.exact_kl, T.flow_grpo_kl):
            with pytest.raises(ValueError, match=r"std is 0\.0"):
                kl(*same, std, interval, T.mean_of_elements)


@pytest.mark.parametrize("reduce", [T.mean_of_elements, T.sum_of_elements])
@pytest.mark.parametrize("transition", STOCHASTIC, ids=str)
def test_exact_kl_is_that_of_two_gaussians(transition, reduce):
    for interval in intervals(flow_match_euler(6, 3.0))[:-1]:
        mean, std = transition(X.double(), V_MOVED.double(), interval)
        ref, _ = transition(X.double(), V.double(), interval)
        expected = reduce(kl_divergence(Normal(mean, std), Normal(ref, std)))
        kl = T.exact_kl(mean, ref, V_MOVED, V, std, interval, reduce)
        close(kl, expected, atol=0, rtol=1e-9)


@pytest.mark.parametrize(
    ("transition", "kl", "std_dev_t"),
    [
        (FlowSDE(0.7), T.flow_grpo_kl, lambda s, s_next: 0.7 * math.sqrt(s / (1 - s))),
        (CPS(0.7), T.exact_kl, lambda s, s_next: s_next * math.sin(0.35 * math.pi)),
    ],
    ids=["sde", "cps"],
)
def test_flow_grpo_s_code_divides_by_the_std_that_its_step_returns(transition, kl, std_dev_t):
    """Of its SDE that is the std without sqrt(-dt), of CPS all of it."""
    for interval in intervals(flow_match_euler(6, 3.0))[1:-1]:
        (mean, std), (ref, _) = (transition(X.double(), v.double(), interval) for v in (V_MOVED, V))
        authors = (mean - ref).square().flatten(1).mean(1) / (2 * std_dev_t(interval.sigma, interval.sigma_next) ** 2)
        close(kl(mean, ref, V_MOVED, V, std, interval, T.mean_of_elements), authors, atol=0, rtol=1e-9)


def test_exact_kl_of_an_sde_in_velocities():
    interval = intervals(flow_match_euler(10, 3.0))[4]
    s, dt, g = interval.sigma, interval.dt, 0.7 * math.sqrt(interval.sigma / (1 - interval.sigma))
    (mean, std), (ref, _) = (FlowSDE(0.7)(X.double(), v.double(), interval) for v in (V_MOVED, V))
    kl = T.exact_kl(mean, ref, V_MOVED, V, std, interval, T.sum_of_elements)
    moved = (V_MOVED - V).double().square().flatten(1).sum(1)
    close(kl, -dt / 2 * (g * (1 - s) / (2 * s) + 1 / g) ** 2 * moved, atol=0, rtol=1e-9)


def test_kl_gradient_pulls_to_the_reference():
    interval = Interval(0, 0.5, 0.4, 0.9)
    mean, velocity = (X + 0.1).requires_grad_(), (V + 0.1).requires_grad_()
    for kl in (T.exact_kl, T.flow_grpo_kl, T.mean_mse_kl):
        (gradient,) = torch.autograd.grad(kl(mean, X, velocity, V, 0.3, interval, T.mean_of_elements).sum(), mean)
        assert (gradient > 0).all()
    (gradient,) = torch.autograd.grad(
        T.velocity_mse_kl(mean, X, velocity, V, 0.3, interval, T.mean_of_elements).sum(), velocity
    )
    assert (gradient > 0).all()


# Bad settings


@pytest.mark.parametrize("rule", [FlowSDE, DanceSDE, CPS, DDIM, lambda noise: TableSDE((0.5, noise))])
@pytest.mark.parametrize("noise", [0.0, -0.3, float("nan")])
def test_noise_must_be_positive(rule, noise):
    with pytest.raises(ValueError, match="must be in"):
        rule(noise)


def test_noise_that_no_step_can_have():
    for rule in (CPS, DDIM):
        with pytest.raises(ValueError, match=r"must be in \(0, 1.0\], got 1.5"):
            rule(1.5)
    with pytest.raises(ValueError, match="has 2 values and none for step 2"):
        TableSDE((0.5, 0.4))(X, V, Interval(2, 0.5, 0.4, 0.9))
