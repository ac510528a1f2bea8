"""Under which licence a base model stands, as its own folder or card says, and what licences of rewards forbid."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flowalign.models.loading import EMBEDDED

FORBIDS = re.compile(r"non-?\s?commercial|research only|\bnc\b", re.IGNORECASE)
UNNAMED = re.compile(r"none named|\bthat of\b|of the weights", re.IGNORECASE)


@dataclass(frozen=True)
class Licence:
    """A licence as the hub writes it: its short name, "other" with a name and a link of its own, "" where unknown."""

    short: str = ""
    name: str = ""
    link: str = ""

    def front(self) -> dict[str, str]:
        """Its part of a card's head."""
        told = {"license": self.short, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in told.items() if value}

    def sentence(self, base: str) -> str:
        """What it means for what was made of the base."""
        if not self.short:
            return f"That of the base model {base}, which does not name it where it was read from: see its own page."
        shown = self.name or self.short
        return f"That of the base model {base}: {f'[{shown}]({self.link})' if self.link else shown}."


def licence_of(base: str) -> Licence:
    """Of a pipeline by its folder, hub id (if its card is in the cache) or embedded name."""
    if base in EMBEDDED:
        return Licence("apache-2.0")
    folder = Path(base).expanduser()
    if folder.is_dir():
        return _of_card(folder / "README.md")
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(base, "README.md") if base.count("/") == 1 else None
    return _of_card(Path(cached)) if isinstance(cached, str) else Licence()


def _of_card(file: Path) -> Licence:
    if not file.is_file():
        return Licence()
    head = re.match(r"\ufeff?---\s*\n(.*?)\n---", file.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        told: Any = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return Licence()
    if not isinstance(told, dict):
        return Licence()
    short, name, link = (told.get(key) for key in ("license", "license_name", "license_link"))
    return Licence(*(one if isinstance(one, str) else "" for one in (short, name, link)))


def warnings_of(rewards: Iterable[tuple[str, str]]) -> list[str]:
    """What the licences of rewards' weights, by the rewards' names, mean for who uses the policy commercially."""
    held = [*rewards]
    forbidden = [f"`{name}` ({licence})" for name, licence in held if FORBIDS.search(licence)]
    unnamed = [f"`{name}`" for name, licence in held if UNNAMED.search(licence) and not FORBIDS.search(licence)]
    found = []
    if forbidden:
        found.append(
            f"**Not for commercial use without asking**: {', '.join(forbidden)} forbids it for the weights of the "
            "reward that trained this policy."
        )
    if unnamed:
        found.append(f"No licence is named for the weights of {', '.join(unnamed)}: ask who made them.")
    return found
