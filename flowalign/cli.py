"""The command `flowalign`. A subcommand is one function with its own arguments, and one line in `main`."""

from __future__ import annotations

import argparse
import importlib.util
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

The same command goes on with a run that was stopped or killed, from its newest checkpoint. Ctrl-C, SIGTERM and SIGUSR1
stop a run at its next safe point, with all saved. Several processes: torchrun, accelerate launch or srun, as in

  torchrun --nproc-per-node 8 -m flowalign train flow_grpo/sd3.5_ocr
"""

SAMPLE = """Sample pictures by the ODE, from noise that depends on the seed and the picture's number alone.

TARGET is a run folder (its model with the policy it kept, its steps and guidance), a pipeline's folder or hub id, or
`shapes`, the embedded model. Options set or replace arguments of the model:

  flowalign sample runs/flow_grpo_shapes --prompt "a red circle" --prompt "two blue squares"
  flowalign sample runs/flow_grpo_shapes --base --prompts prompts.txt --out before
  flowalign sample shapes --lora runs/flow_grpo_shapes/lora --prompt "a red circle" --steps 8 --guidance-scale 1
"""


REPORT = """Write report.html into a run folder: what changed, curves, pictures, costs, settings. One file, no network.

  flowalign report runs/flow_grpo_shapes
"""


CHECK = """Say what a run would do, take and cost, and what is wrong with it, before the hours are spent on it.

CONFIG and its options are those of train. One tiny step is made and thrown away; the run folder is left as it is.

  flowalign check flow_grpo/shapes
  flowalign check flow_grpo/sd3.5_ocr --sampling.batch_size 6 --processes 8

Exit status 2 where something would stop the run.
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
    add_sample(commands)
    add_report(commands)
    add_check(commands)
    arguments, rest = parser.parse_known_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import warns of image processors that no one uses
    try:
        check_packages()
        arguments.run(arguments, rest)
    except KeyboardInterrupt as stop:
        if os.environ.get("RANK", "0") == "0":  # all processes stop together
            say(str(stop) or "stopped")
        return 130 if getattr(stop, "number", signal.SIGINT) == signal.SIGINT else 0
    except (ValueError, OSError) as error:
        if arguments.debug:
            traceback.print_exc()
        hint = "" if arguments.debug or isinstance(error, ConfigError) else " (--debug shows where)"
        say(f"error: {' '.join(str(error).split()) or type(error).__name__}{hint}")
        return 2
    return 0


def say(message: str) -> None:
    """A line for the user; of many processes, those after the first say which they are."""
    rank = os.environ.get("RANK", "0")
    print(f"flowalign: {message}" if rank == "0" else f"flowalign: process {rank}: {message}", file=sys.stderr)


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
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="go on with a run though KEY has changed",
    )
    parser.set_defaults(run=train)


def train(arguments: argparse.Namespace, words: list[str]) -> None:
    """Check the config with the options in it, then build the trainer and run it, or go on with its run."""
    call = read_call(arguments, words)
    from flowalign import distributed
    from flowalign.interrupt import Stopped

    check_files(call)
    distributed.start()
    trainer: Trainer = construct(call)
    changes = tuple(arguments.allow_change)
    try:
        trainer.train({"trainer": call.path, **arguments_of(call)}, resume=True, allow_change=changes)
    except Stopped:
        distributed.finish()  # all processes stop together; after any other error one may have gone
        raise
    distributed.finish()


def check_files(call: Call) -> None:
    """What is wrong with the run's folder or with a file of prompts, told before a model is loaded."""
    ours = sys.modules.get("trainers.base")  # loaded if the trainer is one of ours
    if ours is None or not isinstance(call.target, type) or not issubclass(call.target, ours.Trainer):
        return
    from flowalign.prompts import as_prompts
    from flowalign.tracking import check_folder

    known = call.defaults | call.arguments
    check_folder(Path(known["folder"]))
    evaluation = known["evaluation"]
    held_out = evaluation.arguments.get("prompts") if isinstance(evaluation, Call) else None
    for prompts in (known["prompts"], held_out):
        if isinstance(prompts, str):
            as_prompts(prompts)


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


def add_report(commands: Any) -> None:
    """flowalign report RUN"""
    parser = add_command(commands, "report", "write a run's report.html", REPORT)
    parser.usage = "flowalign report [-h] RUN [--debug]"
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder")
    parser.set_defaults(run=report)


def report(arguments: argparse.Namespace, words: list[str]) -> None:
    """Write the page and print its path."""
    if words:
        raise ConfigError(f"{words[0]} is no option of report")
    from flowalign.report import write_report

    print(write_report(arguments.run_folder))


def add_check(commands: Any) -> None:
    """flowalign check CONFIG [--key value ...]"""
    parser = add_command(commands, "check", "what a run would do and cost, from one tiny step", CHECK)
    parser.usage = (
        "flowalign check [-h] CONFIG [--key value ...] [--processes N] [--out FOLDER] [--allow-code] [--debug]"
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a shipped config")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that the run will have; 1 by default")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the contact sheet; RUN-check by default")
    parser.add_argument("--allow-code", action="store_true", help="let the config name classes outside flowalign")
    parser.set_defaults(run=check)


def check(arguments: argparse.Namespace, words: list[str]) -> None:
    """Print the page. Raises: ConfigError where something would stop the run."""
    if arguments.processes < 1:
        raise ConfigError(f"--processes must be at least 1, got {arguments.processes}")
    call = read_call(arguments, words)
    from flowalign.distributed import check_started
    from trainers.base import Trainer as Ours
    from trainers.preflight import inspect, page

    try:
        check_started()
    except ValueError as error:
        raise ConfigError("check is one process: start it without a launcher, and give --processes N") from error
    if not isinstance(call.target, type) or not issubclass(call.target, Ours):
        raise ConfigError(f"{call.path} is no trainer of FlowAlign's, which are all that check knows")
    check_files(call)
    say("building the trainer")
    trainer: Ours = construct(call)
    config = {"trainer": call.path, **arguments_of(call)}
    out = arguments.out or trainer.folder.with_name(f"{trainer.folder.name}-check")
    found = inspect(trainer, out, config, arguments.processes, say)
    print(page(found, config), flush=True)
    if found.errors:
        raise ConfigError(f"{found.errors} of the problems above would stop the run")


def read_call(arguments: argparse.Namespace, words: list[str]) -> Call:
    """The config with the options put in, all of it checked."""
    if arguments.allow_code and "" not in sys.path:
        sys.path.append(str(Path.cwd()))  # at the end: the user's modules are found, and hide none of ours
    options = read_options(words)
    path = find_config(arguments.config)
    try:
        return parse_trainer(override(load_yaml(path), options), arguments.allow_code)
    except ConfigError as error:
        raise ConfigError(f"{path}{' (with options)' if options else ''}: {error}") from error


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
