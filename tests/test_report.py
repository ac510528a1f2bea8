"""The report of a run: its numbers by hand, what it shows of a complete and of a broken folder, and that it is safe."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowalign.config import dump_yaml
from flowalign.report import write_report
from flowalign.report.charts import BOTTOM, TOP, Series, line_chart, ticks
from flowalign.report.comparing import by_clause, by_kind, by_novelty, compare, difference, select
from flowalign.report.concerns import concerns
from flowalign.report.costs import phases, work
from flowalign.report.curves import histogram_rows
from flowalign.report.formats import duration, number, signed
from flowalign.report.headline import headline, state
from flowalign.report.images import LARGEST, WIDEST, embed, pairs, sheets
from flowalign.report.reading import Row, RunRecord, read_run
from flowalign.shapes.scenes import Group, Spec, render

ATTACK = "<script>alert(1)</script> \"'>&"
BEFORE = ((0, 0.2), (0, 0.1), (1, 1.0), (1, 0.9), (0, 0.2), (0, 0.4), (1, 1.0), (0, 0.1))  # strict, total
BEST = ((1, 1.0), (1, 1.0), (0, 0.3), (1, 0.8), (1, 0.9), (0, 0.1), (1, 0.7), (0, 0.2))
NEWEST = tuple((0, 0.1) for _ in BEFORE)
HELD_OUT = {0: BEFORE, 3: BEST, 6: NEWEST}


def jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def picture(seed: int) -> bytes:
    pixels = render(Spec("single", (Group("red", "circle"),)), np.random.default_rng(seed))
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, "PNG")
    return buffer.getvalue()


def metrics() -> list[dict]:
    rows: list[dict] = []
    for epoch in range(7):
        if epoch:
            rows.append(
                {"step": epoch, "seconds": 10.0 * epoch, "reward": 0.5 + 0.05 * epoch, "reward_std_in_group": 0.2}
                | {"equal_groups": 0.1, "invalid": 0.0, "reward/strict": 0.1 * epoch, "skipped": 0.0, "lr": 1e-3}
                | {"clip_fraction": 0.1, "grad_norm": None if epoch == 4 else 0.1 * epoch}
                | {"rows/forward": 1000, "rows/gradient": 100, "floor/forward": 900, "floor/gradient": 100}
                | {"time/rollout": 5.0, "time/update": 3.0}
            )
        if epoch in HELD_OUT:
            strict = sum(score for score, _ in HELD_OUT[epoch]) / 8
            held_out = {"held-out/strict": strict, "held-out/total": sum(t for _, t in HELD_OUT[epoch]) / 8}
            bounds = {"held-out": strict, "held-out/low": strict - 0.2, "held-out/high": strict + 0.2}
            rows.append({"step": epoch, "seconds": 10.0 * epoch + 2} | held_out | bounds | {"time/evaluation": 2.0})
    return rows


def write_evaluations(folder: Path) -> None:
    prompts = [{"prompt": f"prompt {i}", "kind": "pair" if i < 4 else "count", "unseen": i % 2 == 0} for i in range(8)]
    prompts[1]["prompt"] = ATTACK
    jsonl(folder / "prompts.jsonl", prompts)
    for epoch, scores in HELD_OUT.items():
        rows = [{"total": t, "valid": True, "strict": s, "clause/color": s, "clause/size": None} for s, t in scores]
        rows[0]["clause/size"] = 1
        jsonl(folder / f"epoch-{epoch:06d}.jsonl", rows)
        with zipfile.ZipFile(folder / f"epoch-{epoch:06d}.zip", "w") as archive:
            for i in range(8):
                archive.writestr(f"{i:05d}.png", picture(100 * epoch + i))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A small run that holds everything: eight prompts, six epochs, three evaluations, the second of which is best."""
    folder = tmp_path / "small run"
    folder.mkdir()
    jsonl(folder / "metrics.jsonl", metrics())
    write_evaluations(folder / "evaluations")
    histogram = {"low": -2.0, "high": 2.0, "counts": [1, 3, 3, 1]}
    names = [(step, name) for step in range(1, 7) for name in ("log_ratio", "advantages")]
    jsonl(folder / "histograms.jsonl", [{"step": step, "name": name} | histogram for step, name in names])
    (folder / "samples").mkdir()
    for epoch in HELD_OUT:
        (folder / "samples" / f"epoch-{epoch:06d}.png").write_bytes(picture(epoch))
    sampling = {"groups": 4, "group_size": 6}
    config = {"trainer": "trainers.FlowGRPO", "epochs": 6, "sampling": sampling, "evaluation": {"metric": "strict"}}
    (folder / "config.yaml").write_text(dump_yaml(config | {"note": ATTACK}))
    (folder / "best.json").write_text(json.dumps({"epoch": 3, "held-out": 0.625}))
    (folder / "environment.json").write_text(json.dumps({"python": ATTACK, "processes": 2, "devices": ["cpu", "cpu"]}))
    jsonl(folder / "events.jsonl", [{"time": "2026-01-01T00:00:00Z", "event": "finish", "detail": ATTACK}])
    return folder


class Page(HTMLParser):
    """A page as a browser reads it: its tags with attributes, its text, and what stands in scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.raw = "", {"script": list[str](), "style": list[str]()}
        self._inside = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in self.raw else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.raw[self._inside].append(data)
        else:
            self.text = " ".join(f"{self.text} {data}".split())

    def values(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.tags if name in attributes]


def test_paired_difference_by_hand() -> None:
    found = difference([(0.0, 1.0), (0.5, 0.5), (1.0, 0.8), (0.2, 0.6)])
    assert found is not None
    # changes 1, 0, -.2, .4: mean .3, sd sqrt(.84 / 3), and t of 3 degrees of freedom is 3.182446
    reach = 3.182446 * math.sqrt(0.28) / 2
    assert (found.low, found.high) == pytest.approx((0.3 - reach, 0.3 + reach), abs=1e-6)
    assert (found.before, found.after, found.better, found.worse) == pytest.approx((0.425, 0.725, 2, 1))
    assert found.verdict == "unclear"
    assert [difference([(a, a + d), (a, a + 1.01 * d)]).verdict for a, d in ((0, 1.0), (1, -1.0))] == [
        "better",
        "worse",
    ]  # type: ignore[union-attr]
    assert difference([]) is None


def test_headline_of_the_page(run_folder: Path) -> None:
    text = Page(write_report(run_folder)).text
    # changes 1, 1, -1, 0, 1, 0, 0, 0: mean .25, sd sqrt(3.5 / 7), and t of 7 degrees of freedom is 2.364624
    reach = 2.364624 * math.sqrt(0.5) / math.sqrt(8)
    assert "0.375 \u2192 0.625" in text
    assert "base model \u2192 best, epoch 3" in text
    assert f"+0.250 (95 %: {0.25 - reach:.3f} to +{0.25 + reach:.3f}, paired over 8 prompts)" in text
    assert "3 better, 1 worse, 4 the same" in text
    assert "FlowGRPO, finished, 6 of 6 epochs" in text
    assert "Wall time 1 min 02 s" in text
    assert f"Training samples/s {4 * 6 * 6 / 62:.3f}" in text


def test_prompts_in_order(run_folder: Path) -> None:
    run = read_run(run_folder)
    comparison = compare(run)
    assert comparison is not None
    chosen = select(comparison, 3)
    assert [one.index for one in chosen.up] == [1, 0, 4]  # all from 0 to 1; the totals rise by .9, .8 and .7
    assert [one.index for one in chosen.down] == [2]
    assert [one.index for one in chosen.best] == [0, 1, 4]  # 1, 1, .9 in total; equal ones in the order of the prompts
    assert [one.index for one in chosen.worst] == [5, 7, 2]
    assert (chosen.up[0].gained, chosen.up[0].lost, chosen.up[0].failing) == (("color",), (), ())
    assert (chosen.down[0].gained, chosen.down[0].lost) == ((), ("color",))
    assert chosen.worst[0].failing == ("color",)
    pair = pairs(run, comparison, chosen.down)[0]
    for side, epoch in ((pair.before, 0), (pair.after, 3)):
        assert side is not None
        assert base64.b64decode(side.uri.split(",")[1]) == picture(100 * epoch + 2)


def test_clauses_and_kinds(run_folder: Path) -> None:
    comparison = compare(read_run(run_folder))
    assert comparison is not None
    clauses, kinds, novelty = by_clause(comparison), by_kind(comparison), by_novelty(comparison)
    shown = {name: (one.before, one.after, one.count) for name, one in (clauses | kinds | novelty).items()}
    assert shown == {
        "color": (0.375, 0.625, 8),
        "size": (1.0, 1.0, 1),  # null elsewhere: does not apply
        "count": (0.25, 0.5, 4),
        "pair": (0.5, 0.75, 4),
        "seen in training": (0.25, 0.5, 4),
        "unseen in training": (0.5, 0.75, 4),
    }


def test_costs(run_folder: Path) -> None:
    run = read_run(run_folder)
    assert [(one.measured, one.floor) for one in work(run)] == [(6000, 5400), (600, 600), (7800, 7200)]
    assert work(run)[-1].ratio == pytest.approx((1000 + 3 * 100) / (900 + 3 * 100))
    spent = {phase.name: (phase.seconds, phase.per_epoch) for phase in phases(run)}
    assert spent == {"rollout": (30, 5), "update": (18, 3), "evaluation": (6, 1), "other": (8, pytest.approx(8 / 6))}
    assert sum(phase.share for phase in phases(run)) == pytest.approx(1)
    assert "1.083" in Page(write_report(run_folder)).text


def test_user_text_is_escaped_and_nothing_is_loaded(run_folder: Path) -> None:
    page = Page(write_report(run_folder))
    assert page.text.count("<script>alert(1)</script> \"'>&") >= 4  # prompt, config, environment, event
    assert len(page.raw["script"]) == 1
    assert "alert" not in page.raw["script"][0]
    assert page.values("src")
    assert all(value.startswith("data:image/") for value in page.values("src"))
    assert all(value.startswith("#") for value in page.values("href"))
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert "url(" not in "".join(page.raw["style"] + page.values("style"))
    assert "@import" not in "".join(page.raw["style"])
    policy = next(value for value in page.values("content") if "default-src" in value)
    allowed = base64.b64encode(hashlib.sha256(page.raw["script"][0].encode()).digest()).decode()
    assert f"script-src 'sha256-{allowed}'" in policy
    assert "default-src 'none'" in policy


def test_report_is_a_function_of_the_folder(run_folder: Path, tmp_path: Path) -> None:
    first = write_report(run_folder).read_bytes()
    elsewhere = tmp_path / "other" / run_folder.name
    shutil.copytree(run_folder, elsewhere, ignore=shutil.ignore_patterns("report.html"))
    assert write_report(elsewhere).read_bytes() == first
    assert write_report(run_folder).read_bytes() == first
    assert [path.name for path in run_folder.glob("*report*")] == ["report.html"]


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("config.yaml", "There is no config.yaml"),
        ("histograms.jsonl", "There are no histograms"),
        ("evaluations/epoch-000000.jsonl", "Scores per prompt of epoch 0 and of a later evaluation are missing"),
        ("evaluations/epoch-000003.zip", "picture not kept"),
        ("evaluations/prompts.jsonl", "prompt 1"),
        ("evaluations", "No scores per prompt, so no interval"),
        ("samples", "There are no contact sheets"),
        ("best.json", "base model \u2192 best, epoch 3"),
        ("environment.json", "The environment was not recorded"),
        ("events.jsonl", "No events were recorded"),
    ],
)
def test_missing_files_are_said(run_folder: Path, missing: str, said: str) -> None:
    whole = Page(write_report(run_folder)).text
    path = run_folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert said in Page(write_report(run_folder)).text
    assert (said in whole) == (missing == "best.json")  # which is then read off the metrics


def test_only_metrics(run_folder: Path) -> None:
    for path in run_folder.iterdir():
        if path.name != "metrics.jsonl":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    jsonl(run_folder / "metrics.jsonl", [{"step": 1, "seconds": 2.0, "reward": 0.5}])
    text = Page(write_report(run_folder)).text
    for said in ("whether the policy got better is not known", "The time of phases was not recorded", "1 epochs"):
        assert said in text
    (run_folder / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl"):
        write_report(run_folder)


@pytest.mark.parametrize("name", ["metrics.jsonl", "histograms.jsonl", "events.jsonl"])
def test_torn_and_broken_lines(run_folder: Path, name: str) -> None:
    whole = write_report(run_folder).read_bytes()
    content = (run_folder / name).read_bytes()
    (run_folder / name).write_bytes(content + b'{"step": 7, "seco')
    assert write_report(run_folder).read_bytes() == whole
    line = content.count(b"\n") + 1
    for broken in (b'{"step": 7, "seco\n', b"[1]\n", b"{}\n"):
        (run_folder / name).write_bytes(content + broken)
        with pytest.raises(ValueError, match=rf"{name}:{line}: this line is broken"):
            write_report(run_folder)


def test_evaluation_cut_short_and_broken_pictures_are_left_out(run_folder: Path) -> None:
    scores = run_folder / "evaluations" / "epoch-000003.jsonl"
    scores.write_bytes(scores.read_bytes()[:-30])
    (run_folder / "evaluations" / "epoch-000006.zip").write_bytes(b"PK")
    (run_folder / "samples" / "epoch-000003.png").write_bytes(b"\x89PNG")
    run = read_run(run_folder)
    comparison = compare(run)
    assert comparison is not None
    assert (comparison.after_epoch, comparison.best) == (6, False)
    assert headline(run, comparison).after_name == "newest, epoch 6"
    assert [sheet.epoch for sheet in sheets(run)] == [0, 6]
    assert "picture not kept" in Page(write_report(run_folder)).text


def test_later_row_of_an_epoch_counts(run_folder: Path) -> None:
    jsonl(run_folder / "metrics.jsonl", [*metrics(), {"step": 6, "seconds": 70.0, "reward": 0.9}])
    run = read_run(run_folder)
    assert len(run.epochs) == 6
    assert run.epochs[-1].get("reward") == 0.9


def test_state_and_metric(run_folder: Path) -> None:
    run = read_run(run_folder)
    cut = replace(run, epochs=run.epochs[:4], events=())
    stop = replace(run.events[0], name="stop")
    assert state(cut) == "running or killed, 4 of 6 epochs"
    assert state(replace(cut, events=(stop,))) == "stopped, 4 of 6 epochs"
    assert state(replace(cut, events=(stop, replace(stop, name="resume")))) == "running or killed, 4 of 6 epochs"
    assert state(replace(run, events=())) == "finished, 6 of 6 epochs"
    assert run.metric == "strict"
    assert replace(run, config={}).metric == "strict"  # read off the rows
    assert replace(run, config={"epochs": 6}).metric == "total"


def with_values(run: RunRecord, values: Callable[[int], dict[str, float]]) -> RunRecord:
    rows = tuple(Row(row.step, row.seconds, {**row.values, **values(row.step)}) for row in run.epochs)
    return replace(run, epochs=rows)


def test_concerns(run_folder: Path) -> None:
    run = read_run(run_folder)
    calm = replace(run, scored={0: run.scored[0]}, best=0)
    assert concerns(calm, None) == ()

    def said(change: Callable[[int], dict[str, float]]) -> str:
        return " ".join(concerns(with_values(calm, change), None))

    assert said(lambda step: {"invalid": 2.0}).startswith(
        "Scores could not be had for 12 training samples and 0 held-out"
    )
    assert "not finite: 1, first in epoch 5" in said(lambda step: {"skipped": float(step == 5)})
    assert "60 % of the groups had equal rewards" in said(lambda step: {"equal_groups": 0.6})
    assert "in 2 of 6 epochs, first in epoch 5" in said(lambda step: {"clip_fraction": 0.1 * step + 0.05})
    assert "1.50 times the work" in said(lambda step: {"rows/forward": 1500.0})
    assert "waited for others 48 %" in said(lambda step: {"time/wait": 5.0, "time/rollout": 0.0})
    assert "no number in 1 epochs, first in epoch 2" in said(lambda step: {"reward": math.nan} if step == 2 else {})


def test_reward_hacking_is_seen(run_folder: Path) -> None:
    run = read_run(run_folder)
    comparison = compare(run)
    # from best to newest the held-out score falls in 5 of 8 prompts, and the training reward rises from .60 to .75
    found = concerns(run, comparison)
    assert found[0].startswith("Possible reward hacking: since epoch 3 the held-out strict fell from 0.625 to 0")
    assert found[0].endswith("while the training reward rose from 0.600 to 0.750.")
    assert any(text.startswith("No improvement can be told from chance") for text in found)
    falling = with_values(run, lambda step: {"reward": -float(step)})
    assert concerns(falling, comparison)[0].startswith("The policy got worse after its best")


def test_histograms_of_first_middle_and_last_epoch(run_folder: Path) -> None:
    rows = histogram_rows(read_run(run_folder))
    titles = [[chart.title for chart in row] for row in rows]
    assert titles == [[f"{name}, epoch {step}" for step in (1, 4, 6)] for name in ("log ratio", "advantages")]
    tops = [tick for tick in rows[0][0].y_ticks if tick.label == "30 %"]
    (bars,) = rows[0][0].areas
    heights = [float(bar.split("h")[0]) for bar in bars.path.split("V")[1:] if "h" in bar]
    assert heights[0] == heights[3] > tops[0].at > heights[1] == heights[2]  # 12.5 % and 37.5 %; up is less


def test_lines_rise_where_values_do() -> None:
    x, nan = (0.0, 1.0, 2.0, 3.0, 4.0), math.nan
    rising = Series("a", "train", x, (1.0, 2.0, nan, 4.0, 5.0), (0.5, 1.5, nan, 3.5, 4.5), (1.5, 2.5, nan, 4.5, 5.5))
    chart = line_chart("title", "note", [rising], level=1.0)
    assert chart is not None
    dashed, line = chart.lines
    points = [tuple(map(float, p.split())) for stretch in line.path.split("M")[1:] for p in stretch.split("L")]
    assert line.path.count("M") == 2  # a gap where a value is unknown
    assert [y for _, y in points] == sorted((y for _, y in points), reverse=True)
    assert all(TOP <= y <= BOTTOM for _, y in points)
    assert f" {points[0][1]:.1f}H" in dashed.path
    assert line_chart("title", "note", [Series("a", "train", (0.0,), (nan,))]) is None


def test_axes() -> None:
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(-0.13, 0.11) == pytest.approx([-0.1, -0.05, 0, 0.05, 0.1])
    decades = line_chart("title", "note", [Series("a", "train", (0.0, 1.0, 2.0), (1e-4, 1e-2, 1.0))])
    assert decades is not None
    assert [tick.label for tick in decades.y_ticks] == ["0.0001", "0.001", "0.01", "0.1", "1"]
    gaps = np.diff([tick.at for tick in decades.y_ticks])
    assert gaps == pytest.approx([gaps[0]] * 4)
    near = line_chart("title", "note", [Series("a", "train", (0.0, 1.0), (1.0, 1.001))])
    assert near is not None
    assert len({tick.label for tick in near.y_ticks}) == len(near.y_ticks)


def test_large_pictures_are_made_small() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (300, 600, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    large, small = embed(buffer.getvalue(), WIDEST, LARGEST), embed(picture(0), WIDEST, LARGEST)
    assert large.uri.startswith("data:image/jpeg;base64,")
    assert (large.width, large.height, large.small) == (WIDEST, WIDEST // 2, False)
    assert len(base64.b64decode(large.uri.split(",")[1])) <= LARGEST
    assert small.small
    assert base64.b64decode(small.uri.split(",")[1]) == picture(0)


def test_sheets_are_thinned_evenly(run_folder: Path) -> None:
    sheet = run_folder / "samples" / "epoch-000000.png"
    run = replace(read_run(run_folder), sheets=tuple((epoch, sheet) for epoch in range(100)))
    chosen = [one.epoch for one in sheets(run)]
    assert (len(chosen), chosen[0], chosen[-1]) == (24, 0, 99)
    assert set(np.diff(chosen)) == {4, 5}


def test_formats() -> None:
    assert [number(v) for v in (0.0, 0.1234, 12.345, 1234.5, 0.00012, math.nan)] == [
        "0", "0.123", "12.35", "1,234", "0.00012", "n/a",
    ]  # fmt: skip
    assert [signed(v) for v in (0.00977, -0.25, 1e-5, 12.345, 0.0, 2.7e-18)] == [
        "+0.010", "-0.250", "+1e-05", "+12.35", "0", "0",
    ]  # fmt: skip
    assert [duration(v) for v in (0.05, 12.3, 62, 3 * 3600 + 300)] == ["0.05 s", "12.3 s", "1 min 02 s", "3 h 05 min"]


def test_import_of_flowalign_is_light() -> None:
    code = "import sys, flowalign; print([m for m in ('matplotlib', 'jinja2', 'flowalign.report') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
