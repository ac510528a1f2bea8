"""The commands of `flowalign` but for `train`: each is one function with its arguments."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowalign.cli import add_allow_change, add_command, check_files, read_call, say, start_deterministic
from flowalign.config import Call, ConfigError, arguments_of, build, construct, locate, override, parse, read_options

SAMPLE = """Sample pictures by the ODE, from noise that depends on the seed and the picture's number alone.

TARGET is a run folder (its model with the policy it kept, its steps and guidance), a pipeline's folder or hub id, or an
embedded model: shapes, shapes-few-step, shapes-video. Options set or replace arguments of the model:

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

SCORE = """Score pictures and videos with any reward.

REWARD is a class by its dotted path, or rewards as a formula. Options set the class's arguments:

  flowalign score rewards.PickScore --media pictures/ --prompt "a castle"
  flowalign score rewards.CLIPScore --model shapes --media runs/flow_grpo_shapes/samples --prompt "a red circle"
  flowalign score "pickscore/26 + ocr" --media pictures/ --prompts prompts.jsonl
"""


def add_sample(commands: Any) -> None:
    """flowalign sample TARGET --prompt TEXT"""
    parser = add_command(commands, "sample", "sample pictures with or without a LoRA", SAMPLE)
    parser.usage = "flowalign sample [-h] TARGET (--prompt TEXT | --prompts FILE) [options] [--model.key value ...]"
    parser.add_argument(
        "target", metavar="TARGET", help="a run folder, a pipeline's folder or hub id, an embedded name"
    )
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given more than once")
    parser.add_argument(
        "--prompts", metavar="FILE", help="a .txt, .jsonl, .csv, .tsv or .parquet file, or {class: ...}"
    )
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
    from flowalign import distributed
    from flowalign.sample import Request, save_pictures

    settings = Request(
        arguments.target, tuple(arguments.prompt), arguments.prompts, arguments.lora, arguments.base, arguments.steps,
        arguments.guidance_scale, arguments.seed, arguments.batch_size, arguments.out, read_options(words),
        arguments.allow_code,
    )  # fmt: skip
    distributed.start()
    with distributed.telling():
        made = save_pictures(settings)
    if distributed.rank() == 0:
        print(made)
    distributed.finish()


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
    add_allow_change(parser)
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
    config = {"trainer": call.path, **arguments_of(call), **start_deterministic(arguments, call)}
    check_files(call)
    say("building the trainer")
    trainer: Ours = construct(call)
    out = arguments.out or trainer.folder.with_name(f"{trainer.folder.name}-check")
    found = inspect(trainer, out, config, arguments.processes, say, tuple(arguments.allow_change))
    print(page(found, config), flush=True)
    if found.errors:
        raise ConfigError(f"{found.errors} of the problems above would stop the run")


def add_serve(commands: Any) -> None:
    """flowalign serve REWARD"""
    parser = add_command(commands, "serve", "a reward over HTTP, for RemoteReward", "Serve a reward over HTTP.")
    parser.add_argument("reward", metavar="REWARD", help="a dotted path or expression, or a YAML file that names one")
    parser.add_argument("--host", default="127.0.0.1", help="one that other machines can reach needs --token-file")
    parser.add_argument("--port", type=int, default=8700, help="0 for any that is free")
    parser.add_argument("--token-file", metavar="FILE", help="holds the token that clients have to send")
    parser.add_argument("--max-mb", type=int, default=64, metavar="N", help="the largest request")
    parser.add_argument("--concurrency", type=int, default=1, metavar="N", help="requests scored at once")
    parser.add_argument("--allow-code", action="store_true", help="let REWARD name classes outside flowalign")
    parser.set_defaults(run=serve)


def serve(given: argparse.Namespace, words: list[str]) -> None:
    """Answer until a signal."""
    if words:
        raise ConfigError(f"{words[0]} is no option of serve")
    from rewards.server import run

    run(given.reward, given.host, given.port, given.token_file, given.max_mb, given.concurrency, given.allow_code)


def add_score(commands: Any) -> None:
    """flowalign score REWARD --media PATH --prompt TEXT"""
    parser = add_command(commands, "score", "score pictures and videos with a reward", SCORE)
    parser.usage = "flowalign score [-h] REWARD --media PATH [--prompt TEXT | --prompts FILE] [options] [--key value]"
    parser.add_argument("reward", metavar="REWARD", help="a class by its dotted path, or a formula of rewards")
    parser.add_argument("--media", type=Path, action="append", required=True, metavar="PATH", help="a file or folder")
    parser.add_argument("--prompt", metavar="TEXT", help="of all files")
    parser.add_argument("--prompts", metavar="FILE", help="a line a file, or JSON lines with 'file' and 'prompt'")
    parser.add_argument("--batch-size", type=int, default=16, help="media scored at once")
    parser.add_argument(
        "--out", type=Path, default=Path("scores"), metavar="FOLDER", help="for scores.jsonl and sheet.png"
    )
    parser.add_argument("--allow-code", action="store_true", help="let REWARD name a class outside flowalign")
    parser.set_defaults(run=score)


def score(arguments: argparse.Namespace, words: list[str]) -> None:
    """Score all files; print the table, and leave scores.jsonl and sheet.png."""
    from flowalign.prompts import as_prompts
    from rewards import scoring

    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {arguments.batch_size}")
    if arguments.prompt is not None and arguments.prompts is not None:
        raise ConfigError("--prompt and --prompts exclude each other")
    given = arguments.prompts if arguments.prompt is None else [arguments.prompt]
    prompts = None if given is None else as_prompts(given).all()
    reward = read_reward(arguments.reward, words, arguments.allow_code)
    items = scoring.pair(scoring.find(arguments.media), prompts)
    scores, small = scoring.score_files(reward, items, arguments.batch_size)
    print(scoring.write(items, scores, small, arguments.out, reward.name))
    say(f"scores and contact sheet are in {arguments.out}")


def read_reward(text: str, words: list[str], allow_code: bool) -> Any:
    """A reward: a dotted path with its arguments as options, {class: ...}, or a formula of rewards by short names."""
    from rewards.base import Reward, as_reward

    options = read_options(words)
    if text.lstrip().startswith("{") and not options:
        return build(as_reward, read_options(["--reward", text]), allow_code)
    if not text.replace(".", "").replace("_", "").isalnum() or "." not in text:
        if options:
            raise ConfigError(f"--{next(iter(options))}: a formula of rewards takes no options")
        return as_reward(text)
    target = locate(text, allow_code)
    if not isinstance(target, type) or not issubclass(target, Reward):
        raise ConfigError(f"{text} is no Reward")
    call = parse(target, override({}, options), allow_code)
    return construct(Call(text, target, call.arguments, call.defaults))
