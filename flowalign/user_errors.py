"""Errors of other libraries that are for the user to mend, in one line; all others are mistakes of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from flowalign import determinism
from flowalign.out_of_memory import OTHERWISE, out_of_memory

# readers of weights raise these through other libraries, which do not make them a ValueError; told apart by name, since
# the one is a class of pickle, which nothing of ours imports
UNREADABLE = {
    "UnpicklingError": "a file of weights holds pickled objects that are no tensors, which are never run: take "
    "safetensors",
    "SafetensorError": "a file of weights is cut short, or no safetensors file",
}


def one_line(error: BaseException) -> str | None:
    """What went wrong, where that is for the user to mend; None for a mistake of ours."""
    if out_of_memory(error):
        return f"out of memory: {OTHERWISE}"
    names = [type(one).__name__ for one in _chain(error)]
    return next((UNREADABLE[name] for name in names if name in UNREADABLE), determinism.explained(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def written_to(path: Path) -> Iterator[None]:
    """Around what writes safetensors files, which has an error of its own for a full disk. Raises: OSError then."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
