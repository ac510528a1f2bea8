"""A checked config becomes objects, or plain data with every default written out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flowalign.config.hints import Call, Name, Recipe, parse
from flowalign.config.paths import ConfigError, dotted_name, locate


def construct(tree: Any) -> Any:
    """The objects of a parsed config. A ValueError of a constructor is raised again with the path it came from."""
    if isinstance(tree, Call):
        arguments = {name: construct(value) for name, value in tree.arguments.items()}
        try:
            return tree.target(**arguments)
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{tree.path}: {error}") from error
    if isinstance(tree, Name):
        return tree.target
    if isinstance(tree, list | tuple):
        return type(tree)(construct(value) for value in tree)
    if isinstance(tree, dict):
        return {name: construct(value) for name, value in tree.items()}
    return tree


def plain(tree: Any) -> Any:
    """A parsed config as plain data with every default in it; parsing that gives the same again.

    A default that YAML cannot hold (an object that is no dataclass, a lambda) is left out, and so stays the default.
    """
    if isinstance(tree, Call):
        return {"class": tree.path, **arguments_of(tree)}
    if isinstance(tree, Name):
        return tree.path
    if isinstance(tree, Recipe):
        return tree.config
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    if isinstance(tree, dict):
        return {name: plain(value) for name, value in tree.items()}
    return str(tree) if isinstance(tree, Path) else tree


def arguments_of(call: Call) -> dict[str, Any]:
    """The arguments and defaults of a call as plain data."""
    written = {name: plain(value) for name, value in call.arguments.items()}
    for name, value in call.defaults.items():
        try:
            written[name] = _describe(value)
        except (ValueError, AttributeError):
            continue
    return written


def resolve(target: Callable[..., Any], mapping: Mapping[str, Any], allow_code: bool = False) -> dict[str, Any]:
    """The mapping, checked as by `parse`, with the default of every argument that it leaves out, at every depth."""
    return arguments_of(parse(target, mapping, allow_code))


def build(target: Callable[..., Any], mapping: Mapping[str, Any], allow_code: bool = False) -> Any:
    """The object that `target` makes of a mapping; nothing is constructed before the whole mapping is checked."""
    return construct(parse(target, mapping, allow_code))


def _describe(value: Any) -> Any:
    """A default as plain data that reads back as the same; ValueError or AttributeError where there is none."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {f.name: _describe(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"class": _own_name(type(value)), **held}
    if isinstance(value, list | tuple):
        return [_describe(element) for element in value]
    if isinstance(value, Mapping):
        return {str(name): _describe(element) for name, element in value.items()}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return str(value) if isinstance(value, Path) else _own_name(value)


def _own_name(value: Any) -> str:
    path = dotted_name(value)
    if locate(path) is not value:
        raise ValueError(f"{path} is another object")
    return path
