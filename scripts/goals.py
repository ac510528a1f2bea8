"""The figures that FlowAlign has to reach in reliability, security and distribution, each measured here and now.

    python scripts/goals.py --out build/goals
    python scripts/goals.py --only 4 8 --quick

Every row runs the tests and scripts that measure it, or a measurement of its own (scripts/goal_rows), and prints its
figure beside the target: met, not met, or explained where part of a target cannot be measured here or is another by
choice. What has been measured is kept in --out, so that a run that is stopped goes on; --again measures anew. The whole
takes hours on two cores: --quick takes smaller counts and leaves out slow tests, and says so. Exit status 1 where a
figure is not met.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # as pytest has them
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FLOWALIGN_TEST_SECONDS", "600")  # a busy machine is slow, which is no fault of what is measured

from scripts.goal_rows import rows as of  # noqa: E402
from scripts.goal_rows.measuring import Bench, Goal, Measured  # noqa: E402

GOALS = (
    Goal(1, "resume bit-exact, every trainer, at a boundary and in mid-buffer",
         "SHA-256 equal at 1, 2, 3, 4 processes, FSDP2 2 to 4, HSDP 2 x 2", of.resume),
    Goal(2, "fields of the record proven necessary", "all", of.keys),
    Goal(3, "resume on another number of processes", "<= 1e-6; order of samples identical", of.other_worlds),
    Goal(4, "kill -9 survival", f"{of.KILLS} random kills: 0 unreadable, nothing lost beyond the interval", of.kills),
    Goal(5, "a damaged newest checkpoint", "12 corruptions, all named, all fall back", of.corrupted),
    Goal(6, "pause of a save, 64 MB, flushed and hashed", "<= 0.5 s, asynchronous <= 0.05 s", of.pause,
         "saves are synchronous by choice: a LoRA's checkpoint takes less than a micro-batch, and a writer beside the "
         "run would have to be waited for at every stop. Nothing is measured of 0.05 s."),
    Goal(7, "from a signal to all being saved", "<= 1 step and a save, one step on all processes; TERM, USR1, INT; "
         "20 of 20", of.signals),
    Goal(8, "death of a process", "digest equal after a restart; seen in <= 2 s; a hung one named", of.death),
    Goal(9, "gradient of 1 and N processes, accumulation, KL on", "<= 1e-6; 2, 3, 4 processes, replicated, FSDP2, "
         "HSDP, accelerate; uneven too", of.gradients,
         "accelerate launch only starts the processes here, the gradient's way is the same as torchrun's; its own FSDP "
         "and DeepSpeed are refused with the reason."),
    Goal(10, "the whole online loop on other numbers of processes", "<= 1e-6 on 1 to 5, not dividing too", of.online),
    Goal(11, "ratios of the first inner step", "1 to the bit in the same shape; <= 2.4e-7 fp32 in another; 0 % "
         "clipped", of.first_ratio,
         "the update makes the rollout's own calls, padding included, so that no other shape comes up in a run; single "
         "rows are measured as a bound. The last step's noise is next to nothing and its log-prob so large that its "
         "last bit is worth about 2.4e-7: there two are let pass. Plans seldom train that step."),
    Goal(12, "sampler", "nothing lost or doubled in >= 20,000 cases, <= 5 s", of.sampler),
    Goal(13, "gradient under context parallelism", "<= 1e-6, Ulysses 2", of.context_parallel),
    Goal(14, "faults", ">= 45, each one line, the right exit code, nothing half-written, <= 3 s", of.faults,
         "the slowest are those that wait for something to hang, which has to take its time."),
    Goal(15, "unpickling on default paths", "0: the source is scanned, hostile files run nothing", of.pickles),
    Goal(16, "reward server", "loopback, token, 413, caps, no redirects; 10,000 bodies: no crash, no 5xx", of.server),
    Goal(17, "broken files", "20,000 in <= 60 s, only FlowAlign's errors, memory bounded", of.fuzz),
    Goal(18, "mistakes in configs that are caught", "60 of 60, with a suggestion where one is near", of.configs),
    Goal(19, "tests of several processes", ">= 60 in <= 90 s; no flake in 200 repeats", of.multi_process),
    Goal(20, "soak", "2,000 epochs: memory + <= 5 %, no file or thread more", of.soak),
    Goal(21, "golden runs", "each trainer's digest, equal on the pinned versions", of.golden,
         "no digest is stored: kernels differ between processors. Instead every kind of run is made twice in fresh "
         "processes and has to repeat to the last bit, and the numbers of the authors' code that are stored are met "
         "within their tolerances on any machine."),
)  # fmt: skip

HEAD = ("#", "figure", "target", "measured", "", "s")


@dataclass(frozen=True)
class Row:
    """One goal, and what has been measured of it."""

    goal: Goal
    measured: Measured
    quick: bool

    @property
    def verdict(self) -> str:
        """A measurement that does not hold is not explained away."""
        if not self.measured.holds:
            return "NOT MET"
        return "explained" if self.goal.explained else "met"

    def cells(self) -> tuple[str, ...]:
        """As the table has them."""
        figure = self.measured.figure + (" (quick)" if self.quick else "")
        seconds = f"{self.measured.seconds:.0f}"
        return (str(self.goal.number), self.goal.figure, self.goal.target, figure, self.verdict, seconds)


def measure(goal: Goal, bench: Bench) -> Row:
    """A goal's row. What cannot be measured is not met, and says why."""
    bench.small = False
    try:
        measured = goal.measure(bench)
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[-1]
        measured = Measured(f"could not be measured: {line}", False, 0.0)
    return Row(goal, measured, bench.small)


def table(rows: Sequence[Row]) -> str:
    """In Markdown, with what is explained below."""
    lines = [HEAD, ("---",) * len(HEAD), *(row.cells() for row in rows)]
    told = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]
    notes = [fill(f"{row.goal.number}: {row.goal.explained}", 120) for row in rows if row.goal.explained]
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("met", "explained", "NOT MET")}
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return "\n".join([*told, "", *notes, *([""] if notes else []), f"{len(rows)} figures: {summary}"])


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = [goal.number for goal in GOALS]
    parser.add_argument("--only", type=int, nargs="+", choices=numbers, metavar="N", default=numbers)
    parser.add_argument("--quick", action="store_true", help="smaller counts, no slow tests")
    parser.add_argument("--out", type=Path, default=Path("build/goals"), help="where measurements are kept")
    parser.add_argument("--again", action="store_true", help="measure what is there already anew")
    asked = parser.parse_args(words)
    bench, rows = Bench(asked.out.absolute(), asked.quick, asked.again), list[Row]()
    for goal in GOALS:
        if goal.number in asked.only:
            row = measure(goal, bench)
            rows.append(row)
            print(f"{goal.number:2} {row.verdict:9} {row.measured.figure}", file=sys.stderr, flush=True)
    print(table(rows))
    return 1 if any(row.verdict == "NOT MET" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
