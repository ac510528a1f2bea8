"""Runs beside each other: numbers by hand, the page's content, and what is refused."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from flowalign.cli import main
from flowalign.comparison import gather, markdown, render
from flowalign.comparison.runs import names
from flowalign.config import dump_yaml
from flowalign.report.bars import placed, span
from flowalign.report.comparing import difference
from flowalign.report.differing import unlike
from tests.test_report import ATTACK, jsonl, picture

BEFORE = (0.0, 0.0, 1.0, 1.0)
AFTER = {"first": (1.0, 0.0, 1.0, 1.0), "second": (1.0, 1.0, 0.0, 1.0), "third": (1.0, 1.0, 1.0, 1.0)}


def write_run(folder: Path, after: tuple[float, ...], rows: float | None = 100.0, **changed: object) -> Path:
    """A run of four epochs and two evaluations on four prompts, the last of which is the best."""
    folder.mkdir(parents=True)
    counted = {} if rows is None else {"rows/forward": rows, "rows/gradient": 10.0}
    lines: list[dict] = [
        {"step": epoch, "seconds": float(epoch), "reward": 0.1 * epoch} | counted for epoch in range(1, 5)
    ]
    scored = {0: BEFORE, 4: after}
    for epoch, scores in scored.items():
        mean = sum(scores) / 4
        lines.append({"step": epoch, "seconds": epoch + 0.5, "held-out": mean, "held-out/strict": mean})
    jsonl(folder / "metrics.jsonl", lines)
    prompts = [ATTACK, "b", "c", "d"]
    jsonl(
        folder / "evaluations" / "prompts.jsonl",
        [{"prompt": text, "kind": "ab"[i > 1]} for i, text in enumerate(prompts)],
    )
    for epoch, scores in scored.items():
        told = [{"total": s / 2, "valid": True, "strict": s, "other": 1 - s} for s in scores]
        jsonl(folder / "evaluations" / f"epoch-{epoch:06d}.jsonl", told)
        with zipfile.ZipFile(folder / "evaluations" / f"epoch-{epoch:06d}.zip", "w") as archive:
            for i in range(4):
                archive.writestr(f"{i:05d}.png", picture(10 * epoch + i))
    config = {"trainer": "trainers.FlowGRPO", "seed": 0, "folder": str(folder), "epochs": 4}
    told_config = config | {"evaluation": {"metric": "strict"}, "optimizer": {"learning_rate": 1e-3}} | changed
    (folder / "config.yaml").write_text(dump_yaml(told_config))
    (folder / "best.json").write_text(json.dumps({"epoch": 4}))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two seeds of a config, and another method that took more compute."""
    return [
        write_run(tmp_path / "first", AFTER["first"]),
        write_run(tmp_path / "second", AFTER["second"], seed=1),
        write_run(tmp_path / "third", AFTER["third"], rows=300.0, trainer="trainers.DenseGRPO", epochs=4),
    ]


def test_gains_and_leads_are_paired_over_prompts(runs):
    first, second, third = gather(runs).runs
    assert first.change == difference([*zip(BEFORE, AFTER["first"], strict=True)])
    assert second.change is not None
    assert second.change.change == pytest.approx(0.25)
    assert first.lead is None
    assert second.lead == difference([*zip(AFTER["first"], AFTER["second"], strict=True)])
    assert third.lead is not None
    assert third.lead.change == pytest.approx(0.25)
    assert (first.compute, third.compute) == (4 * (100 + 30), 4 * (300 + 30))
    assert [(p.epoch, p.compute, p.score) for p in first.curve] == [(0, 0, 0.5), (4, 520, 0.75)]


def test_another_metric_is_read_from_the_parts(runs):
    made = gather(runs, "other")
    assert made.parts == ("other", "total", "strict")
    assert [one.change.change for one in made.runs if one.change] == pytest.approx([-0.25, -0.25, -0.5])


def test_runs_that_differ_by_their_seed_are_told_together(runs):
    (told,) = gather(runs).seeds
    assert (told.names, told.mean, told.least, told.most) == (("first", "second"), 0.25, 0.25, 0.25)


def test_other_prompts_give_no_lead_and_are_told(runs, tmp_path):
    other = write_run(tmp_path / "other", AFTER["first"], rows=None)
    jsonl(other / "evaluations" / "prompts.jsonl", [{"prompt": f"else {i}"} for i in range(4)])
    made = gather([*runs, other])
    assert made.runs[-1].lead is None
    assert made.runs[-1].change is not None
    assert any("other" in note and "not evaluated on first's prompts" in note for note in made.notes)
    assert any("network rows were not counted" in note for note in made.notes)
    assert "over epochs" in render(made)
    assert "over thousand network rows" not in render(made)


def test_the_page_has_every_run_and_no_code_of_the_users(runs):
    page = render(gather(runs))
    assert ATTACK not in page
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    for word in ("first", "second", "third", "over thousand network rows", "trainers.DenseGRPO", "Change of strict"):
        assert word in page
    assert page.count("data:image/png") == 4 * (3 + 1)  # every prompt, before and of three runs
    assert "http" not in page.replace("http-equiv", "")


def test_the_table_is_for_a_terminal(runs):
    told = markdown(gather(runs))
    line = next(line for line in told.splitlines() if line.startswith("| third"))
    assert "+0.500" in line
    assert "1,320" in line
    assert "first, second" in told


def test_a_run_that_has_only_begun_stands_beside_others(runs, tmp_path):
    begun = tmp_path / "begun"
    begun.mkdir()
    jsonl(begun / "metrics.jsonl", [{"step": 1, "seconds": 1.0, "reward": 0.5}])
    made = gather([*runs, begun])
    assert made.runs[-1].change is None
    assert any("begun" in note for note in made.notes)
    assert "begun" in render(made)
    assert "first" in render(gather([begun, *runs]))


def test_settings_that_differ():
    one = {"a": 1, "b": {"c": "x", "d": [1, 2]}, "folder": "f"}
    other = {"a": 1, "b": {"c": "y", "d": [1, 2]}, "folder": "g", "e": None}
    assert unlike([one, other]) == {"b.c": ["x", "y"], "e": ["-", "null"]}
    assert unlike([one, one]) == {}


def test_names_are_as_short_as_tells_them_apart(tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert names(folders) == ["a/run", "b/run"]
    assert names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]


def test_bars_of_shares_have_the_whole_scale():
    assert span([0.2, 0.9]) == (0.0, 1.0)
    assert span([-1.0, 3.0]) == (-1.0, 3.0)
    assert placed(0.25, (0.0, 1.0)) == (0.0, 25.0)
    assert placed(-0.5, (-1.0, 1.0)) == (25.0, 25.0)
    assert placed(float("nan"), (0.0, 1.0)) == (0.0, 0.0)


def test_the_command_prints_and_writes(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    for _ in range(2):  # it writes its own page anew
        assert main(["compare", *map(str, runs), "--out", str(out)]) == 0
    assert "| third" in capsys.readouterr().out
    assert out.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{0}"], "two runs or more"),
        (["{0}", "{0}"], "given more than once"),
        (["{0}", "{nowhere}"], "has no metrics.jsonl"),
        (["{0}", "{1}", "--metric", "styrct"], "no run has the score 'styrct'; there are other, strict, total"),
        (["{0}", "{1}", "--out", "{0}"], "is a folder"),
        (["{0}", "{1}", "--out", "{0}/config.yaml"], "is there and is no page of compare's"),
        (["{0}", "{1}", "--out", "{nowhere}/page.html"], "there is no folder"),
        (["{0}", "{1}", "--bars", "2"], "no option of compare"),
    ],
)
def test_mistakes_are_told_in_a_line(words, told, runs, tmp_path, capsys):
    places = {"nowhere": tmp_path / "nowhere"}
    assert main(["compare", *(word.format(*runs, **places) for word in words)]) != 0
    error = capsys.readouterr().err.strip()
    assert told in error
    assert len(error.splitlines()) == 1
