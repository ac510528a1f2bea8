"""Prompts' embeddings: each distinct text is encoded once and kept on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from flowalign.records import Condition

KINDS = 3  # of embeddings: prompt_embeds, pooled_prompt_embeds, prompt_mask
Embedding = tuple[Tensor | None, ...]  # a prompt's row of each kind


class Encoded:
    """Embeddings by text, those used last at the end.

    Args:
        encode: makes the embeddings of a call's texts; one row each, of one shape whatever the texts are.
        per_call: texts in a call; shorter batches are padded to it.
        limit: bytes that are kept.
    """

    def __init__(self, encode: Callable[[list[str]], tuple[Tensor | None, ...]], per_call: int, limit: float) -> None:
        self.encode, self.per_call, self.limit = encode, per_call, limit
        self.rows: dict[str, Embedding] = {}

    def take(self, texts: Iterable[str], again: bool) -> dict[str, Embedding]:
        """The embeddings of texts; those that were not used for longest go where all are more than the limit.

        Args:
            again: whether texts can still be encoded. If not, nothing is forgotten.

        Raises: ValueError for a new text where none can be encoded any more.
        """
        wanted = dict.fromkeys(texts)
        self._make([text for text in wanted if text not in self.rows], again)
        self.rows |= {text: self.rows.pop(text) for text in wanted}
        taken = {text: self.rows[text] for text in wanted}
        size = sum(one.nbytes for one in next(iter(taken.values())) if one is not None)
        most = max(len(wanted), int(self.limit / size))
        for text in [*self.rows][: max(len(self.rows) - most, 0)] if again else []:
            del self.rows[text]
        return taken

    @torch.no_grad()
    def _make(self, missing: list[str], again: bool) -> None:
        if missing and not again:
            raise ValueError(f"prompt {missing[0]!r} was not encoded before the text encoders were freed")
        for start in range(0, len(missing), self.per_call):
            texts = missing[start : start + self.per_call]
            # one batch shape for all, so that an embedding does not depend on which prompts come with it
            made = self.encode(texts + [texts[-1]] * (self.per_call - len(texts)))
            kinds = (*made, None, None)[:KINDS]
            for i, text in enumerate(texts):
                self.rows[text] = tuple(None if kind is None else kind[i].cpu().clone() for kind in kinds)


def stacked(rows: Sequence[Embedding], device: torch.device) -> list[Tensor | None]:
    """Each kind of embedding as a batch on the device; one row in memory where all rows are the same object."""
    if len({id(row) for row in rows}) == 1:
        return [None if one is None else one.to(device).expand(len(rows), *one.shape) for one in rows[0]]
    kinds: list[Tensor | None] = []
    for i in range(KINDS):
        known = [row[i] for row in rows]
        kinds.append(
            torch.stack([one for one in known if one is not None]).to(device) if known[0] is not None else None
        )
    return kinds


def embeddings_of(condition: Condition, negative: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a call of the network is told: the prompt's embeddings, or the negative prompt's.

    Raises: ValueError where there is no negative prompt.
    """
    if not negative:
        return condition.prompt_embeds, condition.pooled_prompt_embeds, condition.prompt_mask
    if condition.negative_prompt_embeds is None:
        raise ValueError("this condition has no negative prompt; encode it with the model that is guided")
    embeds, pooled = condition.negative_prompt_embeds, condition.negative_pooled_prompt_embeds
    return embeds, pooled, condition.negative_prompt_mask
