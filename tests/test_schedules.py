"""Grids against diffusers, plans against what they promise."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flowalign.schedules import (
    AllSteps,
    ChosenSteps,
    FanOut,
    RandomSteps,
    ShiftedLinear,
    Window,
    flow_match_euler,
    linear,
    shifted,
)
from flowalign.transitions import CPS, ODE, FlowSDE

SDE = FlowSDE(0.7)


@pytest.mark.parametrize("steps", [1, 2, 4, 10, 28, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.5])
def test_flow_match_euler_is_the_table_of_diffusers(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(torch.tensor(flow_match_euler(steps, shift)), scheduler.sigmas, atol=1e-6, rtol=0)


def test_grids_by_hand():
    assert linear(4) == [1, 0.75, 0.5, 0.25, 0]
    assert shifted([1.0, 0.5, 0.0], 3.0) == [1, 0.75, 0]
    assert shifted(linear(7), 1.0) == linear(7)
    # Undone by the inverse shift.
    torch.testing.assert_close(shifted(shifted(linear(7), 3.0), 1 / 3), linear(7))
    # Shifts multiply: what a scheduler of shift 3 makes of this grid.
    torch.testing.assert_close(shifted(ShiftedLinear(5 / 3)(7), 3.0), shifted(linear(7), 5.0))
    sd3 = [1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0.0]
    torch.testing.assert_close(flow_match_euler(10, 3.0), sd3, atol=5e-5, rtol=0)


def test_bad_grids_raise():
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        linear(0)
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        flow_match_euler(0, 3.0)
    with pytest.raises(ValueError, match="shift must be positive, got 0"):
        shifted([1.0, 0.0], 0.0)
    with pytest.raises(ValueError, match="shift must be positive, got 0"):
        ShiftedLinear(0.0)


def test_all_steps():
    path = AllSteps(SDE).resolve(3, epoch=0, seed=0)
    assert path.transitions == (SDE, SDE, SDE)
    assert path.branch is None
    assert path.stochastic == (0, 1, 2)
    path = AllSteps(SDE, last_step=False, shared_noise=True).resolve(3, epoch=0, seed=0)
    assert path.transitions == (SDE, SDE, ODE())
    assert path.branch == 0
    assert path.stochastic == (0, 1)
    with pytest.raises(ValueError, match="none of 1"):
        AllSteps(SDE, last_step=False).resolve(1, epoch=0, seed=0)


def test_window():
    path = Window(CPS(0.5), start=1, length=2).resolve(5, epoch=3, seed=0)
    assert path.transitions == (ODE(), CPS(0.5), CPS(0.5), ODE(), ODE())
    assert path.branch is None
    assert Window(SDE, start=1, length=2, shared_noise=True).resolve(5, epoch=3, seed=0).branch == 1
    assert Window(SDE, start=3, length=2).resolve(5, epoch=0, seed=0).stochastic == (3, 4)
    with pytest.raises(ValueError, match=r"step 5 .* of 5 steps"):
        Window(SDE, start=4, length=2).resolve(5, epoch=0, seed=0)


def test_chosen_steps():
    path = ChosenSteps(SDE, (4, 0), shared_noise=True).resolve(6, epoch=0, seed=0)
    assert path.stochastic == (0, 4)
    assert path.branch == 0
    assert ChosenSteps(SDE, (4, 2)).resolve(6, epoch=9, seed=1).branch is None
    for bad in (-1, 6):
        with pytest.raises(ValueError, match=f"step {bad} .* of 6 steps"):
            ChosenSteps(SDE, (0, bad)).resolve(6, epoch=0, seed=0)
    with pytest.raises(ValueError, match="at least one"):
        ChosenSteps(SDE, ()).resolve(6, epoch=0, seed=0)


def test_random_steps_are_keyed_by_seed_and_epoch():
    plan = RandomSteps(SDE, count=2)
    drawn = [plan.resolve(10, epoch, seed=0).stochastic for epoch in range(300)]
    assert drawn == [plan.resolve(10, epoch, seed=0).stochastic for epoch in range(300)]
    assert drawn != [plan.resolve(10, epoch, seed=1).stochastic for epoch in range(300)]
    assert all(len(set(steps)) == 2 for steps in drawn)
    # Each step is chosen with probability 2/10: 60 of 300 epochs, standard deviation 7.
    counts = [sum(step in steps for steps in drawn) for step in range(10)]
    assert all(32 < count < 88 for count in counts)


def test_random_steps_keep_their_bounds():
    plan = RandomSteps(SDE, count=3, last_step=False, shared_noise=True)
    for epoch in range(50):
        path = plan.resolve(4, epoch, seed=0)
        assert path.stochastic == (0, 1, 2)
        assert path.branch == 0
    shared = RandomSteps(SDE, count=1, shared_noise=True)
    assert all((p := shared.resolve(8, e, seed=0)).stochastic == (p.branch,) for e in range(20))
    with pytest.raises(ValueError, match="count is 4, but a rollout of 4 steps has 3"):
        RandomSteps(SDE, count=4, last_step=False).resolve(4, epoch=0, seed=0)
    with pytest.raises(ValueError, match="count is 0"):
        RandomSteps(SDE, count=0).resolve(4, epoch=0, seed=0)


def test_fan_out_takes_its_steps_in_turn():
    plan = FanOut(SDE, steps=(0, 1, 3))
    paths = [plan.resolve(4, epoch, seed=0) for epoch in range(5)]
    assert [path.branch for path in paths] == [0, 1, 3, 0, 1]
    assert paths[1].transitions == (ODE(), SDE, ODE(), ODE())
    assert all(path.stochastic == (path.branch,) for path in paths)


def test_fan_out_checks_all_its_steps_at_once():
    with pytest.raises(ValueError, match=r"step 4 .* of 4 steps"):
        FanOut(SDE, steps=(0, 4)).resolve(4, epoch=0, seed=0)
    with pytest.raises(ValueError, match="empty"):
        FanOut(SDE, steps=()).resolve(4, epoch=0, seed=0)
