"""`flowalign report RUN`: one self-contained page that tells the next morning whether a run worked."""

from __future__ import annotations

from pathlib import Path

from flowalign.report.page import render
from flowalign.report.reading import read_run
from flowalign.tracking import write_atomically

__all__ = ["write_report"]


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder; a function of the folder's content and name alone. Returns its path.

    Raises: ValueError where the folder holds no run, or a file in it is broken.
    """
    run = read_run(folder)
    path = folder / "report.html"
    write_atomically(path, render(run).encode())
    return path
