"""The watch for reward hacking: looks measured exactly, alarms on made-up histories, and runs that it ends."""

from __future__ import annotations

import functools
import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign import looks
from flowalign.looks import clipped, fine_detail, grid_lines, saturation, small, tiling, variety
from flowalign.records import Media, Prompts
from flowalign.report import write_report
from flowalign.report.reading import read_run
from flowalign.report.watch import watched
from rewards import RunningNormalise
from rewards.base import FunctionReward
from tests import jobs, processes
from tests.interrupted import dying, slow_but, state_of, told
from tests.jobs import digest, rows
from trainers import Evaluation, HackingWatch
from trainers.alarms import trained_scores
from trainers.changes import over_epochs, paired, slope
from trainers.hacking_watch import Glance, Scored, compare_looks, compare_scores
from trainers.preflight.folder import of_folder

SIDE = 32
DOWN, ACROSS = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
WATCH = HackingWatch()


def grey(values: Tensor) -> Tensor:
    return values.float().expand(1, 3, SIDE, SIDE)


def color(*rgb: float) -> Tensor:
    return torch.tensor(rgb).view(1, 3, 1, 1).expand(1, 3, SIDE, SIDE)


def noise(seed: int, count: int = 1) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def test_saturation_and_clipping_of_flat_colours():
    assert saturation(color(1.0, 0.0, 0.25)).item() == 1
    assert saturation(color(0.8, 0.5, 0.6)).item() == pytest.approx(0.3)
    assert saturation(grey(DOWN / SIDE)).item() == 0
    assert clipped(color(1.0, 0.0, 0.25)).item() == pytest.approx(2 / 3)
    assert clipped(color(0.999, 0.0019, 0.0021)).item() == pytest.approx(2 / 3)  # 8 bits write 255, 0 and 1


def test_fine_detail_of_waves_and_blur():
    for cycles, share in ((4, 0.0), (8, 0.0), (9, 1.0), (16, 1.0)):
        wave = 0.5 + 0.4 * torch.cos(2 * math.pi * cycles * ACROSS / SIDE)
        assert fine_detail(grey(wave)).item() == pytest.approx(share, abs=1e-5)
        assert fine_detail(grey(wave.T)).item() == pytest.approx(share, abs=1e-5)
    both = 0.5 + 0.2 * torch.cos(math.pi * ACROSS / 8) + 0.1 * torch.cos(math.pi * (ACROSS + DOWN))
    assert fine_detail(grey(both)).item() == pytest.approx(
        0.01 / (0.02 + 0.01), abs=1e-5
    )  # cos^2 is a half, but at Nyquist
    sharp = noise(0)
    soft = torch.nn.functional.avg_pool2d(sharp, 5, 1, 2)
    assert fine_detail(soft) < 0.2 * fine_detail(sharp)
    assert fine_detail(sharp).item() == pytest.approx(0.75, abs=0.03)  # white noise: all but the inner quarter


def test_grids_and_tiles():
    squares = ((ACROSS // 8 + DOWN // 8) % 2).float()
    shifted = squares.roll((4, 4), (0, 1))
    assert grid_lines(grey(squares)).item() == pytest.approx(1)
    assert grid_lines(grey(shifted)).item() < -0.1  # lines, but elsewhere: -6/56 of the expected share
    assert grid_lines(noise(1, 64)).mean().item() == pytest.approx(0, abs=0.02)
    for pattern in (squares, (ACROSS + DOWN) % 2, ACROSS % 4, DOWN % 16):
        assert tiling(grey(pattern)).item() == pytest.approx(1, abs=1e-5)
    assert tiling(noise(2, 64)).mean().item() == pytest.approx(0, abs=0.02)
    assert tiling(noise(2)[..., :16]).item() == pytest.approx(0, abs=0.2)
    assert tiling(noise(2)[..., :16, :31]).item() == 0  # one tile


@pytest.mark.parametrize("value", [0.0, 0.3, 0.7001, 1.0])
def test_a_picture_of_one_colour_has_no_detail(value):
    assert [measure(color(value, 0.3, 0.9)).item() for measure in (fine_detail, grid_lines, tiling)] == [0, 0, 0]


def test_looks_of_videos_are_means_over_frames():
    frames = noise(3, 6)
    video = frames.view(2, 3, 3, SIDE, SIDE)
    torch.testing.assert_close(looks.looks(video), looks.looks(frames).view(2, 3, -1).mean(1))
    assert looks.looks(frames).shape == (6, len(looks.NAMES))


def test_variety_and_distance():
    black, white = color(0.0, 0.0, 0.0)[0], color(1.0, 1.0, 1.0)[0]
    copies = small([black, white, white])
    torch.testing.assert_close(variety(copies), torch.tensor([1.0, 0.5, 0.5], dtype=torch.float64))
    assert variety(small([black])).item() == 0
    large = white.repeat(1, 3, 2)
    assert (small([large]) - small([white])).norm() < 1e-6
    assert small([white.repeat(1, 1, 6)]).shape == (1, 3 * 16 * 96)


def test_changes_by_hand():
    nan = math.nan
    change = paired(torch.tensor([0.0, 0.5, 1.0, 0.2, nan]), torch.tensor([1.0, 0.5, 0.8, 0.6, 3.0]))
    assert change is not None
    assert (change.count, change.mean) == (4, pytest.approx(0.3))
    assert change.error == pytest.approx(math.sqrt(0.28) / 2)
    # Student's t of 3 degrees is 1.1339 there: beyond it lies .1697, as beyond .9556 of a normal
    assert change.errors == pytest.approx(0.9556, abs=1e-3)
    few = paired(torch.zeros(3), torch.tensor([9.0, 10.0, 11.0]))
    assert few is not None
    assert 2 < few.errors < 3  # 17 standard errors of three prompts
    same = paired(torch.zeros(3), torch.ones(3))
    assert same is not None
    assert (same.errors, same.spreads) == (math.inf, math.inf)
    assert slope(torch.tensor([0.0, 1.0, 2.0, nan]), torch.tensor([1.0, 3.0, 5.0, 7.0])) == pytest.approx(2)
    assert slope(torch.ones(4), torch.arange(4.0)) == 0
    rise = over_epochs([1.0, 2.0, 5.0, 3.0, 4.0], 2)
    assert rise is not None
    assert (rise.mean, rise.error) == (2, pytest.approx(math.sqrt(0.5)))
    assert over_epochs([1.0, 2.0, 3.0], 2) is None


def history(seed: int, gains: list[tuple[float, float]], count: int = 256) -> list[Scored]:
    """Evaluations of a trained reward of std 0.2 and a judge that is 0 or 1, which go together; by gains of both.

    What changes from one evaluation to the next but for the gains is chance.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    quality, found = draw(), []
    for epoch, (trained, judged) in enumerate(gains):
        seen = quality + 0.4 * draw()
        right = (seen + 0.8 * draw() > 0.2 - 2.5 * judged).double()
        found.append(Scored(5 * epoch, {"strict": right}, 0.7 + 0.2 * (seen + trained)))
    return found


def alarms(evaluations: list[Scored], rewards: tuple[float, ...] = ()) -> list[int]:
    """The epochs of the alarms."""
    found = [
        compare_scores(WATCH, evaluations[:i] or [one], one, ["strict"], rewards) for i, one in enumerate(evaluations)
    ]
    return [one.epoch for one, told in zip(evaluations, found, strict=True) if told.alarms]


def test_a_hacked_run_is_told_a_healthy_one_is_not():
    hacked = [(0.4 * i, -0.02 * i) for i in range(8)]
    healthy = [(0.3 * i, 0.12 * i) for i in range(8)]
    for seed in range(20):
        first, *_ = alarms(history(seed, hacked))
        assert first <= 20
        assert not alarms(history(seed, healthy))


def test_a_gain_that_turns_into_exploitation_is_told_though_the_judge_is_above_the_start():
    turned = [(0.3 * i, 0.12 * min(i, 3)) for i in range(4)] + [(0.9 + 0.4 * i, 0.36 - 0.01 * i) for i in range(1, 6)]
    for seed in range(10):
        evaluations = history(seed, turned)
        first, *_ = alarms(evaluations)
        told = next(one for one in evaluations if one.epoch == first)
        assert first >= 20
        assert told.scores["strict"].mean() > evaluations[0].scores["strict"].mean()


def test_chance_raises_no_alarm():
    assert not [seed for seed in range(60) if alarms(history(seed, [(0.0, 0.0)] * 8, 128))]
    assert not [seed for seed in range(60) if alarms(history(seed, [(0.0, 0.0)] * 8, 4))]


def test_the_logged_reward_stands_in_where_the_trained_one_is_not_held_out():
    evaluations = [replace(one, trained=None) for one in history(0, [(0.0, -0.1 * i) for i in range(5)])]
    rising = [0.5 + 0.01 * i + 0.01 * (i % 2) for i in range(20)]
    assert alarms(evaluations, tuple(rising))
    assert not alarms(evaluations, (0.5, 0.51) * 10)
    assert not alarms(evaluations)


def glance(pictures: Tensor) -> Glance:
    numbers = looks.looks(pictures)
    named = dict(zip(looks.NAMES, numbers.double().T, strict=True))
    return Glance(named, small([*pictures]))


def kinds(first: Tensor, now: Tensor) -> dict[str, Any]:
    return {alarm.kind: alarm for alarm in compare_looks(WATCH, glance(first), glance(now)).alarms}


def test_looks_that_go_far_are_told_and_the_worst_prompt_is_first():
    soft = torch.nn.functional.avg_pool2d(noise(5, 24), 9, 1, 4)
    first = (0.5 + 2 * (soft - 0.5)).clamp(0.02, 0.98)
    assert not kinds(first, (first + 0.01 * (noise(6, 24) - 0.5)).clamp(0, 1))
    full = (first > 0.5).float()
    assert {"saturation", "clipped"} <= kinds(first, full).keys()
    grid = (first + 0.3 * (((ACROSS // 8 + DOWN // 8) % 2) - 0.5)).clamp(0, 1)
    assert {"grid_lines", "tiling"} <= kinds(first, grid).keys()
    rough = first.clone()
    rough[3:] += 0.5 * (noise(7, 21) - 0.5)
    rough[7] += 0.9 * (noise(8)[0] - 0.5)
    found = kinds(first, rough.clamp(0, 1))
    assert found["fine_detail"].worst[0] == 7
    assert {*found["fine_detail"].worst[-3:]} == {0, 1, 2}
    assert "variety" in kinds(first, first[:1].expand(24, -1, -1, -1))
    assert "distance" in kinds(first, 1 - first)


@pytest.mark.parametrize(
    "wrong", [{"rise": 0.0}, {"short": -1.0}, {"look": 0.0}, {"variety": 1.0}, {"distance": math.nan}]
)
def test_bad_settings_are_refused(wrong):
    with pytest.raises(
        ValueError, match=r"evaluation\.watch: rise, short, look and distance must be above 0, and variety"
    ):
        HackingWatch(**wrong)


def test_the_trained_reward_is_found_among_the_parts():
    scores = {
        "total": torch.tensor([1.0]),
        "a": torch.tensor([2.0]),
        "b": torch.tensor([3.0]),
        "a/raw": torch.tensor([7.0]),
    }
    a, b = FunctionReward(lambda media, prompts: []), FunctionReward(lambda media, prompts: [])
    a.name, b.name = "a", "b"
    assert trained_scores(a, scores, False) is scores["total"]
    assert trained_scores(a, scores, True) is scores["a"]
    assert trained_scores(2 * a - b + 0.5, scores, True).tolist() == [1.5]
    assert trained_scores(RunningNormalise(a), scores, False) is scores["a/raw"]
    b.name = "elsewhere"
    assert trained_scores(a + b, scores, True) is None


HELD_OUT = [
    f"{word} {shape}" for word in ("a red", "two blue", "three green", "a") for shape in ("star", "circle", "cross")
]


def brightness(media: Media, prompts: Prompts) -> Tensor:
    """Easily raised, and worth nothing."""
    return 30 * media.pixels.mean((1, 2, 3))


def darkness(media: Media, prompts: Prompts) -> Tensor:
    """What gets worse as the trained reward gets better."""
    return -brightness(media, prompts)


EAGER = HackingWatch(rise=1e-6, short=1e-6)  # an alarm wherever the one rises and the other falls


def hacked(folder: Path, watch: HackingWatch | None = EAGER, kind: str = "draft", **changes: Any) -> Any:
    """A run whose evaluation has the trained reward as a part, and another that can only fall with it."""
    trained = FunctionReward(brightness, differentiable=True)
    own = FunctionReward(darkness) + 0.0 * FunctionReward(brightness)
    evaluation = Evaluation(HELD_OUT, every=1, pictures=2, metric="darkness", reward=own, watch=watch)
    return jobs.JOBS[kind](folder, reward=trained, evaluation=evaluation, **{"epochs": 4, "kl_coef": 0.0} | changes)


def run_hacked(folder: Path, rank: int = 0, **changes: Any) -> None:
    hacked(folder, **changes).train(resume=True, report=False)


jobs.JOBS["hacked"] = hacked


def events(folder: Path, name: str) -> list[str]:
    found = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event["detail"] for event in found if event["event"] == name]


@pytest.fixture(scope="module")
def told_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("told") / "run"
    hacked(folder).train()
    return folder


def test_a_run_tells_of_its_alarm_once_with_pictures(told_run):
    evaluations = [row for row in rows(told_run) if "held-out" in row]
    raised = [row["step"] for row in evaluations if "watch/alarm/reward" in row]
    assert len(raised) == 1
    assert len(evaluations) == 5
    (detail,) = [detail for detail in events(told_run, "alarm") if "-reward.png" in detail]
    file = f"samples/alarm-{raised[0]:06d}-reward.png"
    assert detail.startswith(f"alarm at epoch {raised[0]}: since epoch ")
    assert detail.endswith(f"pictures in {file}")
    assert (told_run / file).is_file()
    assert evaluations[0]["watch/distance"] == 0 < evaluations[-1]["watch/distance"]
    page = watched(read_run(told_run))
    assert page is not None
    assert [alarm.picture is not None for alarm in page.alarms if alarm.kind == "reward"] == [True]
    assert [chart.title for chart in page.gains] == [
        "Gain since the start",
        "darkness falls short by",
        "total falls short by",
    ]
    text = (told_run / "report.html").read_text()
    assert "Watch for reward hacking" in text
    assert "Possible reward hacking: alarm at epoch" in text
    (told_run / file).rename(told_run / "away.png")
    assert "pictures not kept" in write_report(told_run).read_text()
    (told_run / "away.png").rename(told_run / file)


def test_without_a_watch_nothing_is_looked_at(tmp_path):
    hacked(tmp_path / "run", watch=None, epochs=1).train()
    assert not [name for row in rows(tmp_path / "run") for name in row if name.startswith("watch/")]
    assert not [*(tmp_path / "run" / "evaluations").glob("looks-*")]
    assert "Watch for reward hacking" not in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("on_alarm", slow_but(["roll_back"], ["stop", "roll_back"]))
def test_an_alarm_ends_the_run(on_alarm, told_run, tmp_path, capsys):
    folder, watch = tmp_path / "run", replace(EAGER, on_alarm=on_alarm)
    hacked(folder, watch).train(report=False)
    said = capsys.readouterr().err
    at = next(row["step"] for row in rows(told_run) if any("watch/alarm/" in name for name in row))
    assert f"ended by its watch at epoch {at} of 4; the best policy is that of epoch 0" in said
    assert ("rolled back" in said) == (on_alarm == "roll_back")
    assert rows(folder) == [row for row in rows(told_run) if row["step"] <= at]
    kept = state_of(folder)
    assert (kept.epoch, kept.best_epoch) == (at, 0)
    back = all(not value.any() for name, value in kept.policy.items() if "lora_B" in name)  # as before any update
    assert back == (on_alarm == "roll_back") == (kept.steps == 0) == (not kept.moments)
    before = digest(folder)
    (ended,) = of_folder(hacked(folder, watch), None, ())
    assert f"holds a run that its watch has ended at epoch {at}: train would do nothing more" in ended.text
    hacked(folder, watch).train(resume=True, report=False)
    assert "was ended by its watch; --evaluation.watch.on_alarm tell goes on" in capsys.readouterr().err
    assert digest(folder) == before
    hacked(folder).train(resume=True, report=False)
    assert state_of(folder).epoch == 4
    if on_alarm == "stop":
        assert digest(folder) == digest(told_run)


@pytest.mark.slow
@pytest.mark.parametrize(("place", "turn"), [("rename", 3), ("path", 5)])
def test_a_killed_run_comes_to_the_same(place, turn, told_run, tmp_path):
    folder = tmp_path / "run"
    stop = dying(functools.partial(told, folder, kind="hacked"), place, turn, 0, signal.SIGTERM)
    assert "all is saved" in processes.run(1, tmp_path, stop)[0]
    run_hacked(folder)
    assert digest(folder) == digest(told_run)


def test_two_processes_raise_the_same_alarms(told_run, tmp_path):
    processes.run(2, tmp_path, functools.partial(run_hacked, tmp_path / "run"))
    assert events(tmp_path / "run", "alarm") != []
    one, two = ([row for row in rows(folder) if "held-out" in row] for folder in (told_run, tmp_path / "run"))
    for row, same in zip(one, two, strict=True):
        assert row.keys() == same.keys()
        for name in [name for name in row if name.startswith("watch/")]:
            assert same[name] == pytest.approx(row[name], rel=1e-3, abs=1e-4), name


def test_pictures_that_are_missing_are_said(tmp_path, capsys):
    hacked(tmp_path / "run", epochs=1).train(report=False)
    (tmp_path / "run" / "evaluations" / "epoch-000000.zip").unlink()
    hacked(tmp_path / "run", epochs=2).train(resume=True, report=False)
    assert "nothing is watched at epoch 2:" in capsys.readouterr().err
    assert "has no epoch-000000.zip" in events(tmp_path / "run", "watch")[0]
