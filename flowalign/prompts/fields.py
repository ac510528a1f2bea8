"""What a row of prompt data must hold, and what the names in it that every run knows may say."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flowalign.media import FILES, REFERENCES, confined, is_inline

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


def with_files(row: dict[str, Any], folder: Path | None, where: str) -> None:
    """Make the files that a row names, those its media should be like, start from, or really are, absolute paths.

    An image that is no file's name is left alone: only models that start from a picture look at it.

    Args:
        row: of any kind of data, a prompt's or a preference's.
        folder: of the data, which names are relative to and files must be in; None where it has none.

    Raises: ValueError for a file outside, or that is not there.
    """
    for key in FILES:
        named = row.get(key)
        if key == REFERENCES and key in row:
            if not isinstance(named, list) or not named or not all(isinstance(name, str) for name in named):
                raise ValueError(f'{where}: "{key}" must be a list of picture files, got {named!r:.80}')
            row[key] = [_file(name, key, folder, where) for name in named]
        elif isinstance(named, str):
            row[key] = _file(named, key, folder, where)


def _file(name: str, key: str, folder: Path | None, where: str) -> str:
    """The path of a file that a row names; a picture that stands in the row itself stays as it is."""
    if is_inline(name):
        return name
    if folder is None:
        raise ValueError(f'{where}: "{key}" names {name!r:.80}, a file beside the data, and this has no folder')
    try:
        file = confined(folder, name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not os.path.isfile(file):  # Path.is_file raises for a name that is too long
        raise ValueError(f"{where}: the reference {file} is not a file")
    return str(file)


def file_fingerprint(path: Path, rows: int) -> str:
    """Of a file with so many prompts: read in parts, so that its size is no matter."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{rows} prompts, file of {path.stat().st_size} bytes, SHA-256 {digest}"
