"""The command `flowalign`. A subcommand is one function with its own arguments, and one line in `main`."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
import signal
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

deterministic: true makes every kernel add in one order, so that a command repeats to the last bit on one machine.

The same command goes on with a run that was stopped or killed, from its newest checkpoint. Ctrl-C, SIGTERM and SIGUSR1
stop a run at its next safe point, with all saved. Several processes: torchrun, accelerate launch or srun, as in

  torchrun --nproc-per-node 8 -m flowalign train flow_grpo/sd3.5_ocr
"""


class Trainer(Protocol):
    """What `flowalign train` runs. `config` is the resolved config, plain data, for the run folder."""

    def train(
        self, config: Mapping[str, Any] | None = None, *, resume: bool = False, allow_change: Sequence[str] = ()
    ) -> object: ...


class Parser(argparse.ArgumentParser):
    """argparse, with errors in one line as everywhere else."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"flowalign: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0 done, or stopped with all saved as SIGTERM or SIGUSR1 asked; 2 a mistake of the user's; 130 stopped by Ctrl-C.
    """
    parser = Parser("flowalign", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"flowalign {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_train(commands)
    from flowalign import commands as others  # which import from here
    from flowalign import (
        compare_command,
        doctor_command,
        eval_command,
        export_command,
        optimize_command,
        prefer_command,
        slurm_command,
        soup_command,
    )

    others.add_sample(commands)
    others.add_score(commands)
    others.add_report(commands)
    compare_command.add_compare(commands)
    others.add_check(commands)
    others.add_serve(commands)
    optimize_command.add_optimize(commands)
    eval_command.add_eval(commands)
    soup_command.add_soup(commands)
    prefer_command.add_prefer(commands)
    slurm_command.add_slurm(commands)
    doctor_command.add_doctor(commands)
    export_command.add_export(commands)
    arguments, rest = parser.parse_known_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import warns of image processors that no one uses
    try:
        check_packages()
        arguments.run(arguments, rest)
    except KeyboardInterrupt as stop:
        if _rank() == "0":  # all processes stop together
            say(str(stop) or "stopped")
        return 130 if getattr(stop, "number", signal.SIGINT) == signal.SIGINT else 0
    except Exception as error:
        line = _one_line(error)
        if line is None:
            raise
        if arguments.debug:
            traceback.print_exc()
        hint = "" if arguments.debug or isinstance(error, ConfigError) else " (--debug shows where)"
        say(f"error: {line}{hint}")
        return 2
    return 0


def _one_line(error: Exception) -> str | None:
    """What went wrong, where that is for the user to mend; None for a mistake of ours."""
    if isinstance(error, ValueError | OSError):
        return " ".join(str(error).split()) or type(error).__name__
    from flowalign.user_errors import one_line

    return one_line(error)


def say(message: str) -> None:
    """A line for the user; of many processes, those after the first say which they are."""
    rank = _rank()
    print(f"flowalign: {message}" if rank == "0" else f"flowalign: process {rank}: {message}", file=sys.stderr)


def _rank() -> str:
    """As torchrun and accelerate, or srun, tell it."""
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"


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
    parser.usage = "flowalign train [-h] CONFIG [--key value ...] [--allow-code] [--allow-change KEY] [--debug]"
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a shipped config")
    parser.add_argument("--allow-code", action="store_true", help="let the config name classes outside flowalign")
    add_allow_change(parser)
    parser.set_defaults(run=train)


def add_allow_change(parser: argparse.ArgumentParser) -> None:
    """--allow-change KEY, more than once"""
    told = "go on with a run though KEY has changed"
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY", help=told)


def train(arguments: argparse.Namespace, words: list[str]) -> None:
    """Check the config with the options in it, then build the trainer and run it, or go on with its run."""
    call = read_call(arguments, words)
    from flowalign import distributed
    from flowalign.interrupt import Stopped

    config = {"trainer": call.path, **arguments_of(call), **start_deterministic(arguments, call)}
    check_files(call)
    distributed.start()
    changes = tuple(arguments.allow_change)
    try:
        with distributed.telling():
            trainer: Trainer = construct(call)
        trainer.train(config, resume=True, allow_change=changes)
    except Stopped:
        distributed.finish()  # all processes stop together; after any other error one may have gone
        raise
    distributed.finish()


def start_deterministic(arguments: argparse.Namespace, call: Call) -> dict[str, bool]:
    """Make this process deterministic where the config says so; returns what is recorded of that."""
    if not arguments.deterministic:
        return {}
    from flowalign import determinism

    determinism.start(arguments_of(call))
    if _rank() == "0":
        say(determinism.COST)
    return {"deterministic": True}


def check_files(call: Call) -> None:
    """What is wrong with the run's folder, with a file of prompts or of preferences, told before a model is loaded."""
    ours = sys.modules.get("trainers.base")  # loaded if the trainer is one of ours
    if ours is None or not isinstance(call.target, type) or not issubclass(call.target, ours.Trainer):
        return
    from flowalign.preferences.sources import check_source
    from flowalign.prompts import as_prompts
    from flowalign.tracking import check_folder

    known = call.defaults | call.arguments
    check_folder(Path(known["folder"]))
    evaluation = known["evaluation"]
    held_out = evaluation.arguments.get("prompts") if isinstance(evaluation, Call) else None
    for prompts in (known["prompts"], held_out):
        if isinstance(prompts, str):
            as_prompts(prompts)
    pairs = known.get("pairs")
    stored = pairs.defaults | pairs.arguments if isinstance(pairs, Call) else {}
    for preferences in (stored.get("preferences"), stored.get("held_out")):
        if isinstance(preferences, str):
            check_source(preferences)


def read_call(arguments: argparse.Namespace, words: list[str]) -> Call:
    """The config with the options put in, all of it checked."""
    if arguments.allow_code and "" not in sys.path:
        sys.path.append(str(Path.cwd()))  # at the end: the user's modules are found, and hide none of ours
    options = read_options(words)
    path = find_config(arguments.config)
    try:
        config = override(load_yaml(path), options)
        arguments.deterministic = config.pop("deterministic", False)  # of the process, not of the trainer
        if not isinstance(arguments.deterministic, bool):
            raise ConfigError(f"deterministic: expected true or false, got {arguments.deterministic!r}")
        return parse_trainer(config, arguments.allow_code)
    except ConfigError as error:
        raise ConfigError(f"{path}{' (with options)' if options else ''}: {error}") from error


def parse_trainer(config: Mapping[str, Any], allow_code: bool = False) -> Call:
    """A whole config, checked: the class that `trainer` names, and its arguments."""
    return parse_named(config, "trainer", "trainers.FlowGRPO", "train", allow_code)


def parse_named(config: Mapping[str, Any], key: str, example: str, method: str, allow_code: bool = False) -> Call:
    """A whole config, checked: the class that its `key` names, which has such a method, and its arguments."""
    name = config.get(key)
    if not isinstance(name, str):
        raise ConfigError(f"the key {key!r} has to name a class, as in '{key}: {example}'")
    target = locate(name, allow_code)
    if not isinstance(target, type) or not callable(getattr(target, method, None)):
        raise ConfigError(f"{key}: {name} is no {key}: it is no class with a method {method!r}")
    if inspect.isabstract(target):
        raise ConfigError(f"{key}: {name} is abstract; name one of its subclasses")
    call = parse(target, {name: value for name, value in config.items() if name != key}, allow_code)
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
