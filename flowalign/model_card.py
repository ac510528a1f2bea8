"""The card of an exported policy, README.md as the hub shows it: what it is, how to use it, and how good it is.

Every number is the run's own: held-out scores before and after over the same prompts from the same noise, with the
paired interval of the report.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flowalign import __version__
from flowalign.card_example import Use, example, inference
from flowalign.card_tables import cell, costs, numbers
from flowalign.exporting import Policy, Written
from flowalign.licences import Licence, warnings_of
from flowalign.publishing import public, public_prose
from flowalign.report.comparing import Comparison
from flowalign.report.concerns import concerns
from flowalign.report.formats import count
from flowalign.report.reading import RunRecord

SETTINGS = (
    ("LoRA rank", ("model", "lora", "rank")),
    ("LoRA alpha", ("model", "lora", "alpha")),
    ("precision of training", ("model", "mixed_precision")),
    ("noise of the rollouts", ("sampling", "plan", "class")),
    ("steps of a rollout", ("sampling", "steps")),
    ("guidance in training", ("sampling", "guidance_scale")),
    ("prompts an epoch", ("sampling", "groups")),
    ("samples a prompt", ("sampling", "group_size")),
    ("epochs planned", ("epochs",)),
    ("updates an epoch", ("updates_per_epoch",)),
    ("learning rate", ("optimizer", "learning_rate")),
    ("weight of the KL", ("kl_coef",)),
    ("clip range", ("clip_range",)),
    ("average of the weights", ("optimizer", "ema_decay")),
    ("seed", ("seed",)),
)
TASKS = {"WanPipeline": "text-to-video", "WanImageToVideoPipeline": "image-to-video"}
TAGS = {"diffusers": "LoRA for diffusers", "kohya": "LoRA for ComfyUI and kohya's tools", "merged": "whole pipeline"}


@dataclass(frozen=True)
class RewardNote:
    """A reward of the config: its class, and its weights and their licence as its card says; "" where it says none."""

    name: str
    weights: str
    licence: str


@dataclass(frozen=True)
class Picture:
    """A picture beside the card."""

    file: str
    said: str


@dataclass(frozen=True)
class Card:
    """All that a card is made of.

    name: of what is exported. repo: where it goes on the hub, None for nowhere. format: diffusers, kohya or merged.
    base: the base model as it is shown. hub_base: its id on the hub, None for what is not there. method: what the
    trainer's file says of itself. run, comparison, epoch: the run, its evaluations of base and policy, and the epochs
    after which the policy was kept; None for what is not known. facts: those of its checkpoint. absent: components that
    the pipeline is made without.
    """

    name: str
    repo: str | None
    format: str
    dtype: str | None
    policy: Policy
    written: Written
    base: str
    hub_base: str | None
    licence: Licence
    method: str
    rewards: tuple[RewardNote, ...]
    run: RunRecord | None
    comparison: Comparison | None
    epoch: int | None
    facts: dict[str, Any]
    picture: Picture | None
    absent: tuple[str, ...]

    @property
    def config(self) -> dict[str, Any]:
        """The run's config as others may see it."""
        told: dict[str, Any] = public(self.policy.config or {})
        return told

    def setting(self, *keys: str) -> Any:
        """One value of it, None where it is missing."""
        found: Any = self.config
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found


def text(card: Card) -> str:
    """README.md. Raises: ValueError where a template's value is missing, which is a mistake of ours."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=False,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    comparison, formula = card.comparison, card.setting("reward")
    use = Use(
        card.policy, card.config, card.format, card.base, card.repo, card.name, card.absent, _prompt(comparison)
    )  # fmt: skip
    return environment.get_template("model_card.md.j2").render(
        front=yaml.safe_dump(front_matter(card), sort_keys=False, allow_unicode=True, width=1000),
        name=card.name,
        what=_what(card),
        picture=card.picture,
        example=example(use),
        hints=_hints(card),
        numbers=None if comparison is None or card.run is None else numbers(card.run, comparison),
        method=_linked(card.method),
        rewards=[RewardNote(one.name, cell(one.weights or "-"), cell(one.licence or "-")) for one in card.rewards],
        formula=formula if isinstance(formula, str) and len(card.rewards) != 1 else None,
        licences=warnings_of((one.name, one.licence) for one in card.rewards),
        data=_data(card),
        settings=[(name, f"`{cell(value)}`") for name, value in _settings(card)],
        costs=[] if card.run is None else costs(card.run),
        limits=_limits(card),
        licence=card.licence.sentence(card.base),
        version=__version__,
    )


def front_matter(card: Card) -> dict[str, Any]:
    """What the hub reads: the base model, library, task, tags, licence, and how it is sampled."""
    lora = card.format != "merged"
    task = TASKS.get(card.policy.kind, "text-to-image")
    told: dict[str, Any] = {}
    if card.hub_base is not None:
        told |= {"base_model": card.hub_base, "base_model_relation": "adapter" if lora else "finetune"}
    told |= {"library_name": "diffusers", "pipeline_tag": task} | card.licence.front()
    tags = [*(("lora",) if lora else ()), "diffusers", task, "flowalign", *(["alignment"] if card.method else [])]
    told["tags"] = tags
    parameters = inference(card.config)
    return told | ({"inference": {"parameters": parameters}} if parameters else {})


def _linked(sentence: str) -> str:
    """With a link for each paper that is named by its number on arXiv."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", sentence)


def _what(card: Card) -> str:
    base = f"[{card.hub_base}](https://huggingface.co/{card.hub_base})" if card.hub_base else f"`{card.base}`"
    kind = f"a {TAGS[card.format]}" if card.format != "merged" else f"a {TAGS[card.format]} of diffusers"
    policy = card.policy
    told = f"This is {kind}: {base} ({policy.kind}), whose {policy.network} was aligned with rewards"
    if card.method:
        told += f" by {card.method.partition(':')[0]}"
    if card.epoch is not None:
        told += f"; the policy after {count(card.epoch)} epoch{'' if card.epoch == 1 else 's'}"
    return told + "."


def _prompt(comparison: Comparison | None) -> str:
    """A held-out prompt, or one that suits most models."""
    return comparison.prompts[0].text if comparison is not None and comparison.prompts else "a photo of a red fox"


def _hints(card: Card) -> list[str]:
    found = []
    if card.format == "kohya":
        found.append(
            f"In ComfyUI: put `{card.name}.safetensors` into `models/loras`, and load it with the node Load LoRA at "
            "strength 1. It changes the diffusion model and no text encoder."
        )
    if card.setting("model", "grid") not in (None, "flowalign.schedules.linear"):
        found.append(f"It was trained on the noise levels of `{card.setting('model', 'grid')}`; others work less well.")
    return found


def _data(card: Card) -> list[str]:
    found = []
    prompts = card.setting("prompts")
    if prompts is not None:
        source = prompts.get("class") or prompts if isinstance(prompts, dict) else prompts
        shown = f"`{cell(source)}`" if isinstance(source, str) else "a list in the config"
        print_of = card.facts.get("prompts")
        found.append(f"Training prompts: {shown}" + (f"; {cell(_told(print_of))}" if print_of else ""))
    if card.run is not None and card.run.prompts:
        file = card.run.folder / "evaluations" / "prompts.jsonl"
        digest = sha256(file.read_bytes()).hexdigest()
        found.append(f"Held-out prompts: {count(len(card.run.prompts))}, SHA-256 of their file {digest}")
    for name in ("pairs", "real"):
        if card.setting(name) is not None:
            found.append(f"Of the config, {name}: `{cell(json.dumps(card.setting(name)))[:300]}`")
    return found


def _told(value: Any) -> str:
    """A fingerprint, as a run has kept it, without the places of files."""
    return public_prose(value) if isinstance(value, str) else json.dumps(public(value))


def _settings(card: Card) -> list[tuple[str, object]]:
    found = [(name, card.setting(*keys)) for name, keys in SETTINGS]
    if card.policy.lora is not None:
        ranks = sorted({one.rank for one in card.policy.lora.factors.values()})
        found[0] = "LoRA rank", " to ".join(str(rank) for rank in (ranks if len(ranks) < 2 else (ranks[0], ranks[-1])))
    return [(name, value) for name, value in found if value is not None]


def _limits(card: Card) -> list[str]:
    found = ["What rewards do not see is not guarded: look at the pictures, and not at the scores alone."]
    if card.run is None:
        found.append(
            "How it was trained, and how good it is, is not known to this card: it was exported without a run."
        )
    elif card.comparison is None:
        found.append(
            "There are no held-out scores of both this policy and its base: whether it is better is not known."
        )
    else:
        found += _bias(card, card.run)
    if card.comparison is not None and card.setting("evaluation", "reward") is None:
        found.append(
            "The scores are those of the reward that it was trained with, on prompts that it was not trained on: they "
            "say nothing of what another judge would see."
        )
    if card.policy.idle:
        found.append("The LoRA is zero, as before training: no evaluated policy was better than the base model.")
    if card.format == "merged" and card.written.rounded > 0.01:
        found.append(
            f"Rounding the merged weights to {card.dtype} moved them by {card.written.rounded:.2f} times what the LoRA "
            "changes; fp32, or the LoRA beside its base, is exact."
        )
    if card.run is not None:
        found += [cell(public_prose(one)) for one in _alarms(card.run, card.comparison)]
    return found


def _bias(card: Card, run: RunRecord) -> list[str]:
    """That the best of several was taken by the very numbers that are shown."""
    looked = len(run.evaluations)
    if card.policy.checkpoint is not None or run.best != card.epoch or looked < 3:
        return []
    return [
        f"The policy was taken as the best of {looked} evaluations on these very prompts, so that its scores are a "
        "little too high."
    ]


def _alarms(run: RunRecord, comparison: Comparison | None) -> Sequence[str]:
    """What the report warns of, and what was seen while it ran."""
    seen = dict.fromkeys(event.detail for event in run.events if event.name == "alarm")  # a resumed run tells it again
    return [*concerns(run, comparison), *(f"Alarm while training: {one}" for one in seen)]
