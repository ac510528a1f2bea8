"""What a goal's measurement is, kept in a file of its own as soon as it is there, so that a later run goes on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Measured:
    """A row's figure in words, whether it reaches the target, and the seconds that measuring has taken."""

    figure: str
    holds: bool
    seconds: float


@dataclass(frozen=True)
class Cases:
    """Tests that have run: how many passed, failed and were skipped, all their seconds, and those of the slowest."""

    passed: int
    failed: tuple[str, ...]
    skipped: int
    seconds: float
    slowest: float

    def __add__(self, other: Cases) -> Cases:
        return Cases(
            self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped,
            self.seconds + other.seconds, max(self.slowest, other.slowest),
        )  # fmt: skip

    @property
    def good(self) -> bool:
        """Some have run, and all have passed."""
        return self.passed > 0 and not self.failed

    def __str__(self) -> str:
        told = f"{self.passed} of {self.passed + len(self.failed)} cases"
        told += f" ({self.skipped} skipped)" if self.skipped else ""
        return told + (f", FAILED {', '.join(self.failed[:3])}" if self.failed else "")


@dataclass(frozen=True)
class Goal:
    """A figure, its target, what measures it, and why a part of the target is not measured or is another."""

    number: int
    figure: str
    target: str
    measure: Callable[[Bench], Measured]
    explained: str = ""


class Bench:
    """Where measurements are kept.

    Args:
        out: a folder; each measurement is a JSON file in it. quick: smaller counts will do; a full measurement that is
            there is taken all the same, never a quick one for a full one. again: measure anew what is there.
    """

    def __init__(self, out: Path, quick: bool = False, again: bool = False) -> None:
        self.out, self.quick, self.again = out, quick, again
        self.made: set[str] = set()  # names of this run, which are not made twice
        self.small = False  # whether a quick measurement has been taken since this was last set

    def kept(self, name: str, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What `measure` gives, with the seconds that it took; at once where it is there already."""
        path = self.out / f"{name}.json"
        if path.exists() and (not self.again or name in self.made):
            known: dict[str, Any] = json.loads(path.read_text())
            if self.quick or not known["quick"]:
                self.small |= known["quick"]
                return known
        print(f"measuring {name}", file=sys.stderr, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with said_to(path.with_suffix(".said")):
            found = dict(measure())
        found |= {"seconds": round(time.monotonic() - began, 3), "quick": self.quick}
        path.with_suffix(".part").write_text(json.dumps(found, indent=1))
        path.with_suffix(".part").rename(path)
        self.made.add(name)
        self.small |= self.quick
        print(f"measured {name}: {found['seconds']:.1f} s", file=sys.stderr, flush=True)
        return found

    def count(self, full: int, quick: int) -> int:
        """The smaller number where that will do."""
        return quick if self.quick else full

    def tests(self, file: str, pattern: str = "") -> Cases:
        """The tests of a file whose name, parameters included, has the pattern in it. The whole file runs, once.

        Slow tests run too, unless quick measurements will do.
        """
        name = Path(file).stem
        held = self.kept(name, lambda: {"tests": run_tests(file, self.out / f"{name}.xml", slow=not self.quick)})
        chosen = {test: told for test, told in held["tests"].items() if re.search(pattern, test)}
        seconds = [spent for _, spent in chosen.values()]
        return Cases(
            sum(outcome == "passed" for outcome, _ in chosen.values()),
            tuple(test for test, (outcome, _) in chosen.items() if outcome == "failed"),
            sum(outcome == "skipped" for outcome, _ in chosen.values()),
            sum(seconds),
            max(seconds, default=0.0),
        )

    def script(self, name: str, words: Sequence[str]) -> dict[str, Any]:
        """The exit code of one of the project's scripts, and the last lines that it prints."""

        def run() -> dict[str, Any]:
            done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environ(), capture_output=True, text=True)
            return {"code": done.returncode, "said": (done.stdout or done.stderr).strip().splitlines()[-6:]}

        return self.kept(name, run)


@contextmanager
def said_to(path: Path) -> Iterator[None]:
    """While entered, what this process and those that it forks say on stderr goes into a file."""
    sys.stderr.flush()
    before = os.dup(2)
    with path.open("w") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)


def environ() -> dict[str, str]:
    """For a process of the project's: one thread, and the checkout's own packages."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run_tests(file: str, report: Path, slow: bool) -> dict[str, tuple[str, float]]:
    """Outcome and seconds of each test of a file, by name.

    Raises: RuntimeError where pytest does not come to an end of its own.
    """
    report.parent.mkdir(parents=True, exist_ok=True)
    words = ["-m", "pytest", file, "-q", "-p", "no:cacheprovider", f"--junitxml={report.absolute()}"]
    words += ["-m", "slow or not slow"] if slow else []
    with report.with_suffix(".log").open("w") as log:
        code = subprocess.run([sys.executable, *words], cwd=ROOT, env=environ(), stdout=log, stderr=log).returncode
    if code not in (0, 1):  # 1: tests have failed
        raise RuntimeError(f"pytest {file} ended with {code}; see {report.with_suffix('.log')}")
    return read_report(report)


def read_report(report: Path) -> dict[str, tuple[str, float]]:
    """The tests of a JUnit file. A test whose fixture fails has failed."""
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[case.attrib["name"]] = (outcome, float(case.attrib["time"]))
    return found
