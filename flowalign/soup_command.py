"""`flowalign soup`: merge policies or reward models, and sweep the weights of a merge."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowalign.cli import add_command, say
from flowalign.config import ConfigError, load_yaml, read_options

if TYPE_CHECKING:
    from flowalign.lora_files import LoRAFile
    from flowalign.sample import Request
    from flowalign.soup_sweep import Sweep

SOUP = """Average LoRA policies that were trained from the same model (Rewarded Soups), or reward models (WARM).

Each MEMBER is a run folder, or a folder or file of LoRA weights; ranks, alphas and layers may differ. The products are
averaged, sum of w * alpha / rank * B A, exactly, or cut to --rank by an SVD. The weights are equal unless given:

  flowalign soup runs/clip runs/ocr --out runs/both
  flowalign soup runs/clip runs/ocr --weights 0.7 0.3 --rank 32 --out runs/both

Use the result as any LoRA: load_lora_weights("runs/both"), LoRA(start="runs/both"), or

  flowalign sample runs/clip --lora runs/both --prompt "a red circle"

With --sweep N the prompts are drawn at N points between two members (of three members, a triangle with N points along
each edge) from the same noise, and scored; the folder gets a table, a contact sheet for each point, and pareto.svg,
the first reward against the second. The same command goes on with a sweep that was stopped:

  flowalign soup runs/clip runs/ocr --sweep 5 --reward clip --reward ocr --prompts held_out.txt --out runs/sweep
  flowalign soup a.safetensors b.safetensors --model shapes --sweep 5 --reward rewards.ShapesVerifier
      --reward rewards.JPEGCompressibility --prompts held_out.txt --out sweep

A MEMBER may also be a reward that flowalign has trained; then all of them are, and their weights are averaged:

  flowalign soup rewards/seed0 rewards/seed1 rewards/seed2 --out rewards/warm
"""
SWEEP_ONLY = ("reward", "prompts", "model", "steps", "guidance_scale", "seed", "batch_size", "allow_code")
BATCH = 16


def add_soup(commands: Any) -> None:
    """flowalign soup MEMBER ... --out FOLDER"""
    parser = add_command(commands, "soup", "merge LoRA policies or reward models, or sweep the weights", SOUP)
    parser.usage = (
        "flowalign soup [-h] MEMBER MEMBER ... --out FOLDER [--weights W ...] [--rank R] [--any-weights]\n"
        "       flowalign soup MEMBER MEMBER ... --out FOLDER --sweep N --reward R [--reward R] --prompts FILE "
        "[options] [--model.key value ...]"
    )
    parser.add_argument("members", nargs="+", metavar="MEMBER", help="a run folder, LoRA weights, or a trained reward")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="new or empty, or a sweep to go on with"
    )
    merging = parser.add_argument_group("merging")
    merging.add_argument("--weights", type=float, nargs="+", metavar="W", help="one a member, adding up to 1")
    merging.add_argument("--rank", type=int, metavar="R", help="the most of a layer; exact, the sum of all, by default")
    merging.add_argument("--any-weights", action="store_true", help="also below 0, or of another sum: extrapolation")
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument("--sweep", type=int, metavar="N", help="points along each edge of the simplex")
    sweep.add_argument("--reward", action="append", metavar="R", help="a dotted path, a formula, or {class: ...}")
    sweep.add_argument("--prompts", metavar="FILE", help="a .txt, .jsonl, .csv, .tsv or .parquet file, or {class: ...}")
    sweep.add_argument("--model", metavar="TARGET", help="a run, or a pipeline as in sample; by default the first run")
    sweep.add_argument("--steps", type=int, help="the run's own by default, otherwise 28")
    sweep.add_argument("--guidance-scale", type=float, help="the run's own by default, otherwise 4.5; 1 for none")
    sweep.add_argument("--seed", type=int, help="of the noise; 0 by default")
    sweep.add_argument("--batch-size", type=int, help="pictures made at a time, 16 by default")
    allowed = "let configs and --reward name classes of others"
    sweep.add_argument("--allow-code", action="store_const", const=True, help=allowed)
    parser.set_defaults(run=soup)


def soup(arguments: argparse.Namespace, words: list[str]) -> None:
    """Merge, or sweep."""
    if len(arguments.members) < 2:
        raise ConfigError("a soup has at least two members")
    if arguments.sweep is not None:
        _sweep(arguments, words)
        return
    given = [name for name in SWEEP_ONLY if getattr(arguments, name) is not None]
    if words or given:
        told = words[0] if words else f"--{given[0].replace('_', '-')}"
        raise ConfigError(f"{told} is for a sweep: give --sweep N with it, or leave it out")
    from flowalign.soups import check_weights

    count = len(arguments.members)
    weights = check_weights(arguments.weights or [1 / count] * count, count, arguments.any_weights)
    if _are_rewards(arguments.members):
        _average(arguments, weights)
    else:
        _merge(arguments, weights)


def _are_rewards(members: Sequence[str]) -> bool:
    return any((Path(member) / "reward.json").is_file() for member in members)


def _average(arguments: argparse.Namespace, weights: Sequence[float]) -> None:
    from rewards.averaging import average_rewards

    if arguments.rank is not None:
        raise ConfigError("--rank is for LoRA policies; reward models are averaged as they are")
    average_rewards(arguments.members, weights, arguments.out, arguments.any_weights)
    say(f"averaged {len(weights)} reward models; use it as LearntReward({str(arguments.out)!r})")
    print(arguments.out)


def _merge(arguments: argparse.Namespace, weights: Sequence[float]) -> None:
    from flowalign.lora_files import read_lora
    from flowalign.soups import merge_loras

    _check_bases(arguments.members)
    _tell_idle([read_lora(member) for member in arguments.members])
    made = merge_loras(arguments.members, weights, arguments.out, arguments.rank, arguments.any_weights)
    low, high = made.ranks
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    told = "exact" if not made.error else f"relative error {made.error:.3g}"
    say(f"merged {len(weights)} policies: {ranks}, {told}")
    print(arguments.out)


def _tell_idle(members: Sequence[LoRAFile]) -> None:
    for member in members:
        if not any(one.up.any() and one.down.any() for one in member.factors.values()):
            say(
                f"{member.path} is 0, as before training, and changes nothing: perhaps the run's best policy is its "
                "first; a later one is in its checkpoints (checkpoints/step-.../lora)"
            )


def _check_bases(members: Sequence[str]) -> None:
    """Raises: ValueError for runs of different pipelines: equal layouts do not make them one base model."""
    known: dict[str, str] = {}
    for member in members:
        config = Path(member) / "config.yaml"
        model = load_yaml(config).get("model") if config.is_file() else None
        if isinstance(model, dict) and isinstance(model.get("pipeline"), str):
            known[member] = model["pipeline"]
    for member, pipeline in known.items():
        first = next(iter(known))
        if pipeline != known[first]:
            raise ConfigError(
                f"{first} was trained on {known[first]} and {member} on {pipeline}: no soup of these; if they are one "
                "model all the same, name the folders lora in them"
            )


def _sweep(arguments: argparse.Namespace, words: list[str]) -> None:
    from flowalign import soup_sweep
    from flowalign.lora_files import read_lora
    from flowalign.soup_table import text_table
    from flowalign.soups import check_alike, simplex_grid

    _check_sweep(arguments)
    points = simplex_grid(len(arguments.members), arguments.sweep)
    _check_bases(arguments.members)
    members = [read_lora(member) for member in arguments.members]
    check_alike(members)
    _tell_idle(members)
    request = _request(arguments, read_options(words))
    config, settings = _prepared(arguments, request)
    facts = {
        "members": [member.digest for member in members],
        "model": config["model"],
        "prompts": settings.prompts.fingerprint(),
        "rewards": [*arguments.reward],
        "steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "seed": settings.seed,
    }
    soup_sweep.check_sweep(arguments.out, facts)
    model = soup_sweep.load_model(config["model"], members, request.allow_code)
    rows = soup_sweep.run_sweep(model, members, points, settings, arguments.out, facts)
    print(text_table(rows))
    told = "table, plot and contact sheets are" if len(settings.rewards) > 1 else "table and contact sheets are"
    say(f"{told} in {arguments.out}; merge a point with flowalign soup {' '.join(arguments.members)} --weights ...")


def _check_sweep(arguments: argparse.Namespace) -> None:
    if arguments.weights or arguments.rank is not None or arguments.any_weights:
        raise ConfigError(
            "--weights, --rank and --any-weights are for one soup; a sweep takes the whole simplex, exactly"
        )
    if _are_rewards(arguments.members):
        raise ConfigError("a sweep is of policies, and a member is a reward model: average these with --weights")
    if not arguments.reward or not arguments.prompts:
        raise ConfigError("a sweep needs --reward and --prompts: what to draw, and what to score it with")
    if len({*arguments.reward}) < len(arguments.reward):
        raise ConfigError(f"--reward is given twice: {', '.join(arguments.reward)}")
    if min(value for value in (arguments.batch_size, arguments.steps, 1) if value is not None) < 1:
        raise ConfigError("--steps and --batch-size must be at least 1")


def _request(arguments: argparse.Namespace, options: dict[str, Any]) -> Request:
    """What `flowalign sample` would be asked for: the model without a policy."""
    from flowalign.sample import Request

    unknown = [key for key in options if not key.startswith("model.")]
    if unknown:
        raise ConfigError(f"--{unknown[0]} is no option of soup; the model's arguments are --model.NAME")
    runs = [member for member in arguments.members if (Path(member) / "config.yaml").is_file()]
    target = arguments.model or next(iter(runs), None)
    if target is None:
        raise ConfigError("no member is a run folder: name their base model with --model (a run folder or a pipeline)")
    return Request(
        target, (), arguments.prompts, None, True, arguments.steps, arguments.guidance_scale,
        arguments.seed or 0, arguments.batch_size or BATCH, arguments.out, options, bool(arguments.allow_code),
    )  # fmt: skip


def _prepared(arguments: argparse.Namespace, request: Request) -> tuple[dict[str, Any], Sweep]:
    """The model's config without a policy, and what is drawn and scored; no model is loaded yet but the rewards'."""
    from flowalign.commands import read_reward
    from flowalign.config import override
    from flowalign.sample import config_of, read_prompts, steps_and_guidance
    from flowalign.soup_sweep import Sweep
    from rewards.algebra import running_normalisers
    from rewards.base import Reward

    prompts = read_prompts(arguments.prompts, request.allow_code)
    config = config_of(request)
    config["model"].pop("lora", None)
    config = override(config, request.options)
    if "lora" in config["model"]:
        raise ConfigError("--model.lora is no option of soup: the members are the policy")
    steps, scale = steps_and_guidance(request, config)
    rewards = dict[str, Reward]()
    for text in arguments.reward:
        reward = read_reward(text, [], request.allow_code)
        if reward.card.scope != "sample" or running_normalisers(reward):
            raise ConfigError(f"--reward {text} depends on other samples' scores; a sweep scores each on its own")
        short = text.lstrip().startswith("{") and reward.name not in rewards
        rewards[reward.name if short else text] = reward
    return config, Sweep(prompts, rewards, steps, scale, request.seed, request.batch_size)
