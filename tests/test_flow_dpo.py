"""Flow-DPO: its loss against closed forms and Diffusion-DPO's own, what counts and what does not, and whole runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flowalign.advantages import best_and_worst
from flowalign.cli import main
from flowalign.gradient_plans import LastSteps
from flowalign.models import SD3, StableDiffusion, Wan
from flowalign.models.alpha_table import norm
from flowalign.models.gaussian import GaussianModel
from flowalign.preferences import best_and_worst as best_and_worst_media
from flowalign.preferences.folder import make_pairs
from flowalign.preferences.making import Maker, Settings
from flowalign.randomness import key_generator
from flowalign.records import Media, Prompts, Scores
from flowalign.rollout import Policy
from flowalign.transitions import mean_of_elements, sum_of_elements
from rewards.base import FunctionReward
from tests.families import CASES, ddim, tiny_sd
from tests.jobs import PREFERRED, PROMPTS, dpo_job, pairs_job, redness, rows
from tests.tiny import randomise_policy, tiny_sd3
from tests.tiny_wan import tiny_wan
from trainers import (
    Evaluation,
    FlowDPO,
    GridTimes,
    LogitNormalTimes,
    Margin,
    Optimizer,
    Pairs,
    Sampling,
    UniformTimes,
)
from trainers.flow_dpo import constant, dpo_loss, implicit_rewards, of_noise
from trainers.forward_steps import ForwardSteps, Noised, Units
from trainers.forward_times import Times
from trainers.held_out_pairs import held_out_leads
from trainers.pair_trainer import best_and_worst_unless_equal
from trainers.preflight import inspect, page
from trainers.preflight.geometry import geometry, looked_at, spent_rows

GOLDEN = load_file(Path(__file__).parent / "golden" / "advantages.safetensors")
TABLE, GRID = [1 - i / 1000 for i in range(1000)], [1.0, 0.75, 0.5, 0.25]


def seen(pairs: int, off: float) -> Noised:
    """Noised pairs with velocities that are off their target by normal numbers, the policy's and the reference's."""
    rng = torch.Generator().manual_seed(1)
    target, velocity, reference = (torch.randn(2 * pairs, 4, 3, 3, generator=rng) for _ in range(3))
    sigma = torch.rand(pairs, generator=rng).repeat(2)
    policy = (reference + off * velocity).requires_grad_()
    return Noised(policy, target, torch.randn(2 * pairs, 4, 3, 3), sigma, torch.zeros(pairs), reference)


def lead(noised: Noised, **more: Any) -> Tensor:
    settings: dict[str, Any] = {"beta": 100.0, "weighting": constant, "reduce": mean_of_elements}
    best, worst = implicit_rewards(noised, **settings | more).chunk(2)
    return best - worst


def test_a_policy_that_is_its_reference_has_loss_log_2_and_a_gradient() -> None:
    noised = seen(5, 0.0)
    losses = dpo_loss(lead(noised), noised.credit)
    torch.testing.assert_close(losses, torch.full((5,), math.log(2)))
    losses.sum().backward()
    # -log sigmoid(z) has slope -1/2 at 0, and z rises as the preferred sample's error falls
    error = 2 * (noised.velocity - noised.target).detach() / 36
    signs = torch.tensor([1.0] * 5 + [-1.0] * 5).view(-1, 1, 1, 1)
    torch.testing.assert_close(noised.velocity.grad, 0.5 * 50 * signs * error)
    assert noised.velocity.grad.abs().max() > 0.1


def test_swapping_a_pair_flips_its_lead() -> None:
    noised = seen(5, 0.3)
    turned = [torch.cat([*one.chunk(2)][::-1]) for one in (noised.velocity, noised.target, noised.reference)]
    swapped = replace(noised, velocity=turned[0], target=turned[1], reference=turned[2])
    torch.testing.assert_close(lead(swapped), -lead(noised))
    assert lead(noised).abs().min() > 0.01
    both = dpo_loss(lead(noised), noised.credit), dpo_loss(lead(swapped), noised.credit)
    torch.testing.assert_close(both[1] - both[0], lead(noised))  # log sigmoid(z) - log sigmoid(-z) = z


def test_flow_grpo_s_loss_number_by_number() -> None:
    noised = seen(3, 0.5)
    target, policy, reference = (
        one.detach().double().numpy().reshape(6, -1) for one in (noised.target, noised.velocity, noised.reference)
    )
    error, known = ((policy - target) ** 2).mean(1), ((reference - target) ** 2).mean(1)
    inside = -0.5 * 100 * ((error[:3] - known[:3]) - (error[3:] - known[3:]))
    np.testing.assert_allclose(dpo_loss(lead(noised), noised.credit).detach(), np.log1p(np.exp(-inside)), rtol=1e-5)


def test_sums_are_means_with_beta_divided_by_the_elements() -> None:
    noised = seen(3, 0.5)
    torch.testing.assert_close(lead(noised, beta=100 / 36, reduce=sum_of_elements), lead(noised))


def test_modpo_s_margin() -> None:
    ahead, gap = torch.tensor([0.3, -0.2, 1.0]), torch.tensor([2.0, 0.5, -1.0])
    torch.testing.assert_close(dpo_loss(ahead, gap, 1.0), dpo_loss(ahead, torch.zeros(3)))
    wanted = -torch.log(torch.sigmoid(ahead / 0.25 - 3 * gap))  # (1 - w) / w = 3
    torch.testing.assert_close(dpo_loss(ahead, gap, 0.25), wanted)
    # an objective that prefers the same sample asks for a greater lead, as part of the reason is not this one's
    assert (dpo_loss(ahead, gap + 1, 0.25) > dpo_loss(ahead, gap, 0.25)).all()
    torch.testing.assert_close(dpo_loss(0.75 * gap, gap, 0.25), torch.full((3,), math.log(2)))


def online(model: Any, folder: Path, **changes: Any) -> FlowDPO:
    settings: dict[str, Any] = {
        "reward": redness,
        "prompts": PROMPTS,
        "sampling": Sampling(groups=2, group_size=3, batch_size=4, steps=10, guidance_scale=1.0),
        "folder": str(folder),
    }
    return FlowDPO(model, **settings | changes)


def test_of_an_eps_model_it_is_diffusion_dpo(tmp_path) -> None:
    """At weight (1 - t)^2: against the UNet's own eps, at a timestep of its own for each pair."""
    model = StableDiffusion(tiny_sd(ddim())())
    randomise_policy(model)
    trainer = online(model, tmp_path, beta=5000.0, weighting=of_noise)
    times = [3, 400, 950]
    sigmas = torch.tensor([float(model.table.sigmas[time]) for time in times], dtype=torch.float64).repeat(2)
    clean, noise = torch.randn(6, 4, 16, 16), torch.randn(3, 4, 16, 16).repeat(2, 1, 1, 1)
    told = model.encode(["a red circle", "a star", "two stars"]).rows(torch.arange(3).repeat(2))
    with torch.no_grad():
        noised = trainer.see(clean, noise, sigmas, told, torch.zeros(3))
    assert noised.reference is not None
    scale = torch.tensor([norm(float(sigma)) for sigma in sigmas]).view(-1, 1, 1, 1)

    @torch.no_grad()
    def error() -> Tensor:
        given = {"encoder_hidden_states": told.prompt_embeds, "return_dict": False}
        return (model.call(noised.noised / scale, torch.tensor(times * 2), **given)[0] - noise).square().mean((1, 2, 3))

    policy = error()
    with model.reference():
        known = error()
    better = known - policy
    torch.testing.assert_close(trainer.lead(noised), 2500 * (better[:3] - better[3:]), atol=2e-2, rtol=1e-3)
    assert trainer.lead(noised).abs().min() > 0.5
    torch.testing.assert_close(noised.clean, clean, atol=1e-5, rtol=0)


SOME = [case for case in CASES if case.name in ("sd3", "sd1.5 ddim", "sd2.1 v", "wan", "flux dev", "z-image")]


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_rows_of_several_sigmas_are_rows_of_one_each(case) -> None:
    """One call of a batch, against a call a row; and the table that times are drawn from is the network's own."""
    model = case.adapt(case.make(), **{**case.options, **case.sizes[0]})
    randomise_policy(model)
    table = model.train_sigmas()
    assert len(table) == 1000
    assert 1 >= table[0] > table[1] > table[-1] > 0
    sigmas = torch.tensor([table[i] for i in (40, 700, 400)], dtype=torch.float64)
    latents, told = torch.randn(3, *model.latent_shape), model.encode(["a star", "a red circle", ""])
    for scale in (1.0, case.guided):
        model.meter.take()
        made = model.velocity_rows(latents, sigmas, told, scale)
        calls, _, _ = model.meter.take()
        assert sum(calls.values()) == model.calls(scale, 0.5)
        alone = [
            model.velocity_split(latents[i : i + 1], float(sigmas[i]), told.rows(torch.tensor([i])), scale)
            for i in range(3)
        ]
        torch.testing.assert_close(made, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_the_table_of_a_flow_model_is_its_scheduler_s_own() -> None:
    model = SD3(tiny_sd3(), max_sequence_length=0)
    known = model.pipeline.scheduler.sigmas[:-1] if len(model.pipeline.scheduler.sigmas) > 1000 else None
    wanted = model.pipeline.scheduler.sigmas if known is None else known
    torch.testing.assert_close(torch.tensor(model.train_sigmas()), wanted.float())


def drawn(times: Times, count: int = 4000) -> np.ndarray:
    return np.array([times.draw(key_generator(0, "law", i), TABLE, GRID) for i in range(count)]).flatten()


def test_the_laws_of_times() -> None:
    even = drawn(UniformTimes())
    assert abs(even.mean() - 0.5) < 0.02
    assert abs(even.std() - 12**-0.5) < 0.01
    for mean, std in ((0.0, 1.0), (1.0, 0.5)):
        logit = np.log(drawn(LogitNormalTimes(mean, std)) - 0.0005)
        logit -= np.log(1.0005 - np.exp(logit))
        assert abs(np.median(logit) - mean) < 0.05
        assert abs(logit.std() - std) < 0.05
    assert {*drawn(GridTimes(4), 3)} == {*GRID}
    assert drawn(GridTimes(2), 1).tolist() == sorted(drawn(GridTimes(2), 1), reverse=True)
    assert drawn(UniformTimes(3), 5).shape == (15,)
    for law, message in ((lambda: UniformTimes(0), "times.draws"), (lambda: LogitNormalTimes(std=0.0), "times.std")):
        with pytest.raises(ValueError, match=message):
            law()
    with pytest.raises(ValueError, match="but a rollout has 4 points to choose from"):
        drawn(GridTimes(5), 1)


def grouped(trainer: FlowDPO, rewards: list[float], valid: list[bool] | None = None) -> Units:
    total = torch.tensor(rewards).float()
    known = torch.tensor([True] * len(rewards) if valid is None else valid)
    return trainer.units(trainer.collection.epoch(0), Scores(total, {"beside": total.square()}, known))


def test_the_best_and_the_worst_of_a_group_are_a_pair_unless_they_are_equal(tmp_path) -> None:
    trainer = online(GaussianModel(), tmp_path, sampling=Sampling(groups=3, group_size=3, batch_size=4))
    units = grouped(trainer, [1, 3, 2, 5, 5, 5, 0, 9, 4], [True, True, True, True, True, True, True, False, True])
    assert units.samples[[0, 2]].tolist() == [[1, 0], [8, 6]]
    assert units.weights.tolist() == [1, 0, 1]
    alone = grouped(trainer, [1, 3, 2, 5, 6, 7, 0, 9, 4], [True, False, False, True, True, True, False, False, False])
    assert alone.weights.tolist() == [0, 1, 0]
    trainer.part = "beside"
    assert grouped(trainer, [1, 3, 2, 5, 5, 5, 0, 1, 4]).credit.tolist() == [8, 0, 16]
    trainer.part = "clip"
    with pytest.raises(ValueError, match=r"margin\.part 'clip' is no part of the scores, which have \['beside'\]"):
        grouped(trainer, [1, 3, 2, 5, 5, 5, 0, 1, 4])


def test_flow_grpo_s_pairs_are_those_that_its_code_has_made(tmp_path) -> None:
    """Recorded labels of 20 samples, of which a group of equals has a pair there and none by default here."""
    order, labels = GOLDEN["group"].argsort(stable=True), GOLDEN["flow_grpo/type=dpo"]
    sampling = Sampling(groups=5, group_size=4, batch_size=4)
    rewards = GOLDEN["reward1"][order].tolist()
    theirs = online(GaussianModel(), tmp_path, sampling=sampling, pairing=best_and_worst)
    units = grouped(theirs, rewards)
    assert units.weights.tolist() == [1] * 5
    assert (labels[order][units.samples] == torch.tensor([1.0, -1.0])).all()
    ours = grouped(online(GaussianModel(), tmp_path, sampling=sampling), rewards)
    assert ours.weights.tolist() == [1, 1, 0, 1, 1]
    assert torch.equal(ours.samples[[0, 1, 3, 4]], units.samples[[0, 1, 3, 4]])


def gradient(trainer: FlowDPO, epoch: int, chosen: list[int], weights: Tensor | None = None) -> list[Tensor]:
    """Of one optimizer step of some of an epoch's units."""
    at = trainer.collection.epoch(epoch)
    units = trainer.units(at, trainer.source.draw(at, None))
    units = units if weights is None else replace(units, weights=weights)
    trainer.optimizer.discard()
    steps = ForwardSteps(trainer, at, units, None)
    steps._accumulate(torch.tensor(chosen), steps._watch())
    return [value.grad.clone() for value in trainer.model.trainable().values() if value.grad is not None]


def test_ties_and_invalid_pairs_change_no_bit_of_the_gradient(tmp_path) -> None:
    trainer = pairs_job(tmp_path / "run", sampling=Sampling(groups=7, group_size=2, batch_size=4, steps=3))
    randomise_policy(trainer.model)
    epoch = trainer.collection.epoch(0)
    units = trainer.units(epoch, trainer.source.draw(epoch, None))
    decided = [i for i, number in enumerate(epoch.prompts) if number not in (2, 4)]
    assert [i for i in range(7) if units.weights[i] > 0] == decided
    assert units.weights[epoch.prompts.index(3)] == 2
    whole, without = (gradient(trainer, 0, chosen) for chosen in ([*range(7)], decided))
    assert max(float(one.abs().max()) for one in whole) > 1e-3
    assert all(torch.equal(one, other) for one, other in zip(whole, without, strict=True))
    # and they would, if they counted
    counted = gradient(trainer, 0, [*range(7)], units.weights.clamp(min=0.5))
    assert not all(torch.equal(one, other) for one, other in zip(whole, counted, strict=True))


def test_a_gradient_does_not_depend_on_how_pairs_are_cut_into_calls(tmp_path) -> None:
    found = []
    for size in (2, 4, 14):
        trainer = pairs_job(tmp_path / "run", sampling=Sampling(groups=7, group_size=2, batch_size=size, steps=3))
        randomise_policy(trainer.model)
        found.append(gradient(trainer, 0, [*range(7)]))
    for other in found[1:]:
        assert max(float((a - b).abs().max()) for a, b in zip(found[0], other, strict=True)) < 1e-5
    assert max(float(one.abs().max()) for one in found[0]) > 1e-2


def test_both_of_a_pair_get_one_noise_and_one_sigma_and_the_preferred_one_comes_first(tmp_path) -> None:
    trainer = pairs_job(tmp_path / "run", sampling=Sampling(groups=7, group_size=2, batch_size=14, steps=3))
    epoch, found = trainer.collection.epoch(0), list[Noised]()
    real = trainer.loss

    def kept(noised: Noised) -> Tensor:
        found.append(noised)
        return real(noised)

    trainer.loss = kept  # type: ignore[method-assign]
    gradient(trainer, 0, [*range(7)])
    (noised,) = found
    first, second = ([*one.chunk(2)] for one in (noised.sigma, noised.noised))
    assert torch.equal(*first)
    noise = (noised.target + noised.clean).chunk(2)
    torch.testing.assert_close(noise[0], noise[1], atol=1e-5, rtol=1e-5)
    assert not torch.equal(*second)
    numbers = [number for number in epoch.prompts if number not in (2, 4)]
    best, worst = trainer.source.pairs.rows(numbers).ordered()  # type: ignore[attr-defined]
    torch.testing.assert_close(noised.clean[:5], best, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(noised.clean[7:12], worst, atol=1e-5, rtol=1e-5)


def height(media: Media, prompts: Prompts) -> Tensor:
    return media.pixels[:, 0, 0, 0]


def test_pairs_of_a_normal_law_labelled_by_its_variable_move_its_mean_up(tmp_path) -> None:
    """Samples of the reference N(0, 1), labelled by r = x: the policy gets new pairs right, and its mean rises."""
    model = GaussianModel()
    sampling = Sampling(groups=64, group_size=2, batch_size=128, steps=10, guidance_scale=1.0)
    trainer = FlowDPO(
        model, None, height, ["x"] * 64, sampling, Optimizer(2e-2, weight_decay=0.0, ema_decay=0.0), epochs=12,
        updates_per_epoch=2, beta=2.0, times=UniformTimes(), sample_reference=True, folder=str(tmp_path / "run"),
    )  # fmt: skip
    trainer.train(report=False)
    epochs = rows(tmp_path / "run")
    assert np.mean([row["accuracy"] for row in epochs[-4:]]) > 0.9
    assert epochs[-1]["lead"] > 0.2
    assert abs(np.mean([row["reward"] for row in epochs])) < 0.1  # of the reference, which stays as it was
    start, grid = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0)), model.sigmas(10)
    means = []
    for reference in (False, True):
        latents = start
        for sigma, after in zip(grid, grid[1:], strict=False):
            with torch.no_grad(), model.reference() if reference else torch.no_grad():
                latents = latents + (after - sigma) * model.velocity(latents, sigma, model.encode(["x"] * 2000))
        means.append(float(latents.mean()))
    assert means[0] > 0.2
    assert abs(means[1]) < 0.05


def test_a_reference_that_is_renewed_is_the_policy_and_samples_come_from_it_if_asked(tmp_path) -> None:
    """After each epoch: the first loss of the next one is log 2 again, and its samples are the policy's."""
    gentle = Optimizer(3e-3, ema_decay=0.0)
    settings = {"epochs": 2, "evaluation": Evaluation(), "optimizer": gentle, "updates_per_epoch": 1}
    found: dict[int, list[dict[str, Any]]] = {}
    for refresh in (0, 1):
        dpo_job(tmp_path / str(refresh), refresh=refresh, sample_reference=True, **settings).train(report=False)
        found[refresh] = rows(tmp_path / str(refresh))
    assert found[0][0] == found[1][0]
    assert found[0][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found[1][1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found[0][1]["loss"] != pytest.approx(math.log(2), abs=1e-4)
    assert found[0][1]["reward/redness/raw"] != found[1][1]["reward/redness/raw"]


def test_stored_pairs_alone_are_a_run_whose_best_policy_gets_most_of_the_held_out_right(tmp_path) -> None:
    """No prompts, no reward: judged by the implicit reward's accuracy, 1/2 where the policy is its reference."""
    folder = tmp_path / "run"
    trainer = pairs_job(folder, evaluation=Evaluation(every=1), updates_per_epoch=2)
    trainer.train()
    first, *later = (row for row in rows(folder) if "held-out" in row)
    assert (first["held-out"], first["held-out/pair_lead"]) == (0.5, 0.0)
    assert max(row["held-out"] for row in later) > 0.7
    assert all(row["held-out"] == row["held-out/pair_accuracy"] for row in later)
    told = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["time/evaluation"] > 0 for row in told if "held-out" in row)
    assert (folder / "report.html").is_file()
    assert json.loads((folder / "best.json").read_text())["held-out"] == max(row["held-out"] for row in later)
    epochs = [row for row in rows(folder) if "loss" in row]
    assert all(row["pairs"] + row["ties"] + row["invalid"] == 5 for row in epochs)
    assert sum(row["ties"] for row in epochs) == 2
    assert sum(row["invalid"] for row in epochs) == 2  # of 15 pairs taken out of seven


def test_rows_are_counted_as_a_check_says(tmp_path) -> None:
    """Online and from stored pairs, where ties and what is not valid take no call."""
    sampling = Sampling(groups=5, group_size=4, batch_size=6, steps=10, guidance_scale=1.0)
    settings = {"reward": height, "sampling": sampling, "epochs": 1}
    trainers = {
        "online": online(GaussianModel(), tmp_path / "online", updates_per_epoch=2, **settings),
        "stored": pairs_job(tmp_path / "stored", evaluation=Evaluation(), epochs=1),
    }
    for name, trainer in trainers.items():
        made = inspect(trainer, tmp_path / f"{name} out")
        assert made.errors == 0
        assert made.trial is not None
        assert made.trial.learning.grad_norm > 0
        assert "noised anew" in page(made)
        assert not (tmp_path / name).exists()
        assert trainer.state.buffer == {}
        epoch, cut = looked_at(trainer)[0], geometry(trainer)
        spent = spent_rows(trainer, epoch, cut)
        trainer.train(report=False)
        (row,) = (row for row in rows(tmp_path / name) if "loss" in row)
        assert (row["rows/forward"], row["rows/gradient"]) <= (spent.forward, spent.gradient)
        if name == "online":
            assert (row["rows/forward"], row["rows/gradient"]) == (spent.forward, spent.gradient)


def test_a_check_counts_what_held_out_pairs_take(tmp_path) -> None:
    """The rows that judging them makes, at the price of those of the update."""
    trainer = pairs_job(tmp_path / "run", evaluation=Evaluation())
    trial = inspect(trainer, tmp_path / "out").trial
    assert trial is not None
    price = trial.learning.seconds_per_step / trainer.update_rows(trainer.units_per_call()).cost
    trainer.model.meter.take()
    assert held_out_leads(trainer, trainer.held_out_pairs, trainer.lead, lambda done, all_of_them: False) is not None
    _, made, _ = trainer.model.meter.take()
    assert made.forward > 0
    assert trainer.preflight().judged_beside(trial, 1) == pytest.approx(made.forward * price)


def pictures_of_pairs(model: Any, folder: Path, count: int = 3) -> str:
    told = Prompts(tuple(PROMPTS[:count]), ({},) * count)
    reward = FunctionReward(lambda media, prompts: media.pixels.flatten(1).double().std(1).float())
    return str(make_pairs(Maker(model, reward, told, Settings(2, 1.0, best_and_worst_media, 2)), folder, {}))


def test_pairs_of_videos_end_to_end(tmp_path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        pipe = tiny_wan()
    model = Wan(pipe, height=32, width=32, frames=5, max_sequence_length=12)
    pairs = Pairs(pictures_of_pairs(model, tmp_path / "pairs"), cache=str(tmp_path / "cache"))
    sampling = Sampling(groups=3, group_size=2, batch_size=4, rows_per_call=4, steps=2, guidance_scale=1.0)
    trainer = FlowDPO(
        model, pairs, sampling=sampling, optimizer=Optimizer(1e-2, ema_every=1), epochs=2, folder=str(tmp_path / "run")
    )
    trainer.train(report=False)
    found = rows(tmp_path / "run")
    assert found[0]["loss"] == pytest.approx(math.log(2))
    assert found[0]["grad_norm"] > 0
    assert found[1]["loss"] < found[0]["loss"]
    assert (tmp_path / "run" / "lora").is_dir()


def test_the_embedded_world_from_pairs_that_the_command_makes(tmp_path, capsys) -> None:
    (tmp_path / "prompts.txt").write_text("a white circle\ntwo cyan triangles\na small red star\na blue square\n")
    made = ["prefer", "shapes", "--prompts", str(tmp_path / "prompts.txt"), "--steps", "2", "--guidance-scale", "1"]
    made += ["--reward", "rewards.JPEGIncompressibility", "--samples", "2", "--out", str(tmp_path / "pairs")]
    assert main([*made, "--model.max_sequence_length", "0"]) == 0
    words = [
        "--pairs.preferences", str(tmp_path / "pairs" / "pairs.jsonl"), "--pairs.held_out",
        str(tmp_path / "pairs" / "pairs.jsonl"), "--pairs.cache", str(tmp_path / "cache"), "--epochs", "2",
        "--sampling.groups", "4", "--sampling.batch_size", "4", "--evaluation.prompts", "null",
        "--optimizer.decay", "0", "--folder", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(["train", "flow_dpo/shapes", *words]) == 0
    epochs = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["pairs"] for row in epochs] == [4, 4]
    assert epochs[0]["loss"] == pytest.approx(math.log(2))
    capsys.readouterr()
    for more, message in (
        (["--betta", "3"], "unknown key 'betta' in FlowDPO; did you mean 'beta'?"),
        (["--pairs.preferences", "none.jsonl"], "none.jsonl is no file or folder"),
        (["--prompts", "x.txt"], "x.txt"),
    ):
        assert main(["train", "flow_dpo/shapes", *more]) == 2
        assert message in capsys.readouterr().err


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"beta": 0.0}, "beta must be positive"),
    ({"reward": None}, "give it either pairs, or prompts and reward"),
    ({"prompts": None, "reward": None}, "give it either pairs, or prompts and reward"),
    ({"pairs": Pairs(str(PREFERRED))}, "give it either pairs, or prompts and reward"),
    ({"sampling": Sampling(group_size=2, batch_size=3)}, "batch_size counts samples, two of each pair: 3 is odd"),
    ({"sampling": Sampling(LastSteps(1), group_size=2)}, r"plan is LastSteps, which says where a reward's gradient"),
    ({"updates_per_epoch": 3}, r"updates_per_epoch must lie in 1 \.\.\. 2"),
]
WRONG_PAIRS: list[tuple[dict[str, Any], str]] = [
    ({"sampling": Sampling(group_size=4)}, "group_size is 4, but pairs are groups of two; set it to 2"),
    ({"evaluation": Evaluation(PROMPTS)}, r"need a reward to be scored by: give evaluation\.reward"),
    ({"pairing": best_and_worst}, "stored pairs are pairs already"),
    ({"margin": Margin(0.5, "clip")}, "scores of stored pairs, which are called 'score', not 'clip'"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_wrong_settings(changes, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        online(GaussianModel(), tmp_path, **changes)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("changes", "message"), WRONG_PAIRS, ids=[message[:40] for _, message in WRONG_PAIRS])
def test_wrong_settings_of_stored_pairs(changes, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        pairs_job(tmp_path, **changes)


def test_pairs_without_scores_have_no_margin(tmp_path) -> None:
    lines = [json.loads(line) for line in PREFERRED.read_text().splitlines()]
    plain = PREFERRED.with_name("plain.jsonl")
    plain.write_text("\n".join(json.dumps({k: v for k, v in row.items() if k != "scores"}) for row in lines))
    pairs = Pairs(str(plain), cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="margin reads the scores of stored pairs, and 5 of 5 have none"):
        pairs_job(tmp_path / "run", pairs=pairs, margin=Margin())
    scored = pairs_job(tmp_path / "run", margin=Margin())
    epoch = scored.collection.epoch(0)
    credit = scored.units(epoch, scored.source.draw(epoch, None)).credit
    wanted = {0: 0.0 - 0.3, 1: 0.3 - 0.1, 2: 0, 3: 0.3 - 0.3, 4: 0, 5: 0.3 - 0.5, 6: 0.6 - 0.3}
    assert credit.tolist() == pytest.approx([wanted[number] for number in epoch.prompts], abs=1e-6)
    for weight in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"margin\.weight must lie in \(0, 1\]"):
            Margin(weight)


def test_ties_alone_are_refused(tmp_path) -> None:
    lines = [json.loads(line) | {"label": "tie"} for line in PREFERRED.read_text().splitlines()]
    ties = PREFERRED.with_name("ties.jsonl")
    ties.write_text("\n".join(json.dumps(row) for row in lines))
    with pytest.raises(ValueError, match="none of the 7 pairs is decided"):
        pairs_job(tmp_path / "run", pairs=Pairs(str(ties), cache=str(tmp_path / "cache")))


def test_what_is_not_valid_stops_or_is_left_out(tmp_path) -> None:
    def half(media: Media, prompts: Prompts) -> Tensor:
        return redness(media, prompts).where(torch.tensor(prompts.groups) > 0, torch.nan)

    settings = {"reward": half, "epochs": 1, "evaluation": Evaluation()}
    with pytest.raises(ValueError, match=r"3 of 12 scores of epoch 0 are not valid; mend the reward"):
        dpo_job(tmp_path / "stop", **settings).train(report=False)
    dpo_job(tmp_path / "drop", on_invalid="drop", **settings).train(report=False)
    (row,) = rows(tmp_path / "drop")
    assert (row["invalid"], row["pairs"], row["ties"]) == (3, 3, 0)
    dpo_job(tmp_path / "groups", on_invalid="drop_group", **settings).train(report=False)
    assert [row["invalid"] for row in rows(tmp_path / "groups")] == [3]


def test_a_loss_that_is_not_finite_is_written_down_and_stops_the_run(tmp_path) -> None:
    trainer = pairs_job(tmp_path / "run", evaluation=Evaluation(), optimizer=Optimizer(1e-2, max_skipped=0))
    real = trainer.loss
    trainer.loss = lambda noised: real(noised) * torch.nan  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="had a loss or gradient that is not finite"):
        trainer.train(report=False)
    (told,) = (tmp_path / "run" / "non_finite").glob("*.jsonl")
    assert {json.loads(line)["prompt"] for line in told.open()} <= {*PROMPTS}
    held = load_file(told.with_suffix(".safetensors"))
    assert {value.shape for value in held.values()} == {(2, *trainer.model.latent_shape)}


def test_the_policy_that_compares_is_not_the_one_that_samples(tmp_path) -> None:
    """Samples are guided, velocities are not: a guided rollout row is two calls, a compared one is one."""
    trainer = dpo_job(tmp_path / "run")
    assert trainer.policy == Policy(2.0)
    assert trainer.update_rows(4).gradient == 4 * 2 * 2
    assert trainer.update_rows(4).forward == 4 * 2 * 2
    guided = dpo_job(tmp_path / "run", guidance_scale=2.0)
    assert guided.update_rows(4).gradient == 4 * 2 * 2
    assert guided.update_rows(4).forward == 3 * 4 * 2 * 2


def test_equal_groups_have_no_label() -> None:
    rewards, groups = torch.tensor([1.0, 1.0, 2.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1, 1])
    assert best_and_worst_unless_equal(rewards, groups).tolist() == [0, 0, 1, -1, 0]
