"""Where in a config something is wrong, and the words for what was expected and what was got."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from flowalign.config.paths import ConfigError


@dataclass(frozen=True)
class Place:
    """Where in the config a value stands, and whether foreign code may be named there."""

    key: str = ""
    allow_code: bool = False

    def at(self, key: str) -> Place:
        return dataclasses.replace(self, key=f"{self.key}.{key}" if self.key else key)

    def item(self, index: int) -> Place:
        return dataclasses.replace(self, key=f"{self.key}[{index}]")

    def error(self, message: str) -> ConfigError:
        return ConfigError(f"{self.key}: {message}" if self.key else message)


def label(hint: Any) -> str:
    if hint is types.NoneType:
        return "null"
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(label(member) for member in get_args(hint))
    if get_origin(hint) is Literal:
        return " | ".join(str(member) for member in get_args(hint))
    if get_origin(hint) is not None:
        return str(hint).replace("typing.", "").replace("collections.abc.", "")
    return getattr(hint, "__name__", str(hint))


def show(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
