"""The preflight: what it counts is what a run takes, it leaves no trace, and every problem it names is one."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from flowalign.cli import main
from flowalign.models.sd3 import SD3
from flowalign.records import Media, Prompts, Scores
from flowalign.schedules import AllSteps, ChosenSteps, FanOut
from flowalign.transitions import CPS, FlowSDE, Reduce, TableSDE, sum_of_elements
from tests.jobs import JOBS, PROMPTS, job, redness, rows
from tests.test_context_parallel import PAIR
from tests.test_context_parallel import made as video_job
from tests.tiny import tiny_sd3
from trainers import Checkpoints, Evaluation, Optimizer, Sampling
from trainers.base import Trainer
from trainers.preflight import Preflight, checking, inspect, page, trial
from trainers.preflight.costs import Space, Times
from trainers.preflight.findings import of_costs
from trainers.preflight.folder import of_folder
from trainers.preflight.geometry import floor_rows, geometry, looked_at, planned_steps, spent_rows
from trainers.preflight.memory import predict
from trainers.preflight.policy import waited
from trainers.preflight.problems import of_settings
from trainers.state import State

SDE = FlowSDE(0.7)
SMALL = [
    "--epochs=3", "--optimizer.decay=3", "--sampling.groups=4", "--sampling.group_size=4", "--sampling.batch_size=4",
    "--sampling.steps=3", "--evaluation.every=1", "--evaluation.prompts.count=32", "--prompts.count=40",
]  # fmt: skip
FAST = Sampling(
    ChosenSteps(SDE, (0, 1)), groups=2, group_size=4, batch_size=4, rows_per_call=4, steps=3, guidance_scale=1.0
)


def check(folder: Path, *words: str) -> int:
    return main(["check", "flow_grpo/shapes", "--folder", str(folder), *SMALL, *words])


@pytest.fixture
def unpredicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what has nothing to do with the memory of a GPU, whose prediction takes most of a check of a tiny model."""
    monkeypatch.setattr(checking, "predict", lambda trainer, cut: None)


def sampled(**changes: Any) -> dict[str, Any]:
    return {"sampling": replace(FAST, **changes)}


def test_the_command_reports_and_leaves_the_run_folder_alone(tmp_path, capsys):
    assert check(tmp_path / "run") == 0
    shown = capsys.readouterr()
    heads = [line for line in shown.out.splitlines() if line and not line.startswith((" ", "warning"))]
    assert heads == [
        "model", "reward", "geometry of an epoch", "plan", "calls of an epoch", "tiny step", "time (an estimate)",
        "memory of a GPU (predicted)", "memory and disk", "no problems found",
    ]  # fmt: skip
    assert "exactly 1, as it has to be" in shown.out
    assert "FlowSDE(noise_level=1.0)" in shown.out
    assert "flowalign: building the trainer" in shown.err
    assert {path.name for path in tmp_path.iterdir()} == {"run-check"}
    assert {path.name for path in (tmp_path / "run-check").iterdir()} == {"first_group.png"}
    assert str(tmp_path / "run-check" / "first_group.png") in shown.out
    assert Image.open(tmp_path / "run-check" / "first_group.png").size[0] > 3 * 128


@pytest.mark.usefixtures("unpredicted")
def test_an_error_is_status_2_and_a_sheet_is_drawn_all_the_same(tmp_path, capsys):
    assert check(tmp_path / "run", "--evaluation.metric", "beauty", "--out", str(tmp_path / "here")) == 2
    shown = capsys.readouterr()
    assert (
        "error: evaluation.metric 'beauty' is no part of the evaluation's reward, which has clause/count" in shown.out
    )
    assert shown.err.splitlines()[-1] == "flowalign: error: 1 of the problems above would stop the run"
    assert (tmp_path / "here" / "first_group.png").is_file()


def test_a_launcher_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert check(tmp_path / "run") == 2
    assert "check is one process: start it without a launcher" in capsys.readouterr().err


def test_what_no_trainer_takes_is_one_line(tmp_path, capsys):
    assert check(tmp_path / "run", "--sampling.plan.steps", "[9]") == 2
    assert "step 9 is outside a rollout of 3 steps" in capsys.readouterr().err
    assert check(tmp_path / "run", "--out", str(tmp_path / "run" / "check")) == 2
    assert "lies in the run folder" in capsys.readouterr().err
    assert check(tmp_path / "run", "--processes", "0") == 2
    assert [*tmp_path.iterdir()] == []


PLANS = [
    {"kl_coef": 0.1, "sampling": Sampling(AllSteps(SDE), 3, 3, 2, 2, 3, 2.0), "updates_per_epoch": 2},
    {"kl_coef": 0.0, "sampling": Sampling(FanOut(SDE, (1, 0)), 3, 4, 2, 4, 3, 1.0), "updates_per_epoch": 2},
    {"kl_coef": 0.0, "sampling": Sampling(ChosenSteps(SDE, (1,), True), 5, 2, 3, 3, 3, 3.0), "updates_per_epoch": 1},
]


@pytest.mark.parametrize("changes", PLANS, ids=["all steps", "fan-out", "shared start"])
def test_counted_rows_are_those_of_the_run(changes, tmp_path):
    trainer = job(tmp_path / "run", **changes, evaluation=Evaluation(), epochs=2)
    cut, epochs = geometry(trainer), looked_at(trainer)
    trainer.train(report=False)
    for epoch, row in zip(epochs, rows(tmp_path / "run"), strict=True):
        spent, floor = spent_rows(trainer, epoch, cut), floor_rows(trainer, epoch)
        assert (spent.forward, spent.gradient) == (row["rows/forward"], row["rows/gradient"])
        assert (floor.forward, floor.gradient) == (row["floor/forward"], row["floor/gradient"])


def test_a_check_leaves_the_trainer_as_it_was_and_its_run_too(tmp_path):
    changes = PLANS[1] | {"evaluation": Evaluation(PROMPTS, every=2, pictures=0), "epochs": 2}
    trainer = job(tmp_path / "run", **changes)
    policy = {name: value.detach().clone() for name, value in trainer.model.trainable().items()}
    inspect(trainer, tmp_path / "out")
    assert all(torch.equal(value, policy[name]) for name, value in trainer.model.trainable().items())
    assert all(value.grad is None and value.requires_grad for value in trainer.model.trainable().values())
    assert trainer.state == State()
    assert not trainer.optimizer.adamw.state
    assert not (tmp_path / "run").exists()
    trainer.train(report=False)
    job(tmp_path / "unchecked", **changes).train(report=False)
    assert rows(tmp_path / "run") == rows(tmp_path / "unchecked")


@pytest.mark.usefixtures("unpredicted")
def test_the_first_group_is_the_runs_own(tmp_path):
    trainer = job(tmp_path / "run", **sampled(batch_size=3))
    made = inspect(trainer, tmp_path / "out").trial.rollouts
    batch = trainer.collect(0)
    assert len(made.scores) == 4  # one of two groups, out of two micro-batches of three rows
    assert torch.equal(made.scores.total, batch.scores.total[:4])
    assert made.batch.texts == batch.texts[:4]
    alone = trainer.credit(made.scores, torch.zeros(4, dtype=torch.int64))
    assert torch.equal(made.advantages, alone)
    assert made.repeatable


@pytest.mark.usefixtures("unpredicted")
@pytest.mark.parametrize("kind", ["flow_grpo", "draft"])
def test_what_keeping_pictures_takes_is_no_phase_of_the_run(kind, tmp_path, monkeypatch):
    clock, ahead = time.perf_counter, 0.0

    def slowly(pixels: Tensor) -> Tensor:
        nonlocal ahead
        ahead += 1000.0
        return pixels

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + ahead)
    monkeypatch.setattr(trial, "stills", slowly)
    made = inspect(JOBS[kind](tmp_path / "run"), tmp_path / "out").trial
    assert ahead > 0
    assert made.rollouts.seconds_per_score * len(made.rollouts.scores) < 500
    assert made.learning.seconds_per_step < 500


def test_shares_of_processes_add_up(tmp_path):
    trainer = job(tmp_path / "run", **sampled(groups=5, batch_size=3))  # 20 rows, 7 micro-batches
    for processes in (1, 2, 4, 8):
        cut = geometry(trainer, processes)
        assert sum(cut.shares) == 7
        assert len(cut.shares) == len(cut.update_shares) == processes
        assert max(cut.shares) - min(cut.shares) <= 1
    assert geometry(trainer).rollout_padding == pytest.approx(21 / 20 - 1)
    assert geometry(trainer).update_padding == pytest.approx(24 / 20 - 1)  # two steps of 10 rows: 4 calls each


def test_a_check_shares_work_out_to_groups(tmp_path):
    trainer = video_job(tmp_path / "run", PAIR)
    alone, cut = geometry(trainer), geometry(trainer, 4)
    assert (cut.processes, cut.callers, len(cut.shares)) == (4, 2, 2)
    assert (alone.processes, alone.callers) == (1, 1)
    assert cut.shares == replace(geometry(video_job(tmp_path / "other", None), 2), callers=2).shares
    found = inspect(trainer, tmp_path / "out", processes=4)
    one, four = predict(trainer, alone), found.memory
    assert one is not None
    assert four is not None
    assert four.needs.learning == one.needs.learning // 2
    assert four.needs.sampling == one.needs.sampling // 2
    assert (four.needs.weights, four.needs.decoding) == (one.needs.weights, one.needs.decoding)
    told = page(found)
    assert re.search(r"on 2 processes +groups of 2, 4 micro-batches each, busy 100 %", told)
    assert re.search(r"on 4 processes +groups of 2, 2 micro-batches each, busy 100 %", told)
    assert "on 2 groups of 2 processes, each as fast as this one" in told
    with pytest.raises(ValueError, match="2 processes make each call together, which does not divide 3"):
        geometry(trainer, 3)


SETTINGS: list[tuple[dict[str, Any], str]] = [
    (sampled(plan=AllSteps(CPS())), "error: step 2 is meant to be stochastic, but its noise has std 0"),
    (sampled(plan=AllSteps(SDE)), "warning: the last step is trained, and its noise is next to nothing (std 0.0063"),
    ({"clip_range": 2.0}, "warning: clip_range 2 will never act: reduce is the mean over a latent's 64 elements"),
    ({"reduce": sum_of_elements}, "warning: clip_range 0.001 clips nearly every sample after the first update"),
    (sampled(group_size=3), "warning: sampling.group_size 3 is small"),
    (sampled(groups=4), "warning: 3 prompts for 4 groups"),
    ({"prompts": [*PROMPTS, "z" * 39]}, "warning: 1 prompts are longer than the 40 tokens"),
    (sampled(groups=3, batch_size=12), "warning: 100 % of rows on top are padding in the update"),
    (sampled(rows_per_call=3), "warning: sampling.rows_per_call 3 is less than sampling.batch_size 4"),
    ({"optimizer": Optimizer(warmup=6, ema_every=1)}, "warning: optimizer.warmup 6 is not over"),
    ({"optimizer": Optimizer(warmup=1, decay=3, ema_every=1)}, "warning: the learning rate is 0 from optimizer step 4"),
    ({"optimizer": Optimizer(decay=8, ema_every=1)}, "warning: optimizer.decay 8 is not over when the run's 6"),
    ({"optimizer": Optimizer(ema_every=7)}, "warning: the average of the weights moves every 7 optimizer steps"),
    ({"evaluation": Evaluation(["a star"] * 30, every=4)}, "warning: evaluation.every 4 is more than the run's 3"),
    ({"evaluation": Evaluation()}, "warning: there is no evaluation.prompts"),
    ({"evaluation": Evaluation(["a star"] * 29, every=1)}, "warning: 29 held-out prompts tell little"),
    ({"evaluation": Evaluation(["a star"] * 29 + PROMPTS[:1])}, "warning: 1 of 30 held-out prompts are trained on too"),
]


@pytest.fixture(scope="module")
def model() -> SD3:
    return SD3(tiny_sd3(), max_sequence_length=0)


def sound(folder: Path, **changes: Any) -> Trainer:
    """A trainer with nothing to complain of, but for the changes."""
    settings: dict[str, Any] = {
        "sampling": FAST,
        "evaluation": Evaluation(["a star"] * 30, every=1, pictures=2),
        "optimizer": Optimizer(1e-2, ema_every=1),
    }
    return job(folder, **settings | changes)


def told(trainer: Trainer, processes: int = 1) -> list[str]:
    cut, steps = geometry(trainer, processes), planned_steps(trainer, looked_at(trainer))
    return [f"{problem.kind}: {problem.text}" for problem in of_settings(trainer, cut, steps)]


def test_sound_settings_have_no_problem(model, tmp_path):
    assert told(sound(tmp_path, model=model)) == []


@pytest.mark.parametrize(("changes", "message"), SETTINGS, ids=[message[:60] for _, message in SETTINGS])
def test_a_problem_of_the_settings_is_told(changes, message, model, tmp_path):
    assert any(text.startswith(message) for text in told(sound(tmp_path, model=model, **changes)))


def test_more_prompts_than_tokens_are_not_cut_where_they_fit(model, tmp_path):
    assert told(sound(tmp_path, model=model, prompts=[*PROMPTS, "z" * 38])) == []


def test_the_smaller_batch_size_that_is_offered_pads_less(model, tmp_path):
    (text,) = told(sound(tmp_path, model=model, **sampled(groups=3, batch_size=12, rows_per_call=12)))
    assert text.endswith("With 6 it is 0 %")
    assert geometry(sound(tmp_path, model=model, **sampled(groups=3, batch_size=6))).update_padding == 0


def test_idle_processes_are_told(model, tmp_path):
    texts = told(sound(tmp_path, model=model), 4)
    assert any(text.startswith("warning: 2 of 4 processes have nothing to do") for text in texts)


def test_half_precision_without_a_gpu_is_told(tmp_path):
    half = SD3(tiny_sd3(), max_sequence_length=0, mixed_precision="fp16", device="cpu")
    assert any(text.startswith("warning: mixed_precision fp16 on a CPU") for text in told(sound(tmp_path, model=half)))


def constant(media: Media, prompts: Prompts) -> Tensor:
    return torch.full((len(media),), 0.25)


def broken(media: Media, prompts: Prompts) -> Tensor:
    return torch.where(torch.arange(len(media)) == 0, math.nan, redness(media, prompts))


def refusing(media: Media, prompts: Prompts) -> Tensor:
    raise ValueError("no detector here")


def with_a_dead_part(media: Media, prompts: Prompts) -> Scores:
    total = redness(media, prompts)
    return Scores(total, {"red": total, "dead": torch.zeros(len(total))}, torch.isfinite(total))


class Moody:
    """Remembers how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, media: Media, prompts: Prompts) -> Tensor:
        self.calls += 1
        return redness(media, prompts) + self.calls


def dead(x: Tensor, mean: Tensor, std: float, reduce: Reduce) -> Tensor:
    return reduce(0 * mean)


TRIALS: list[tuple[dict[str, Any], str]] = [
    ({"reward": constant}, "warning: in 2 of the first 2 groups all scores are equal"),
    ({"reward": broken}, "error: 1 of the first 8 samples have no valid score, and on_invalid: stop ends the run"),
    ({"reward": broken, "on_invalid": "drop"}, "warning: 1 of the first 8 samples have no valid score; they are left"),
    (
        {"reward": with_a_dead_part, **sampled(groups=8, batch_size=32)},
        "warning: of the reward's parts dead (0) did not differ over the first 32 samples",
    ),
    ({"reward": Moody()}, "warning: the same samples got other scores the second time"),
    ({"reward": refusing}, "error: sampling the first group, to warm up and again to be measured: no detector here"),
    (sampled(plan=AllSteps(TableSDE((1.0,)))), "error: the plan: TableSDE.table has 1 values and none for step 1"),
]


def found(trainer: Trainer, tmp_path: Path) -> tuple[Preflight, list[str]]:
    made = inspect(trainer, tmp_path / "out")
    assert page(made)
    return made, [f"{problem.kind}: {problem.text}" for problem in made.problems]


@pytest.mark.usefixtures("unpredicted")
@pytest.mark.parametrize(("changes", "message"), TRIALS, ids=[message[:60] for _, message in TRIALS])
def test_what_the_tiny_step_shows_is_told(changes, message, model, tmp_path):
    everywhere = (
        sampled(batch_size=8, rows_per_call=8) | {"updates_per_epoch": 1} | changes
    )  # one micro-batch holds both groups
    made, texts = found(sound(tmp_path / "run", model=model, **everywhere), tmp_path)
    assert any(text.startswith(message) for text in texts), texts
    assert made.errors == message.startswith("error")
    assert not (tmp_path / "run").exists()


def test_a_sound_job_has_no_problem_and_its_first_ratio_is_1(model, tmp_path):
    made, texts = found(sound(tmp_path / "run", model=model), tmp_path)
    assert texts == []
    assert made.trial.learning.off == made.trial.learning.clipped == 0
    assert made.trial.learning.grad_norm > 0


@pytest.mark.usefixtures("unpredicted")
def test_a_policy_that_no_gradient_reaches_is_an_error(model, tmp_path):
    _, texts = found(sound(tmp_path / "run", model=model, log_prob=dead), tmp_path)
    assert [text[:35] for text in texts] == ["error: the gradient is exactly 0, th"[:35]]


def test_space_and_time_that_do_not_suffice_are_told(model, tmp_path):
    trainer = sound(tmp_path, model=model, checkpoints=Checkpoints(every=0, minutes=0))
    space = Space(
        peak=10**9, moments=1, rollouts=2, embeddings=8 * 10**9, pictures=3, memory=9 * 10**9, limit=10**9,
        checkpoint=5 * 10**6, kept=0, evaluations=0, disk=2 * 10**9, free=10**6,
    )  # fmt: skip
    times = Times(900.0, 0.0, 0.0, 0.0, 1.0, 1, 1.0, 1, 1.0, 3)
    texts = [f"{problem.kind}: {problem.text}" for problem in of_costs(trainer, space, times)]
    assert texts[0].startswith("error: the run needs about 9.0 GB of memory and there are 1.0 GB; embeddings of all")
    assert "will take up to 2.0 GB and 1.0 MB are free: 4 checkpoints of up to 5.0 MB" in texts[1]
    assert texts[2].startswith("warning: checkpoints.every and checkpoints.minutes are both 0: a kill costs all since")
    assert "15 min 00 s" in texts[2]
    enough = replace(space, memory=1, disk=1)
    assert of_costs(sound(tmp_path, model=model), enough, times) == []


def test_estimates_follow_from_their_parts():
    times = Times(4.0, 2.0, 1.0, 3.0, 7.0, 5, 0.5, 6, 2.0, 100)
    assert times.epoch == 10
    assert times.run == 1000 + 35 + 3 + 2


@pytest.mark.parametrize(
    ("reward", "beside", "calls", "seconds"),
    [(6.0, 4.0, 1, 6.0), (2.0, 8.0, 4, 0.5), (6.0, 4.0, 4, 3.0), (0.0, 4.0, 4, 0.0)],
)
def test_rewards_beside_rollouts_are_waited_for_in_part(reward, beside, calls, seconds):
    """As a line of calls that roll out for `beside / calls` each, while one reward is made after another."""
    assert waited(reward, beside, calls) == pytest.approx(seconds)
    done = 0.0
    for call in range(1, calls + 1):
        done = max(done, call * beside / calls) + reward / calls
    assert waited(reward, beside, calls) == pytest.approx(done - beside)


def test_what_is_in_the_run_folder_is_told(tmp_path):
    def of(folder: Path, epochs: int = 3, rate: float = 0.1) -> list[str]:
        trainer = job(folder, epochs=epochs)
        found = of_folder(trainer, {"rate": rate, "epochs": epochs}, ())
        return [f"{problem.kind}: {problem.text}" for problem in found]

    assert of(tmp_path / "new" / "run") == []
    (tmp_path / "file").write_text("")
    assert of(tmp_path / "file" / "run")[0].startswith("error: ")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("")
    assert "is not empty and holds no run" in of(tmp_path / "photos")[0]
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    (run / "config.yaml").write_text(json.dumps({"rate": 0.1, "epochs": 9}))
    assert "holds a run of this config: train goes on with it from epoch 0 of 3" in of(run)[0]
    assert of(run, rate=0.2)[0].startswith(f"error: {run} holds a run with another rate; name another --folder")
    assert {path.name for path in run.iterdir()} == {"metrics.jsonl", "config.yaml"}


def test_a_finished_run_is_told(tmp_path):
    trainer = sound(tmp_path / "run", epochs=1)
    trainer.train({"epochs": 1}, report=False)
    (problem,) = of_folder(trainer, {"epochs": 1}, ())
    assert problem.text.endswith("holds a run that has finished its 1 epochs: train would do nothing more")
    (problem,) = of_folder(sound(tmp_path / "run", epochs=2), {"epochs": 2}, ())
    assert "goes on with it from epoch 1 of 2" in problem.text
