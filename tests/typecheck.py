"""The run-time type checker of the tests: every annotated call of the three packages, shapes of arrays included.

conftest.py has jaxtyping's import hook decorate all functions and dataclasses with `jaxtyped`, and puts this one in the
place of jaxtyping's own, which checks the arguments twice and binds them once more, at every call. A function's checks
are made at its first call, and one without shapes in its annotations needs no table of them.
"""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable
from dataclasses import is_dataclass
from types import CodeType, FunctionType
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype
from beartype._check.code import codemain
from jaxtyping import AbstractArray

# It looks at one item of a list, by python's global generator; with one of its own, that stays the code's under test.
vars(codemain)["getrandbits"] = random.Random(0).getrandbits
# As for static checkers, an int will do where a float is asked for.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
scope = jaxtyping.jaxtyped
CALLS = 10  # of a function that are checked in a test: what a loop does a thousand times it does alike
test, on = 0, True
counts = dict[CodeType, list[int]]()  # of each function's code: the test that called it last, and how often it did


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


def begin() -> None:
    """A test begins: all functions are checked again."""
    global test
    test += 1


def switch_off() -> None:
    """No more checks in this process, which take some 30 % of its time: tests in one process make them."""
    global on
    on = False


def _checked(function: Any) -> Any:
    made: Callable[..., Any] | None = None
    shaped = False
    calls = counts.setdefault(function.__code__, [-1, 0])  # a function in a function is made anew by each call

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal made, shaped
        calls[:] = test, calls[1] + 1 if calls[0] == test else 1
        if not on or calls[1] > CALLS:
            return function(*args, **kwargs)
        if made is None:
            hints = {name: _hint(hint, function) for name, hint in function.__annotations__.items()}
            made, shaped = _with_checks(function, hints), any(_has_shape(hint) for hint in hints.values())
        if not shaped:
            return made(*args, **kwargs)
        with scope("context"):
            return made(*args, **kwargs)

    return call


def _with_checks(function: Any, hints: dict[str, Any]) -> Callable[..., Any]:
    """The function with its hints as they are meant, in beartype's wrapper; itself where it has none."""
    if not hints:
        return function  # type: ignore[no-any-return]
    names = function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    copy = FunctionType(*names)
    copy.__kwdefaults__, copy.__annotations__ = function.__kwdefaults__, hints
    copy.__qualname__, copy.__module__ = function.__qualname__, function.__module__
    return check(copy)  # type: ignore[no-any-return]


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
