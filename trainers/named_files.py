"""The files that prompts name, looked at before a run begins: one that is missing would end it epochs later."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flowalign.media import IMAGE, REAL, REFERENCES, VIDEOS, is_inline
from flowalign.records import Prompts, PromptSet

LOOKED_AT = 10_000  # prompts of a large set, spread evenly

Named = Iterable[tuple[str, str]]  # a prompt, and a file that it names


def check_media(prompts: PromptSet, video: bool) -> None:
    """Raises: ValueError for a prompt that names no real media, a file that is not there, or one of another kind.

    Args:
        video: whether videos are meant, or pictures.
    """
    told = prompts.some(LOOKED_AT)
    named = [(text, name) for text, name in _column(told, REAL) if isinstance(name, str)]
    without = [text for text, name in _column(told, REAL) if not isinstance(name, str)]
    if without:
        raise ValueError(
            f'prompt {without[0]!r} names no real media: give its record the key "{REAL}", a file '
            f"({len(without)} of the {len(told)} prompts looked at name none)"
        )
    _check_files(named, "the real media")
    for text, name in named:
        if (not is_inline(name) and Path(name).suffix.lower() in VIDEOS) != video:
            kinds = ("a picture", "videos") if video else ("a video", "pictures")
            raise ValueError(
                f"{name}, the real media of prompt {text!r}, is {kinds[0]}, and the model makes {kinds[1]}"
            )


def check_images(prompts: PromptSet) -> None:
    """Raises: ValueError for a prompt that names no picture to start from or to follow, or one that is not there."""
    told = [*_column(prompts.some(LOOKED_AT), IMAGE)]
    without = [text for text, name in told if not isinstance(name, str)]
    if without:
        raise ValueError(
            f'prompt {without[0]!r} names no picture, which the model needs: give its record the key "{IMAGE}", a file '
            f"({len(without)} of the {len(told)} prompts looked at name none)"
        )
    _check_files(told, "the picture")


def check_references(prompts: PromptSet) -> None:
    """Raises: ValueError where some prompts have references and others none, and for one that is no file."""
    told = [*_column(prompts.some(LOOKED_AT), REFERENCES)]
    known, without = [row for row in told if row[1]], [text for text, names in told if not names]
    if known and without:
        raise ValueError(
            f'prompt {without[0]!r} has no "{REFERENCES}", and {len(known)} of the {len(told)} prompts looked at have '
            "some: give its record some too, or leave the prompt out"
        )
    _check_files([(text, name) for text, names in known for name in names], "a reference")


def _column(prompts: Prompts, key: str) -> list[tuple[str, Any]]:
    return [(text, row.get(key)) for text, row in zip(prompts.text, prompts.metadata, strict=True)]


def _check_files(named: Named, what: str) -> None:
    looked_at = set[str]()
    for text, name in named:
        if name not in looked_at and not is_inline(name) and not Path(name).is_file():
            raise ValueError(f"{name}, {what} of prompt {text!r}, is not a file")
        looked_at.add(name)
