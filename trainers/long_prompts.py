"""Prompts that the text encoders do not read whole, counted before a run and told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowalign.models import PipelineModel

if TYPE_CHECKING:
    from trainers.base import Trainer

GLANCED_AT = 10_000  # prompts of a large set whose text is looked at


def glance(trainer: Trainer) -> str:
    """What to say where not all prompts were looked at."""
    return f" (looking at one in {step})" if (step := -(-len(trainer.prompts) // GLANCED_AT)) > 1 else ""


def long_prompts(trainer: Trainer) -> str | None:
    """How many training and held-out prompts are cut off by their tokens, and what to do; None where none is."""
    if not isinstance(trainer.model, PipelineModel):
        return None
    held_out = trainer.evaluator.prompts
    texts = {*trainer.prompts.some(GLANCED_AT).text, *(held_out.text if held_out is not None else ())}
    limit, tokenizer = trainer.model.token_limit()
    # a token is a byte at least, so that only long prompts need to be looked at
    long = [text for text in texts if len(text.encode()) + 2 > limit]
    cut = [text for text in long if len(tokenizer(text).input_ids) > limit]
    if not cut:
        return None
    return (
        f"{len(cut)} prompts{glance(trainer)} are longer than the {limit} tokens that the text encoders read, and the "
        f"rest of them is not seen, as in {min(cut)[:60]!r}. Shorten them"
        + (", or raise model.max_sequence_length" if trainer.model.max_sequence_length else "")
    )
