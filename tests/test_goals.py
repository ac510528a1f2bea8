"""The goals table: how it reads, what is kept of a measurement, going on, and one row that is really measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import repeat_tests
from scripts.goal_rows.measuring import Bench, Cases, Goal, Measured, read_report
from scripts.goal_rows.rows import multi_process
from scripts.goals import GOALS, Row, main, measure, table

HELD = Measured("3 of 3 cases", True, 12.4)


def row(number: int, measured: Measured = HELD, explained: str = "", quick: bool = False) -> Row:
    return Row(Goal(number, "a|b", "all", lambda bench: measured, explained), measured, quick)


def test_a_table_has_a_line_for_each_goal_and_says_what_is_explained():
    rows = [row(1), row(2, explained="by choice.", quick=True), row(3, Measured("2 of 3 cases", False, 0.4), "so.")]
    assert table(rows).splitlines() == [
        "| # | figure | target | measured |  | s |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 1 | a\\|b | all | 3 of 3 cases | met | 12 |",
        "| 2 | a\\|b | all | 3 of 3 cases (quick) | explained | 12 |",
        "| 3 | a\\|b | all | 2 of 3 cases | NOT MET | 0 |",
        "",
        "2: by choice.",
        "3: so.",
        "",
        "3 figures: 1 met, 1 explained, 1 NOT MET",
    ]


def test_there_is_a_goal_of_each_number():
    assert [goal.number for goal in GOALS] == [*range(1, 22)]


def counting(bench: Bench, counts: list[int]) -> dict[str, Any]:
    def made() -> dict[str, Any]:
        counts.append(len(counts))
        return {"figure": len(counts)}

    return bench.kept("some/thing", made)


def test_what_is_measured_is_kept_and_not_measured_again(tmp_path):
    counts = list[int]()
    assert counting(Bench(tmp_path), counts)["figure"] == 1
    assert counting(Bench(tmp_path), counts)["figure"] == 1
    assert json.loads((tmp_path / "some" / "thing.json").read_text())["figure"] == 1
    again = Bench(tmp_path, again=True)
    assert counting(again, counts)["figure"] == counting(again, counts)["figure"] == 2, "once a run"


def test_a_quick_measurement_is_never_taken_for_a_full_one(tmp_path):
    counts = list[int]()
    quick = Bench(tmp_path, quick=True)
    assert counting(quick, counts)["figure"] == 1
    assert quick.small
    full = Bench(tmp_path)
    assert counting(full, counts)["figure"] == 2
    assert not full.small
    after = Bench(tmp_path, quick=True)
    assert counting(after, counts)["figure"] == 2, "a full one will do where a quick one is asked for"
    assert not after.small


def test_what_breaks_off_is_not_kept_and_is_a_row_that_is_not_met(tmp_path):
    def broken(bench: Bench) -> Measured:
        bench.kept("thing", lambda: {"x": 1 // len(bench.made)})
        return HELD

    def fails() -> dict[str, Any]:
        raise RuntimeError("first line\nno disk")

    with pytest.raises(ZeroDivisionError):
        measure(Goal(1, "a", "b", broken), Bench(tmp_path))
    assert [path.suffix for path in tmp_path.iterdir()] == [".said"]
    goal = Goal(1, "a", "b", lambda bench: Measured(str(bench.kept("thing", fails)), True, 0.0))
    found = measure(goal, Bench(tmp_path))
    assert (found.verdict, found.measured.figure) == ("NOT MET", "could not be measured: no disk")


REPORT = """<testsuites><testsuite><testcase name="test_a[1]" time="0.5"/>
<testcase name="test_a[2]" time="2.0"><failure message="x">y</failure></testcase>
<testcase name="test_b" time="0.1"><error message="x">y</error></testcase>
<testcase name="test_c" time="0.2"><skipped message="x"/></testcase></testsuite></testsuites>"""


def test_cases_are_those_of_the_report_that_a_pattern_names(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    held = {"tests": read_report(tmp_path / "report.xml"), "seconds": 3.0, "quick": False}
    (tmp_path / "test_x.json").write_text(json.dumps(held))
    bench = Bench(tmp_path)
    assert bench.tests("tests/test_x.py", "test_a") == Cases(1, ("test_a[2]",), 0, 2.5, 2.0)
    whole = bench.tests("tests/test_x.py")
    assert str(whole) == "1 of 3 cases (1 skipped), FAILED test_a[2], test_b"
    assert not whole.good
    assert not bench.tests("tests/test_x.py", "test_c").good, "where nothing has run nothing is shown"


def test_a_row_that_is_really_measured(tmp_path, capsys):
    asked = ["--only", "12", "--quick", "--out", str(tmp_path)]
    assert main(asked) == 0
    told = capsys.readouterr()
    assert "| 12 | sampler | " in told.out
    assert "400 cases, 0 wrong, " in told.out
    assert "(quick) | met |" in told.out
    assert "measuring sampler" in told.err
    assert main(asked) == 0
    assert "measuring" not in capsys.readouterr().err


def kept_repeats(folder: Path, name: str, times: int, seconds: float, failed: int = 0, tests: int = 77) -> None:
    """As repeat_tests.py and the table leave them."""
    (folder / name).mkdir(parents=True)
    line = f"{tests} passed, 215 deselected in {seconds}s"
    made = [{"passed": number >= failed, "seconds": seconds, "line": line} for number in range(times)]
    (folder / name / "repeats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in made))
    ended = {"code": int(failed > 0), "said": [], "seconds": times * seconds, "quick": False}
    (folder / f"{name}.json").write_text(json.dumps(ended))


@pytest.mark.parametrize(
    ("tests", "seconds", "failed", "told"),
    [
        (77, 81.0, 0, (True, "77 in 81 s by themselves; 0 of 200 repeats with a failure")),
        (77, 91.0, 0, (False, "77 in 91 s by themselves; 0 of 200 repeats with a failure")),
        (59, 81.0, 0, (False, "59 in 81 s by themselves; 0 of 200 repeats with a failure")),
        (77, 81.0, 1, (False, "77 in 81 s by themselves; 1 of 200 repeats with a failure")),
    ],
    ids=["met", "too slow", "too few", "a flake"],
)
def test_the_time_of_the_repeats_is_that_of_one_by_itself(tmp_path, tests, seconds, failed, told):
    kept_repeats(tmp_path, "alone", 1, seconds, tests=tests)
    kept_repeats(tmp_path, "repeats", 200, 150.0, failed)
    found = multi_process(Bench(tmp_path))
    assert (found.holds, found.figure) == told


FLAKY = """
from pathlib import Path


def test_it():
    path = Path(__file__).with_name("turns")
    turns = len(path.read_text()) if path.exists() else 0
    path.write_text("x" * (turns + 1))
    assert turns % 2 == 0, "an odd turn"
"""


def test_repeats_count_flakes_and_keep_what_they_say(tmp_path):
    (tmp_path / "test_flaky.py").write_text(FLAKY)
    own = [str(tmp_path / "test_flaky.py"), "-c", os.devnull]
    command = [sys.executable, repeat_tests.__file__, "--times", "2", "--out", str(tmp_path / "out"), *own]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("1/2 passed: 1 passed in ")
    assert lines[1].startswith("2/2 FAILED: 1 failed in ")
    assert lines[-1].startswith("2 repeats, 1 with a failure (50.0%), ")
    (log,) = (tmp_path / "out").glob("*.log")
    assert "an odd turn" in log.read_text()
    assert str(log) in lines[-2]
    more = subprocess.run([*command[:3], "3", *command[4:]], capture_output=True, text=True).stdout.splitlines()
    assert more[0].startswith("3/3 passed: 1 passed in ")  # the two are not made again
    assert more[-1].startswith("3 repeats, 1 with a failure (33.3%), ")
