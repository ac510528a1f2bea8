"""The tests' own type checker: it lets through what it should, and nothing else."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, Int
from torch import Tensor
from typecheck import jaxtyped

from flowalign.records import Condition, Prompts
from flowalign.transitions import ODE

if TYPE_CHECKING:
    from nowhere import Unknown

Rows = Float[Tensor, "b d"]
WRONG = pytest.raises(BeartypeCallHintViolation)


@jaxtyped(typechecker=None)
def weighted(rows: Rows, weights: Float[Tensor, " b"], scale: float = 1.0, *, turned: bool = False) -> Rows:
    made = scale * rows * weights[:, None]
    return made.T if turned else made


@jaxtyped(typechecker=None)
def known_to_static_checkers(one: Unknown, other: int) -> Unknown:
    return one


@jaxtyped(typechecker=None)
@dataclass(frozen=True)
class Pair:
    """Two columns of one length."""

    first: Float[Tensor, " b"]
    second: Int[Tensor, " b"]
    name: str = ""

    @property
    @jaxtyped(typechecker=None)
    def length(self) -> int:
        return len(self.first)


@contextmanager
@jaxtyped(typechecker=None)
def entered(size: int) -> Iterator[Tensor]:
    yield torch.zeros(size)


def test_shapes_agree_within_a_call_and_are_free_in_the_next() -> None:
    for rows in (2, 5):
        assert weighted(torch.ones(rows, 3), torch.ones(rows), 2).sum() == 6 * rows  # an int will do for a float
    with WRONG:
        weighted(torch.ones(2, 3), torch.ones(3))
    with WRONG:
        weighted(torch.ones(2, 3), torch.ones(2).long())
    with WRONG:
        weighted(torch.ones(2, 3), torch.ones(2), turned=True)  # what is returned is not [b, d]
    with WRONG:
        weighted(torch.ones(2, 3), torch.ones(2), scale="1")
    assert weighted(torch.ones(3, 3), torch.ones(3), turned=True).shape == (3, 3)


def test_dataclasses_generators_and_names_for_static_checkers() -> None:
    pair = Pair(torch.ones(2), torch.ones(2).long())
    assert pair.length == 2
    with WRONG:
        replace(pair, second=torch.ones(3).long())
    with WRONG:
        Pair(torch.ones(2), torch.ones(2).long(), 3)  # type: ignore[arg-type]
    with entered(3) as made:
        assert len(made) == 3
    with WRONG, entered("3"):
        pass
    anything: Any = object()
    assert known_to_static_checkers(anything, 1) is anything
    with WRONG:
        known_to_static_checkers(anything, "1")


def test_signatures_are_those_of_the_functions() -> None:
    told = inspect.signature(weighted)
    assert [*told.parameters] == ["rows", "weights", "scale", "turned"]
    assert (told.parameters["scale"].default, told.return_annotation) == (1.0, "Rows")
    assert inspect.unwrap(weighted).__name__ == "weighted"


def test_the_packages_are_checked() -> None:
    with WRONG:
        Condition(torch.zeros(2, 3))
    with WRONG:
        Prompts("a prompt", ({},))  # type: ignore[arg-type]
    with WRONG:
        Condition(torch.zeros(2, 3, 4), pooled_prompt_embeds=torch.zeros(3, 4))
    with WRONG:
        ODE()(torch.zeros(2, 3), torch.zeros(3, 3), None)  # type: ignore[arg-type]
