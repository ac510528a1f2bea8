"""What a signature asks for: hints and defaults by name, and whether a class satisfies a hint."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections import abc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from flowalign.config.place import Place

SCALARS = (bool, int, float, str, Path)
LISTS = (list, tuple, abc.Sequence, abc.Iterable, abc.Collection)
MAPPINGS = (dict, abc.Mapping)
REQUIRED = inspect.Parameter.empty


def parameters(target: Callable[..., Any], at: Place) -> dict[str, tuple[Any, Any]]:
    """Hint and default of everything that can be passed by name."""
    source: Any = target
    factories: dict[str, Any] = {}
    if isinstance(target, type):
        own = vars(target).get("__dataclass_params__")
        # a dataclass's fields are resolved class by class: its __init__ knows only the names of the last one's module
        source = target if own is not None and own.init else source.__init__
        fields = dataclasses.fields(target) if dataclasses.is_dataclass(target) else ()
        factories = {f.name: f.default_factory for f in fields if f.default_factory is not dataclasses.MISSING}
    hints, signature = type_hints(source, at), inspect.signature(target)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name: (hints.get(name, Any), factories[name]() if name in factories else parameter.default)
        for name, parameter in signature.parameters.items()
        if parameter.kind in named
    }


def type_hints(source: Any, at: Place) -> dict[str, Any]:
    """The resolved hints of a class or function; a name that exists only for type checkers cannot be resolved."""
    try:
        return get_type_hints(source, include_extras=True)
    except NameError as error:
        raise at.error(f"the type hints of {source.__qualname__} cannot be read: {error}") from error


def is_object(hint: Any) -> bool:
    """Whether a hint asks for something that only code can make: a class, a Protocol, a callable."""
    kind = get_origin(hint) or hint
    data = (*SCALARS, *LISTS, *MAPPINGS, Literal, types.NoneType, Any, object)
    return kind not in data


def fits(product: Any, hint: Any) -> bool:
    """Whether instances of a class fit a hint. A Protocol is checked by the names of its methods."""
    kind = get_origin(hint) or hint
    if kind in (Union, types.UnionType):
        return any(fits(product, member) for member in get_args(hint))
    product = get_origin(product) or product
    if kind in (Any, object):
        return True
    if not isinstance(kind, type) or not isinstance(product, type):
        return False
    if Protocol in kind.__bases__:
        wanted = {
            name
            for name in (*vars(kind), *vars(kind).get("__annotations__", {}))
            if name == "__call__" or name[:1] != "_"
        }
        return all(name in dir(product) or name in _annotated(product) for name in wanted)
    return issubclass(product, kind)


def _annotated(product: type) -> set[str]:
    return {name for base in product.__mro__ for name in vars(base).get("__annotations__", ())}
