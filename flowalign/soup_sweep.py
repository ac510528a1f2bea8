"""A sweep of soups: the simplex point by point, the same prompts from the same noise, scored by every reward.

In its folder:

    sweep.json                    what the sweep is made of: members, model, prompts, rewards, settings
    points/0.25_0.75.png, .jsonl  the pictures at these weights, and every prompt's scores; a point with both is done
    sweep.jsonl                   a line for each point: means, their standard errors, the chord, whether dominated
    pareto.svg                    the first reward against the second
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.adapters import policy_parameters
from flowalign.checkpoint import told_apart
from flowalign.config import build
from flowalign.lora_files import Factors, LoRAFile
from flowalign.media import shown
from flowalign.models import Model, PipelineModel
from flowalign.pictures import grid, to_bytes
from flowalign.progress import Progress
from flowalign.randomness import keyed_globals
from flowalign.records import Media, Prompts, Scores
from flowalign.sample import pictures
from flowalign.sizes import Call, calls_of
from flowalign.soup_table import Row, Weights, label, mean_of, or_none, plain, plot, table
from flowalign.soups import concatenated
from flowalign.tracking import json_lines, write_atomically
from flowalign.videos import stills

FACTS = "sweep.json"
FIX = "name the model that they were trained on with --model"
SHEET = 64  # pictures on a contact sheet: the first ones
Rate = Callable[[Media, Prompts], Scores]


@dataclass(frozen=True)
class Sweep:
    """What is drawn and scored at every point.

    rewards: by the name that tables and plot give them; the first two are plotted.
    """

    prompts: Prompts
    rewards: Mapping[str, Rate]
    steps: int
    guidance_scale: float
    seed: int = 0
    batch_size: int = 16


def run_sweep(
    model: PipelineModel,
    members: Sequence[LoRAFile],
    points: Sequence[Weights],
    sweep: Sweep,
    out: Path,
    facts: Mapping[str, Any],
) -> list[Row]:
    """Draw and score each point that is not done, then write table and plot; returns the table.

    Args:
        model: as `load_model` gives it; its policy is set for each point.
        out: the folder. A point that is done there is read, and not drawn again; nothing is written before one is done.
        facts: what the sweep is made of, as `check_sweep` compares it.

    Raises: ValueError where the folder cannot be this sweep's, and for members that do not fit the model.
    """
    check_sweep(out, facts)
    known = {weights: read_point(out, weights, sweep) for weights in points}
    calls = calls_of(model, sweep.prompts, sweep.batch_size)
    missing = [weights for weights in points if known[weights] is None]
    progress = Progress(len(points), done=len(points) - len(missing))
    for weights in missing:
        set_policy(model, concatenated([member.factors for member in members], weights))
        scores, sheet = _draw(model, sweep, calls, progress)
        _write(out, weights, sweep, facts, scores, sheet)
        known[weights] = scores
        progress.update(len(sweep.prompts), {name: or_none(mean_of(values)) for name, values in scores.items()})
    progress.close()
    rows = table({weights: scores for weights, scores in known.items() if scores is not None})
    write_atomically(out / "sweep.jsonl", json_lines([plain(row) for row in rows]))
    names = [*sweep.rewards][:2]
    if len(names) == 2:
        write_atomically(out / "pareto.svg", plot(rows, names[0], names[1]).encode())
    return rows


def load_model(config: Mapping[str, Any], members: Sequence[LoRAFile], allow_code: bool = False) -> PipelineModel:
    """The model of a config, with a policy that has room for all members, their factors one below the other.

    Raises: ValueError where a member has a layer that the model lacks.
    """
    whole = concatenated([member.factors for member in members], [0.0] * len(members))
    rank = max(one.rank for one in whole.values())
    targets = [name.partition(".")[2] for name in whole]
    lora = {"rank": rank, "alpha": rank, "targets": targets}
    model: PipelineModel = build(_itself, {"model": {**config, "lora": lora}}, allow_code)
    set_policy(model, whole)
    return model


def _itself(model: PipelineModel) -> PipelineModel:
    return model


@torch.no_grad()
def set_policy(model: PipelineModel, factors: Mapping[str, Factors]) -> None:
    """Give the model's policy these factors, of scale 1 as is the policy's, with zeros up to its rank.

    Raises: ValueError for a layer that the policy lacks, or has in another size or a lower rank.
    """
    left = {*factors}
    for name, parameter in policy_parameters(model.module).items():
        module, part = name.rsplit(".", 3)[:2]
        key = f"{model.network_name}.{module}"
        left.discard(key)
        parameter.zero_()
        if key in factors:
            value = factors[key].down if part == "lora_A" else factors[key].up
            room = parameter[: len(value)] if part == "lora_A" else parameter[:, : value.shape[1]]
            if room.shape != value.shape:
                raise ValueError(f"{key} is {[*value.shape]} in the members and {[*room.shape]} in the model: {FIX}")
            room.copy_(value)
    if left:
        raise ValueError(f"{min(left)} is in a member and not in the model: {FIX}")


def _draw(
    model: PipelineModel, sweep: Sweep, calls: Sequence[Call], progress: Progress
) -> tuple[dict[str, list[float]], bytes]:
    """Every prompt's scores by the policy as it is set, and the contact sheet."""
    prompts = sweep.prompts
    drawn = pictures(model, prompts, sweep.steps, sweep.guidance_scale, sweep.seed, calls=calls)
    scores = {name: [math.nan] * len(prompts) for name in sweep.rewards}
    small: dict[int, Tensor] = {}
    for done, (call, pixels) in enumerate(zip(calls, drawn, strict=True), 1):
        batch = prompts.rows(call.rows)
        small |= {i: one for i, one in zip(call.rows, to_bytes(stills(pixels)), strict=True) if i < SHEET}
        for name, values in _rate(model, sweep, pixels, batch, call.rows[0]).items():
            for i, value in zip(call.rows, values, strict=True):
                scores[name][i] = value
        progress.within("call", done, len(calls))
    captions = [f"{_listed(scores, i)}\n{prompts.text[i]}" for i in sorted(small)]  # what is cut off is a long prompt
    return scores, grid([small[i] / 255 for i in sorted(small)], captions)


def _write(
    out: Path,
    weights: Weights,
    sweep: Sweep,
    facts: Mapping[str, Any],
    scores: Mapping[str, Sequence[float]],
    sheet: bytes,
) -> None:
    """The point's files, the sheet first: its scores say that it is done."""
    (out / "points").mkdir(parents=True, exist_ok=True)
    if not (out / FACTS).is_file():
        write_atomically(out / FACTS, json.dumps(facts, indent=1, default=str).encode())
    texts = enumerate(sweep.prompts.text)
    rows = [{"prompt": text} | {name: or_none(values[i]) for name, values in scores.items()} for i, text in texts]
    write_atomically(_file(out, weights, "png"), sheet)
    write_atomically(_file(out, weights, "jsonl"), json_lines(rows))


def _rate(
    model: Model, sweep: Sweep, pixels: Float[Tensor, "b *frames 3 h w"], batch: Prompts, first: int
) -> dict[str, list[float]]:
    """Each reward's scores of a call, nan where one is not valid."""
    media, found = shown(pixels, batch, model.fps), {}
    for name, reward in sweep.rewards.items():
        with keyed_globals(sweep.seed, "soup_reward", first):
            scores = reward(media, batch)
        found[name] = scores.total.detach().float().cpu().where(scores.valid.cpu(), torch.nan).tolist()
    return found


def _listed(scores: Mapping[str, Sequence[float]], index: int) -> str:
    return ", ".join(f"{name} {row[index]:.3g}" for name, row in scores.items())


def _file(out: Path, weights: Weights, kind: str) -> Path:
    return out / "points" / f"{label(weights)}.{kind}"


def read_point(out: Path, weights: Weights, sweep: Sweep) -> dict[str, list[float]] | None:
    """The scores of a point that is done, or None. Raises: ValueError for a file that is not of this sweep."""
    file = _file(out, weights, "jsonl")
    if not file.is_file() or not _file(out, weights, "png").is_file():
        return None
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        if [row["prompt"] for row in rows] != [*sweep.prompts.text]:
            raise ValueError("its prompts are others")
        values = {name: [row[name] for row in rows] for name in sweep.rewards}
        return {name: [math.nan if one is None else float(one) for one in column] for name, column in values.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is altered ({error}); remove it, and its point is drawn again") from error


def check_sweep(out: Path, facts: Mapping[str, Any]) -> None:
    """Raises: ValueError for a folder that holds something else, or a sweep that is made of something else."""
    if (out / FACTS).is_file():
        changed = told_apart(json.loads((out / FACTS).read_bytes()), json.loads(json.dumps(facts, default=str)))
        if changed:
            raise ValueError(f"{out} holds a sweep with another {', '.join(changed)}; name another folder with --out")
    elif out.exists() and (not out.is_dir() or any(path.name != "points" for path in out.iterdir())):
        raise ValueError(f"{out} is in use and holds no sweep; name another folder with --out")
