"""What a row of prompt data must hold, and what the names in it that every run knows may say."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flowalign.media import IMAGE, REAL, REFERENCES, confined, is_inline

PROMPT_COLUMNS = ("prompt", "caption", "text")  # the first of them that a table has
SIZES = ("height", "width", "frames")


def prompt_column(names: Iterable[str], where: str) -> str:
    """The column of a table that holds the prompts. Raises: ValueError where there is none, or two of one name."""
    told = [*names]
    twice = [name for name in told if told.count(name) > 1]
    if twice:
        raise ValueError(f"{where}: the column {twice[0]!r} is there twice")
    found = [name for name in PROMPT_COLUMNS if name in told]
    if not found:
        raise ValueError(f"{where}: there is no column prompt, caption or text; the columns are {', '.join(told)}")
    return found[0]


def check_text(text: object, where: str) -> str:
    """The text of a prompt. Raises: ValueError where it is none, is empty, or cannot be written."""
    if not isinstance(text, str):
        raise ValueError(f"{where}: the prompt is no text: {text!r}")
    if not text.strip():
        raise ValueError(f"{where}: the prompt is empty")
    if _is_broken(text):
        raise ValueError(f"{where}: the prompt holds half a character (a lone surrogate)")
    return text


def _is_broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def check_fields(metadata: Mapping[str, Any], where: str) -> None:
    """Raises: ValueError where a name that every run knows says something that it cannot mean."""
    negative = metadata.get("negative_prompt")
    if negative is not None and (not isinstance(negative, str) or _is_broken(negative)):
        raise ValueError(f"{where}: negative_prompt must be a text, got {negative!r}")
    for name in ("seed", *SIZES):
        value = metadata.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < (0 if name == "seed" else 1):
            least = "at least 0" if name == "seed" else "positive"
            raise ValueError(f"{where}: {name} must be a whole number, {least}, got {value!r}")


def references(folder: Path, names: object, where: str) -> list[str]:
    """The files that a row names, relative to the folder of its data, as absolute paths; they must be in it.

    A picture that stands in the row itself stays as it is.
    """
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{where}: "{REFERENCES}" must be a list of picture files, got {names!r}')
    try:
        files = [name if is_inline(name) else confined(folder.resolve(), name) for name in names]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    missing = [file for file in files if isinstance(file, Path) and not file.is_file()]
    if missing:
        raise ValueError(f"{where}: the reference {missing[0]} is not a file")
    return [str(file) for file in files]


def with_files(row: dict[str, Any], folder: Path, where: str) -> None:
    """Make the files that a row names, those its media should be like, start from, or really are, absolute paths.

    An image that is no file's name is left alone: only models that start from a picture look at it.
    """
    if REFERENCES in row:
        row[REFERENCES] = references(folder, row[REFERENCES], where)
    for key in (IMAGE, REAL):
        if isinstance(row.get(key), str):
            row[key] = references(folder, [row[key]], where)[0]


def file_fingerprint(path: Path, rows: int) -> str:
    """Of a file with so many prompts: read in parts, so that its size is no matter."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{rows} prompts, file of {path.stat().st_size} bytes, SHA-256 {digest}"
