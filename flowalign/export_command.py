"""`flowalign export`: a policy for others to use, with a card that says what it is, into a folder and onto the hub."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowalign.cli import add_command, say
from flowalign.config import ConfigError, dump_yaml, locate
from flowalign.config.paths import is_ours

if TYPE_CHECKING:
    from flowalign.exporting import Policy, Written
    from flowalign.model_card import Card, Picture
    from flowalign.report.comparing import Comparison
    from flowalign.report.reading import RunRecord

EXPORT = """Export the policy of a run, or a LoRA, with a model card.

RUN is a run folder, whose kept policy is meant, or that of one --checkpoint; or a LoRA's folder or file with --model.

  diffusers  pytorch_lora_weights.safetensors, for pipe.load_lora_weights(FOLDER)
  kohya      NAME.safetensors with the keys that ComfyUI, A1111 and kohya's trainers know
  merged     the whole pipeline with the policy in its weights, for from_pretrained(FOLDER)

README.md beside it says how it was trained, on which rewards under which licences, and how good it is before and
after, with a picture; config.yaml and environment.json go with it, without paths, servers and secrets.

  flowalign export runs/flow_grpo_shapes --out exported
  flowalign export runs/flow_grpo_shapes --out comfy --format kohya --name shapes-aligned
  flowalign export runs/flow_grpo_sd3.5_ocr --out exported --push me/sd3.5-ocr --private
"""
SHOWN = 8  # prompts of the picture
SEEN = (
    "python",
    "flowalign",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "safetensors",
    "numpy",
    "processes",
    "devices",
)


def add_export(commands: Any) -> None:
    """flowalign export RUN --out FOLDER"""
    parser = add_command(commands, "export", "a policy with a model card, for diffusers, ComfyUI or the hub", EXPORT)
    parser.usage = (
        "flowalign export [-h] RUN --out FOLDER [--format diffusers|kohya|merged] [--checkpoint NAME] [--name NAME]\n"
        "       [--dtype fp32|bf16|fp16] [--model TARGET] [--base-model ID] [--push OWNER/NAME [--private]] [--debug]"
    )
    parser.add_argument("target", metavar="RUN", help="a run folder, or a folder or file of LoRA weights")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="must be new or empty")
    parser.add_argument("--format", choices=("diffusers", "kohya", "merged"), default="diffusers")
    parser.add_argument("--checkpoint", metavar="NAME", help="such as step-00000040; the policy that the run keeps")
    parser.add_argument("--name", help="on the card and of kohya's file; the run's by default")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of merged weights (fp32) and kohya's file")
    parser.add_argument("--model", metavar="TARGET", help="the base model of a LoRA without a run, as in sample")
    parser.add_argument("--base-model", metavar="ID", help="its id on the hub, where it was read from a folder")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to the hub, as the login you have")
    parser.add_argument("--private", action="store_true", help="for a new repository; public by default")
    parser.set_defaults(run=export)


def export(arguments: argparse.Namespace, words: list[str]) -> None:
    """Check everything, write the folder whole or not at all, then push it."""
    if words:
        raise ConfigError(f"{words[0]} is no option of export")
    name = arguments.name or _name(arguments.push or arguments.target)
    _check(arguments, name)
    from flowalign.exporting import find_policy
    from flowalign.publishing import check_push, push
    from flowalign.soups import check_new, new_folder

    check_new(arguments.out)
    if arguments.push:
        check_push(arguments.push)
    policy = find_policy(arguments.target, arguments.checkpoint, arguments.model)
    if policy.idle:
        say(
            "warning: this LoRA is 0, as before training, and changes nothing: perhaps no policy of the run was better "
            "than its first; a later one is in its checkpoints"
        )
    with new_folder(arguments.out) as making:
        card = _card(arguments, name, policy, making)
        _beside(card, making)
    say(f"wrote {', '.join(sorted(one.name for one in arguments.out.iterdir()))}")
    print(arguments.out)
    if arguments.push:
        print(push(arguments.out, arguments.push, arguments.private))


def _name(place: str) -> str:
    """Of a run, a repository or a LoRA's file."""
    path = Path(place).expanduser().resolve()
    return path.name.removesuffix(".safetensors")


def _check(arguments: argparse.Namespace, name: str) -> None:
    if not re.fullmatch(r"[\w.][\w. -]{0,95}", name) or name.strip(". ") != name:
        raise ConfigError(f"--name {name!r}: take letters, digits, '_', '-' and '.', 96 at most")
    if arguments.dtype and arguments.format == "diffusers":
        raise ConfigError("--dtype is for --format merged and kohya; a LoRA for diffusers keeps its own")
    if arguments.private and not arguments.push:
        raise ConfigError("--private is for --push OWNER/NAME")


def _card(arguments: argparse.Namespace, name: str, policy: Policy, making: Path) -> Card:
    """The weights written, and the card of them."""
    from flowalign.exporting import absent_parts
    from flowalign.licences import licence_of
    from flowalign.model_card import Card, RewardNote

    run, facts = _run(policy)
    epoch = _epoch(policy, run)
    comparison = _comparison(run, epoch)
    method = _method((policy.config or {}).get("trainer"))
    shown, hub = _base(policy, arguments.base_model)
    written = _write(arguments, name, policy, making, shown, method)
    reward = (policy.config or {}).get("reward")
    rewards = tuple(RewardNote(*one) for one in dict.fromkeys(_rewards(reward)))
    picture = None if run is None else _picture(run, comparison, making)
    return Card(
        name, arguments.push, arguments.format, arguments.dtype, policy, written, shown, hub, licence_of(policy.base),
        method, rewards, run, comparison, epoch, facts, picture,
        absent_parts(policy, making if arguments.format == "merged" else None),
    )  # fmt: skip


def _write(arguments: argparse.Namespace, name: str, policy: Policy, making: Path, base: str, method: str) -> Written:
    from flowalign import exporting

    if arguments.format == "merged":
        return exporting.write_merged(policy, making, arguments.dtype, say)
    if arguments.format == "diffusers":
        return exporting.write_diffusers(policy, making)
    config = policy.config or {}
    notes = {"ss_output_name": name, "ss_sd_model_name": base, "ss_training_comment": method}
    notes |= {"ss_seed": str(config["seed"])} if "seed" in config else {}
    return exporting.write_kohya(
        policy, making, name, {key: value for key, value in notes.items() if value}, arguments.dtype
    )


def _beside(card: Card, making: Path) -> None:
    """The card, and what it refers to."""
    from flowalign.model_card import text

    if card.policy.config is not None:
        (making / "config.yaml").write_text(dump_yaml(card.config), encoding="utf-8")
    if card.run is not None and card.run.environment:
        held = {key: card.run.environment[key] for key in SEEN if key in card.run.environment}
        (making / "environment.json").write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    (making / "README.md").write_text(text(card), encoding="utf-8")


def _run(policy: Policy) -> tuple[RunRecord | None, dict[str, Any]]:
    """The run's record, and the facts of the checkpoint that is exported, or of its newest."""
    from flowalign import checkpoint
    from flowalign.report.reading import read_run

    if policy.run is None:
        return None, {}
    there = checkpoint.names(policy.run / "checkpoints")
    name = policy.checkpoint or (there[-1] if there else "")
    state = policy.run / "checkpoints" / name / "state.json"
    facts = json.loads(state.read_bytes()) if name and state.is_file() else {}
    run = read_run(policy.run) if (policy.run / "metrics.jsonl").is_file() else None
    told = facts.get("facts", {}) if isinstance(facts, dict) else {}
    return run, (told if isinstance(told, dict) else {}) | {"epoch": facts.get("epoch")}


def _epoch(policy: Policy, run: RunRecord | None) -> int | None:
    """After how many epochs the policy was kept: of the checkpoint, of the best, or of the newest."""
    if policy.checkpoint is not None and policy.run is not None:
        state = policy.run / "checkpoints" / policy.checkpoint / "state.json"
        found = json.loads(state.read_bytes()).get("epoch") if state.is_file() else None
        return found if isinstance(found, int) else None
    if run is None:
        return None
    return run.done if run.best is None else run.best


def _comparison(run: RunRecord | None, epoch: int | None) -> Comparison | None:
    """The base model against this very policy; None where one of the two was not evaluated."""
    from flowalign.report.comparing import compare

    if run is None or epoch is None or not {0, epoch} <= run.scored.keys() or epoch == 0:
        return None
    return compare(replace(run, best=epoch))


def _method(trainer: Any) -> str:
    """What the file of the run's trainer says of itself in its first line, "" where that is none of ours."""
    import inspect

    if not isinstance(trainer, str) or not is_ours(trainer):
        return ""
    module = inspect.getmodule(locate(trainer))
    return (inspect.getdoc(module) or "").partition("\n")[0]


def _base(policy: Policy, named: str | None) -> tuple[str, str | None]:
    """The base model as it is shown, and its id on the hub; a folder's place on this machine is shown to nobody."""
    from flowalign.models.loading import EMBEDDED
    from flowalign.publishing import check_id

    if named is not None:
        check_id(named, "--base-model")
        return named, named
    if policy.base in EMBEDDED:
        return policy.base, None
    if Path(policy.base).expanduser().is_dir():
        return Path(policy.base).expanduser().resolve().name, None
    return policy.base, policy.base


def _rewards(reward: Any) -> Iterator[tuple[str, str, str]]:
    """Of each reward that a config names, wherever it does: its class, its weights and their licence; none is made."""
    from rewards.expression import REWARDS

    if isinstance(reward, list):
        for one in reward:
            yield from _rewards(one)
    elif isinstance(reward, str) and is_ours(reward):
        yield from _carded(reward, None)
    elif isinstance(reward, str):
        for name in re.findall(r"[A-Za-z][\w.]*(?![\w.]*\s*\()", reward):
            yield from _rewards(REWARDS.get(name, []))
    elif isinstance(reward, dict):
        inner = [one for key, value in reward.items() if _may_name_rewards(key, value) for one in _rewards(value)]
        named = reward.get("class")
        if isinstance(named, str) and not is_ours(named):
            yield named, "", "that of its own code"
        elif isinstance(named, str):
            yield from [
                one for one in _carded(named, reward.get("model") or reward.get("weights")) if one[1] or not inner
            ]
        yield from inner


def _may_name_rewards(key: str, value: Any) -> bool:
    return key != "class" and (isinstance(value, dict | list) or key == "expression" or is_ours(str(value)))


def _carded(path: str, model: Any) -> Iterator[tuple[str, str, str]]:
    """A reward's card, where the path leads to one that is no mere combination; model: weights of the config's own."""
    from flowalign.publishing import public
    from rewards.base import Combination, Reward

    found = locate(path)
    if not isinstance(found, type) or not issubclass(found, Reward) or issubclass(found, Combination):
        return
    weights, licence = found.card.weights, found.card.licence
    if model == "shapes":
        weights, licence = "the embedded ones", "Apache-2.0"
    elif isinstance(model, str) and model not in weights:
        own = f"; of {weights}: {licence}" if licence else ""
        weights, licence = public(model), f"that of these weights{own}"
    yield path, weights, licence


def _picture(run: RunRecord, comparison: Comparison | None, making: Path) -> Picture | None:
    """The same prompts from the same noise before and after; else the sheet of the run's newest evaluation."""
    from flowalign.model_card import Picture
    from flowalign.pictures import grid, unzipped

    if comparison is not None:
        ends = [run.zip_of(comparison.before_epoch), run.zip_of(comparison.after_epoch)]
        if all(end.is_file() for end in ends):
            some = min(SHOWN, len(comparison.prompts))
            both = [one for pair in zip(*(unzipped(end, some) for end in ends), strict=True) for one in pair]
            texts = [line for one in comparison.prompts[:some] for line in (f"before: {one.text}", "after")]
            (making / "before_after.png").write_bytes(grid(both, texts))
            return Picture(
                "before_after.png", f"Before and after, from the same noise: the first {some} held-out prompts"
            )
    if run.sheets:
        epoch, sheet = run.sheets[-1]
        (making / "samples.png").write_bytes(sheet.read_bytes())
        return Picture("samples.png", f"Held-out prompts after {epoch} epochs")
    return None
