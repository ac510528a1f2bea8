"""`flowalign compare`: runs beside each other on one page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowalign.cli import add_command, say
from flowalign.config import ConfigError

COMPARE = """Put runs beside each other: what each gained and cost, in what their configs differ, and their pictures.

The first run is what the others are compared with. A table is printed; the page has curves over compute, bars by kind
of prompt, rewards against each other, the settings that differ, and the same prompts from every run (videos play). One
file, no network, no model: everything is read from the run folders.

  flowalign compare runs/flow_grpo_shapes runs/dense_grpo_shapes
  flowalign compare runs/seed0 runs/seed1 runs/other --metric strict --out seeds.html

To draw and score anew, on prompts of benchmarks and with intervals over all seeds: flowalign eval.
"""
TITLE = "FlowAlign comparison"


def add_compare(commands: Any) -> None:
    """flowalign compare RUN RUN ..."""
    parser = add_command(commands, "compare", "runs beside each other on one page", COMPARE)
    parser.usage = "flowalign compare [-h] RUN RUN ... [--metric NAME] [--out FILE] [--debug]"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, finished or not")
    parser.add_argument("--metric", metavar="NAME", help="a part of the held-out score; the first run's by default")
    parser.add_argument("--out", type=Path, default=Path("compare.html"), metavar="FILE", help="%(default)s by default")
    parser.set_defaults(run=compare)


def compare(arguments: argparse.Namespace, words: list[str]) -> None:
    """Print the table, and write the page."""
    if words:
        raise ConfigError(f"{words[0]} is no option of compare")
    if len(arguments.runs) < 2:
        raise ConfigError("compare needs two runs or more; one run's own page: flowalign report RUN")
    check_out(arguments.out)
    from flowalign.comparison import gather, markdown, render
    from flowalign.tracking import write_atomically

    made = gather(arguments.runs, arguments.metric)
    page = render(made)
    print(markdown(made), end="")
    write_atomically(arguments.out, page.encode())
    say(f"the page is {arguments.out}")


def check_out(out: Path) -> None:
    """Raises: ConfigError where the page cannot go there, or would replace a file that is no such page."""
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file, as {out / 'compare.html'}")
    if out.is_file() and TITLE.encode() not in out.read_bytes()[:2000]:
        raise ConfigError(f"--out {out} is there and is no page of compare's; name another file")
