"""Docstrings and comments as Markdown: what is indented is code, and nothing in a sentence is taken for markup."""

from __future__ import annotations

import re

TAGS = re.compile(r"(<pre.*?</pre>|<a\s.*?</a>|<h\d.*?</h\d>|<[^>]+>)", re.DOTALL)
PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
BAR = re.compile(r"(?<!\\)\|")
FAR = re.compile(r" {5,}(\([^()]*\))$")  # the number of an equation, which the sources put at the right
MARKUP = re.compile(r"([*<\[\]|])")


def prose(text: str) -> str:
    """A docstring as Markdown. Lines indented by four or more are code; in all others nothing but `...` is markup."""
    blocks = [block for block in re.split(r"\n\n+", text.strip("\n")) if block.strip()]
    return "\n\n".join(_block(block) for block in blocks)


def _block(block: str) -> str:
    lines = block.splitlines()
    if lines[0].startswith("    "):
        return fenced(block)
    at = next((i for i, line in enumerate(lines) if line.startswith("    ")), len(lines))
    said = escaped("\n".join(lines[:at]))
    return said if at == len(lines) else f"{said}\n\n{_block(chr(10).join(lines[at:]))}"


def escaped(text: str) -> str:
    """Text with nothing in it that Markdown would take for markup, but for `code`."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else MARKUP.sub(r"\\\1", part) for part in parts)


def fenced(text: str, language: str = "text", title: str = "") -> str:
    """A block of code; a common indent is taken away."""
    lines = text.splitlines()
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    body = "\n".join(FAR.sub(r"    \1", line[indent:]) for line in lines)
    return f"```{language}{f' title={chr(34)}{title}{chr(34)}' if title else ''}\n{body}\n```"


def row(*cells: str) -> str:
    """A line of a table."""
    return "| " + " | ".join(BAR.sub(r"\|", " ".join(cell.split())) for cell in cells) + " |"


def table(heads: tuple[str, ...], rows: list[str]) -> str:
    return "\n".join([row(*heads), row(*["---"] * len(heads)), *rows])


def slug(text: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w]+", "-", text.lower()).strip("-")


def linked(html: str) -> str:
    """Each paper that a page names, linked, but in code, headings and links."""
    parts = TAGS.split(html)
    return "".join(part if part.startswith("<") else PAPER.sub(_link, part) for part in parts)


def _link(found: re.Match[str]) -> str:
    return f'<a href="https://arxiv.org/abs/{found.group(1)}">{found.group()}</a>'
