"""Prompt data, and which prompts an epoch's groups take.

Beside its text a prompt has a record of its own. Some names in it mean something to every run:

    negative_prompt         what this prompt's unconditional call is told instead of the model's own
    height, width, frames   the size of its media instead of the model's own
    seed                    of its start noise where it is sampled or evaluated, instead of its number; not in training
    references              pictures that its media should be like (`flowalign.media`)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flowalign.prompts.fields import check_fields
from flowalign.prompts.files import read_file
from flowalign.prompts.order import epoch_prompts
from flowalign.prompts.tables import HubPrompts
from flowalign.records import Prompts, PromptSet

__all__ = ["HubPrompts", "PromptData", "as_prompts", "epoch_prompts"]

PromptData = Prompts | PromptSet | Sequence[str] | str


def as_prompts(prompts: PromptData) -> PromptSet:
    """Prompts from a list of texts, or from a file, of which one row is in memory at a time.

    .txt           one prompt a line
    .jsonl         JSON lines with "prompt"; all else in them is metadata
    .csv, .tsv     with a header: a column prompt, caption or text; other columns are metadata, read as JSON where they
                   are JSON (numbers, lists, true), else as text; an empty cell says nothing
    .parquet       the same, with the types that the file has

    Raises: ValueError for no prompts, or an empty or unreadable one, named by file and row.
    """
    if isinstance(prompts, str):
        return read_file(Path(prompts))
    if not isinstance(prompts, PromptSet):
        prompts = Prompts(tuple(prompts), tuple({} for _ in prompts))
    if not len(prompts):
        raise ValueError("prompts is empty: training needs at least one prompt")
    if isinstance(prompts, Prompts):
        for i, (text, metadata) in enumerate(zip(prompts.text, prompts.metadata, strict=True)):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"prompt {i} is empty: {text!r}")
            check_fields(metadata, f"prompt {i}")
    return prompts
