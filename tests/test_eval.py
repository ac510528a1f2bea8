"""`flowalign eval` on the embedded world: what is kept and what is made again, kills, processes, compute, tables."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowalign.accounting import Meter
from flowalign.cli import main
from flowalign.config import build, dump_yaml, find_config, load_yaml
from flowalign.evaluation import Evaluated, Sweep, cells, evaluate, plan
from flowalign.evaluation.cells import Store
from flowalign.evaluation.page import _picture, render
from flowalign.evaluation.readings import _spread
from flowalign.interrupt import Stopped
from flowalign.models import SD3
from flowalign.shapes.prompts import held_out_prompts
from flowalign.tracking import json_lines, write_atomically
from rewards import CLIPEmbedder
from rewards.base import FunctionReward
from rewards.sets import MMD
from tests import processes
from tests.tiny import randomise_policy

CLIP = {"class": "rewards.CLIPScore", "model": "shapes"}
JPEG = {"class": "rewards.JPEGCompressibility"}
FEW = {"grid": "flowalign.schedules.linear", "max_sequence_length": 0}
PRICES = {"decode": 0.5, "reward": 0.25}


def sweep(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two methods of one step on four prompts from two seeds, in calls of two: eight calls, a second."""
    return {
        "models": {"few": {"target": "shapes-few-step", "steps": 1, "guidance_scale": 1.0, "model": FEW}},
        "methods": {"ode": {}, "best": {"search": "trainers.BestOfN", "samples": 3, "reward": CLIP}},
        "benchmarks": {"shapes": {"class": "flowalign.evaluation.Shapes", "count": 4}},
        "metrics": {"clip": CLIP},
        "seeds": [0, 1],
        "prices": PRICES,
        "batch_size": 2,
        "folder": str(folder),
    } | changes


def run(config: dict[str, Any]) -> Evaluated:
    found = evaluate(plan(build(Sweep, config)), config)
    assert found is not None
    return found


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """What is in memory before is not looked through again whenever a model is let go of."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep as it comes out where nothing happens to it."""
    return run(sweep(tmp_path_factory.mktemp("unbroken") / "eval")).folder


def rows_of(config: dict[str, Any]) -> dict[str, int]:
    """The network rows that a sweep makes, and the rows of the table by arm and number."""
    counted = {"rows": 0}
    before = Meter.network

    def count(self: Meter, rows: int) -> None:
        counted["rows"] += rows
        before(self, rows)

    Meter.network = count  # type: ignore[method-assign]
    try:
        run(config)
    finally:
        Meter.network = before  # type: ignore[method-assign]
    return counted


def tables(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("table.md", "table.json")]


def copied(unbroken: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """The sweep with changes, on what the unbroken one has kept."""
    return sweep(folder, cache=str(unbroken / "cells")) | changes


def values(folder: Path, benchmark: str = "shapes") -> dict[tuple[str, str], dict[str, Any]]:
    told = json.loads((folder / "table.json").read_text())
    return {(row["arm"], row["number"]): row for row in told if row["benchmark"] == benchmark}


def test_a_sweep_says_which_arm_is_better(unbroken: Path) -> None:
    told = values(unbroken)
    assert told["few/best", "clip"]["change"] > 0  # it was chosen by that
    assert told["few/best", "clip"]["wins"] > 0.5
    assert told["few/best", "clip"]["change"] == pytest.approx(
        told["few/best", "clip"]["value"] - told["few/ode", "clip"]["value"]
    )
    assert "change" not in told["few/ode", "clip"]
    text = (unbroken / "table.md").read_text()
    assert "### accuracy by clause" in text
    assert "the share of prompts of which every clause holds" in text
    made = json.loads((unbroken / "results.json").read_text())
    (benchmark,) = made["benchmarks"]
    assert len(benchmark["prompts"]) == 4
    assert {len(row) for row in benchmark["numbers"][0]["grids"]["few/ode"]} == {2}
    for arm in ("few/ode", "few/best"):
        assert all((unbroken / path).is_file() for row in benchmark["media"][arm] for path in row)


def test_a_page_stands_alone_and_shows_where_arms_differ(unbroken: Path) -> None:
    made = json.loads((unbroken / "results.json").read_text())
    number = made["benchmarks"][0]["numbers"][1]
    made["benchmarks"][0]["numbers"] = [number]  # so that CLIP is the headline, on which all pictures differ
    made["benchmarks"][0]["prompts"][0] = "<b>a red circle</b>"
    page = render(made, unbroken)
    assert "://" not in page
    assert "<b>a red circle" not in page
    assert "&lt;b&gt;a red circle" in page
    change = np.array(number["grids"]["few/best"]) - np.array(number["grids"]["few/ode"])
    assert (change >= 0).all()  # the best of three, by what is shown
    assert page.count("data:image/png;base64,") == 2 * int((change > 0).any(1).sum())
    assert "Where few/best is most above few/ode" in page
    assert page.count("data:image/svg+xml;base64,") == 1  # CLIP over compute
    assert "In what they differ" in page
    assert re.search(r'<th>method</th><td class="value">ode</td><td class="value">best</td>', page)
    assert "most below" not in page
    assert (unbroken / "report.html").read_text().startswith("<!doctype html>")


def test_every_benchmark_of_a_page_has_pictures(unbroken: Path) -> None:
    """With many of them a few each, rather than all of the first one's."""
    made = json.loads((unbroken / "results.json").read_text())
    made["benchmarks"][0]["numbers"] = [made["benchmarks"][0]["numbers"][1]]  # CLIP, on which all prompts differ
    alone = render(made, unbroken).count("data:image/png;base64,")
    made["benchmarks"] *= 12
    many = render(made, unbroken).count("data:image/png;base64,")
    assert (alone, many) == (4 * 2, 12 * 2 * 2)
    made["benchmarks"] *= 12
    assert render(made, unbroken).count("data:image/png;base64,") == 144 * 2


def test_compute_that_is_the_same_is_not_plotted(unbroken: Path) -> None:
    """What measured prices leave of difference is noise."""
    made = json.loads((unbroken / "results.json").read_text())
    for arm, cost in zip(made["arms"], (7.8, 8.1), strict=True):
        arm["compute"]["cost"] = cost
    assert "over compute" not in render(made, unbroken)
    made["arms"][1]["compute"]["cost"] = 9.0
    assert "over compute" in render(made, unbroken)


def test_the_plain_arm_draws_what_sample_draws(unbroken: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(held_out_prompts(4).text))
    words = ["sample", "shapes-few-step", "--prompts", str(prompts), "--seed", "1", "--steps", "1", "--batch-size", "2"]
    words += ["--guidance-scale", "1", "--model.grid", "flowalign.schedules.linear", "--model.max_sequence_length", "0"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    (benchmark,) = json.loads((unbroken / "results.json").read_text())["benchmarks"]
    for i, row in enumerate(benchmark["media"]["few/ode"]):
        drawn, sampled = (
            np.asarray(Image.open(unbroken / row[1])),
            np.asarray(Image.open(tmp_path / f"out/{i:04d}.png")),
        )
        assert np.array_equal(drawn, sampled)


def test_a_rerun_makes_nothing_and_gives_the_same(unbroken: Path, tmp_path: Path) -> None:
    before = tables(unbroken)
    assert rows_of(sweep(unbroken)) == {"rows": 0}
    assert tables(unbroken) == before


def test_a_killed_sweep_goes_on_and_comes_to_the_same(unbroken: Path, tmp_path: Path) -> None:
    config = sweep(tmp_path / "eval")
    keep = Store.keep

    def work() -> None:
        kept = []

        def keep_some(self: Store, *given: Any) -> None:
            if len(kept) == 5:  # the first file of the sixth call is there, what says that it is done is not
                self._write(self.folder / "drawn" / given[0], 0, given[1].media[0], None)
            kept.append(keep(self, *given))

        def write(self: Store, folder: Path, *given: Any) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            before(self, folder, *given)
            if len(kept) == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        before = Store._write
        Store.keep, Store._write = keep_some, write  # type: ignore[method-assign]
        run(config)

    assert processes.killed(work) == -signal.SIGKILL
    done = sorted((tmp_path / "eval/cells/drawn").glob("*/call.json"))
    times = [path.stat().st_mtime_ns for path in done]
    assert len(done) == 5
    assert not (tmp_path / "eval/table.md").exists()
    run(config)
    assert [path.stat().st_mtime_ns for path in done] == times  # what was done is not drawn again
    assert tables(tmp_path / "eval") == tables(unbroken)


def test_a_killed_scoring_goes_on(unbroken: Path, tmp_path: Path) -> None:
    config = sweep(tmp_path / "eval")

    def work() -> None:
        made = []
        before = Store.keep_scores

        def keep(self: Store, *given: Any) -> None:
            before(self, *given)
            made.append(given)
            if len(made) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        Store.keep_scores = keep  # type: ignore[method-assign]
        run(config)

    assert processes.killed(work) == -signal.SIGKILL
    assert rows_of(config) == {"rows": 0}
    assert tables(tmp_path / "eval") == tables(unbroken)


def test_a_signal_stops_between_two_calls(unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = Store.keep

    def keep_and_ask(self: Store, *given: Any) -> None:
        keep(self, *given)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Store, "keep", keep_and_ask)
    with pytest.raises(Stopped, match="1 calls are drawn; the same command goes on"):
        run(sweep(tmp_path / "eval"))
    monkeypatch.undo()
    run(sweep(tmp_path / "eval"))
    assert tables(tmp_path / "eval") == tables(unbroken)


def test_two_processes_come_to_the_same_table(unbroken: Path, tmp_path: Path) -> None:
    config = sweep(tmp_path / "eval")

    def work(rank: int) -> bool:
        return evaluate(plan(build(Sweep, config)), config) is not None

    assert processes.run(2, tmp_path, work) == [True, False]
    assert tables(tmp_path / "eval") == tables(unbroken)


def test_another_reward_draws_nothing(unbroken: Path, tmp_path: Path) -> None:
    assert rows_of(copied(unbroken, tmp_path / "eval", metrics={"jpeg": JPEG})) == {"rows": 0}
    told = values(tmp_path / "eval")
    assert ("few/ode", "jpeg") in told
    assert told["few/ode", "accuracy"] == values(unbroken)["few/ode", "accuracy"]


def test_after_a_change_only_what_changed_is_drawn(unbroken: Path, tmp_path: Path) -> None:
    # a method's setting: its arm alone, 2 samples for each of 4 prompts and 2 seeds
    methods = {"ode": {}, "best": {"search": "trainers.BestOfN", "samples": 2, "reward": CLIP}}
    assert rows_of(copied(unbroken, tmp_path / "a", methods=methods)) == {"rows": 2 * 4 * 2}
    # a seed more: that seed alone
    assert rows_of(copied(unbroken, tmp_path / "b", seeds=[0, 1, 2])) == {"rows": 4 + 3 * 4}


def test_more_prompts_leave_the_others_as_they_were(tmp_path: Path) -> None:
    def asked(count: int) -> dict[str, Any]:
        own = {"class": "flowalign.evaluation.PromptBenchmark", "prompts": list(held_out_prompts(6).text[:count])}
        return sweep(tmp_path / "eval", methods={"ode": {}}, benchmarks={"own": own}, metrics={"jpeg": JPEG})

    assert rows_of(asked(4)) == {"rows": 2 * 4}
    assert rows_of(asked(6)) == {"rows": 2 * 2}
    assert rows_of(asked(4)) == {"rows": 0}


def test_a_file_that_was_altered_is_told(unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "eval"
    run(sweep(folder, methods={"ode": {}}))
    picture = next((folder / "cells/drawn").glob("*/00000.png"))
    Image.new("RGB", (32, 32)).save(picture)
    with pytest.raises(ValueError, match="is not what was drawn; remove the folder"):
        run(sweep(folder, methods={"ode": {}}, metrics={"jpeg": JPEG}))


def test_a_full_disk_is_told_and_gone_on_from(unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        if path.name == "00001.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_atomically(path, content)

    monkeypatch.setattr(cells, "write_atomically", full)
    with pytest.raises(OSError, match=r"\(No space left on device\): make room there, and the same command goes on"):
        run(sweep(tmp_path / "eval"))
    monkeypatch.undo()
    run(sweep(tmp_path / "eval"))
    assert tables(tmp_path / "eval") == tables(unbroken)


def test_one_sample_of_a_search_is_the_plain_one(tmp_path: Path) -> None:
    methods = {"ode": {}, "one": {"search": "trainers.BestOfN", "samples": 1, "reward": CLIP}}
    told = values(run(sweep(tmp_path / "eval", methods=methods, seeds=[3])).folder)
    assert told["few/one", "clip"]["change"] == 0.0
    assert told["few/one", "clip"]["wins"] == 0.5
    assert not told["few/one", "clip"]["real"]
    assert told["few/one", "clip"]["cost"] == 1 + PRICES["decode"] + PRICES["reward"]
    assert told["few/ode", "clip"]["cost"] == 1 + PRICES["decode"]


def test_at_equal_compute_every_method_spends_the_same(tmp_path: Path) -> None:
    methods = {
        "ode": {},
        "best": {"search": "trainers.BestOfN", "samples": 2, "reward": CLIP},
        "reno": {"search": "trainers.ReNO", "iterations": 2, "reward": CLIP},
    }
    two = {"shapes": {"class": "flowalign.evaluation.Shapes", "count": 2}}
    equal = {"benchmarks": two, "seeds": [0], "at_equal_compute": True}
    config = sweep(tmp_path / "eval", methods=methods, budget=11.0, **equal)
    made = {arm["name"]: arm for arm in json.loads((run(config).folder / "results.json").read_text())["arms"]}
    # a step is 1 and its decode .5; a sample 1.75; a gradient 3 x 1.75, and the last try needs none
    assert made["few/ode"]["settings"]["steps"] == 10
    assert made["few/ode"]["compute"]["cost"] == 10.5
    assert made["few/best"]["compute"]["spent"]["rewards"]["forward"] / 2 == 6
    assert made["few/best"]["compute"]["cost"] == 10.5
    assert made["few/reno"]["compute"]["spent"]["rewards"] == {"forward": 2, "gradient": 2}
    assert all(0 < arm["compute"]["cost"] <= 11.0 for arm in made.values())
    config |= {"budget": None, "methods": {"ode": {}, "best": methods["best"]}, "folder": str(tmp_path / "dearest")}
    made = {arm["name"]: arm for arm in json.loads((run(config).folder / "results.json").read_text())["arms"]}
    assert made["few/ode"]["settings"]["steps"] == 3  # as much as the dearest, two samples of 1.75
    assert made["few/best"]["compute"]["cost"] == 3.5


def test_measured_prices_are_kept(tmp_path: Path) -> None:
    two = {"shapes": {"class": "flowalign.evaluation.Shapes", "count": 2}}
    config = sweep(tmp_path / "eval", prices=None, benchmarks=two, seeds=[0])
    run(config)
    before = tables(tmp_path / "eval")
    run(config)
    assert tables(tmp_path / "eval") == before
    cost = values(tmp_path / "eval")
    one, three = cost["few/ode", "clip"]["cost"], cost["few/best", "clip"]["cost"]
    assert one > 1
    assert three > 3 * one  # decodes are measured once, and a reward costs something


def test_judges_diversity_and_distances(unbroken: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    reference.mkdir()
    for i, path in enumerate(sorted((unbroken / "cells/drawn").glob("*/0000*.png"))[:5]):
        Image.open(path).save(reference / f"{i}.png")
    embedder = {"class": "rewards.CLIPEmbedder", "model": "shapes"}
    extra = {
        "judges": {"by clip": {"class": "rewards.PairwiseWinRate", "reward": CLIP}},
        "embedders": {"clip": embedder},
        "distances": {"cmmd": {"class": "rewards.MMD", "embedder": embedder, "reference": str(reference)}},
    }
    folder = run(copied(unbroken, tmp_path / "eval", **extra)).folder
    told = values(folder)
    assert told["few/best", "by clip"]["value"] == told["few/best", "clip"]["wins"]
    (benchmark,) = json.loads((folder / "results.json").read_text())["benchmarks"]
    paths = [folder / path for row in benchmark["media"]["few/best"] for path in row]
    seen = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255 for path in paths])
    clip = CLIPEmbedder("shapes")
    exact = float(MMD(clip, reference).distance(clip(seen).double()))
    assert told["few/best", "cmmd"]["value"] == pytest.approx(exact, rel=1e-5)
    assert told["few/best", "cmmd"]["low"] is None
    pairs = seen.view(4, 2, 3, 32, 32)
    apart = [(a - b).square().mean().sqrt().item() for a, b in pairs]
    assert told["few/best", "diversity (pixels)"]["value"] == pytest.approx(np.mean(apart), rel=1e-5)
    cosine = [1 - float(a @ b) for a, b in (clip(pair) for pair in pairs)]
    assert told["few/best", "diversity (clip)"]["value"] == pytest.approx(np.mean(cosine), rel=1e-4)


def test_diversity_of_alike_and_of_opposite_media() -> None:
    black, white = torch.zeros(3, 4, 4), torch.ones(3, 4, 4)
    assert _spread([black, black], None) == 0.0
    assert _spread([black, white], None) == 1.0
    assert _spread([black, white, black], None) == pytest.approx(2 / 3)
    assert np.isnan(_spread([black], None))


def test_videos(tmp_path: Path) -> None:
    config = sweep(
        tmp_path / "eval",
        models={"video": {"target": "shapes-video", "steps": 1, "guidance_scale": 1.0}},
        methods={},
        benchmarks={"moving": {"class": "flowalign.evaluation.ShapesVideo", "count": 2}},
        metrics={"clip": CLIP, "still": {"class": "rewards.TemporalFlickering"}},
    )
    made = run(config)
    assert "metrics.clip scores images, so not those of moving" in made.table
    told = values(made.folder, "moving")
    assert {name for _, name in told} == {"accuracy", "still", "diversity (pixels)"}
    (benchmark,) = json.loads((made.folder / "results.json").read_text())["benchmarks"]
    paths = [made.folder / path for row in benchmark["media"]["video"] for path in row]
    assert {path.suffix for path in paths} == {".mp4"}
    embedded = _picture(benchmark["media"]["video"][0][0], made.folder)
    assert embedded is not None
    assert embedded.film.startswith("data:video/mp4;base64,")
    before = tables(made.folder)
    assert rows_of(config) == {"rows": 0}
    assert tables(made.folder) == before


def test_prompts_of_two_sizes_and_a_search_without_any_valid_sample(tmp_path: Path) -> None:
    drawn = cells.Drawn((None, torch.zeros(3, 4, 4, dtype=torch.uint8)), cells.Spent(), 0.0)
    store = Store(tmp_path)
    store.open()
    prompts = held_out_prompts(2)
    store.keep("key", drawn, prompts, None)
    kept = store.drawn("key")
    assert kept is not None
    assert [digest is None for digest in kept.digests] == [True, False]
    (tmp_path / "drawn/key/00001.png").unlink()
    assert store.drawn("key") is None  # it is drawn again


@pytest.fixture
def trained(tmp_path: Path) -> Callable[[str, float], Path]:
    """A run folder as training leaves it."""

    def make(name: str, scale: float) -> Path:
        folder = tmp_path / name
        model = SD3("shapes", max_sequence_length=0)
        randomise_policy(model, scale)
        model.save(folder / "lora")
        own = {"class": "flowalign.models.SD3", "pipeline": "shapes", "max_sequence_length": 0}
        config = {"trainer": "trainers.FlowGRPO", "model": own, "sampling": {"steps": 2, "guidance_scale": 1.0}}
        (folder / "config.yaml").write_text(dump_yaml(config))
        return folder

    return make


def test_runs_are_held_against_what_they_were(
    trained: Callable[[str, float], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(trained("one", 0.1))]
    words = [
        "eval",
        *runs,
        "--benchmark",
        "shapes",
        "--benchmarks.shapes.count",
        "2",
        "--folder",
        str(tmp_path / "out"),
    ]
    words += ["--reward", "{class: rewards.CLIPScore, model: shapes}"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "shapes: 2 prompts, 1 seed, against base" in out
    told = values(tmp_path / "out")
    assert {arm for arm, _ in told} == {"base", "one"}
    assert {name for _, name in told} == {"accuracy", "CLIPScore"}
    assert told["one", "CLIPScore"]["change"] != 0
    settings = {arm["name"]: arm["settings"] for arm in json.loads((tmp_path / "out/results.json").read_text())["arms"]}
    assert settings["one"]["steps"] == 2
    # the LoRA of the first, named as such, is the same arm: nothing is drawn
    cache = str(tmp_path / "out/cells")
    words = ["eval", "shapes", "--lora", f"{runs[0]}/lora", "--benchmark", "shapes", "--benchmarks.shapes.count", "2"]
    words += ["--steps", "2", "--guidance-scale", "1", "--models.shapes.model.max_sequence_length", "0"]
    count = len([*(tmp_path / "out/cells/drawn").iterdir()])
    assert main([*words, "--folder", str(tmp_path / "lora"), "--cache", cache]) == 0
    assert len([*(tmp_path / "out/cells/drawn").iterdir()]) == count
    assert values(tmp_path / "lora")["shapes/one", "accuracy"]["value"] == told["one", "accuracy"]["value"]


def brightness(media: Any, prompts: Any) -> Any:
    return media.pixels.mean((1, 2, 3))


def test_prompts_of_your_own_count_by_category(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_bytes(json_lines([{"prompt": f"a red circle {i}", "sort": "a" if i else "b"} for i in range(4)]))
    own = {"prompts": str(file), "category": "sort", "per_category": True, "reward": JPEG}
    config = sweep(tmp_path / "eval", methods={"ode": {}}, seeds=[0], metrics={"same": JPEG})
    config["benchmarks"] = {"mine": {"class": "flowalign.evaluation.PromptBenchmark", **own}}
    folder = run(config).folder
    told = values(folder, "mine")
    (benchmark,) = json.loads((folder / "results.json").read_text())["benchmarks"]
    grid = np.array(benchmark["numbers"][0]["grids"]["few"])[:, 0]
    assert told["few", "score"]["value"] == pytest.approx((grid[0] + grid[1:].mean()) / 2)
    assert told["few", "same"]["value"] == pytest.approx(grid.mean())
    assert isinstance(FunctionReward(brightness), FunctionReward)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"benchmarks": {}}, "benchmarks is empty"),
    ({"seeds": [1, 1]}, "seeds are there twice"),
    ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"budget": 3.0}, "budget is positive, and goes with at_equal_compute"),
    ({"at_equal_compute": True, "budget": 1.2, "methods": {}}, "few: a budget of 1.2 forwards does not pay for one"),
    ({"baseline": ["nobody"]}, "there is no arm 'nobody'; the arms are few/ode, few/best"),
    ({"methods": {"x": {"stepps": 3}}}, "methods.x: unknown key 'stepps'"),
    ({"methods": {"x": {"search": "trainers.FlowGRPO"}}}, "methods.x: search: 'trainers.FlowGRPO' is no search"),
    ({"methods": {"x": {"search": "trainers.BestOfN", "reward": CLIP, "seed": 3}}}, "seed is the sweep's own"),
    ({"methods": {"x": {"search": "trainers.ReNO"}}}, "methods.x: ReNO needs 'reward'"),
    ({"models": {"a": {"target": "shapes", "loras": {"x": "nowhere"}}}}, "models.a: nowhere does not exist"),
    ({"models": {"a": {"target": "shapes", "methods": ["tree"]}}}, "models.a.methods: there is no 'tree'"),
    ({"models": {"a": {"target": "shapes", "lora": "x", "base": True}}}, "lora, loras and base exclude each other"),
    ({"models": {"a/b": "shapes", "a": {"target": "shapes", "methods": ["ode"], "loras": {"b": None}}},
      "methods": {"ode": {}}}, "two arms are called 'a/b'"),
    ({"models": {"v": "shapes-video"}}, "models.v makes videos, and the benchmark shapes is of pictures"),
    ({"models": {"v": "./nothing"}}, "models.v: ./nothing is not a folder"),
    ({"benchmarks": {"g": {"class": "flowalign.evaluation.GenEval", "file": "none.jsonl"}}}, "none.jsonl is not there"),
    ({"benchmarks": {"s": {"class": "flowalign.evaluation.Shapes", "count": 0}}}, "count must be at least 1"),
    ({"benchmarks": {"s": {"class": "flowalign.evaluation.Shapes", "kinds": ["cube"]}}}, "kinds must be some of"),
    ({"benchmarks": {"p": {"class": "flowalign.evaluation.PromptBenchmark", "prompts": ["x"]}}, "metrics": {}},
     "benchmarks.p has no reward"),
    ({"metrics": {"accuracy": CLIP}}, "metrics.accuracy: the benchmark shapes has a number of that name"),
    ({"metrics": {"w": {"class": "rewards.PairwiseWinRate", "reward": CLIP}}}, "put what compares samples under"),
    ({"judges": {"c": CLIP}}, "judges.c scores each sample on its own"),
    ({"metrics": {"c": {"class": "rewards.CLIPScore", "modl": "shapes"}}}, "unknown key 'modl'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda one: one if isinstance(one, str) else "")
def test_what_is_wrong_is_told_in_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as told:
        run(sweep(tmp_path / "eval", **changes))
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"is in use and holds no sweep \(thesis.tex\)"):
        run(sweep(tmp_path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shapes"], "eval needs --benchmark NAME, or a sweep file"),
        (["nosweep.yaml"], "no file and no shipped config 'nosweep.yaml'"),
        (["shapes", "--benchmark", "parti"], "there is no 'parti'; shapes, shapes-video come with the package"),
        (["shapes", "--benchmark", "geneval"], "--benchmark geneval needs its authors' file: geneval=PATH"),
        (["shapes", "--benchmark", "shapes=x"], "comes with the package: leave =x out"),
        (["shapes", "a/shapes", "--benchmark", "shapes"], "targets: two are called 'shapes'"),
        (["shapes", "--benchmark", "shapes", "--fodler", "x"], "unknown key 'fodler' in Sweep"),
        (["eval/shapes", "--benchmark", "shapes"], "--benchmark is for targets"),
        (["shapes", "shapes-few-step", "--lora", "x", "--benchmark", "shapes"], "--lora is tried on one target"),
    ],
)
def test_bad_commands(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_shipped_sweeps_are_whole() -> None:
    planned = plan(build(Sweep, load_yaml(find_config("eval/shapes"))))
    assert [arm.name for arm in planned.arms] == ["base", "few-step/ode", "few-step/best-of-n", "few-step/reno"]
    assert planned.baselines == {"shapes": "few-step/ode"}
    trained = build(Sweep, load_yaml(find_config("eval/shapes_trained")))
    for entrant in (one for one in trained.models.values() if one.target != "shapes-few-step"):
        config = load_yaml(find_config(entrant.target.removeprefix("runs/").replace("_shapes", "/shapes")))
        assert config["folder"] == entrant.target
    assert {*trained.baseline} <= {*trained.models}
