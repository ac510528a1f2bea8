"""Fields of a class as a list: our docstrings tell them as `name: what it is`, one after another in a paragraph."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Fields(griffe.Extension):
    """Makes such paragraphs lists, for the fields and arguments that a class has."""

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Called by griffe for every class that it has read."""
        if cls.docstring is None:
            return
        names = [name for name, member in cls.members.items() if member.is_attribute]
        cls.docstring.value = listed(cls.docstring.value, names)


def listed(text: str, names: list[str]) -> str:
    """A docstring with the paragraphs that tell fields as lists."""
    if not names:
        return text
    one = "(?:" + "|".join(map(re.escape, names)) + ")"
    start = rf"(?P<told>{one}(?:, {one})*): "
    return "\n\n".join(_listed(block, re.compile(rf"(?:^|(?<=\. )|(?<=\.\n)){start}")) for block in text.split("\n\n"))


def _listed(block: str, field: re.Pattern[str]) -> str:
    if not field.match(block):
        return block
    found = [*field.finditer(block)]
    ends = [*(one.start() for one in found[1:]), len(block)]
    told = ((one["told"], " ".join(block[one.end() : end].split())) for one, end in zip(found, ends, strict=True))
    return "\n".join(f"- **{names}**: {said}" for names, said in told)
