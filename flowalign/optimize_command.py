"""`flowalign optimize`: for each prompt the best sample that some compute can find, without training."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from flowalign.cli import add_command, parse_named, say
from flowalign.config import (
    Call,
    ConfigError,
    arguments_of,
    config_root,
    construct,
    find_config,
    load_yaml,
    override,
    read_options,
)

METHODS = {"reno": "trainers.ReNO", "best_of_n": "trainers.BestOfN"}

OPTIMIZE = """Find better samples at inference time, by a reward: no weight is changed.

TARGET is a YAML file or the name of a shipped config, whose key `search` names the method; or, as for sample, a run
folder, a pipeline's folder or hub id, or an embedded model, with --reward and prompts:

  flowalign optimize reno/shapes
  flowalign optimize reno/sdxl_turbo --prompt "a red dog and a green cat"
  flowalign optimize shapes-few-step --steps 1 --guidance-scale 1 --prompt "two blue squares" \\
      --reward "{class: rewards.CLIPScore, model: shapes}"
  flowalign optimize runs/flow_grpo_sd3.5 --method best_of_n --samples 32 --reward pickscore --prompts prompts.txt

reno follows the reward's gradient to the start noise (arXiv:2406.04312) and is meant for models of one to four steps;
best_of_n draws samples and takes any reward. Other options are the method's own and the model's, at any depth:

  --iterations 30  --patience 10  --optimizer.learning_rate 2  --budget 200  --model.mixed_precision bf16

The folder gets each prompt's best sample, its plain one and the noise, results.jsonl, and before_after.png, which grows
as the search goes on. Ctrl-C and SIGTERM stop it with all saved; the same command goes on.
"""


def add_optimize(commands: Any) -> None:
    """flowalign optimize TARGET"""
    parser = add_command(commands, "optimize", "find better samples by a reward, without training", OPTIMIZE)
    parser.usage = "flowalign optimize [-h] TARGET [--reward REWARD] [--prompt TEXT | --prompts FILE] [options]"
    parser.add_argument("target", metavar="TARGET", help="a config, or what sample takes")
    parser.add_argument("--method", choices=sorted(METHODS), help="reno by default; a config names its own")
    parser.add_argument("--reward", metavar="REWARD", help="a formula of rewards, a dotted path, or {class: ...}")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given more than once")
    parser.add_argument(
        "--prompts", metavar="FILE", help="a .txt, .jsonl, .csv, .tsv or .parquet file, or {class: ...}"
    )
    parser.add_argument("--lora", metavar="PATH", help="a folder or file of LoRA weights; a run's own by default")
    parser.add_argument("--steps", type=int, help="a config's or run's own by default, otherwise 28")
    parser.add_argument("--guidance-scale", type=float, help="a config's or run's own by default, otherwise 4.5")
    parser.add_argument("--seed", type=int, help="of all noise; 0 by default")
    parser.add_argument("--batch-size", type=int, help="samples made at a time")
    parser.add_argument("--out", metavar="FOLDER", help="runs/reno or runs/best_of_n by default")
    parser.add_argument("--allow-code", action="store_true", help="let the config name classes outside flowalign")
    parser.set_defaults(run=optimize)


def optimize(arguments: argparse.Namespace, words: list[str]) -> None:
    """Check everything, build the model and the reward, then search prompt by prompt, or go on."""
    call = read_search(arguments, words)
    known = call.defaults | call.arguments
    from flowalign.prompts import as_prompts
    from flowalign.tracking import check_folder

    check_folder(Path(known["folder"]))
    if isinstance(known["prompts"], str):
        as_prompts(known["prompts"])
    say("building the model and the reward")
    search = construct(call)
    print(search.run({"search": call.path, **arguments_of(call)}) / "before_after.png")


def read_search(arguments: argparse.Namespace, words: list[str]) -> Call:
    """The search that was asked for, all of it checked."""
    if arguments.allow_code and "" not in sys.path:
        sys.path.append(str(Path.cwd()))  # at the end: the user's modules are found, and hide none of ours
    if arguments.prompt and arguments.prompts:
        raise ConfigError("--prompt and --prompts exclude each other")
    given = _given(arguments) | read_options(words)
    path = _config_file(arguments.target)
    source = f"{path}{' (with options)' if given else ''}" if path else arguments.target
    config = override(_of_pipeline(arguments) if path is None else _of_file(path, arguments), given)
    for key, how in (("reward", "--reward REWARD"), ("prompts", "--prompt TEXT or --prompts FILE")):
        if key not in config:
            raise ConfigError(f"optimize needs {how}")
    try:
        return parse_named(config, "search", "trainers.ReNO", "run", arguments.allow_code)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _config_file(target: str) -> Path | None:
    """The config of this name, or None for what `sample` takes.

    Raises: ConfigError for what is neither, and looks like a config's name.
    """
    if Path(target).is_dir():
        return None
    try:
        return find_config(target)
    except ConfigError as error:
        folders = [path.name for path in config_root().iterdir() if path.is_dir()]
        if target.endswith((".yaml", ".yml")) or target.split("/")[0] in folders:
            raise ConfigError(str(error)) from error
        return None


def _of_file(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    config = load_yaml(path)
    if arguments.method is not None:
        raise ConfigError(f"{path} names its method by its key 'search'; leave --method out")
    if arguments.lora is not None:
        config = override(config, {"model.lora.start": _existing(arguments.lora)})
    return config


def _of_pipeline(arguments: argparse.Namespace) -> dict[str, Any]:
    """A run's model or a pipeline, with the settings that `sample` gives it."""
    from flowalign.sample import Request, config_of, steps_and_guidance

    request = Request(
        arguments.target, tuple(arguments.prompt), arguments.prompts, arguments.lora, False, arguments.steps,
        arguments.guidance_scale, 0, 1, Path(), {}, arguments.allow_code,
    )  # fmt: skip
    config = config_of(request)
    steps, scale = steps_and_guidance(request, config)
    method = METHODS[arguments.method or "reno"]
    return {"search": method, "model": config["model"], "steps": steps, "guidance_scale": scale}


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of the command that are arguments of every search."""
    told = {name: getattr(arguments, name) for name in ("steps", "guidance_scale", "seed", "batch_size")}
    told |= {"prompts": arguments.prompt or None, "folder": arguments.out}
    known = {name: value for name, value in told.items() if value is not None}
    read = {"--reward": arguments.reward, "--prompts": arguments.prompts}
    return known | read_options([word for pair in read.items() if pair[1] is not None for word in pair])


def _existing(path: str) -> str:
    if not Path(path).exists():
        raise ConfigError(f"{path} does not exist; --lora takes a folder or file of LoRA weights")
    return path
