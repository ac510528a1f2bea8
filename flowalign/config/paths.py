"""Dotted paths in configs: which code a config may name, and what the path leads to."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import re
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGES = ("flowalign", "rewards", "trainers")
OUTSIDE = "from outside flowalign, rewards and trainers; run it with --allow-code"

_PATH = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", re.ASCII)
_log = logging.getLogger("flowalign")


class ConfigError(ValueError):
    """A config or an option that cannot be used; the message is one line that names the key and the fix."""


def suggest(name: str, known: Iterable[str], offer: int = 1) -> str:
    """'; did you mean ...?' for the known names nearest to `name`, or '' where none is near."""
    near = get_close_matches(name, list(known), n=offer, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def is_ours(path: str) -> bool:
    """Whether a string is a dotted path into one of the library's own packages."""
    return _PATH.fullmatch(path) is not None and path.split(".")[0] in PACKAGES


def dotted_name(value: Any) -> str:
    """The path that `locate` finds this class or function by; ValueError if it has none (a lambda, a local class)."""
    path = f"{value.__module__}.{value.__qualname__}"
    if not _PATH.fullmatch(path):
        raise ValueError(f"{path} has no dotted path")
    return path


def names_code(text: str) -> bool:
    """Whether a text that may be something else is a dotted path into a package of others that python finds."""
    if not _PATH.fullmatch(text) or is_ours(text) or Path(text).exists():
        return False
    return importlib.util.find_spec(text.split(".")[0]) is not None


def locate(path: str, allow_code: bool = False) -> Any:
    """The class or function at a dotted path, such as `rewards.ShapesVerifier`.

    Without `allow_code` only what flowalign, rewards and trainers define themselves is given out: neither other
    packages nor what those three import from them, and nothing whose name starts with an underscore, so that a config
    from a stranger runs no code but ours. With it, every foreign path is logged with the file it comes from.

    Raises: ConfigError for all that is not a class or a function that may be used.
    """
    if not _PATH.fullmatch(path):
        raise ConfigError(f"expected a dotted path such as rewards.ShapesVerifier, got {path!r}")
    if not allow_code and path.split(".")[0] not in PACKAGES:
        raise ConfigError(f"{path} is code {OUTSIDE}")
    found = _walk(path)
    if not (isinstance(found, type) or inspect.isroutine(found)):
        raise ConfigError(f"{path} is a {type(found).__name__}, not a class or a function")
    home = str(found.__module__)
    if home.split(".")[0] not in PACKAGES:
        if not allow_code:
            raise ConfigError(f"{path} is code from outside ({home}); run it with --allow-code")
        _log.warning("code from outside flowalign: %s (%s)", path, getattr(inspect.getmodule(found), "__file__", home))
    return found


def _walk(path: str) -> Any:
    """The object at a path: the longest prefix that is a module, then attributes of it (never further modules)."""
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        try:
            found: Any = import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name + ".").startswith(error.name + "."):
                raise ConfigError(f"{path} needs the package {error.name}, which is not installed") from error
            continue
        for part in parts[cut:]:
            parent, found = found, getattr(found, part, None)
            if found is None or isinstance(found, ModuleType):
                raise ConfigError(f"no {part!r} in {parent.__name__}{suggest(part, _public(parent))}")
        return found
    raise ConfigError(f"python finds no package {parts[0]!r} (for {path})")


def _public(value: Any) -> list[str]:
    return [name for name in dir(value) if not name.startswith("_")]
