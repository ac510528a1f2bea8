"""The check as a page of plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from flowalign.models import PipelineModel
from flowalign.models.embedding_store import entries
from flowalign.report.formats import count, duration, number, percent
from flowalign.transitions import ODE
from trainers.preflight.checking import Preflight
from trainers.preflight.family import Lines
from trainers.preflight.findings import size, spread
from trainers.preflight.geometry import LOOKED_AT, callers_of, geometry
from trainers.preflight.memory import Fit

NAME = 22  # columns
WIDTH = 110


def page(found: Preflight, config: Mapping[str, Any] | None = None) -> str:
    """All sections that there is something to say in, then the problems."""
    sections = {
        "model": _model(found, config),
        "reward": _reward(found),
        "geometry of an epoch": _geometry(found),
        "plan": _plan(found),
        "calls of an epoch": _calls(found),
        "tiny step": _step(found),
        "time (an estimate)": _time(found),
        "memory of a GPU (predicted)": _memory(found),
        "memory and disk": _space(found),
    }
    blocks = [f"{name}\n" + "\n".join(_aligned(lines)) for name, lines in sections.items() if lines]
    return "\n\n".join([*blocks, _problems(found)])


def _aligned(lines: Lines) -> list[str]:
    shown = []
    for name, text in lines:
        parts = textwrap.wrap(text, WIDTH - NAME - 2, break_long_words=False, break_on_hyphens=False) or [""]
        shown.append(f"  {name:<{NAME}}{parts[0]}".rstrip())
        shown += [" " * (NAME + 2) + part for part in parts[1:]]
    return shown


def _model(found: Preflight, config: Mapping[str, Any] | None) -> Lines:
    model = found.trainer.model
    given = (config or {}).get("model")
    known = given if isinstance(given, Mapping) else {}
    trained = model.trainable()
    pipeline = f", {type(model.pipeline).__name__}" if isinstance(model, PipelineModel) else ""
    named = f" of {known['pipeline']}" if "pipeline" in known else ""
    precisions = [f"{what} {known[key]}" for what, key in PRECISIONS.items() if key in known]
    numbers = sum(value.numel() for value in trained.values())
    shown = [
        ("class", f"{type(model).__name__}{pipeline}{named}, on {model.device}"),
        ("trained", f"{count(numbers)} parameters in {len(trained)} tensors"),
        ("mixed precision", ", ".join(precisions)),
        ("a latent", " x ".join(map(str, model.latent_shape))),
    ]
    if found.trial is not None:
        *frames, _, height, width = found.trial.rollouts.medium.shape
        rate = "" if model.fps is None else f", {model.fps:g} a second"
        about = f"{frames[0]} frames of " if frames else ""
        shown.append(("a video" if frames else "a picture", f"{about}{height} x {width} pixels{rate}"))
    return [line for line in shown if line[1]]


PRECISIONS = {"network": "mixed_precision", "decoder": "decode_precision"}


def _reward(found: Preflight) -> Lines:
    reward = found.trainer.reward
    shown = [("class", f"{type(reward).__name__}, {'' if reward.differentiable else 'not '}differentiable")]
    if found.trial is None:
        return shown
    scores = found.trial.rollouts.scores
    known = scores.valid
    shown.append(("total", f"{spread(scores.total[known])} (of {len(scores)} samples)"))
    shown += [(f"  {name}", spread(column[known])) for name, column in scores.parts.items()]
    return [*shown, ("not valid", count(int((~known).sum())))]


def _geometry(found: Preflight) -> Lines:
    trainer, cut = found.trainer, found.cut
    steps = trainer.epochs * cut.updates
    a_row = "a sample" if cut.members == 1 else f"{cut.members} samples that share their start"
    total, drawn = len(trainer.prompts), trainer.epochs * cut.groups
    taken = f"{count(drawn)} of them" if drawn < total else f"each of them {drawn / total:.1f} times"
    shown = [
        ("samples", f"{cut.groups} groups x {cut.group_size} = {count(cut.samples)}"),
        ("prompts", f"{count(total)}, and {trainer.epochs} epochs take {taken}"),
        ("rows", f"{count(cut.rows)}, each {a_row}"),
        ("micro-batches", f"{sum(cut.shares)} of {cut.batch_size} rows, {percent(cut.rollout_padding)} padding"),
        ("optimizer steps", f"{cut.updates} of {number(cut.learnt / cut.updates)} samples; {count(steps)} in the run"),
        ("update", f"{_many(sum(cut.update_shares))}, {percent(cut.update_padding)} padding"),
    ]
    numbers = sorted({2, 4, 8, cut.processes} - {1})
    return shown + [_split(found, many) for many in numbers if many % callers_of(trainer, many) == 0]


def _split(found: Preflight, processes: int) -> tuple[str, str]:
    cut = geometry(found.trainer, processes)
    least, most = min(cut.shares), max(cut.shares)
    each = f"{_many(most) if least == most else f'{least} to {_many(most)}'} each"
    idle = sum(one == 0 for one in cut.shares)
    busy = sum(cut.shares) / (most * len(cut.shares))
    told = f", {idle} without work" if idle else ""
    each = each if cut.callers == 1 else f"groups of {cut.callers}, {each}"
    return f"on {processes} processes", f"{each}, busy {percent(busy)} of the time{told}"


def _many(number: int) -> str:
    return f"{number} micro-batch{'' if number == 1 else 'es'}"


def _plan(found: Preflight) -> Lines:
    trainer = found.trainer
    noisy = [kind for kind in trainer.collection.epoch(0).path.transitions if not isinstance(kind, ODE)]
    noise = ", ".join(dict.fromkeys(map(repr, noisy))) or "none: all steps are the ODE's"
    return [("noise", noise), *trainer.preflight().plan_lines(found.steps)]


def _calls(found: Preflight) -> Lines:
    spent, floor = zip(*found.rows, strict=True)
    shown = []
    for name in ("forward", "gradient"):
        values, least = ([getattr(one, name) for one in rows] for rows in (spent, floor))
        many = f"{count(min(values))} to {count(max(values))}, mean " if min(values) < max(values) else ""
        label = "rows without gradient" if name == "forward" else "rows with gradient"
        shown.append((label, f"{many}{count(fmean(values))}; the fewest possible {count(fmean(least))}"))
    ratio = sum(one.cost for one in spent) / sum(one.cost for one in floor)
    shown.append(("work", f"{ratio:.2f} times the fewest possible, a row with gradient counted as 3"))
    shown.append(("pictures decoded", count(found.cut.samples if found.cut.drawn else 0)))
    if len(spent) == LOOKED_AT:
        shown.append(("", f"of the first {LOOKED_AT} epochs"))
    return shown


def _step(found: Preflight) -> Lines:
    if found.trial is None:
        return []
    told = found.trainer.preflight().step_lines(found.trial, found.cut)
    shown = [("prompt", found.trial.rollouts.heading), *told, ("contact sheet", str(found.sheet or ""))]
    return [line for line in shown if line[1]]


def _time(found: Preflight) -> Lines:
    times = found.times
    if times is None:
        return []
    phases = {"rollout": times.rollout, "decode": times.decode, "reward": times.reward, "update": times.update}
    told = ", ".join(f"{name} {duration(value)}" for name, value in phases.items())
    groups, callers = len(found.cut.shares), found.cut.callers
    shown = [("an epoch", f"{duration(times.epoch)}: {told}")]
    if times.evaluations:
        shown.append(("evaluations", f"{times.evaluations} of {duration(times.evaluation)}"))
    shown.append(("checkpoints", f"about {times.checkpoints} of {duration(times.checkpoint)}"))
    shown.append(("encoding prompts", duration(times.encoding)))
    each = "processes" if callers == 1 else f"groups of {callers} processes, each"
    where = "" if groups * callers == 1 else f" on {groups} {each} as fast as this one, their exchange not counted"
    return [*shown, ("the whole run", f"{duration(times.run)} for {times.epochs} epochs{where}")]


def _space(found: Preflight) -> Lines:
    needs = found.space
    if needs is None:
        return []
    cuda = found.trainer.model.device.type == "cuda"
    shown = [
        ("tiny step, at most", f"{size(needs.peak)} {'of GPU memory' if cuda else 'in the whole process'}"),
        ("optimizer's moments", size(needs.moments)),
        ("an epoch's rollouts", size(needs.rollouts)),
        ("prompt embeddings", f"{size(needs.embeddings)} once all prompts have been taken"),
        ("evaluation's pictures", f"{size(needs.pictures)} of the host's memory"),
        ("memory in all", f"{size(needs.memory)} of {size(needs.limit) if needs.limit else 'unknown'}"),
        ("embeddings kept", f"{size(needs.stored)} in {found.trainer.model.embeddings_folder}, {_there(found)}"),
        ("run folder, at most", f"{size(needs.disk)} of {size(needs.free)} free"),
        ("a checkpoint", f"{size(needs.checkpoint)} at most, with an epoch's rollouts"),
    ]
    return [line for line in shown if not line[1].startswith("0 B")]


def _there(found: Preflight) -> str:
    """What the folder of embeddings has already."""
    folder = found.trainer.model.embeddings_folder
    return "" if folder is None else f"which holds {count(entries(folder))} prompts now"


def _memory(found: Preflight) -> Lines:
    if found.memory is None:
        return []
    needs = found.memory.needs
    weights = ", ".join(f"{name} {size(held)}" for name, held in needs.weights.items() if held)
    model = found.trainer.model
    whole = isinstance(model, PipelineModel) and model.policy.whole
    start = "frozen, counted with the weights" if found.trainer.looks_back()[0] else "not kept: no loss reads it"
    shown = [
        ("weights", f"{size(sum(needs.weights.values()))}: {weights}"),
        *([("the start's copy", start)] if whole else []),
        ("reward's weights", size(needs.reward)),
        ("policy", f"{size(needs.policy)} with its gradient, the optimizer's moments and the average"),
        ("an epoch's rollouts", size(needs.trajectory)),
        ("activations", f"{size(needs.learning)} of a micro-batch with gradient"),
        ("sampling", f"{size(needs.sampling)} of the largest call without"),
        ("decoding", size(needs.decoding)),
        ("encoding prompts", size(needs.encoding)),
        ("at most at once", f"{size(needs.total)}; activations, sampling, decoding and encoding take turns"),
    ]
    blind = f"activations are without those of {found.trainer.reward.name}, which cannot be predicted"
    shown += [] if found.memory.with_reward else [("", blind)]
    return [line for line in shown if not line[1].startswith("0 B")] + [_card(fit) for fit in found.memory.fits]


def _card(fit: Fit) -> tuple[str, str]:
    name = f"on {fit.card} GB"
    if not fit.turned:
        return name, "fits" if fit.enough else "does not fit, and there is no switch left"
    steps = ", then ".join(f"{told} ({size(made.total)})" for told, made in fit.turned)
    return name, f"{'fits with' if fit.enough else 'does not fit, not even with'} {steps}"


def _problems(found: Preflight) -> str:
    if not found.problems:
        return "no problems found"
    order: Sequence[str] = ("error", "warning")
    lines = []
    for problem in sorted(found.problems, key=lambda one: order.index(one.kind)):
        lines += textwrap.wrap(
            f"{problem.kind}: {problem.text}", WIDTH, subsequent_indent="  ", break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
    return "\n".join(lines)
