"""Prompt data, and which prompts an epoch's groups take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from flowalign.media import REFERENCES, confined
from flowalign.randomness import key_generator
from flowalign.records import Prompts


def as_prompts(prompts: Prompts | Sequence[str] | str) -> Prompts:
    """Prompts from a list of texts, or from a file: one prompt a line, or JSON lines with "prompt" and metadata.

    Raises: ValueError for no prompts, or an empty or unreadable one, named by file and line.
    """
    if isinstance(prompts, str):
        prompts = _read(Path(prompts))
    if not isinstance(prompts, Prompts):
        prompts = Prompts(tuple(prompts), tuple({} for _ in prompts))
    if not len(prompts):
        raise ValueError("prompts is empty: training needs at least one prompt")
    for i, text in enumerate(prompts.text):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"prompt {i} is empty: {text!r}")
    return prompts


def _read(path: Path) -> Prompts:
    if not path.is_file():
        raise ValueError(f"prompts: {path} is not a file; give a .txt or .jsonl file or a list of prompts")
    try:
        text = path.read_text("utf-8-sig").rstrip()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {path} is not UTF-8 text (byte {error.start})") from error
    if not text:
        raise ValueError(f"prompts: {path} is empty; training needs at least one prompt")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix != ".jsonl":
        empty = [str(number) for number, line in enumerate(text.split("\n"), 1) if not line.strip()]
        if empty:
            more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
            raise ValueError(f"prompts: {path} has empty prompts in line {', '.join(empty[:5])}{more}; remove them")
        return Prompts(tuple(line.strip() for _, line in lines), tuple({} for _ in lines))
    rows = [_row(path, number, line) for number, line in lines]
    return Prompts(tuple(row.pop("prompt") for row in rows), tuple(rows))


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number}: not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}:{number}: not JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f'{path}:{number}: a line must be an object with a text under "prompt"')
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in row["prompt"]):
        raise ValueError(f"{path}:{number}: the prompt holds half a character (a lone surrogate)")
    if not row["prompt"].strip():
        raise ValueError(f"{path}:{number}: the prompt is empty")
    if REFERENCES in row:
        row[REFERENCES] = _references(path, number, row[REFERENCES])
    return row


def _references(path: Path, number: int, names: object) -> list[str]:
    """The files that a line names, relative to the file of prompts, as absolute paths; they must be in its folder."""
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{path}:{number}: "{REFERENCES}" must be a list of picture files, got {names!r}')
    try:
        files = [confined(path.resolve().parent, name) for name in names]
    except ValueError as error:
        raise ValueError(f"{path}:{number}: {error}") from error
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{path}:{number}: the reference {missing[0]} is not a file")
    return [str(file) for file in files]


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def epoch_prompts(total: int, groups: int, epoch: int, seed: int) -> list[int]:
    """The prompt of each of an epoch's groups: every prompt once before any comes again, in an order drawn per pass.

    A function of its arguments alone, so that resuming needs no cursor and nothing is skipped.
    """
    counters = range(epoch * groups, (epoch + 1) * groups)
    return [int(_order(total, n // total, seed)[n % total]) for n in counters]


@lru_cache(maxsize=4)
def _order(total: int, number: int, seed: int) -> np.ndarray:
    return key_generator(seed, "prompt_order", number).permutation(total)
