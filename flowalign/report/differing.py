"""In what several configs differ, key by key."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's values by their dotted keys; lists and empty mappings are values."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        inner = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def unlike(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Dotted keys whose values differ, with each config's value in one line; "-" where it has none."""
    every = [flat(config) for config in configs]
    keys = dict.fromkeys(key for one in every for key in one)
    told = {key: [_written(one[key]) if key in one else "-" for one in every] for key in keys}
    return {key: values for key, values in told.items() if len(set(values)) > 1 and key != "folder"}


def _written(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, default=str)
