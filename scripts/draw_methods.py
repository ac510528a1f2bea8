"""What `compare_methods.py` has found, as a table and a picture: curves.png and table.md beside its curves.jsonl.

    python scripts/draw_methods.py build/methods

Each method has a panel: held-out score against compute, the mean over seeds with the range of them, all others in grey.
The table gives each seed's gain with the lower end of its 95 % interval, and their mean; best first.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

try:
    from matplotlib.figure import Figure
except ImportError as missing:
    raise SystemExit(
        "this script draws with matplotlib, which FlowAlign does not need: pip install matplotlib"
    ) from missing

PLACES = 60  # of the curves, between no compute and all
Curve = tuple[list[float], list[float]]  # compute and score


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of lines; of an arm and seed told twice the later ones."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except OSError as error:
        raise SystemExit(
            f"{path}: {error.strerror}; it is what scripts/compare_methods.py --out FOLDER leaves"
        ) from error


def curves(rows: list[dict[str, Any]]) -> dict[str, list[Curve]]:
    """Of each arm, one curve for each seed."""
    found: dict[tuple[str, int], dict[float, float]] = defaultdict(dict)
    for row in rows:
        found[row["arm"], row["seed"]][row["compute"]] = row["scores"]["held-out"]
    by_arm: dict[str, list[Curve]] = defaultdict(list)
    for (arm, _), points in found.items():
        by_arm[arm].append((sorted(points), [points[at] for at in sorted(points)]))
    return by_arm


def at_places(lines: list[Curve], places: np.ndarray) -> np.ndarray:
    """The curves [seeds, places] between their points; nan beyond the last."""
    return np.stack([np.interp(places, *one, right=np.nan) for one in lines])


def draw(by_arm: dict[str, list[Curve]], order: list[str], file: Path) -> None:
    """A panel for each arm, best first."""
    columns = 4
    rows = -(-len(order) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    most = max(one[0][-1] for lines in by_arm.values() for one in lines)
    places = np.linspace(0, most, PLACES)
    drawn = {arm: at_places(by_arm[arm], places) for arm in order}
    for panel in panels[len(order) :]:
        panel.set_visible(False)
    for panel, arm in zip(panels, order, strict=False):
        for other in drawn.values():
            panel.plot(places / 1000, other.mean(0), color="0.85", linewidth=0.8)
        panel.fill_between(places / 1000, drawn[arm].min(0), drawn[arm].max(0), alpha=0.25)
        panel.plot(places / 1000, drawn[arm].mean(0), linewidth=1.8)
        panel.set_title(f"{arm} ({len(by_arm[arm])} seeds)", fontsize=9)
        panel.tick_params(labelsize=8)
    for panel in panels[max(len(order) - columns, 0) : len(order)]:  # the lowest of each column
        panel.tick_params(labelbottom=True)
    figure.supxlabel("thousands of network forwards", fontsize=9)
    figure.supylabel("held-out prompts drawn right", fontsize=9)
    figure.savefig(file, dpi=110)


def table(rows: list[dict[str, Any]]) -> tuple[list[str], str]:
    """The arms, best first, and the table in Markdown."""
    by_arm: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        by_arm[row["arm"]][row["seed"]] = row
    order = sorted(by_arm, key=lambda arm: -fmean(row["gain"] for row in by_arm[arm].values()))
    costs = sorted({name for row in rows for name in row if name.startswith("cost of ")})
    lines = ["| | gain of each seed | its lower end | mean | " + " | ".join(costs) + " | thousands of forwards |"]
    lines.append("|---" * (5 + len(costs)) + "|")
    for arm in order:
        held = [by_arm[arm][seed] for seed in sorted(by_arm[arm])]
        gains, lows = (" ".join(f"{row[name]:.3f}" for row in held) for name in ("gain", "lower"))
        reached = [
            " ".join("-" if row.get(name) is None else f"{row[name] / 1000:.0f}" for row in held) for name in costs
        ]
        spent = f"{fmean(row['compute'] for row in held) / 1000:.0f}"
        cells = [arm, gains, lows, f"{fmean(row['gain'] for row in held):.3f}", *reached, spent]
        lines.append("| " + " | ".join(cells) + " |")
    return order, "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, nargs="+", help="what compare_methods.py has written; of several, all arms"
    )
    parser.add_argument("--out", type=Path, help="where the two files go; by default the first folder")
    arguments = parser.parse_args()
    out = arguments.out or arguments.folder[0]
    order, text = table([row for folder in arguments.folder for row in read(folder / "table.jsonl")])
    draw(
        curves([row for folder in arguments.folder for row in read(folder / "curves.jsonl")]), order, out / "curves.png"
    )
    (out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
