"""Losses against recorded numbers of flow_grpo and Flow-Factory, and by hand where the clip bites."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowalign.objectives import clipped_policy_loss, clipped_surrogate, guard_ratio, policy_diagnostics
from flowalign.records import Interval
from flowalign.transitions import (
    flow_grpo_kl,
    gaussian_log_prob,
    mean_mse_kl,
    mean_of_elements,
    velocity_mse_kl,
)

FOLDER = Path(__file__).parent / "golden"
GOLDEN = load_file(FOLDER / "grpo_loss.safetensors")
MEANS = load_file(FOLDER / "grpo_loss_means.safetensors")
VELOCITIES = load_file(FOLDER / "grpo_loss_velocities.safetensors")
OLD, ADVANTAGES = GOLDEN["old_log_prob"][:, 0], GOLDEN["advantages"][:, 0]
DT, STD_DEV_T = -0.12, 0.9
STD = STD_DEV_T * math.sqrt(-DT)
INTERVAL = Interval(3, 0.6, 0.6 + DT, 0.9)


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual.detach(), expected, atol=atol, rtol=0)


def inputs() -> dict[str, torch.Tensor]:
    return {
        "log_prob": GOLDEN["log_prob"].clone().requires_grad_(),
        "mean": MEANS["mean"].clone().requires_grad_(),
        "velocity": VELOCITIES["v_pred"].clone().requires_grad_(),
    }


def kl_of(kl, given: dict[str, torch.Tensor]) -> torch.Tensor:
    ref_mean, ref_velocity = MEANS["mean_ref"], VELOCITIES["v_ref"]
    return kl(given["mean"], ref_mean, given["velocity"], ref_velocity, STD, INTERVAL, mean_of_elements).mean()


@pytest.mark.parametrize("clip", ["0.0001", "0.01"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_flow_grpo(clip, beta):
    key, given = f"flow_grpo/clip{clip}/beta{beta}", inputs()
    policy = clipped_policy_loss(given["log_prob"], OLD, ADVANTAGES, float(clip)).mean()
    kl = kl_of(flow_grpo_kl, given)
    close(policy, GOLDEN[f"{key}/policy_loss"])
    (policy + beta * kl).backward()
    close(policy + beta * kl, GOLDEN[f"{key}/loss"])
    close(given["log_prob"].grad, GOLDEN[f"{key}/grad_log_prob"])
    if beta:
        close(kl, GOLDEN[f"{key}/kl_loss"], atol=1e-10)
        close(given["mean"].grad.flatten(1).norm(dim=1), GOLDEN[f"{key}/grad_mean_norm"], atol=1e-12)


@pytest.mark.parametrize("clip", ["0.0001", "0.01"])
def test_flow_grpo_diagnostics(clip):
    key = f"flow_grpo/clip{clip}/beta0.0"
    found = policy_diagnostics(GOLDEN["log_prob"], OLD, float(clip))
    close(found["clip_fraction"].mean(), GOLDEN[f"{key}/clipfrac"])
    close(found["clip_above"].mean(), GOLDEN[f"{key}/clipfrac_gt_one"])
    close(found["clip_below"].mean(), GOLDEN[f"{key}/clipfrac_lt_one"])
    close(found["approx_kl"].mean(), GOLDEN[f"{key}/approx_kl"], atol=1e-14)
    close(found["log_ratio"], GOLDEN["log_prob"] - OLD)


@pytest.mark.parametrize("clip", ["0.0001", "0.01"])
@pytest.mark.parametrize(
    ("name", "kl", "grad_norm", "through"),
    [
        ("none", None, None, None),
        ("v-based", velocity_mse_kl, "grad_v_norm", "velocity"),
        ("x-based", mean_mse_kl, "grad_mean_norm", "mean"),
    ],
)
def test_flow_factory(clip, name, kl, grad_norm, through):
    key, given = f"flow_factory/clip{clip}/kl={name}", inputs()
    loss = clipped_policy_loss(given["log_prob"], OLD, ADVANTAGES, float(clip)).mean()
    loss = loss if kl is None else loss + 0.04 * kl_of(kl, given)
    loss.backward()
    close(loss, GOLDEN[f"{key}/loss"])
    close(given["log_prob"].grad, GOLDEN[f"{key}/grad_log_prob"])
    if kl is not None:
        close(given[through].grad.flatten(1).norm(dim=1), GOLDEN[f"{key}/{grad_norm}"], atol=1e-12)


@pytest.mark.parametrize(("name", "std"), [("scalar", STD), ("b", torch.full((8,), STD))])
def test_grpo_guard(name, std):
    ratio = guard_ratio(GOLDEN["log_prob"], OLD, MEANS["mean"], MEANS["guard_old_mean"], std)
    close(ratio, GOLDEN[f"flow_factory_guard/{name}/ratio"])
    close(clipped_surrogate(ratio, ADVANTAGES, 2e-6).mean(), GOLDEN[f"flow_factory_guard/{name}/loss"])


def test_grpo_guard_removes_the_bias():
    generator = torch.Generator().manual_seed(0)
    old_mean, noise, moved = (torch.randn(64, 500, generator=generator).double() for _ in range(3))
    mean, std = old_mean + 0.01 * moved, 0.05
    x = old_mean + std * noise
    new, old = (gaussian_log_prob(x, m, std) for m in (mean, old_mean))
    log_ratio = guard_ratio(new, old, mean, old_mean, std).log()
    close(log_ratio, (noise * (mean - old_mean)).mean(1), atol=1e-12)
    assert abs(log_ratio.mean()) < 4 * log_ratio.std() / 8
    assert (new - old).mean() < -4 * (new - old).std() / 8


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.00, 2.0, -2.0, -2.0),  # inside the range: plain policy gradient
        (1.00, -2.0, 2.0, 2.0),
        (1.05, 2.0, -2.1, -2.0),
        (1.20, 2.0, -2.2, 0.0),  # rose enough: clipped
        (1.20, -2.0, 2.4, 2.0),  # rose though it should fall: pulled back
        (0.80, 2.0, -1.6, -2.0),  # fell though it should rise: pulled back
        (0.80, -2.0, 1.8, 0.0),  # fell enough: clipped
        (1.20, 0.0, 0.0, 0.0),
    ],
)
def test_clip_by_hand(ratio, advantage, loss, gradient):
    given = torch.tensor([ratio], requires_grad=True)
    found = clipped_surrogate(given, torch.tensor([advantage]), 0.1)
    (slope,) = torch.autograd.grad(found.sum(), given)
    close(found, torch.tensor([loss]))
    close(slope, torch.tensor([gradient]))


def test_gradient_at_ratio_1_is_the_policy_gradient():
    generator = torch.Generator().manual_seed(0)
    mean, noise = torch.randn(2, 5, 3, 4, 4, generator=generator).unbind()
    advantages, std = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0]), 0.4
    x, mean = mean + std * noise, mean.requires_grad_()
    log_probs = gaussian_log_prob(x, mean, std)
    loss = clipped_policy_loss(log_probs, log_probs.detach(), advantages, 1e-4)
    close(loss, -advantages, atol=0)
    loss.sum().backward()
    close(mean.grad, -advantages[:, None, None, None] * (x - mean.detach()) / (std**2 * 48))
