"""The meter against what the network itself sees, and phases against the clock."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny import randomise_policy, tiny_sd3

from flowalign.accounting import Meter, Rows
from flowalign.models.sd3 import SD3
from flowalign.records import Condition, Media, Prompts
from flowalign.rollout import Policy, replay, rollout
from flowalign.schedules import AllSteps, FanOut, Plan, linear
from flowalign.transitions import FlowSDE
from trainers import FlowGRPO, Sampling

PROMPTS = ("a red circle", "two blue squares", "three green stars")


class Watched:
    """A tiny SD3 whose transformer keeps account of its own calls: rows, and whether they carry gradient."""

    def __init__(self) -> None:
        self.model = SD3(tiny_sd3(), max_sequence_length=12)
        self.calls: list[tuple[int, bool]] = []
        self.model.module.register_forward_hook(lambda module, inputs, output: self._saw(output[0]))

    def _saw(self, velocity: torch.Tensor) -> None:
        self.calls.append((len(velocity), velocity.requires_grad))

    def batch(self) -> tuple[torch.Tensor, float, Condition]:
        return torch.randn(3, *self.model.latent_shape), 0.5, self.model.encode(PROMPTS)

    def rows(self) -> Rows:
        """Since the last check."""
        return sum((Rows(0, number) if gradient else Rows(number, 0) for number, gradient in self.calls), Rows())

    def check(self, rows: Rows) -> None:
        """What the meter has counted since the last check is what the network saw, and is `rows`."""
        calls, counted, _ = self.model.meter.take()
        assert calls == Counter("gradient" if gradient else "forward" for _, gradient in self.calls)
        assert counted == self.rows() == rows
        self.calls.clear()


def test_rows_of_velocity() -> None:
    watched = Watched()
    model, batch = watched.model, watched.batch()
    with torch.no_grad():
        model.velocity(*batch)
        watched.check(Rows(3, 0))
        model.velocity(*batch, guidance_scale=4.5)
        assert len(watched.calls) == 1, "guidance doubles the batch, not the calls"
        watched.check(Rows(6, 0))
    model.velocity(*batch)
    watched.check(Rows(0, 3))
    model.velocity(*batch, guidance_scale=4.5)
    watched.check(Rows(0, 6))


def test_rows_of_velocity_split() -> None:
    watched = Watched()
    model, batch = watched.model, watched.batch()
    model.velocity_split(*batch)
    watched.check(Rows(0, 3))
    model.velocity_split(*batch, guidance_scale=4.5)
    assert watched.calls == [(3, True), (3, False)]
    watched.check(Rows(3, 3))
    model.velocity_split(*batch, guidance_scale=4.5, unconditional_grad=True)
    watched.check(Rows(0, 6))
    with torch.no_grad():
        model.velocity_split(*batch, guidance_scale=4.5, unconditional_grad=True)
        watched.check(Rows(6, 0))


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_the_reference_makes_the_policys_calls(guidance: float) -> None:
    """So that a policy that has not moved is at no distance from it, not even that of rounding."""
    watched = Watched()
    model, policy = watched.model, Policy(guidance)
    latents, _, condition = watched.batch()
    path = AllSteps(FlowSDE(0.7)).resolve(3, epoch=0, seed=0)
    step = rollout(model, condition, latents, linear(3), path, policy, lambda step: torch.randn_like(latents)).steps[1]
    with torch.no_grad():
        still = replay(model, step, FlowSDE(0.7), condition, policy)
        with model.reference():
            assert torch.equal(replay(model, step, FlowSDE(0.7), condition, policy).velocity, still.velocity)
        randomise_policy(model)
        assert (replay(model, step, FlowSDE(0.7), condition, policy).mean - still.mean).abs().max() > 1e-3
        model.meter.take()
        watched.calls.clear()
        with model.reference():
            assert torch.equal(replay(model, step, FlowSDE(0.7), condition, policy).velocity, still.velocity)
    watched.check(Rows(3 if guidance == 1 else 6, 0))
    assert all(parameter.requires_grad for parameter in model.trainable().values())


def spread(media: Media, prompts: Prompts) -> torch.Tensor:
    return media.pixels.flatten(1).std(1)


@pytest.mark.parametrize(
    ("plan", "guidance", "kl", "rows"),
    [
        # 4 samples; 4 steps, 3 of them trained: rollout 16, update 12, reference 12; all but the update twice if guided
        (AllSteps(FlowSDE(0.7)), 1.0, 0.0, Rows(16, 12)),
        (AllSteps(FlowSDE(0.7)), 1.0, 0.04, Rows(16 + 12, 12)),
        (AllSteps(FlowSDE(0.7)), 4.5, 0.0, Rows(2 * 16 + 12, 12)),
        (AllSteps(FlowSDE(0.7)), 4.5, 0.04, Rows(2 * 16 + 12 + 2 * 12, 12)),
        # 2 groups share step 0 and its one network row, then 4 samples 3 ODE steps; only step 0 is trained
        (FanOut(FlowSDE(0.7)), 4.5, 0.04, Rows(2 * (2 + 12) + 2 + 2 * 2, 2)),
    ],
)
def test_an_epoch_makes_the_rows_its_maths_need(
    tmp_path: Path, plan: Plan, guidance: float, kl: float, rows: Rows
) -> None:
    watched = Watched()
    trainer = FlowGRPO(
        watched.model,
        spread,
        PROMPTS,
        Sampling(plan, groups=2, group_size=2, batch_size=2, rows_per_call=2, steps=4, guidance_scale=guidance),
        kl_coef=kl,
        step_fraction=0.75,
        updates_per_epoch=1,
        folder=str(tmp_path / "run"),
    )
    batch = trainer.collect(0)
    trainer.update(batch)
    epoch = trainer.collection.epoch(0)
    assert watched.rows() == trainer.state.rows == rows
    assert trainer.collection.needed(epoch, trainer.trained_steps, trainer.needs_reference()) == rows


def test_cost() -> None:
    assert (Rows(5, 1) + Rows(2, 3)).cost == 7 + 3 * 4


def test_a_moment_belongs_to_one_phase() -> None:
    meter, started = Meter(), time.perf_counter()
    with meter.phase("update"):
        time.sleep(0.01)
        with meter.phase("reference"):
            time.sleep(0.05)
        time.sleep(0.01)
    time.sleep(0.1)  # no one's
    with meter.phase("update"):
        time.sleep(0.01)
    elapsed = time.perf_counter() - started
    _, _, seconds = meter.take()
    assert seconds["reference"] >= 0.05
    assert seconds["update"] >= 0.03
    assert sum(seconds.values()) <= elapsed - 0.1


def test_a_phase_that_fails_is_closed() -> None:
    meter = Meter()

    @meter.phase("update")
    def fails() -> None:
        time.sleep(0.01)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fails()
    assert meter.take()[2]["update"] >= 0.01
    time.sleep(0.01)
    assert not meter.take()[2]


def test_take_starts_again_and_leaves_phases_open() -> None:
    meter, started = Meter(), time.perf_counter()
    with meter.phase("rollout"):
        meter.network(3)
        meter.count("decode")
        time.sleep(0.02)
        calls, rows, first = meter.take()
        assert (calls, rows) == (Counter(gradient=1, decode=1), Rows(0, 3))
        time.sleep(0.01)
    calls, rows, second = meter.take()
    assert (calls, rows) == (Counter(), Rows())
    assert first["rollout"] >= 0.02
    assert second["rollout"] >= 0.01
    assert first["rollout"] + second["rollout"] <= time.perf_counter() - started
    assert meter.take() == (Counter(), Rows(), {})
