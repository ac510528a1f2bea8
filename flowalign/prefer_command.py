"""`flowalign prefer`: preferences between a model's own samples, judged by a reward."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from flowalign.cli import add_command, say
from flowalign.config import ConfigError, arguments_of, construct, override, parse, read_options

PAIRINGS = ("best_and_worst", "all")

PREFER = """Make preferences of a model's own samples and a reward: pictures or videos, and pairs.jsonl.

TARGET is what sample takes: a run folder, a pipeline's folder or hub id, or an embedded model. Of each prompt some
samples are drawn, and the best is preferred to the worst (arXiv:2401.12086). Options set arguments of the model:

  flowalign prefer shapes --reward shapes --prompts "{class: flowalign.shapes.train_prompts, count: 2000}" --out pairs
  flowalign prefer runs/flow_grpo_sd3.5 --reward "pickscore/26 + ocr" --prompts prompts.txt --samples 8 --margin 0.02 \\
      --out pairs --model.mixed_precision bf16
  flowalign prefer shapes --reward "{class: rewards.CLIPScore, model: shapes}" --prompts prompts.txt --pairs all

Pairs whose scores differ by less than the margin, or not at all, are ties and left out, as are samples without a valid
score; both are counted. Ctrl-C and SIGTERM stop it with all saved; the same command goes on.
"""


def add_prefer(commands: Any) -> None:
    """flowalign prefer TARGET --reward REWARD --prompts FILE"""
    parser = add_command(commands, "prefer", "make preferences of a model's samples and a reward", PREFER)
    parser.usage = "flowalign prefer [-h] TARGET --reward REWARD --prompts FILE [options] [--model.key value ...]"
    parser.add_argument(
        "target", metavar="TARGET", help="a run folder, a pipeline's folder or hub id, an embedded name"
    )
    parser.add_argument("--reward", required=True, help="a formula of rewards, a dotted path, or {class: ...}")
    parser.add_argument(
        "--prompts", required=True, metavar="FILE", help="a .txt, .jsonl, .csv, .tsv or .parquet file, or {class: ...}"
    )
    parser.add_argument("--out", type=Path, default=Path("preferences"), metavar="FOLDER")
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="of each prompt; 4 by default")
    parser.add_argument("--pairs", choices=PAIRINGS, default=PAIRINGS[0], help="which pairs; best_and_worst by default")
    parser.add_argument("--margin", type=float, default=0.0, help="the least difference of scores; below it is a tie")
    parser.add_argument("--lora", metavar="PATH", help="a folder or file of LoRA weights; a run's own by default")
    parser.add_argument("--base", action="store_true", help="without a run's LoRA: what its model was before")
    parser.add_argument("--steps", type=int, help="a run's own by default, otherwise 28")
    parser.add_argument("--guidance-scale", type=float, help="a run's own by default, otherwise 4.5; 1 for none")
    parser.add_argument("--seed", type=int, default=0, help="of all noise; 0 by default")
    parser.add_argument("--batch-size", type=int, default=16, help="samples made at a time")
    parser.add_argument("--allow-code", action="store_true", help="let names lead to classes outside flowalign")
    parser.set_defaults(run=prefer)


def prefer(arguments: argparse.Namespace, words: list[str]) -> None:
    """Check everything, build the reward and the model, then make pairs prompt by prompt, or go on."""
    if arguments.allow_code and "" not in sys.path:
        sys.path.append(str(Path.cwd()))  # at the end: the user's modules are found, and hide none of ours
    options = read_options(words)
    unknown = [key for key in options if not key.startswith("model.")]
    if unknown:
        raise ConfigError(f"--{unknown[0]} is no option of prefer; the model's arguments are --model.NAME")
    if arguments.base and arguments.lora:
        raise ConfigError("--base and --lora exclude each other")
    from flowalign.preferences import all_pairs, best_and_worst
    from flowalign.preferences.folder import make_pairs
    from flowalign.preferences.making import Maker, Settings, parts
    from flowalign.prompts import as_prompts
    from flowalign.sample import Request, config_of, steps_and_guidance
    from flowalign.tracking import check_folder
    from rewards.base import as_reward

    request = Request(
        arguments.target, (), arguments.prompts, arguments.lora, arguments.base, arguments.steps,
        arguments.guidance_scale, arguments.seed, arguments.batch_size, arguments.out, options, arguments.allow_code,
    )  # fmt: skip
    config = override(config_of(request), options)
    steps, scale = steps_and_guidance(request, config)
    pairing = dict(zip(PAIRINGS, (best_and_worst, all_pairs), strict=True))[arguments.pairs]
    settings = Settings(
        steps, scale, pairing, arguments.samples, arguments.margin, arguments.seed, arguments.batch_size
    )
    check_folder(arguments.out)
    named = read_options(["--reward", arguments.reward, "--prompts", arguments.prompts])
    call = parse(parts, {"model": config["model"], **named}, arguments.allow_code)
    if isinstance(call.arguments["reward"], str):
        as_reward(call.arguments["reward"])  # what is wrong is told before the model is loaded
    if isinstance(call.arguments["prompts"], str):
        as_prompts(call.arguments["prompts"])
    say("building the model and the reward")
    model, judge, prompts = construct(call)
    maker = Maker(model, as_reward(judge), as_prompts(prompts).all(), settings)
    told = {name: value for name, value in arguments_of(call).items() if name != "prompts"}  # they have a fingerprint
    print(make_pairs(maker, arguments.out, told))
