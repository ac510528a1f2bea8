"""What the repository says of itself, read without running any of it: docstrings, classes, configs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("flowalign", "rewards", "trainers")
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


@dataclass(frozen=True)
class Module:
    """A file of one of the packages. name: dotted, as in `trainers.draft`."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def doc(self) -> str:
        return ast.get_docstring(self.tree) or ""

    @property
    def classes(self) -> dict[str, ast.ClassDef]:
        return {node.name: node for node in self.tree.body if isinstance(node, ast.ClassDef)}

    @property
    def constants(self) -> dict[str, Any]:
        """What its top level names by a literal."""
        known: dict[str, Any] = {}
        for node in self.tree.body:
            for target, value in _assigned(node):
                made = literal(value, known)
                if made is not None:
                    known[target] = made
        return known

    def docstrings(self) -> Iterator[str]:
        """Of the file, and of all in it."""
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        for node in ast.walk(self.tree):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text:
                yield text


def _assigned(node: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    if not isinstance(node, ast.Assign):
        return
    for target in node.targets:
        if isinstance(target, ast.Name):
            yield target.id, node.value
        elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = zip(target.elts, node.value.elts, strict=True)
            yield from ((name.id, value) for name, value in pairs if isinstance(name, ast.Name))


def literal(node: ast.expr, names: dict[str, Any]) -> Any:
    """What an expression of literals and known names is; None for all others."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.JoinedStr):
        parts = [literal(part, names) for part in node.values]
        return None if None in parts else "".join(map(str, parts))
    if isinstance(node, ast.FormattedValue):
        return literal(node.value, names)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


@cache
def modules() -> dict[str, Module]:
    """All of the three packages, by name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = Module(name, path, ast.parse(path.read_text()))
    return found


@cache
def exports(package: str) -> dict[str, str]:
    """The names that a package hands out, and the module that each is from."""
    found = {}
    for node in modules()[package].tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: node.module for alias in node.names}
    return {name: where for name, where in found.items() if where in modules()}


@cache
def lineage(name: str, package: str) -> tuple[str, ...]:
    """A class and all that it descends from, the nearest first, by their short names."""
    for module in modules().values():
        if module.name.startswith(package) and name in module.classes:
            bases = [base.id for base in module.classes[name].bases if isinstance(base, ast.Name)]
            return tuple(dict.fromkeys([name, *(above for base in bases for above in lineage(base, package))]))
    return (name,)


def signature(node: ast.ClassDef) -> str:
    """How it is made, an argument a line; "" where nothing is said."""
    made = next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
    if made is None:
        return ""
    rest = [one for one in made.args.args if one.arg != "self"]
    defaults = [None] * (len(rest) - len(made.args.defaults)) + list(made.args.defaults)
    named = [*zip(rest, defaults, strict=True), *zip(made.args.kwonlyargs, made.args.kw_defaults, strict=True)]
    lines = [f"    {_argument(argument, default)},\n" for argument, default in named]
    return f"{node.name}(\n{''.join(lines)})"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    told = argument.arg + (f": {ast.unparse(argument.annotation)}" if argument.annotation else "")
    return told if default is None else f"{told} = {ast.unparse(default)}"


@dataclass(frozen=True)
class Config:
    """A shipped config. name: as commands take it, `flow_grpo/shapes`. header: the comment that it opens with."""

    name: str
    text: str
    header: str
    data: dict[str, Any]

    @property
    def folder(self) -> str:
        return self.name.split("/")[0]

    @property
    def named(self) -> str:
        """The class that it is a config of, or ""."""
        told = self.data.get("trainer") or self.data.get("search") or ""
        return str(told).rsplit(".", 1)[-1]

    @property
    def embedded(self) -> bool:
        """Whether all its models come with the package."""
        told = self.data.get("model", "")
        names = [told.get("pipeline", "") if isinstance(told, dict) else told]
        names += [model.get("target", "") for model in self.data.get("models", {}).values()]
        named = [str(name) for name in names if name]
        return bool(named) and all(name.startswith("shapes") for name in named)

    @property
    def level(self) -> str:
        return "run here" if self.embedded else "resolved"


@cache
def configs() -> tuple[Config, ...]:
    """All that are shipped, by name."""
    found = []
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        text = path.read_text()
        opening = re.match(r"(?:#.*\n)*", text)
        header = "\n".join(re.sub(r"^# ?", "", line) for line in (opening.group() if opening else "").splitlines())
        name = path.relative_to(ROOT / "configs").with_suffix("").as_posix()
        found.append(Config(name, text, header, yaml.safe_load(text) or {}))
    return tuple(found)
