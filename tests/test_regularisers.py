"""Chi-squared against its integral, coefficients by their rule, a renewed reference, and the supervised branch."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.divergences import chi_squared
from flowalign.models.gaussian import GaussianModel
from flowalign.randomness import key_generator, key_noise
from flowalign.records import Interval, Media, Prompts
from flowalign.rollout import Replay
from flowalign.schedules import AllSteps, linear
from flowalign.transitions import FlowSDE, exact_kl, mean_of_elements, sum_of_elements, velocity_mse_kl
from flowalign.trees import Tree
from tests.jobs import rows
from trainers import DenseGRPO, FlowGRPO, Optimizer, Sampling, UniformTimes
from trainers.raft import best_of_each
from trainers.regularisers import BandCoefficient, ProportionalCoefficient, Refresh
from trainers.supervised import Supervised
from trainers.tree_grpo import TreeGRPO
from trainers.update import Update

SDE = FlowSDE(0.7)
INTERVAL = Interval(3, 0.6, 0.48, 0.9)
PER_STEP = Sampling(AllSteps(SDE, last_step=False), 4, 4, 16, 64, 3, 1.0)


def close(actual: Tensor, expected: Any, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected).double(), atol=0, rtol=rtol)


@pytest.mark.parametrize("std", [0.3, 1.7])
def test_chi_squared_is_the_integral_of_the_squared_ratio(std):
    """E_q[(p / q)^2] - 1 of p at `mean` and q at `ref`; of two elements the product of both."""
    mean, ref = torch.tensor([[0.4, -0.1]]).double(), torch.tensor([[0.1, 0.3]]).double()
    x, p, q = torch.linspace(-30, 30, 120_001).double(), list[Tensor](), list[Tensor]()
    for at in range(2):
        for found, centre in ((p, mean), (q, ref)):
            found.append((-((x - centre[0, at]) ** 2) / (2 * std**2)).exp() / (std * math.sqrt(2 * math.pi)))
    squares = [torch.trapezoid((one / other.clamp(min=1e-300)) * one, x) for one, other in zip(p, q, strict=True)]
    found = chi_squared(mean, ref, mean, ref, std, INTERVAL, sum_of_elements)
    close(found, [(squares[0] * squares[1] - 1).item()], 1e-6)
    one, other = mean[:, :1], ref[:, :1]
    single = chi_squared(one, other, one, other, std, INTERVAL, mean_of_elements)
    close(single, [(squares[0] - 1).item()], 1e-6)


@pytest.mark.parametrize("reduce", [mean_of_elements, sum_of_elements])
def test_near_the_reference_chi_squared_is_twice_the_kl_and_pulls_there(reduce):
    ref = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)).double()
    mean = (ref + 1e-4).requires_grad_()
    both = [kl(mean, ref, mean, ref, 0.3, INTERVAL, reduce) for kl in (chi_squared, exact_kl)]
    close(both[0], 2 * both[1], 1e-5)
    assert (both[0] > 2 * both[1]).all()
    (gradient,) = torch.autograd.grad(both[0].sum(), mean)
    assert (gradient > 0).all()
    far = chi_squared(ref + 1, ref, ref, ref, 0.3, INTERVAL, mean_of_elements)
    close(far, [math.expm1(1 / 0.09)] * 3, 1e-6)
    with pytest.raises(ValueError, match=r"std is 0\.0"):
        chi_squared(ref, ref, ref, ref, 0.0, INTERVAL, reduce)


def test_coefficients_follow_their_rule():
    band = BandCoefficient(0.1, target=0.02)
    found = [0.1]
    for kl in (0.02, 0.031, 0.05, 0.03, 0.0134, 0.0133, 0.0):
        found.append(band.moved(found[-1], kl))
    assert found == pytest.approx([0.1, 0.1, 0.2, 0.4, 0.4, 0.4, 0.2, 0.1])
    assert BandCoefficient(0.1, 0.02, band=1.0, factor=1.5).moved(0.1, 0.021) == pytest.approx(0.15)
    slow = ProportionalCoefficient(0.1, target=0.02)
    moved = [slow.moved(0.1, kl) for kl in (0.02, 0.022, 0.5, 0.019, 0.0)]
    assert moved == pytest.approx([0.1, 0.101, 0.102, 0.0995, 0.098])


def level(media: Media, prompts: Prompts) -> Tensor:
    return media.pixels[:, 0, 0, 0]


def trainer(folder: Path, sampling: Sampling = PER_STEP, kind: type[FlowGRPO] = FlowGRPO, **changes: Any) -> FlowGRPO:
    settings: dict[str, Any] = {
        "optimizer": Optimizer(0.05, weight_decay=0.0, ema_decay=0.5, ema_every=1),
        "updates_per_epoch": 1,
        "reduce": sum_of_elements,
        "epochs": 4,
        "folder": str(folder),
    }
    return kind(GaussianModel(grid=linear(3)), level, ["x", "y"], sampling, **settings | changes)


def replayed(mean: Tensor) -> Replay:
    return Replay(torch.zeros(len(mean)), mean, mean, 0.5)


@pytest.mark.parametrize(
    "control", [BandCoefficient(0.1, 0.01), ProportionalCoefficient(0.1, 0.01, gain=0.5, most=1.0)]
)
def test_a_run_s_coefficient_follows_the_kl_that_it_logs_and_multiplies_it(control, tmp_path):
    run = trainer(tmp_path / "run", kl_coef=control, refresh=Refresh(3))
    run.train(report=False)
    told = [(row["kl_coef"], row["kl"]) for row in rows(tmp_path / "run") if "kl_coef" in row]
    assert told[0] == (0.1, 0.0)
    assert len({coefficient for coefficient, _ in told}) > 2
    for (before, kl), (after, _) in zip(told, told[1:], strict=False):
        assert after == pytest.approx(control.moved(before, kl), rel=1e-12)
    assert run.kl_coef == run.state.kl_coef == pytest.approx(control.moved(*told[-1]), rel=1e-12)
    new, nothing = replayed(torch.ones(2, 1)), torch.zeros(2)
    loss = run.loss(new, nothing, nothing, replayed(torch.zeros(2, 1)), INTERVAL)
    close(loss, [run.kl_coef / (2 * 0.25)] * 2, 1e-6)


def with_nothing_to_learn(run: FlowGRPO) -> dict[str, float]:
    """An epoch's update by its KL alone."""
    batch = run.collect(9)
    return run.update(replace(batch, advantages=torch.zeros_like(batch.advantages)))


@pytest.mark.parametrize("kl", [chi_squared, velocity_mse_kl])
def test_a_renewed_reference_has_no_kl_and_no_gradient(kl, tmp_path):
    run, same, averaged = (
        trainer(tmp_path / name, kl=kl, kl_coef=1.0, refresh=refresh, epochs=2)
        for name, refresh in (("a", Refresh(2)), ("b", Refresh()), ("c", Refresh(2, average=True)))
    )
    for one in (run, same, averaged):
        one.train(report=False)
        for name, value in one.model.trainable().items():
            assert torch.equal(value, run.model.trainable()[name])  # two epochs without a difference
    assert {name: one.tolist() for name, one in run.state.older.items()} == {
        name: value.tolist() for name, value in run.model.trainable().items()
    }
    assert not same.state.older
    assert all(torch.equal(averaged.state.older[name], value) for name, value in averaged.optimizer.average.items())
    found = [with_nothing_to_learn(one) for one in (run, same, averaged)]
    assert (found[0]["kl"], found[0]["grad_norm"]) == (0, 0)
    assert found[1]["kl"] > found[2]["kl"] > 0
    assert found[1]["grad_norm"] > 0


def test_a_reference_is_renewed_every_so_many_epochs(tmp_path):
    run = trainer(tmp_path / "run", kl_coef=0.1, refresh=Refresh(2), epochs=4)
    run.train(report=False)
    seen = [row["kl"] for row in rows(tmp_path / "run") if "kl" in row]
    assert seen[0] == seen[2] == 0
    assert min(seen[1], seen[3]) > 0


# The supervised branch


def gradient(run: FlowGRPO, batch: Any) -> dict[str, Tensor]:
    """Of the first optimizer step."""
    update = Update(run, batch, None)
    run.state.part = 0
    kept = update._accumulate(update._parts(run.updates_per_epoch)[0], update._watch())
    found = {name: value.grad.clone() for name, value in run.model.trainable().items() if value.grad is not None}
    run.optimizer.discard()
    return found | {"loss": torch.tensor(kept.get("supervised", 0.0))}


SHARED = Sampling(AllSteps(SDE, shared_noise=True), 4, 4, 2, 64, 3, 1.0)
TREES = Sampling(Tree(SDE, (0, 2), (2, 2)), 4, 4, 2, 64, 3, 1.0)


@pytest.mark.parametrize(
    ("sampling", "kind"),
    [(PER_STEP, FlowGRPO), (replace(PER_STEP, batch_size=3), FlowGRPO), (SHARED, FlowGRPO), (TREES, TreeGRPO)],
    ids=["one", "odd", "shared", "trees"],
)
def test_the_branch_is_the_matching_loss_of_each_group_s_best(sampling, kind, tmp_path):
    """Against the formula, from the samples themselves; what else there is, advantages of 0 leave out."""
    branch = Supervised(0.5, best_of_each, UniformTimes(draws=2))
    run = trainer(tmp_path / "run", sampling, kind, kl_coef=0.0, supervised=branch)
    batch = run.collect(0)
    flat = replace(batch, advantages=torch.zeros_like(batch.advantages))
    found = gradient(run, flat)
    best = batch.scores.total.view(4, 4).argmax(1) + 4 * torch.arange(4)
    assert torch.equal(torch.cat(batch.latents)[best][:, 0], batch.scores.total[best])
    table, losses = run.model.train_sigmas(), []
    for sample in best.tolist():
        clean = batch.scores.total[sample].view(1, 1)
        times = branch.times.draw(key_generator(run.seed, "supervised_times", 0, sample), table, table)
        for draw, sigma in enumerate(times):
            noise = key_noise(run.seed, "supervised", 0, sample, draw, shape=(1, 1))
            noised = (1 - sigma) * clean + sigma * noise
            made = run.model.velocity(noised, sigma, run.model.encode([""]))
            losses.append((made - (noise - clean)).square().mean())
    mean = torch.stack(losses).mean()
    expected = torch.autograd.grad(0.5 * mean, [*run.model.trainable().values()])
    for name, value in zip(run.model.trainable(), expected, strict=True):
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
    assert found["loss"] == pytest.approx(mean.item(), rel=1e-5)
    # it is added to what is there without it
    both, bare = gradient(run, batch), gradient(trainer(tmp_path / "b", sampling, kind, kl_coef=0.0), batch)
    for name in run.model.trainable():
        torch.testing.assert_close(both[name], bare[name] + found[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "sampling"),
    [(FlowGRPO, replace(PER_STEP, batch_size=2)), (DenseGRPO, replace(PER_STEP, batch_size=2)), (TreeGRPO, TREES)],
)
def test_the_branch_costs_its_calls_and_nothing_by_default(kind, sampling, tmp_path):
    ends = []
    for name, branch in (("off", None), ("on", Supervised(0.1, times=UniformTimes(draws=3)))):
        run = trainer(tmp_path / name, sampling, kind, kl_coef=0.0, supervised=branch, epochs=1,
                      updates_per_epoch=2)  # fmt: skip
        run.train(report=False)
        (row,) = (row for row in rows(tmp_path / name) if "rows/gradient" in row)
        assert (row["rows/forward"], row["rows/gradient"]) == (row["floor/forward"], row["floor/gradient"])
        ends.append(row)
    assert ends[1]["rows/gradient"] - ends[0]["rows/gradient"] == 4 * 3
    assert "supervised" in ends[1]
    assert "supervised" not in ends[0]
    assert ends[1]["reward"] == ends[0]["reward"]


def test_nothing_of_a_group_of_equals_is_imitated(tmp_path):
    run = trainer(tmp_path / "run", kl_coef=0.0, supervised=Supervised(1.0))
    batch = run.collect(0)
    equal = replace(batch, scores=replace(batch.scores, total=torch.zeros(16)))
    found = gradient(run, replace(equal, advantages=torch.zeros(16)))
    assert found.keys() == {"loss"}
    assert found["loss"].isnan()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_coef": 0.0, "refresh": Refresh(5)}, "kl_coef is 0: no loss reads it"),
        (
            {"refresh": Refresh(5, average=True), "optimizer": Optimizer(ema_decay=0.0)},
            "optimizer.ema_decay is 0: there are none",
        ),
        ({"supervised": Supervised(0.1), "updates_per_epoch": 5}, "4 groups are fewer than its 5 optimizer steps"),
    ],
)
def test_what_cannot_work_together_is_refused(changes, message, tmp_path):
    settings = {"kl_coef": 0.1, "updates_per_epoch": 2} | changes
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "run", **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BandCoefficient(0.0, 0.1), "start and BandCoefficient.target must be positive"),
        (lambda: BandCoefficient(0.1, 0.1, factor=1.0), "factor above 1"),
        (lambda: ProportionalCoefficient(0.1, 0.0), "must be positive"),
        (lambda: ProportionalCoefficient(0.1, 0.1, gain=2.0, most=0.5), "product below 1"),
        (lambda: Refresh(-1), "refresh.every must be at least 0"),
        (lambda: Refresh(0, average=True), "refresh.every is 0"),
        (lambda: Supervised(0.0), "without the branch leave it out"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
