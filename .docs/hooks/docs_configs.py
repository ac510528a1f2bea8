"""The pages of configs: one for each folder of them, and a list."""

from __future__ import annotations

from docs_sources import Config, configs
from docs_text import escaped, fenced, row, slug, table

INTRO = """A config is a YAML file whose key `trainer` (or `search`) names a class; every other key is an argument of
that class, and `class:` names what a value is made of. Any key can be set from the command line:
`flowalign train flow_grpo/shapes --sampling.groups 32`. An unknown key stops the command with the nearest known one.
A name without a path is looked up among the shipped configs, wherever you are.

Two levels of evidence are told apart. **Run here**: on the models that come with the package, on CPUs; the comment says
what came of it, or that settings are not tuned. **Resolved**: all settings resolve, for most a test compares them with
the published ones, and the pipeline's classes were run at tiny size with random weights; the published weights were not
run.
"""


def pages() -> dict[str, str]:
    """All of them, by path."""
    made = {"configs/index.md": _index()}
    for folder in dict.fromkeys(config.folder for config in configs()):
        own = [config for config in configs() if config.folder == folder]
        made[f"configs/{folder}.md"] = f"# configs/{folder}\n\n" + "\n\n".join(_section(config) for config in own)
    return made


def link(config: Config, above: str = "") -> str:
    """To a config's place in these pages, from a page whose way to the top is `above`."""
    return f"[{config.name}]({above}configs/{config.folder}.md#{slug(config.name)})"


def summary(config: Config) -> str:
    """The first sentence of its comment."""
    told = " ".join(config.header.split("\n\n")[0].split())
    first = told.split(": ")[0] if len(told) > 140 and ": " in told else told
    return escaped(first if len(first) <= 160 else first[:157] + "...")


def _index() -> str:
    rows = [row(link(config, "../"), summary(config), config.level) for config in configs()]
    return f"# Configs\n\n{INTRO}\n{table(('config', 'what it is', 'level'), rows)}\n"


def _section(config: Config) -> str:
    told = "\n\n".join(_comment(part) for part in config.header.split("\n\n"))
    head = f"## {config.name} {{ #{slug(config.name)} }}\n\n*Level: {config.level}.*"
    return f"{head}\n\n{told}\n\n{fenced(_body(config), 'yaml', f'configs/{config.name}.yaml')}"


def _comment(part: str) -> str:
    indented = any(line.startswith("  ") for line in part.splitlines())
    return fenced(part) if indented else escaped(part)


def _body(config: Config) -> str:
    lines = config.text.splitlines()
    start = next((i for i, line in enumerate(lines) if not line.startswith("#")), 0)
    return "\n".join(lines[start:]).strip("\n")
