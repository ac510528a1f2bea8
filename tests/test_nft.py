"""DiffusionNFT: its loss against the authors' numbers, where it leads, and which network calls it makes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flowalign.advantages import group_advantages
from flowalign.gradient_plans import LastSteps
from flowalign.models.gaussian import GaussianModel
from flowalign.randomness import key_generator
from flowalign.records import Scores
from flowalign.schedules import linear
from flowalign.transitions import ODE
from tests.jobs import nft_job, rows
from tests.test_flow_grpo import law, level, nothing
from tests.test_shipped_configs import resolved
from trainers import Checkpoints, Evaluation, GridTimes, Optimizer, Sampling
from trainers.forward_advantages import on_policy, rising_late, rising_to_half, rising_to_three_tenths
from trainers.forward_steps import Noised
from trainers.forward_times import StratifiedTimes
from trainers.nft import DiffusionNFT, binary, both_signs, negative_only, nft_loss, one_only, optimality, positive_only
from trainers.preflight import inspect
from trainers.preflight.geometry import floor_rows, geometry, looked_at, spent_rows
from trainers.state import State

STEPS, DIMS = 5, 4
GOLDEN = Path(__file__).parent / "golden"
INPUTS = load_file(GOLDEN / "matching_inputs.safetensors") | load_file(GOLDEN / "matching_velocities.safetensors")
RECORDED = load_file(GOLDEN / "matching_losses.safetensors")
MODES = {
    "None": both_signs,
    "positive_only": positive_only,
    "negative_only": negative_only,
    "one_only": one_only,
    "binary": binary,
}


def recorded_input(r: Tensor, kl: float) -> Noised:
    """What the authors' functions were given, as a trainer has it; `v_new` with gradient."""
    t = INPUTS["t"].view(-1, 1, 1, 1)
    noised = (1 - t) * INPUTS["x0"] + t * INPUTS["noise"]
    velocity = INPUTS["v_new"].clone().requires_grad_()
    reference = INPUTS["v_ref"] if kl else None
    return Noised(velocity, INPUTS["noise"] - INPUTS["x0"], noised, INPUTS["t"], r, reference, INPUTS["v_old"])


def settings(folder: Path, updates: int = 1, epochs: int = 1, groups: int = 2, size: int = 8) -> dict[str, Any]:
    """On the closed form, whose policy can be every Gaussian of alike elements."""
    return {
        "model": GaussianModel(dims=DIMS, grid=linear(STEPS)), "prompts": ["x"],
        "sampling": Sampling(
            groups=groups, group_size=size, batch_size=8, rows_per_call=4096, steps=STEPS, guidance_scale=1.0
        ),
        "optimizer": Optimizer(0.02, weight_decay=0.0, max_grad_norm=1e3, ema_decay=0.0),
        "updates_per_epoch": updates, "times": GridTimes(STEPS), "checkpoints": Checkpoints(minutes=0),
        "folder": str(folder), "epochs": epochs,
    }  # fmt: skip


def trainer(folder: Path, updates: int = 1, epochs: int = 1, **changes: Any) -> DiffusionNFT:
    return DiffusionNFT(**{"reward": level, **settings(folder, updates, epochs), **changes})


@pytest.mark.parametrize(("beta", "kl", "mode"), [*itertools.product((0.1, 1.0), (0.0, 0.0001), MODES)])
def test_the_authors_numbers(beta, kl, mode, tmp_path):
    key = f"nft/beta{beta}/kl{kl}/{mode}"
    made = trainer(tmp_path, beta=beta, kl_coef=kl, mode=MODES[mode])
    r = optimality(INPUTS["advantages"], made.mode, made.adv_clip)
    torch.testing.assert_close(r, RECORDED[f"{key}/r"], atol=1e-7, rtol=0)
    noised = recorded_input(r, kl)
    assert noised.older is not None
    plain = nft_loss(noised.velocity, noised.older, noised.target, noised.sigma, r, beta)
    torch.testing.assert_close(plain.double(), RECORDED[f"{key}/per_sample"], atol=1e-6, rtol=0)
    loss = made.loss(noised).mean()
    torch.testing.assert_close(loss.double(), RECORDED[f"{key}/loss"], atol=1e-6, rtol=0)
    loss.backward()
    assert noised.velocity.grad is not None
    torch.testing.assert_close(
        noised.velocity.grad.flatten(1).norm(dim=1), RECORDED[f"{key}/grad_norm"], atol=1e-8, rtol=1e-5
    )
    if f"{key}/grad" in RECORDED:
        torch.testing.assert_close(noised.velocity.grad[:, ::4, ::4, ::4], RECORDED[f"{key}/grad"], atol=1e-8, rtol=0)


def gradient_at_the_older(r: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Of the loss, and of the error alone over its mean magnitude."""
    older, target, t = INPUTS["v_old"], INPUTS["noise"] - INPUTS["x0"], INPUTS["t"]
    velocity = older.clone().requires_grad_()
    nft_loss(velocity, older, target, t, r, beta).sum().backward()
    assert velocity.grad is not None
    off = (t.view(-1, 1, 1, 1) * (older - target)).flatten(1)
    plain = 2 * t[:, None] * off / off.shape[1] / off.abs().mean(1, keepdim=True)
    return velocity.grad.flatten(1), plain


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_where_both_policies_are_the_same_the_gradient_is_the_error_s_times_two_r_less_one(beta):
    """Whatever beta is: it cancels there."""
    r = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.6, 0.75, 0.9, 1.0])
    found, plain = gradient_at_the_older(r, beta)
    torch.testing.assert_close(found, (2 * r - 1)[:, None] * plain, atol=1e-8, rtol=1e-5)


def test_a_mean_sample_has_no_gradient_there():
    found, plain = gradient_at_the_older(torch.full((8,), 0.5), 1.0)
    assert found.abs().max() < 1e-8 < 1e-5 < plain.abs().max()


def test_modes_and_optimality_by_hand():
    advantages = torch.tensor([-9.0, -2.5, 0.0, 1.0, 9.0])
    expected = {
        both_signs: [0, 0.25, 0.5, 0.6, 1],
        positive_only: [0.5, 0.5, 0.5, 0.6, 1],
        negative_only: [0, 0.25, 0.5, 0.5, 0.5],
        one_only: [0.5, 0.5, 0.5, 0.6, 0.6],
        binary: [0.4, 0.4, 0.5, 0.6, 0.6],
    }
    for mode, found in expected.items():
        assert optimality(advantages, mode, 5.0).tolist() == pytest.approx(found)


def test_the_authors_decays():
    at = (0, 1, 75, 76, 100, 300, 500, 2000)
    assert [on_policy(step) for step in at] == [0] * 8
    assert [rising_to_half(step) for step in at] == pytest.approx([0, 0.001, 0.075, 0.076, 0.1, 0.3, 0.5, 0.5])
    assert [rising_late(step) for step in at] == pytest.approx([0, 0, 0, 0.0075, 0.1875, 0.999, 0.999, 0.999])
    assert [rising_to_three_tenths(step) for step in at] == pytest.approx([0, 0.001, 0.075, 0.076, 0.1, 0.3, 0.3, 0.3])


def half(step: int) -> float:
    return 0.5


@pytest.mark.parametrize("decay", [on_policy, half])
def test_the_mean_moves_to_where_the_reward_is_higher_and_back_for_its_opposite(decay, tmp_path):
    def lower(media: Any, prompts: Any) -> Tensor:
        return -level(media, prompts)

    ends = []
    for sign, reward in (("up", level), ("down", lower)):
        optimizer = Optimizer(0.05, weight_decay=0.0, max_grad_norm=1e3, ema_decay=0.0)
        made = trainer(tmp_path / sign, 2, 3, reward=reward, decay=decay, kl_coef=0.0, optimizer=optimizer)
        made.train(report=False)
        assert isinstance(made.model, GaussianModel)
        ends.append(law(made.model, ODE())[0])
    assert ends[0] > 0.05
    assert ends[1] < -0.05
    told = [row["reward"] for row in rows(tmp_path / "up") if "reward" in row]
    assert told[-1] > told[0]


def test_equal_rewards_move_nothing_from_where_both_policies_are_the_same(tmp_path):
    made = trainer(tmp_path, 1, 3, reward=nothing, decay=on_policy, optimizer=Optimizer(0.1, eps=1.0, ema_decay=0.0))
    made.train(report=False)
    assert max(float(value.detach().abs().max()) for value in made.model.trainable().values()) < 1e-6


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize(("updates", "decay", "older"), [(1, on_policy, 0), (2, on_policy, 4), (2, half, 6)])
def test_the_older_policy_and_the_reference_are_called_only_where_they_are_needed(updates, decay, older, kl, tmp_path):
    """Over two epochs of 16 samples in steps of 16 or 8: none of the older policy's where it is the policy itself."""
    made = trainer(tmp_path, updates, 2, decay=decay, kl_coef=kl)
    made.train(report=False)
    told = [row for row in rows(tmp_path) if "loss" in row]
    rolled, noised = 16 * STEPS, 16 * STEPS
    expected = 2 * rolled + older * noised // 4 + 2 * noised * (kl > 0)
    if updates == 2 and decay is half:  # the first epoch starts with both the same
        assert [row["rows/forward"] for row in told] == [
            rolled + noised // 2 + noised * (kl > 0), rolled + noised + noised * (kl > 0)
        ]  # fmt: skip
    assert sum(row["rows/forward"] for row in told) == expected
    assert sum(row["rows/gradient"] for row in told) == 2 * noised
    for row, epoch in zip(told, looked_at(made), strict=True):
        assert (row["rows/forward"], row["rows/gradient"]) == (row["floor/forward"], row["floor/gradient"])
        assert floor_rows(made, epoch) == spent_rows(made, epoch, geometry(made))
        assert ("kl" in row) == (kl > 0)


def test_leaving_the_older_policy_s_call_out_changes_no_bit(tmp_path, monkeypatch):
    ends = []
    for name in ("left out", "made"):
        made = nft_job(tmp_path / name, evaluation=Evaluation(), epochs=1, decay=on_policy)
        if name == "made":
            monkeypatch.setattr(DiffusionNFT, "reads_older", lambda self, epoch, part: True)
        made.train(report=False)
        ends.append({key: value.detach().clone() for key, value in made.model.trainable().items()})
    told = [[row["rows/forward"] for row in rows(tmp_path / name) if "loss" in row] for name in ("left out", "made")]
    assert all(few < many for few, many in zip(*told, strict=True))
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_the_older_policy_is_a_mixture_and_draws_the_samples(tmp_path, monkeypatch):
    made = trainer(tmp_path, 2, 3, decay=half, kl_coef=0.0)
    kept, drawn = list[dict[str, Tensor]](), list[dict[str, Tensor]]()
    renewed, begin = made.renewed, made.collection.begin

    def renew() -> dict[str, Tensor]:
        kept.append(made.optimizer.snapshot())
        return renewed()

    def draw(*given: Any) -> Any:
        drawn.append(made.optimizer.snapshot())
        return begin(*given)

    monkeypatch.setattr(made, "renewed", renew)
    monkeypatch.setattr(made.collection, "begin", draw)
    made.train(report=False)
    expected, each = torch.zeros(STEPS + 1), len(drawn) // 3
    for epoch, now in enumerate(kept):
        torch.testing.assert_close(drawn[epoch * each]["bias"], expected, atol=1e-7, rtol=0)
        expected = 0.5 * expected + 0.5 * now["bias"]
    assert torch.equal(made.state.older["bias"], expected)
    assert not torch.equal(made.state.older["bias"], kept[-1]["bias"])


def test_a_check_of_a_run_leaves_it_as_it_was_and_tells_equal_scores(tmp_path):
    made = trainer(tmp_path / "run", 2, 3, decay=half)
    found = inspect(made, tmp_path / "out")
    assert not found.errors, found.problems
    assert found.trial is not None
    assert found.trial.learning.grad_norm > 0
    assert [spent.forward for spent, _ in found.rows] == [16 * STEPS * one // 2 for one in (5, 6, 6)]
    assert made.state == State()
    flat = trainer(tmp_path / "flat", reward=nothing)
    texts = [one.text for one in inspect(flat, tmp_path / "flat out").problems]
    assert any(text.startswith("the first group has nothing to learn from") for text in texts)


def test_credit_is_of_valid_samples(tmp_path):
    made = trainer(tmp_path, advantages=group_advantages, on_invalid="drop")
    total = torch.tensor([0.0, 1.0] * 8)
    scores = Scores(total, {}, torch.tensor([True] * 14 + [False] * 2))
    units = made.units(made.collection.epoch(0), scores)
    assert units.credit.tolist() == pytest.approx([0.4, 0.6] * 7 + [0.0] * 2)
    assert units.weights.tolist() == [1.0] * 14 + [0.0] * 2


def test_strata_have_a_point_each():
    grid = [1 - i / 14 for i in range(14)]
    seen = [StratifiedTimes(6, 1, 0.9).draw(key_generator(0, "x", i), [], grid) for i in range(200)]
    found = [sorted({grid.index(one[stratum]) for one in seen}) for stratum in range(6)]
    assert found == [[1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    whole = [StratifiedTimes(6, 0, 0.9).draw(key_generator(0, "x", i), [], grid) for i in range(200)]
    assert [sorted({grid.index(one[k]) for one in whole}) for k in range(6)] == [[2 * k, 2 * k + 1] for k in range(6)]
    with pytest.raises(ValueError, match="6 strata of points 1 to 3 of a rollout's 5"):
        StratifiedTimes(6, 1, 0.9).draw(key_generator(0, "x"), [], grid[:5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "beta and adv_clip must be positive, got 0.0"),
        ({"adv_clip": -1.0}, "beta and adv_clip must be positive"),
        ({"kl_coef": -1.0}, "kl_coef must be at least 0"),
        ({"decay": lambda step: 1.5}, r"decay must lie in \[0, 1\], and is 1.5 after 1 optimizer steps"),
        ({"sampling": Sampling(group_size=1)}, "group_size must be at least 2: an advantage compares the samples"),
        ({"sampling": Sampling(LastSteps(1))}, "says where a reward's gradient flows; DiffusionNFT looks at where"),
        ({"times": GridTimes(9)}, "times.draws is 9, but a rollout has 5 points to choose from"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changes)


@pytest.mark.parametrize(
    ("short", "updates", "beta", "decay"),
    [("pickscore", 1, 1.0, "rising_to_half"), ("geneval", 1, 1.0, "rising_to_half"), ("ocr", 2, 0.1, "rising_late")],
)
def test_published_settings(short, updates, beta, decay):
    config = resolved(f"nft/sd3.5_{short}.yaml")
    assert (config["updates_per_epoch"], config["beta"], config["kl_coef"]) == (updates, beta, 1e-4)
    assert config["decay"] == f"trainers.forward_advantages.{decay}"
    assert (config["times"]["draws"], config["adv_clip"], config["guidance_scale"]) == (9, 5.0, 1.0)
    assert [config["sampling"][key] for key in ("groups", "group_size", "steps", "guidance_scale")] == [48, 24, 10, 1.0]
    optimizer = config["optimizer"]
    assert (optimizer["learning_rate"], optimizer["ema_decay"], optimizer["ema_every"]) == (3e-4, 0.9, 1)


def test_guidance_asks_for_the_unconditional_half_of_each_policy(tmp_path):
    sampling = Sampling(groups=3, group_size=3, batch_size=2, rows_per_call=2, steps=3, guidance_scale=2.0)
    made = nft_job(tmp_path, guidance_scale=2.0, decay=half, sampling=sampling)
    assert made.update_rows(3, older=True).forward == 3 * made.times.draws * (1 + 2 * made.needs_reference() + 2)
    assert made.update_rows(3).forward == 3 * made.times.draws * (1 + 2 * made.needs_reference())
    assert made.sampling.guidance_scale == 2.0
