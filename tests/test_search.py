"""Best-of-N, what a search costs, and its folder: killed, stopped and gone on with, the same to the last bit."""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from flowalign import checkpoint
from flowalign.accounting import Rows
from flowalign.interrupt import Stopped
from flowalign.media import load
from flowalign.models.wan import Wan
from flowalign.pictures import to_bytes
from flowalign.records import Media, Prompts
from flowalign.sample import pictures
from flowalign.schedules import AllSteps, FanOut
from flowalign.tracking import Run
from flowalign.transitions import FlowSDE
from rewards import OnFrames, Rank
from rewards.base import FunctionReward, as_reward
from tests import processes
from tests.families import seeded
from tests.searches import PRICES, PROMPTS, Identity, brightness, differentiable, job, nearness, tiny_model
from tests.tiny_wan import tiny_wan
from trainers import BestOfN, ReNO
from trainers.last_two import LastTwo
from trainers.search_cost import Prices, Spent, measured
from trainers.search_run import Record
from trainers.search_sheet import sheet
from trainers.search_state import Candidate


def best_of(folder: Path | str = "runs/none", **changes: Any) -> BestOfN:
    settings: dict[str, Any] = {
        "model": tiny_model(), "reward": brightness, "prompts": PROMPTS, "samples": 5, "steps": 2, "batch_size": 4,
        "seed": 7, "prices": PRICES, "folder": str(folder), "save_seconds": 0.0,
    }  # fmt: skip
    return BestOfN(**settings | changes)


def plain_pictures(model: Any, prompts: Any, seed: int = 7) -> list[Tensor]:
    return [one for part in pictures(model, prompts, 2, 1.0, seed) for one in to_bytes(part)]


def near(one: Tensor, other: Tensor) -> bool:
    """The same pictures up to the rounding of another batch shape."""
    return bool((one.int() - other.int()).abs().max() <= 1)


@pytest.mark.parametrize("make", [best_of, job])
def test_the_first_sample_is_the_plain_one(make):
    search = make()
    for one, plain in zip(search.find(), plain_pictures(search.model, PROMPTS), strict=True):
        assert near(one.first.media, plain)


def test_a_prompt_s_own_seed_is_its_noise():
    prompts = Prompts(("a red circle", "two stars"), ({"seed": 12}, {}))
    search = best_of(prompts=prompts)
    for one, plain in zip(search.find(), plain_pictures(search.model, prompts), strict=True):
        assert near(one.first.media, plain)
    assert torch.equal(search.sampler.noise(0), best_of(prompts=["x"] * 13).sampler.noise(12))


def test_the_best_is_the_maximum_over_keyed_noises():
    search = best_of()
    for one in search.find():
        scores = []
        for member in range(5):
            made = search.remake(search.sampler.noise(one.number, member), one.number)[None]
            scores.append(float(brightness(Media(made), search.prompts.rows([one.number]))))
        assert one.best.score == pytest.approx(max(scores), abs=1e-6)
        assert (one.best.number, one.tried) == (int(np.argmax(scores)), 5)
        assert one.first.score == pytest.approx(scores[0], abs=1e-6)
        assert torch.equal(one.best.noise, search.sampler.noise(one.number, one.best.number))
    assert len({float(search.sampler.noise(n, m).sum()) for n in range(3) for m in range(5)}) == 15


def test_the_plain_sample_stays_the_best_where_all_are_alike():
    (found,) = BestOfN(Identity(), lambda media, prompts: [1.0] * len(media), ["x"], 4, prices=PRICES).find()
    assert found.best.number == 0


def test_an_invalid_score_is_no_candidate():
    """All scores are below 0, and member 0 has none: neither it nor a 0 in its place may win."""

    def partly(media: Media, prompts: Prompts) -> Tensor:
        scores = brightness(media, prompts) - 5
        scores[0 if len(media) == 5 else slice(0)] = torch.nan
        return scores.where(torch.tensor([text != PROMPTS[1] for text in prompts.text]), torch.inf)

    one, none, _ = best_of(reward=partly, batch_size=5).find()
    assert one.first is None
    assert (one.tried, one.invalid) == (5, 1)
    assert one.best.number > 0
    assert one.best.score < -4
    assert (none.best, none.first, none.invalid) == (None, None, 5)


def test_calls_are_filled_over_prompts_and_padded_at_the_end():
    search = best_of()
    state = search.start()
    ends = [[one.number for one in found] for found in search.rounds(state)]
    assert ends == [[], [0], [1], [2]]  # 15 samples in calls of 4
    assert (state.rounds, state.padding, state.finished) == (4, 1, 3)


def test_every_search_counts_alike():
    """With guidance two rows a step: the meter's, and what a budget is reckoned with."""
    for search, own in ((best_of(guidance_scale=3.0), 5), (job(guidance_scale=3.0, batch_size=3), 5)):
        one = search.sampler.one(search.needs_gradient)
        for found in search.find():
            if isinstance(search, BestOfN):
                assert found.spent == Spent(Rows(4 * own), Rows(own), Rows(own))
                assert one == Spent(Rows(4), Rows(1), Rows(1))
            else:  # the last iteration moves nothing, and all are at it together
                assert found.spent == Spent(Rows(4, 4 * 4), Rows(1, 4), Rows(1, 4))
                assert one == Spent(Rows(0, 4), Rows(0, 1), Rows(0, 1))
            assert found.cost == found.spent.cost(PRICES)
    assert Spent(Rows(4, 16), Rows(1, 4), Rows(1, 4)).cost(Prices(0.5, 0.25)) == 4 + 48 + 13 * 0.75


def test_a_budget_is_never_exceeded_and_all_but_used_up():
    searches = (
        best_of(budget=14.0, samples=None),
        job(budget=30.0, iterations=50),
        job(budget=40.0, iterations=50, recompute=True),
    )
    for search in searches:
        one = search.sampler.one(search.needs_gradient).cost(PRICES)
        for found in search.find():
            assert found.cost <= search.budget < (found.tried + 1) * one
    assert {found.tried for found in best_of(budget=100.0, samples=3).find()} == {3}
    assert {found.tried for found in best_of(budget=55.0, samples=None, prompts=["x"]).find()} == {20}  # at 2.75 each
    with pytest.raises(ValueError, match=r"does not pay for one sample, which costs 2\.75"):
        best_of(budget=2.0).find()


def test_the_seconds_of_a_call_are_shared_out():
    began = time.perf_counter()
    found = best_of(samples=4, batch_size=12).find()
    assert 0 < sum(one.seconds for one in found) <= time.perf_counter() - began


def test_gradients_through_fp16_are_scaled_up_and_down_again():
    """By a power of two, so that in float32 no bit is another."""
    found = []
    for scaled in (False, True):
        model = Identity()
        model.scale_loss = scaled
        reward = nearness(torch.ones(3, 8, 8), 1e-6)  # far below what is clipped
        found += ReNO(model, reward, ["x"], 4, regularisation=0.0, prices=PRICES).find()
    assert torch.equal(found[0].best.noise, found[1].best.noise)
    assert found[0].best.number > 0


def test_no_weight_takes_part_in_a_gradient():
    search, seen = job(prompts=PROMPTS[:1], iterations=2), list[bool]()
    inner = search.sampler.reward.score

    def watching(media: Media, prompts: Prompts) -> Any:
        seen.extend(value.requires_grad for value in search.model.trainable().values())
        return inner(media, prompts)

    search.sampler.reward.score = watching
    search.find()
    assert seen
    assert not any(seen)
    assert all(value.requires_grad for value in search.model.trainable().values())


def test_what_a_reward_draws_at_random_is_a_matter_of_the_seed():
    def scores(seed: int) -> list[float]:
        search = BestOfN(
            Identity(), lambda media, prompts: torch.rand(len(media)), ["x", "y"], 3, seed=seed, prices=PRICES
        )
        return [one.best.score for one in search.find()]

    assert scores(1) == scores(1) != scores(2)


def test_prices_are_measured_in_network_rows():
    prices = measured(lambda: time.sleep(0.02), lambda: time.sleep(0.03), lambda: time.sleep(0.01), rows=4, samples=2)
    assert prices.decode == pytest.approx(3.0, rel=0.3)
    assert prices.reward == pytest.approx(1.0, rel=0.3)
    found = best_of(prices=None, samples=1).start().prices
    assert 0 < found.decode < 100
    assert 0 <= found.reward < 100
    with pytest.raises(ValueError, match="prices must be finite"):
        Prices(-1.0, 0.0)


def test_members_of_a_stochastic_plan_have_step_noise_of_their_own():
    search = best_of(plan=AllSteps(FlowSDE(0.7)), samples=3)
    (found, *_) = search.find()
    made = search.remake(found.best.noise, 0, found.best.number)
    assert near(to_bytes(made), found.best.media)


def test_prompts_of_several_sizes():
    prompts = Prompts(("a", "b", "c"), ({}, {"height": 48}, {}))
    search = best_of(prompts=prompts, samples=2)
    shapes = [tuple(one.best.media.shape) for one in search.find()]
    assert shapes == [(3, 32, 32), (3, 48, 32), (3, 32, 32)]
    again = [search.remake(one.best.noise, one.number) for one in search.find()]
    assert all(near(to_bytes(made), one.best.media) for made, one in zip(again, search.find(), strict=True))


def test_sizes_are_gone_on_with_where_they_were(tmp_path):
    prompts = Prompts(("a", "b", "c"), ({}, {"height": 48}, {}))
    job(tmp_path / "whole", prompts=prompts).run()
    with pytest.raises(Stopped):  # the second size's second call
        dying(functools.partial(job, prompts=prompts), tmp_path / "run", "reward", 7, signal.SIGTERM)
    job(tmp_path / "run", prompts=prompts).run()
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"reward": Rank(as_reward(brightness))}, "needs one that scores each on its own"),
        ({"reward": OnFrames(as_reward(brightness))}, "scores videos, and the model makes pictures"),
        ({"plan": FanOut(FlowSDE(0.7))}, "a plan that does not branch"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        best_of(**changes)


def test_a_reward_of_pictures_is_not_for_videos():
    model = Wan(tiny_wan(), height=32, width=32, frames=5, max_sequence_length=12)
    reward = as_reward(brightness)
    reward.card = replace(reward.card, modality="image")
    with pytest.raises(ValueError, match="scores pictures, and the model makes videos: wrap it in OnFrames"):
        best_of(model=model, reward=reward)


def digest(folder: Path) -> dict[str, Any]:
    """All that a search has come to, without what the clock says."""
    found: dict[str, Any] = {}
    for name in ("results.jsonl", "metrics.jsonl"):
        lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        found[name] = [{k: v for k, v in row.items() if k != "seconds"} for row in lines]
    files = sorted([*folder.glob("*.png"), *folder.glob("*.mp4")])
    found |= {path.name: path.read_bytes() for path in files}
    found |= {path.name: load_file(path)["noise"].numpy().tobytes() for path in (folder / "noise").iterdir()}
    summary = json.loads((folder / "summary.json").read_text())
    return found | {"summary": {name: value for name, value in summary.items() if name != "seconds"}}


def work(make: Callable[..., Any], folder: Path) -> None:
    make(folder).run({"search": "x", "folder": str(folder)})


@pytest.fixture(scope="module", params=[job, best_of])
def unbroken(request, tmp_path_factory) -> tuple[Callable[..., Any], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    work(request.param, folder)
    return request.param, digest(folder)


PLACES = {
    "reward": (FunctionReward, "score"),
    "write": (Record, "write"),
    "save": (checkpoint, "_write"),
    "seal": (checkpoint, "_seal"),
}


def dying(make: Callable[..., Any], folder: Path, place: str, turn: int, number: int) -> None:
    """The search, in which the process is sent a signal as it comes to a place for the n-th time."""
    owner, name = PLACES[place]
    real, seen = getattr(owner, name), [0]

    @functools.wraps(real)
    def counted(*arguments: Any) -> Any:
        seen[0] += 1
        if seen[0] == turn:
            os.kill(os.getpid(), number)
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(owner, name, counted)
        work(make, folder)


@pytest.mark.parametrize(("place", "turn"), [("reward", 1), ("reward", 3), ("write", 2), ("save", 3), ("seal", 2)])
def test_a_killed_search_comes_to_the_same(place, turn, unbroken, tmp_path):
    make, expected = unbroken
    broken = functools.partial(dying, make, tmp_path / "run", place, turn, signal.SIGKILL)
    assert processes.killed(broken) == -signal.SIGKILL
    work(make, tmp_path / "run")
    assert digest(tmp_path / "run") == expected


def test_a_kill_between_a_prompt_s_files_and_the_checkpoint(unbroken, tmp_path, monkeypatch):
    make, expected = unbroken

    def cut(self: Record, state: Any, ended: bool) -> None:
        if ended:
            raise OSError("the disk is full")
        real(self, state, ended)

    real = Record.keep
    with monkeypatch.context() as patched:
        patched.setattr(Record, "keep", cut)
        with pytest.raises(OSError, match="disk is full"):
            work(make, tmp_path / "run")
    assert len((tmp_path / "run" / "results.jsonl").read_text().splitlines()) in (1, 2)  # and none in the checkpoint
    work(make, tmp_path / "run")
    assert digest(tmp_path / "run") == expected


def test_what_has_ended_is_saved_at_once(tmp_path):
    """However long it is to the next save by time: of three prompts in calls of two the third is under way."""
    make = functools.partial(job, save_seconds=1e9)
    broken = functools.partial(dying, make, tmp_path / "run", "reward", 7, signal.SIGKILL)
    assert processes.killed(broken) == -signal.SIGKILL
    path, _ = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert checkpoint.load(path)[0]["state"]["finished"] == 2


def test_a_sheet_shows_each_prompt_before_and_after(tmp_path, monkeypatch):
    seen = list[tuple[list[Tensor], list[str]]]()
    monkeypatch.setattr("trainers.search_sheet.grid", lambda pairs, captions: seen.append((pairs, captions)))
    for name, level in (("0000-before", 0), ("0000", 255)):
        Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / f"{name}.png")
    black, white = (torch.full((3, 8, 8), level, dtype=torch.uint8) for level in (0, 255))
    way = Candidate(0, -3.0, {}, torch.zeros(1), black), Candidate(1, 4.0, {}, torch.zeros(1), white)
    sheet(tmp_path, ["a star", "a kite"], [{"number": 0, "before": 1.0, "score": 2.0}], {1: way})
    ((pairs, captions),) = seen
    assert captions == ["a star\n1.000 -> 2.000", "a kite\n-3.000 -> 4.000"]
    for pair in pairs:
        assert not pair[:, :, :8].any()
        assert pair[:, :, -8:].min() == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_call_with_all_saved(number, unbroken, tmp_path):
    make, expected = unbroken
    folder = tmp_path / "run"
    with pytest.raises(Stopped, match="run the same command again") as stopped:
        dying(make, folder, "reward", 3, number)
    assert stopped.value.number == number
    assert (folder / "PREEMPTED").exists() == (number == signal.SIGTERM)
    assert (folder / "before_after.png").is_file()
    calls = len((folder / "metrics.jsonl").read_text().splitlines())
    assert calls == 3
    work(make, folder)
    assert not (folder / "PREEMPTED").exists()
    assert digest(folder) == expected


def test_what_a_search_leaves(tmp_path):
    search = job(tmp_path / "run")
    folder = search.run()
    rows = {row["number"]: row for row in map(json.loads, (folder / "results.jsonl").read_text().splitlines())}
    assert [rows[i]["prompt"] for i in range(3)] == PROMPTS
    for i, row in rows.items():
        assert row["score"] > row["before"]
        assert row["parts"] == {"brightness": row["score"]}
        assert (row["seed"], row["noise_key"], row["tried"], row["invalid"], row["stopped"]) == (7, i, 5, 0, None)
        assert row["compute"]["network"]["gradient"] >= 8
        noise = load_file(folder / row["noise"])["noise"]
        kept = torch.from_numpy(np.asarray(Image.open(folder / f"{i:04d}.png")).copy()).permute(2, 0, 1)
        assert near(to_bytes(search.remake(noise, i)), kept)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["prompts"], summary["better"], summary["without_valid_sample"]) == (3, 3, [])
    assert summary["after"] == pytest.approx(sum(row["score"] for row in rows.values()) / 3)
    before = (folder / "results.jsonl").read_bytes()
    job(tmp_path / "run").run()  # nothing is left to do
    assert (folder / "results.jsonl").read_bytes() == before


def test_videos_have_mp4s_and_strips(tmp_path):
    torch.manual_seed(3)
    model = Wan(tiny_wan(), height=32, width=32, frames=5, max_sequence_length=12)
    for search in (
        ReNO(model, differentiable(brightness), ["a kite"], 2, folder=str(tmp_path / "a"), prices=PRICES),
        BestOfN(model, brightness, ["a kite"], 2, folder=str(tmp_path / "b"), prices=PRICES),
    ):
        folder = search.run()
        names = {path.name for path in folder.iterdir()}
        assert {"0000.mp4", "0000-before.mp4", "0000.png", "0000-before.png", "before_after.png"} <= names
        assert Image.open(folder / "0000.png").width > 128 * 5


def film_job(folder: Path) -> ReNO:
    """Two prompts' videos of five frames, one after the other."""
    model = Wan(seeded(tiny_wan)(), height=32, width=32, frames=5, max_sequence_length=12)
    reward = OnFrames(differentiable(brightness))
    return ReNO(model, reward, ["a kite", "a red car"], 3, seed=7, prices=PRICES, folder=str(folder), save_seconds=0.0)


def test_a_killed_search_of_videos_comes_to_the_same(tmp_path):
    work(film_job, tmp_path / "whole")
    broken = functools.partial(dying, film_job, tmp_path / "run", "reward", 3, signal.SIGKILL)
    assert processes.killed(broken) == -signal.SIGKILL
    work(film_job, tmp_path / "run")
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    found = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert all(row["score"] > row["before"] and row["best_try"] > 0 for row in found)
    before, after = (load(tmp_path / "run" / name)[0] for name in ("0001-before.mp4", "0001.mp4"))
    assert before.shape == after.shape == (5, 3, 128, 128)  # small ones are enlarged
    assert not torch.equal(before, after)


def test_a_prompt_without_any_valid_sample_is_told(tmp_path, capsys):
    nowhere = differentiable(lambda media, prompts: media.pixels.flatten(1).sum(1) * torch.nan)
    folder = ReNO(Identity(), nowhere, ["x", "y"], 3, folder=str(tmp_path / "run"), prices=PRICES).run()
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [(row["score"], row["before"], row["noise"], row["invalid"]) for row in rows] == [(None, None, None, 1)] * 2
    assert "no valid sample (score or gradient not finite) for prompts 0, 1" in capsys.readouterr().err
    assert json.loads((folder / "summary.json").read_text())["without_valid_sample"] == [0, 1]


def test_a_folder_of_another_search_is_refused(tmp_path):
    folder = tmp_path / "run"
    config = {"search": "trainers.ReNO", "folder": str(folder), "steps": 2, "seed": 7}
    job(folder).run(config)
    kept = (folder / "results.jsonl").read_bytes()
    for changed, name in (({"seed": 8}, "seed"), ({"search": "trainers.BestOfN"}, "search")):
        with pytest.raises(ValueError, match=f"holds a search with another {name}; name another folder"):
            job(folder).run(config | changed)
    for again, name in ((job(folder, seed=8), "seed"), (job(folder, prompts=["x"]), "prompts"),
                        (job(folder, max_grad_norm=1.0), "max_grad_norm"),
                        (job(folder, patience=3), "patience"), (job(folder, batch_size=1), "batch_size"),
                        (best_of(folder), "search")):  # fmt: skip
        with pytest.raises(ValueError, match=f"holds a search with another .*{name}"):
            again.run()
    job(folder, save_seconds=9.0).run(config)  # which is free to change
    assert (folder / "results.jsonl").read_bytes() == kept
    with Run(tmp_path / "other", {"trainer": "trainers.FlowGRPO"}):
        pass
    with pytest.raises(ValueError, match="holds a run that is no search"):
        job(tmp_path / "other").run(config)


def test_results_without_their_checkpoints_are_not_written_over(tmp_path):
    folder = tmp_path / "run"
    job(folder).run()
    for path in (folder / "checkpoints").glob("*/state.json"):
        path.write_text("{}")
    with pytest.raises(ValueError, match="holds results but no checkpoint"):
        job(folder).run()


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "manifest.json"])
def test_of_two_checkpoints_a_damaged_one_is_told_and_the_other_taken(file, unbroken, tmp_path, capsys):
    make, expected = unbroken
    broken = functools.partial(dying, make, tmp_path / "run", "reward", 3, signal.SIGKILL)
    assert processes.killed(broken) == -signal.SIGKILL
    _, newer = checkpoint.names(tmp_path / "run" / "checkpoints")
    path = tmp_path / "run" / "checkpoints" / newer / file
    os.truncate(path, path.stat().st_size // 2)
    work(make, tmp_path / "run")
    assert f"flowalign: skipped {path.parent}: " in capsys.readouterr().err
    assert digest(tmp_path / "run") == expected
    events = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert "skip" in {json.loads(line)["event"] for line in events}


def test_a_damaged_checkpoint_is_none_of_the_two_that_stay(tmp_path):
    with Run(tmp_path / "run") as run:
        held = LastTwo(run.folder / "checkpoints")
        for number in (1, 2, 5):
            held.save(f"step-{number}", {"number": number})
        assert checkpoint.names(held.folder) == ["step-2", "step-5"]
        (held.folder / "step-5" / "state.json").write_text("{}")
        held = LastTwo(held.folder)
        path, problems = held.newest(run)
        assert path == held.folder / "step-2"
        assert len(problems) == 1
        held.save("step-3", {"number": 3})
        assert checkpoint.names(held.folder) == ["step-2", "step-3"]


def test_progress_is_told(tmp_path, capsys):
    ReNO(Identity(), nearness(torch.zeros(3, 8, 8)), ["x", "y"], 2, folder=str(tmp_path / "run"), prices=PRICES).run()
    told = capsys.readouterr().err
    assert "step 1/2  before -" in told
    assert "2 prompts: mean score -" in told
