"""What a config's value may be, by the type hint that it has to fit.

    bool int float str Path Literal   that type alone; an int is also a float, a bool is no number, no nan or inf
    X | Y | None                      the first member that fits, an exact type first
    list tuple Sequence dict          every element by its own hint; a string is no sequence
    a dataclass                       a mapping of its fields
    any class, Protocol or Callable   {class: dotted.path, argument: value, ...} or just the string dotted.path
    Any                               plain data
    Annotated[..., Elsewhere(hint)]   what fits that hint, checked and not made: another process makes it

A dotted path to a class makes an instance. A bare path to a function is the function itself where the hint takes a
callable; everywhere else, and always after `class:`, the function is called and its declared return type has to fit.
Where the hint also takes a string, a string is a dotted path only if it starts with flowalign., rewards. or trainers.;
a file of such a name is written ./rewards.txt, code from elsewhere {class: my.module.Name}.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from flowalign.config.paths import ConfigError, is_ours, locate, names_code, suggest
from flowalign.config.place import Place, label, show
from flowalign.config.signatures import LISTS, MAPPINGS, REQUIRED, SCALARS, fits, is_object, parameters, type_hints


@dataclass(frozen=True)
class Call:
    """A class or function that will be called: its dotted path as written, and the arguments that were given.

    `defaults` are the parameters that were not; they are written out with the rest, but not passed.
    """

    path: str
    target: Callable[..., Any]
    arguments: dict[str, Any]
    defaults: dict[str, Any]


@dataclass(frozen=True)
class Name:
    """A function, or a class where a class is asked for, that is taken as it is."""

    path: str
    target: Any


@dataclass(frozen=True)
class Recipe:
    """Plain data that an object is made of elsewhere; `allow_code`: classes outside the three packages may be named."""

    config: Any
    allow_code: bool


@dataclass(frozen=True)
class Elsewhere:
    """Beside a hint in `Annotated`: the value becomes a `Recipe`, after it was checked against this hint."""

    hint: Any


def parse(target: Callable[..., Any], mapping: Mapping[str, Any], allow_code: bool = False) -> Call:
    """Check a mapping against the signature of a class or function, all the way down, without calling anything.

    Args:
        target: the class or function whose arguments these are.
        mapping: plain data as YAML gives it; read by the rules at the top of this module.
        allow_code: whether dotted paths may lead outside flowalign, rewards and trainers.

    Raises: ConfigError that names the key, what was expected and what was got, for the first thing that is wrong.
    """
    return _call(target, target.__qualname__, mapping, Place(allow_code=allow_code))


def read(value: Any, hint: Any, at: Place) -> Any:
    """A value checked against a hint: itself, a number made a float, a string made a Path, or a tree of calls."""
    if get_origin(hint) is Annotated:
        hint, *notes = get_args(hint)
        for note in notes:
            if isinstance(note, Elsewhere):
                read(value, note.hint, at)
                return Recipe(value, at.allow_code)
    if hint in (Any, object) or isinstance(hint, TypeVar):
        return _data(value, at)
    members, kind = get_args(hint), get_origin(hint) or hint
    if kind in (Union, types.UnionType):
        return _union(value, hint, at)
    if kind is Literal:
        if any(value == member and type(value) is type(member) for member in members):
            return value
        raise at.error(f"expected {label(hint)}, got {show(value)}{suggest(str(value), map(str, members))}")
    if kind in SCALARS or kind is types.NoneType:
        return _scalar(value, kind, at)
    if kind in LISTS:
        return _sequence(value, kind, members, hint, at)
    if kind in MAPPINGS:
        if not isinstance(value, Mapping):
            raise at.error(f"expected {label(hint)}, got {show(value)}")
        return {name: read(element, members[1] if members else Any, at.at(name)) for name, element in value.items()}
    return _object(value, hint, at)


def _data(value: Any, at: Place) -> Any:
    if isinstance(value, Mapping):
        return {name: _data(element, at.at(name)) for name, element in value.items()}
    if isinstance(value, list):
        return [_data(element, at.item(i)) for i, element in enumerate(value)]
    return value if value is None else _scalar(value, type(value), at)


def _scalar(value: Any, kind: type, at: Place) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        hint = "; put it in quotes" if kind is str and isinstance(value, bool | int | float) else ""
        raise at.error(f"expected {label(kind)}, got {show(value)}{hint}")
    if isinstance(value, float) and not math.isfinite(value):
        raise at.error(f"expected a finite number, got {show(value)}")
    return value


def _sequence(value: Any, kind: type, members: tuple[Any, ...], hint: Any, at: Place) -> Any:
    if not isinstance(value, list | tuple):
        raise at.error(f"expected {label(hint)}, got {show(value)}; write it as [a, b, ...]")
    if kind is tuple and members and members[-1] is not Ellipsis:
        if len(value) != len(members):
            raise at.error(f"expected {len(members)} values, got {len(value)}: {show(value)}")
        return tuple(read(element, members[i], at.item(i)) for i, element in enumerate(value))
    elements = [read(element, members[0] if members else Any, at.item(i)) for i, element in enumerate(value)]
    return tuple(elements) if kind is tuple else elements


def _union(value: Any, hint: Any, at: Place) -> Any:
    """One of several hints; an object is looked for in all of them at once, data in the first that has its shape."""
    members = get_args(hint)
    objects = any(is_object(member) for member in members)
    if objects and isinstance(value, str):
        takes_text = any(member in (str, Path) or get_origin(member) is Literal for member in members)
        if is_ours(value) or not takes_text or (at.allow_code and names_code(value)):
            return _object(value, hint, at)
    if objects and isinstance(value, Mapping) and "class" in value:
        return _object(value, hint, at)
    shaped = [member for member in members if _has_shape(value, member)]
    if len(shaped) == 1:
        return read(value, shaped[0], at)
    for member in sorted(shaped, key=lambda member: type(value) is not member):
        try:
            return read(value, member, at)
        except ConfigError:
            continue
    how = " without 'class: dotted.path'" if objects and isinstance(value, Mapping) else ""
    raise at.error(f"expected {label(hint)}, got {show(value)}{how}")


def _has_shape(value: Any, hint: Any) -> bool:
    """Whether a value is of the outer shape that a hint asks for: mapping, list, or the scalar itself."""
    kind = get_origin(hint) or hint
    if kind in (Any, object):
        return True
    if isinstance(value, Mapping):
        return kind in MAPPINGS or dataclasses.is_dataclass(kind)
    if isinstance(value, list | tuple):
        return kind in LISTS
    if kind is Literal:
        return value in get_args(hint)
    alike = {
        Path: (str,),
        float: (float, int),
        str: (str,),
        bool: (bool,),
        int: (int,),
        types.NoneType: (types.NoneType,),
    }
    return type(value) in alike.get(kind, ())


def _object(value: Any, hint: Any, at: Place) -> Call | Name:
    """A class or function by its dotted path, with or without arguments, whose product fits the hint."""
    bare = isinstance(value, str)
    if not bare and not isinstance(value, Mapping):
        raise at.error(f"expected {label(hint)} as a dotted path or as 'class: dotted.path', got {show(value)}")
    if not bare and "class" not in value:
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            return _call(hint, f"{hint.__module__}.{hint.__qualname__}", value, at)
        raise at.error(f"expected {label(hint)}: name it with 'class: dotted.path'")
    path = value if bare else value["class"]
    try:
        found = locate(path, at.allow_code) if isinstance(path, str) else None
    except ConfigError as error:
        raise at.error(str(error)) from error
    if found is None:
        raise at.error(f"expected a dotted path after 'class', got {show(path)}")
    if bare and (_asks_for_class(found, hint) or (not isinstance(found, type) and fits(types.FunctionType, hint))):
        return Name(path, found)
    product = found if isinstance(found, type) else type_hints(found, at).get("return", object)
    if product is types.NoneType or not fits(product, hint):  # what returns nothing is there for its effects
        what = "" if isinstance(found, type) else f" returns {label(product)} and"
        raise at.error(f"{path}{what} is no {label(hint)}")
    if inspect.isabstract(found):
        raise at.error(f"{path} is abstract; name one of its subclasses")
    return _call(found, path, {} if bare else {k: v for k, v in value.items() if k != "class"}, at)


def _asks_for_class(found: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_asks_for_class(found, member) for member in get_args(hint))
    bound = get_args(hint) or (object,)
    return (get_origin(hint) or hint) is type and isinstance(found, type) and fits(found, bound[0])


def _call(target: Callable[..., Any], path: str, mapping: Mapping[str, Any], at: Place) -> Call:
    known, short = parameters(target, at), target.__qualname__
    if "allow_code" in mapping and not at.allow_code:
        raise at.error("'allow_code' is no key of a config: give --allow-code on the command line")
    for name in mapping:
        if name not in known:
            hint = suggest(str(name), known) or f"; its keys are {', '.join(known) or 'none'}"
            raise at.error(f"unknown key {str(name)!r} in {short}{hint}")
    missing = [repr(name) for name, (_, default) in known.items() if default is REQUIRED and name not in mapping]
    if missing:
        raise at.error(f"{short} needs {', '.join(missing)}")
    given = {name: read(value, known[name][0], at.at(name)) for name, value in mapping.items()}
    defaults = {name: default for name, (_, default) in known.items() if name not in given}
    return Call(path, target, given, defaults)
