"""What a row of a table means: which of its columns are media, and which tell what is preferred."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flowalign.preferences.records import LABELS, Label
from flowalign.prompts.fields import PROMPT_COLUMNS, SIZES, check_fields, check_text

Row = Mapping[str, Any]
EXTRA = ("margin", "weight", "scores", "parts", "seeds", "split", "metadata", "negative_prompt", "seed", *SIZES)
STANDING: dict[Label, tuple[float, float] | None] = {
    "first": (1.0, 0.0),
    "second": (0.0, 1.0),
    "tie": (0.0, 0.0),
    "invalid": None,
}


@dataclass(frozen=True)
class Told:
    """What a row says beside its media; fields as of `Ranking`."""

    prompt: str
    metadata: dict[str, Any]
    standing: tuple[float, ...] | None
    scores: tuple[float, ...] | None
    margin: float | None
    weight: float


class Columns(ABC):
    """The columns of a table that are more than metadata.

    All kinds may have, under these names, margin and weight (numbers, at least 0), metadata (a record), scores (a
    number for each of the media, by a reward), and what every run knows of a prompt (`flowalign.prompts`).
    """

    prompt: str

    @abstractmethod
    def media_columns(self) -> tuple[str, ...]:
        """Columns that hold media: file names, bytes, or lists of them."""

    @abstractmethod
    def own(self) -> tuple[str, ...]:
        """All columns that this reads, of which each row must have each."""

    @abstractmethod
    def standing(self, row: Row) -> tuple[float, ...] | None:
        """How good each of the media is, higher is better; None where it is not known.

        Raises: ValueError for what is no label.
        """

    def texts(self) -> tuple[str, ...]:
        """Columns whose cells are texts, where a file does not say what is a number."""
        return self.prompt, *self.media_columns()

    def media(self, row: Row) -> list[Any]:
        """The media of a row, each a file's name, bytes, or a record of both. Raises: ValueError where one is none."""
        return [row[name] for name in self.media_columns()]

    def check(self, row: Row) -> None:
        """Raises: ValueError for a row without a column that is needed."""
        missing = [name for name in self.own() if name not in row]
        if missing:
            raise ValueError(f"there is no {missing[0]!r}; there are {', '.join(map(str, row))}")

    def read(self, row: Row, where: str) -> Told:
        """What a row says; its media need not be in it. Raises: ValueError for a row that is wrong."""
        standing = self.standing(row)
        scores, margin, weight = _scores(row), _number(row, "margin"), _number(row, "weight")
        if scores is not None and standing is not None and len(scores) != len(standing):
            raise ValueError(f"scores must be a number for each of the {len(standing)} media, got {row['scores']!r}")
        known = (*self.own(), "margin", "weight", "scores", "metadata")
        more = row.get("metadata")
        if more is not None and not isinstance(more, Mapping):
            raise ValueError(f"metadata must be a record, got {more!r}")
        metadata = {k: v for k, v in row.items() if k not in known and v is not None and v == v} | dict(more or {})
        check_fields(metadata, where)
        text = check_text(row.get(self.prompt), where)
        return Told(text, metadata, standing, scores, margin, 1.0 if weight is None else weight)


@dataclass(frozen=True)
class PairColumns(Columns):
    """Two media and a label.

    Args:
        prompt, first, second: columns.
        label: a column; "" where there is none, and the first one is always preferred.
        labels: what the label column says, as text, and what it means; {} for "first", "second", "tie", "invalid".
    """

    prompt: str = "prompt"
    first: str = "first"
    second: str = "second"
    label: str = "label"
    labels: Mapping[str, Label] | None = None

    def media_columns(self) -> tuple[str, ...]:
        return self.first, self.second

    def own(self) -> tuple[str, ...]:
        return (self.prompt, self.first, self.second, *([self.label] if self.label else []))

    def texts(self) -> tuple[str, ...]:
        return self.own()

    def standing(self, row: Row) -> tuple[float, ...] | None:
        if not self.label:
            return STANDING["first"]
        known = self.labels or {label: label for label in LABELS}
        told = row[self.label]
        if str(told) not in known:
            raise ValueError(_unknown(told, known, self.labels is None))
        return STANDING[known[str(told)]]


def _unknown(told: object, known: Iterable[str], ours: bool) -> str:
    if ours:
        return f"a label is 'first', 'second' or 'tie', got {told!r} ('invalid' is for a pair that is not to be used)"
    return f"a label is {', '.join(map(repr, known))}, got {told!r}"


@dataclass(frozen=True)
class OurPairs(PairColumns):
    """Our own format: {"prompt", "first", "second", "label"}, what else is known by name, and nothing else."""

    def check(self, row: Row) -> None:
        super().check(row)
        unknown = sorted({*row} - {*self.own(), *EXTRA})
        if unknown:
            raise ValueError(
                f"a row gives {', '.join(self.own())}, perhaps {', '.join(EXTRA)}, and nothing else; this gives "
                f'{unknown[0]!r}: put it under "metadata"'
            )
        odd = [name for name in self.own() if not isinstance(row[name], str | bytes | dict)]
        if odd:
            raise ValueError(f"{', '.join(self.own())} must be given as text; {odd[0]} is {row[odd[0]]!r:.80}")


@dataclass(frozen=True)
class Shares(Columns):
    """Two media and the share of the preference that each has got: 1 and 0, or a half each for a tie.

    Pick-a-Pic's columns (arXiv:2305.01569). Where `valid` is a column that says false, or a share is missing, the label
    is invalid.
    """

    prompt: str = "caption"
    first: str = "jpg_0"
    second: str = "jpg_1"
    first_share: str = "label_0"
    second_share: str = "label_1"
    valid: str = "has_label"

    def media_columns(self) -> tuple[str, ...]:
        return self.first, self.second

    def own(self) -> tuple[str, ...]:
        return self.prompt, self.first, self.second, self.first_share, self.second_share

    def standing(self, row: Row) -> tuple[float, ...] | None:
        told = row[self.first_share], row[self.second_share]
        if row.get(self.valid, True) in (False, 0, None) or any(one is None or one != one for one in told):
            return None
        shares = tuple(_as_number(one) for one in told)
        if shares not in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)):
            raise ValueError(
                f"{self.first_share} and {self.second_share} must be 1 and 0, 0 and 1, or .5 and .5, got {told}"
            )
        return shares


@dataclass(frozen=True)
class RankingColumns(Columns):
    """A list of media, and a list that says how good each is.

    Args:
        prompt, media: columns.
        ranks: a column of ranks, the lowest is the best; averages and equals are taken. "" for none.
        ratings: one of ratings instead, the highest is the best.
    """

    prompt: str = "prompt"
    media_list: str = "media"
    ranks: str = ""
    ratings: str = ""

    def __post_init__(self) -> None:
        if bool(self.ranks) == bool(self.ratings):
            raise ValueError(f"name a column of ranks or one of ratings, got {self.ranks!r} and {self.ratings!r}")

    def media_columns(self) -> tuple[str, ...]:
        return (self.media_list,)

    def texts(self) -> tuple[str, ...]:
        return (self.prompt,)

    def own(self) -> tuple[str, ...]:
        return self.prompt, self.media_list, self.ranks or self.ratings

    def media(self, row: Row) -> list[Any]:
        held, told = row[self.media_list], row[self.ranks or self.ratings]
        if not isinstance(held, list) or len(held) < 2:
            raise ValueError(f"{self.media_list} must be a list of two media or more, got {held!r:.80}")
        if isinstance(told, list) and len(told) != len(held):
            raise ValueError(f"{self.media_list} has {len(held)} media, {self.ranks or self.ratings} {len(told)}")
        return held

    def standing(self, row: Row) -> tuple[float, ...] | None:
        name, sign = self.ranks or self.ratings, -1.0 if self.ranks else 1.0
        told = row[name]
        if not isinstance(told, list) or len(told) < 2:
            raise ValueError(f"{name} must be a list of two numbers or more, got {told!r:.80}")
        return tuple(sign * _as_number(one) for one in told)


KNOWN: tuple[Columns, ...] = (
    OurPairs(),
    Shares(),  # Pick-a-Pic
    RankingColumns(media_list="file_path", ratings="human_preference"),  # HPD v2, training
    RankingColumns(media_list="image_path", ratings="human_preference"),
    RankingColumns(media_list="image_path", ranks="rank"),  # HPD v2, test: averages over people
    PairColumns(first="path1", second="path2", label=""),  # HPD v3: the first is the preferred one
    RankingColumns(ranks="ranks"),
    RankingColumns(ratings="scores"),
    *(PairColumns(prompt=name, first="chosen", second="rejected", label="") for name in PROMPT_COLUMNS),
)


def recognised(names: Collection[str], where: str) -> Columns:
    """The columns that a table with these names is known by. Raises: ValueError where it is not."""
    for columns in KNOWN:
        if {*columns.own()} <= {*names}:
            return columns
    raise ValueError(
        f"{where}: the columns {', '.join(map(str, names))} are no preferences that are known; say which they are "
        "(columns: {class: flowalign.preferences.PairColumns, prompt: ..., first: ..., second: ..., label: ...})"
    )


def _scores(row: Row) -> tuple[float, ...] | None:
    told = row.get("scores")
    if told is None:
        return None
    if not isinstance(told, list):
        raise ValueError(f"scores must be a list of numbers, got {told!r:.80}")
    return tuple(_as_number(one) for one in told)


def _number(row: Row, name: str) -> float | None:
    told = row.get(name)
    if told is None or told != told:
        return None
    number = _as_number(told)
    if number < 0:
        raise ValueError(f"{name} must be at least 0, got {told!r}")
    return number


def _as_number(told: object) -> float:
    if isinstance(told, bool) or not isinstance(told, int | float) or not math.isfinite(told):
        raise ValueError(f"expected a finite number, got {told!r:.80}")
    return float(told)
