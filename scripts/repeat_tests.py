"""The same tests again and again: how many repeats pass without a flake, and what those that fail say.

    python scripts/repeat_tests.py --times 200
    python scripts/repeat_tests.py --times 50 tests/test_overlap.py -k signal

Without arguments of pytest's own it takes the tests of several processes: what is the same on any number of them, what
a signal stops, what their clocks have to do with it, shards and context parallelism. Tests are collected once; every
repeat is a pytest in a fork of the process that has, so that nothing is imported again. Of one that fails the whole
output is left in --out. Repeats are counted there too, with the commit that they are of: a command that was stopped
goes on. Exit status 1 where any repeat has failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SUITE = [f"tests/test_{name}.py" for name in ("processes", "stops", "clocks", "sharding", "context_parallel")]


def forked(words: Sequence[str], log: Path) -> int:
    """The exit code of a pytest that runs in a fork and writes into a file."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = 70
        try:
            code = pytest.main(["-p", "no:cacheprovider", *words])
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def collect(words: Sequence[str]) -> None:
    """Import the tests and what they test, here and thus in all forks; what is wrong with them the repeats tell."""
    stdout, kept = sys.stdout, os.dup(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        sys.stdout = nowhere
        pytest.main(["-p", "no:cacheprovider", "--collect-only", "-q", *words])
    sys.stdout = stdout
    os.dup2(kept, 1)
    os.close(kept)


def warm_up() -> None:
    """One run of the kind that most of the tests make, if any: what is looked up at first use is known in all forks."""
    if "tests.interrupted" not in sys.modules:
        return
    from tests.interrupted import train

    with TemporaryDirectory(prefix="flowalign-repeats-") as folder:
        train(Path(folder) / "run")


def once(words: Sequence[str], log: Path) -> tuple[bool, str]:
    """Whether all tests pass, and pytest's last line; the log stays where one fails."""
    code = forked(["-rfE", *words], log)
    said = log.read_text().strip().splitlines()
    if code == 0:
        log.unlink()
    failed = [line for line in said if line.startswith(("FAILED", "ERROR"))]
    last = re.sub(r"=+ ?| ?=+$", "", said[-1]) if said else "nothing said"
    return code == 0, "; ".join([last, *failed])


def commit() -> str:
    """What is checked out, "+" where it has been changed since; "" where git does not know."""
    asked = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def counted(tally: Path, words: Sequence[str]) -> list[dict[str, Any]]:
    """The repeats of these tests that were made before."""
    lines = tally.read_text().splitlines() if tally.exists() else []
    return [one for one in map(json.loads, lines) if one["tests"] == [*words]]


def repeat(words: Sequence[str], log: Path, tally: Path) -> dict[str, Any]:
    """One repeat, counted."""
    began = time.monotonic()
    good, line = once(words, log)
    told = line if good else f"{line} ({log})"
    made = {"tests": [*words], "commit": commit(), "passed": good, "seconds": time.monotonic() - began, "line": told}
    with tally.open("a") as file:
        file.write(json.dumps(made) + "\n")
    return made


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=200, help="those that --out has already among them")
    parser.add_argument("--out", type=Path, default=Path("build/repeats"), help="for logs of failures and the count")
    asked, own = parser.parse_known_args(words)
    out, tests = asked.out.absolute(), own or SUITE
    out.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT)]
    tally = out / "repeats.jsonl"
    made = counted(tally, tests)
    if len(made) < asked.times:
        collect(tests)
        warm_up()
    try:
        for number in range(len(made) + 1, asked.times + 1):
            log = out / f"{os.getpid()}-{number:04d}.log"
            made.append(one := repeat(tests, log, tally))
            print(f"{number}/{asked.times} {'passed' if one['passed'] else 'FAILED'}: {one['line']}", flush=True)
    except KeyboardInterrupt:
        log.unlink(missing_ok=True)
        print("stopped", flush=True)
    return told(made)


def told(made: Sequence[dict[str, Any]]) -> int:
    """Print what failed, and how many; the exit status."""
    failed = [f"{number}: {one['line']}" for number, one in enumerate(made, 1) if not one["passed"]]
    print("\n".join(failed), end="\n" if failed else "")
    each, states = sum(one["seconds"] for one in made) / max(len(made), 1), len({one["commit"] for one in made})
    rate = f"{len(made)} repeats, {len(failed)} with a failure ({len(failed) / max(len(made), 1):.1%})"
    print(f"{rate}, {each:.1f} s each" + (f", over {states} commits" if states > 1 else ""))
    return 1 if failed or not made else 0


if __name__ == "__main__":
    sys.exit(main())
