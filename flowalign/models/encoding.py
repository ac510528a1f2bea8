"""Prompts' embeddings: each distinct text is encoded once and kept on the host; and what a call is told of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowalign.records import Condition

if TYPE_CHECKING:
    from flowalign.models.embedding_store import EmbeddingStore

KINDS = 3  # of embeddings: prompt_embeds, pooled_prompt_embeds, prompt_mask
Embedding = tuple[Tensor | None, ...]  # a prompt's row of each kind


class Encoded:
    """Embeddings by text, those used last at the end.

    store: asked for what is not at hand before it is encoded, and given what then is; None for none.

    Args:
        encode: makes the embeddings of a call's texts; one row each, of one shape whatever the texts are.
        per_call: texts in a call; shorter batches are padded to it.
        limit: bytes that are kept.
    """

    def __init__(self, encode: Callable[[list[str]], tuple[Tensor | None, ...]], per_call: int, limit: float) -> None:
        self.encode, self.per_call, self.limit = encode, per_call, limit
        self.rows: dict[str, Embedding] = {}
        self.store: EmbeddingStore | None = None

    def take(self, texts: Iterable[str], again: bool) -> dict[str, Embedding]:
        """The embeddings of texts; those that were not used for longest go where all are more than the limit.

        Args:
            again: whether texts can still be encoded. If not, nothing is forgotten.

        Raises: ValueError for a new text where none can be encoded any more.
        """
        wanted = dict.fromkeys(texts)
        self._make([text for text in wanted if text not in self.rows and not self._known(text)], again)
        self.rows |= {text: self.rows.pop(text) for text in wanted}
        taken = {text: self.rows[text] for text in wanted}
        size = sum(one.nbytes for one in next(iter(taken.values())) if one is not None)
        most = max(len(wanted), int(self.limit / size))
        for text in [*self.rows][: max(len(self.rows) - most, 0)] if again else []:
            del self.rows[text]
        return taken

    def _known(self, text: str) -> bool:
        """Take a text's embeddings from the store, if they are there."""
        row = None if self.store is None else self.store.read(text)
        if row is not None:
            self.rows[text] = row
        return row is not None

    @contextmanager
    def anew(self) -> Iterator[None]:
        """While entered, the store is left alone."""
        store, self.store = self.store, None
        try:
            yield
        finally:
            self.store = store

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
                if self.store is not None:
                    self.store.write(text, self.rows[text])


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


@dataclass(frozen=True)
class Told:
    """What one call of the network is told, row by row: a prompt, or a negative prompt, as a `Condition` holds it.

    Args:
        embeds: of its tokens.
        pooled: one embedding of all of it, where a family's encoders give one.
        mask: true where `embeds` are a token's, false where they are padding; None where the network attends to all.
        image_embeds: of a picture that stands beside the prompt.
        control: the picture that a ControlNet looks at.
    """

    embeds: Float[Tensor, "b n d"]
    pooled: Float[Tensor, "b p"] | None = None
    mask: Bool[Tensor, "b n"] | None = None
    image_embeds: Float[Tensor, "b m e"] | None = None
    control: Float[Tensor, "b 3 h w"] | None = None

    @property
    def besides(self) -> tuple[Tensor | None, ...]:
        """What there is besides `embeds`, in the order of the fields."""
        return self.pooled, self.mask, self.image_embeds, self.control

    def to(self, device: torch.device) -> Told:
        """The same on another device."""
        return Told(self.embeds.to(device), *(None if one is None else one.to(device) for one in self.besides))

    def and_then(self, other: Told) -> Told:
        """These rows, then the other's; of each field that both have."""
        pairs = zip(self.besides, other.besides, strict=True)
        besides = (None if one is None or after is None else torch.cat([one, after]) for one, after in pairs)
        return Told(torch.cat([self.embeds, other.embeds]), *besides)


def embeddings_of(condition: Condition, negative: bool) -> Told:
    """What a call of the network is told: the prompt's embeddings, or the negative prompt's; either with its pictures.

    Raises: ValueError where there is no negative prompt.
    """
    pictures = condition.image_embeds, condition.control
    if not negative:
        embeds, pooled, mask = condition.prompt_embeds, condition.pooled_prompt_embeds, condition.prompt_mask
        return Told(embeds, pooled, mask, *pictures)
    if condition.negative_prompt_embeds is None:
        raise ValueError("this condition has no negative prompt; encode it with the model that is guided")
    embeds, pooled = condition.negative_prompt_embeds, condition.negative_pooled_prompt_embeds
    return Told(embeds, pooled, condition.negative_prompt_mask, *pictures)
