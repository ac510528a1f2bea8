"""Checkpoints of what one process makes, a search or a reward: the last two, so that one damaged file ends nothing."""

from __future__ import annotations

import sys
from pathlib import Path

from flowalign import checkpoint
from flowalign.checkpoint import Tree
from flowalign.tracking import Run

KEPT = 2  # as of training runs


class LastTwo:
    """Saves into a folder, in which the newest two stay, and finds the newest that verifies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._broken: set[str] = set()

    def newest(self, run: Run) -> tuple[Path | None, list[str]]:
        """The newest that verifies, or None, and why newer ones do not, which is told where there is another one.

        Raises: ValueError for a checkpoint that a newer FlowAlign wrote.
        """
        path, problems = checkpoint.newest(self.folder)
        if path is not None:
            self._broken = {name for name in checkpoint.names(self.folder) if name > path.name}
            for problem in problems:
                run.note("skip", f"skipped {problem}")
                print(f"flowalign: skipped {problem}", file=sys.stderr, flush=True)
        return path, problems

    def save(self, name: str, told: Tree) -> None:
        """Write a checkpoint; then the older ones go, but one, and those that do not verify."""
        self._broken.discard(name)
        checkpoint.save(self.folder, name, told, {}, lambda _: None, self._kept)

    def _kept(self) -> set[str]:
        return {*[name for name in checkpoint.names(self.folder) if name not in self._broken][-KEPT:]}
