"""Strict configs: YAML files and `--key value` options become typed objects, named by dotted paths."""

from flowalign.config.builder import arguments_of, build, construct, plain, resolve
from flowalign.config.files import config_root, dump_yaml, find_config, load_yaml, override, parse_yaml, read_options
from flowalign.config.hints import Call, Elsewhere, Recipe, parse
from flowalign.config.paths import PACKAGES, ConfigError, dotted_name, locate

__all__ = [
    "PACKAGES",
    "Call",
    "ConfigError",
    "Elsewhere",
    "Recipe",
    "arguments_of",
    "build",
    "config_root",
    "construct",
    "dotted_name",
    "dump_yaml",
    "find_config",
    "load_yaml",
    "locate",
    "override",
    "parse",
    "parse_yaml",
    "plain",
    "read_options",
    "resolve",
]
