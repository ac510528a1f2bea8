"""The run-time type checker of the tests: every annotated call of the three packages, shapes of arrays included.

conftest.py has jaxtyping's import hook decorate all functions and dataclasses with `jaxtyped`, and puts this one in the
place of jaxtyping's own, which checks the arguments twice and binds them once more, at every call. A function's checks
are made at its first call, and one without shapes in its annotations needs no table of them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import is_dataclass
from types import FunctionType
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

# As for static checkers, an int will do where a float is asked for.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
scope = jaxtyping.jaxtyped


def jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
    """jaxtyping's decorator as its import hook writes it; the checker is always `check`."""
    return _decorated


def _decorated(found: Any) -> Any:
    """A function that is checked; of a dataclass, its `__init__`."""
    if not inspect.isclass(found):
        return _checked(found)
    if is_dataclass(found) and inspect.unwrap(found.__init__) is found.__init__:
        found.__init__ = _checked(found.__init__)  # type: ignore[misc]
    return found


def _checked(function: Any) -> Any:
    made: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not made:
            made.append(_with_checks(function))
        return made[0](*args, **kwargs)

    return call


def _with_checks(function: Any) -> Callable[..., Any]:
    hints = {name: _hint(hint, function) for name, hint in function.__annotations__.items()}
    if not hints:
        return function  # type: ignore[no-any-return]
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__, copy.__qualname__, copy.__module__ = (
        function.__kwdefaults__, function.__qualname__, function.__module__
    )  # fmt: skip
    copy.__annotations__ = hints
    checked: Callable[..., Any] = check(copy)
    if not any(_has_shape(hint) for hint in hints.values()):
        return checked

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with scope("context"):
            return checked(*args, **kwargs)

    return call


def _hint(hint: Any, function: Any) -> Any:
    """What a hint stands for; anything where that is known to static checkers alone."""

    def probe() -> None: ...

    probe.__annotations__ = {"hint": hint}
    try:
        return get_type_hints(probe, function.__globals__, include_extras=True)["hint"]
    except Exception:  # of whatever kind: names that are imported under TYPE_CHECKING, two variadic dimensions
        return Any


def _has_shape(hint: Any) -> bool:
    whole = inspect.isclass(hint) and issubclass(hint, AbstractArray)
    return whole or any(_has_shape(part) for part in get_args(hint))
