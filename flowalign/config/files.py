"""Config files and options as plain data: a strict reader of YAML, the shipped configs by name, `--key value`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flowalign.config.paths import ConfigError, is_ours, suggest

MAX_BYTES = 1_000_000
MAX_DEPTH = 40

# The scalars of YAML 1.2's core schema. 1.1, which PyYAML speaks, reads 1e-4 as a string, no and off as false, 010 as 8
# and 1:30 as 90.
_PATTERNS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}


class _Refused(yaml.MarkedYAMLError):
    pass


class _Loader(yaml.SafeLoader):
    """SafeLoader without tags, anchors and duplicate keys; numbers and booleans as in YAML 1.2."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (the base class declares it so)
        None: [(f"tag:yaml.org,2002:{name}", re.compile(f"(?:{text})$")) for name, text in _PATTERNS.items()]
    }
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _Refused(
                problem="anchors and aliases are not read; write the value out", problem_mark=event.start_mark
            )
        if getattr(event, "tag", None) is not None:
            raise _Refused(problem=f"the tag {event.tag} is not read; remove it", problem_mark=event.start_mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Refused(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                shown = getattr(key, "value", "") or "null"
                raise _Refused(problem=f"the key {shown!r} is no string; put it in quotes", problem_mark=key.start_mark)
            if key.value in seen:
                raise _Refused(problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _quoted(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """A string that the reader above would take for a number or the like, in quotes; PyYAML quotes by 1.1's rules."""
    style = "'" if any(re.fullmatch(pattern, text) for pattern in _PATTERNS.values()) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor(
    "tag:yaml.org,2002:float",
    lambda loader, node: float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan")),
)
_Dumper.add_representer(str, _quoted)


def parse_yaml(text: str, source: str) -> Any:
    """One YAML document as plain data. Raises: ConfigError with source, line and what is wrong."""
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{line}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: {' '.join(str(error).split())}") from error


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A config file as a mapping.

    Read strictly: at most 1 MB, one document, no tags, no anchors, no key twice, every key a string. `1e-4` is a float
    and `no` a string, as in YAML 1.2.

    Raises: ConfigError that names the file and the line.
    """
    path = Path(path)
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes; this is no config")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error
    mapping = parse_yaml(text, str(path))
    if not isinstance(mapping, dict):
        raise ConfigError(
            f"{path}: expected 'key: value' lines, got {type(mapping).__name__ if mapping else 'nothing'}"
        )
    return mapping


def dump_yaml(mapping: Mapping[str, Any]) -> str:
    """Plain data as YAML that `load_yaml` reads back as the same."""
    return yaml.dump(dict(mapping), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def config_root() -> Path:
    """Where the shipped configs lie: inside the installed package, or at the root of a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside, checkout = package / "configs", package.parent / "configs"
    return checkout if not inside.is_dir() and (package.parent / "pyproject.toml").is_file() else inside


def find_config(name: str) -> Path:
    """The file of this path, or the shipped config of this name; `configs/` and `.yaml` may be left out.

    Raises: ConfigError with the nearest names where there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    root = config_root()
    shipped = {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}
    wanted = name.removeprefix("./").removeprefix("configs/").removesuffix(".yaml")
    if wanted in shipped:
        return shipped[wanted]
    alike = [known for known in shipped if known.split("/")[-1] == wanted]
    near = f"; did you mean {' or '.join(map(repr, alike))}?" if alike else suggest(wanted, shipped, offer=3)
    raise ConfigError(f"no file and no shipped config {name!r}{near or '; shipped are ' + ', '.join(shipped)}")


def read_options(words: Sequence[str]) -> dict[str, Any]:
    """`--key value` and `--key=value` as a mapping from (dotted) key to value, which is read as YAML reads it.

    A value that starts with [ or { or a quote is YAML; anything else is one scalar, so text with a colon stays text.
    """
    options: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not all(key.split(".")):
            raise ConfigError(f"expected --key value, got {word!r}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value: --{key} VALUE")
            value = rest.pop(0)
        if key in options:
            raise ConfigError(f"--{key} is given twice")
        options[key] = _option_value(value, f"--{key}")
    return options


def _option_value(text: str, source: str) -> Any:
    kinds = [kind for kind, pattern in _PATTERNS.items() if re.fullmatch(pattern, text)]
    return parse_yaml(text, source) if kinds or text[:1] in ("[", "{", "'", '"') else text


def override(config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A config with options put in, each at its dotted key; the config given is left as it is.

    A class named by its bare path becomes a mapping when an option sets one of its arguments, and a number in a key
    chooses an element of a list. Keys that lead nowhere are left for the builder to refuse, as it does for the file's.
    """
    result: Any = dict(config)
    for key, value in options.items():
        result = _put(result, key.split("."), value, key)
    return result


def _put(node: Any, parts: list[str], value: Any, key: str) -> Any:
    if not parts:
        return value
    head, tail = parts[0], parts[1:]
    if node is None:
        node = {}
    if isinstance(node, str) and (is_ours(node) or re.fullmatch(r"\w+(\.\w+)+", node)):
        node = {"class": node}
    if isinstance(node, dict):
        return {**node, head: _put(node.get(head), tail, value, key)}
    if isinstance(node, list) and head.isdecimal() and int(head) < len(node):
        return [_put(element, tail, value, key) if i == int(head) else element for i, element in enumerate(node)]
    raise ConfigError(f"--{key}: there is no {head!r} in {type(node).__name__} {str(node)[:60]!r}")
