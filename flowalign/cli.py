"""The command `flowalign`. A subcommand is one function with its own arguments, and one line in `main`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

# torch and diffusers are imported by what a config names, so that --help and a mistyped config answer at once
from flowalign import __version__
from flowalign.config import (
    PACKAGES,
    Call,
    ConfigError,
    arguments_of,
    construct,
    find_config,
    load_yaml,
    locate,
    override,
    parse,
    read_options,
)

DESCRIPTION = """Align diffusion and flow models with rewards.

examples:
  flowalign train configs/flow_grpo/shapes.yaml
  flowalign train flow_grpo/shapes --optimizer.learning_rate 3e-4 --epochs 20
  flowalign sample runs/flow_grpo_shapes --prompt "a red circle left of a blue square"
"""

TRAIN = """Train as a config says.

CONFIG is a file, or the name of a shipped config. Its key `trainer` names the class; every other key is an argument of
that class. Options set or replace keys, at any depth:

  flowalign train flow_grpo/shapes --epochs 20
  flowalign train flow_grpo/shapes --model.lora.rank 8 --folder runs/rank8
  flowalign train my.yaml --allow-code --reward my_rewards.brightness
"""

SAMPLE = """Sample pictures by the ODE, from noise that depends on the seed and the picture's number alone.

TARGET is a run folder (its model with the policy it kept, its steps and guidance), a pipeline's folder or hub id, or
`shapes`, the embedded model. Options set or replace arguments of the model:

  flowalign sample runs/flow_grpo_shapes --prompt "a red circle" --prompt "two blue squares"
  flowalign sample runs/flow_grpo_shapes --base --prompts prompts.txt --out before
  flowalign sample shapes --lora runs/flow_grpo_shapes/lora --prompt "a red circle" --steps 8 --guidance-scale 1
"""


class Trainer(Protocol):
    """What `flowalign train` runs. `config` is the resolved config, plain data, for the run folder."""

    def train(self, config: Mapping[str, Any] | None = None) -> object: ...


class Parser(argparse.ArgumentParser):
    """argparse, with errors in one line as everywhere else."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"flowalign: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 a mistake of the user's, 130 stopped by Ctrl-C."""
    parser = Parser("flowalign", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"flowalign {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_train(commands)
    add_sample(commands)
    arguments, rest = parser.parse_known_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import warns of image processors that no one uses
    try:
        check_packages()
        arguments.run(arguments, rest)
    except KeyboardInterrupt:
        print("flowalign: stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if arguments.debug:
            traceback.print_exc()
        hint = "" if arguments.debug or isinstance(error, ConfigError) else " (--debug shows where)"
        print(f"flowalign: error: {' '.join(str(error).split()) or type(error).__name__}{hint}", file=sys.stderr)
        return 2
    return 0


def add_command(commands: Any, name: str, help: str, description: str) -> argparse.ArgumentParser:
    """A subcommand's parser, with the options that all of them have; set its function with `set_defaults(run=...)`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=description, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_train(commands: Any) -> None:
    """flowalign train CONFIG [--key value ...]"""
    parser = add_command(commands, "train", "train as a config says", TRAIN)
    parser.usage = "flowalign train [-h] CONFIG [--key value ...] [--allow-code] [--debug]"
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a shipped config")
    parser.add_argument("--allow-code", action="store_true", help="let the config name classes outside flowalign")
    parser.set_defaults(run=train)


def train(arguments: argparse.Namespace, words: list[str]) -> None:
    """Read the config, put the options in, check all of it, then build the trainer and run it."""
    if arguments.allow_code and "" not in sys.path:
        sys.path.append(str(Path.cwd()))  # at the end: the user's modules are found, and hide none of ours
    options = read_options(words)
    path = find_config(arguments.config)
    config = override(load_yaml(path), options)
    source = f"{path} (with options)" if options else str(path)
    try:
        call = parse_trainer(config, arguments.allow_code)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    trainer: Trainer = construct(call)
    trainer.train(config={"trainer": call.path, **arguments_of(call)})


def add_sample(commands: Any) -> None:
    """flowalign sample TARGET --prompt TEXT"""
    parser = add_command(commands, "sample", "sample pictures with or without a LoRA", SAMPLE)
    parser.usage = "flowalign sample [-h] TARGET (--prompt TEXT | --prompts FILE) [options] [--model.key value ...]"
    parser.add_argument("target", metavar="TARGET", help="a run folder, a pipeline's folder or hub id, or 'shapes'")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given more than once")
    parser.add_argument("--prompts", metavar="FILE", help="a prompt a line, or JSON lines with the key 'prompt'")
    parser.add_argument("--lora", metavar="PATH", help="a folder or file of LoRA weights; a run's own by default")
    parser.add_argument("--base", action="store_true", help="without a run's LoRA: what its model was before")
    parser.add_argument("--steps", type=int, help="a run's own by default, otherwise 28")
    parser.add_argument("--guidance-scale", type=float, help="a run's own by default, otherwise 4.5; 1 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16, help="pictures made at a time")
    parser.add_argument("--out", type=Path, default=Path("samples"), metavar="FOLDER", help="must be new or empty")
    parser.add_argument("--allow-code", action="store_true", help="let a run's config name classes outside flowalign")
    parser.set_defaults(run=sample)


def sample(arguments: argparse.Namespace, words: list[str]) -> None:
    """Check everything, build the model, then write each picture as it is made, and a sheet of all of them."""
    from flowalign.sample import Request, save_pictures

    settings = Request(
        arguments.target, tuple(arguments.prompt), arguments.prompts, arguments.lora, arguments.base, arguments.steps,
        arguments.guidance_scale, arguments.seed, arguments.batch_size, arguments.out, read_options(words),
        arguments.allow_code,
    )  # fmt: skip
    print(save_pictures(settings))


def parse_trainer(config: Mapping[str, Any], allow_code: bool = False) -> Call:
    """A whole config, checked: the class that `trainer` names, and its arguments."""
    name = config.get("trainer")
    if not isinstance(name, str):
        raise ConfigError("the key 'trainer' has to name a class, as in 'trainer: trainers.FlowGRPO'")
    target = locate(name, allow_code)
    if not isinstance(target, type) or not callable(getattr(target, "train", None)):
        raise ConfigError(f"trainer: {name} is no trainer: it is no class with a method 'train'")
    call = parse(target, {key: value for key, value in config.items() if key != "trainer"}, allow_code)
    return Call(name, target, call.arguments, call.defaults)


def check_packages() -> None:
    """Whether `rewards` and `trainers` are ours: a folder of that name in the user's path hides them.

    Raises: ConfigError that names what python found instead.
    """
    home = Path(__file__).resolve().parents[1]
    for name in PACKAGES[1:]:
        spec = importlib.util.find_spec(name)
        if spec is None or not (spec.origin or spec.submodule_search_locations):
            raise ConfigError(f"python finds no package {name!r}; install flowalign-diffusion again")
        found = Path(spec.origin).resolve() if spec.origin else Path(next(iter(spec.submodule_search_locations or ())))
        folder = found.parent if found.name == "__init__.py" else found
        if folder != home / name:
            raise ConfigError(f"{folder} hides flowalign's own package {name!r}; rename it or start from elsewhere")
