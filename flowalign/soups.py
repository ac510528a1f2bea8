"""Averages of policies: Rewarded Soups (arXiv:2306.04488), and of reward models: WARM (arXiv:2401.12187).

    theta = sum_i w_i theta_i      of members that were trained from the same weights, w on the simplex

Of LoRA policies theta is W + dW, so that the products are averaged, and not their factors:

    dW = sum_i w_i (alpha_i / r_i) B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]

The right side is exact and has the sum of the ranks; a truncated SVD brings it down to any rank, with an error that is
known. (sum_i w_i B_i) (sum_i w_i A_i), the average of the factors, is another matrix.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from flowalign.lora_files import WEIGHTS, Factors, LoRAFile, lora_bytes, read_lora

RECORD = "soup.json"
CLOSE = 1e-6  # by which the sum of weights may differ from 1: thirds written with seven digits are meant


@dataclass(frozen=True)
class Soup:
    """A merged LoRA. ranks: of its layers, the smallest and the largest. error: ||dW - exact|| / ||exact|| of all."""

    folder: Path
    ranks: tuple[int, int]
    error: float


@dataclass(frozen=True)
class Cut:
    """Factors of a lower rank. lost, total: the squared Frobenius norms of what was cut off, and of all."""

    factors: Factors
    lost: float
    total: float


def check_weights(weights: Sequence[float], count: int, any_weights: bool = False) -> tuple[float, ...]:
    """One weight for each member, from 0 to 1 and of sum 1.

    Args:
        any_weights: takes those outside the simplex too. They extrapolate: (1.5, -0.5) goes beyond the first member and
            away from the second, where nothing says that the network still works.

    Raises: ValueError for others.
    """
    told = " ".join(f"{weight:g}" for weight in weights)
    if len(weights) != count:
        raise ValueError(f"{count} members but {len(weights)} weights ({told}); give one for each")
    if not all(map(math.isfinite, weights)) or not any(weights):
        raise ValueError(f"weights must be finite and not all 0, got {told}")
    if not any_weights and (min(weights) < 0 or abs(math.fsum(weights) - 1) > CLOSE):
        raise ValueError(f"weights must be at least 0 and add up to 1, got {told}; --any-weights takes others too")
    return tuple(map(float, weights))


def average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """sum_i w_i theta_i of plain parameters, added up in float64, in the first one's dtypes.

    For all of a network's weights, for heads, and for policies that are linear in their parameters; not for the factors
    of a LoRA. What is not a floating number must be equal. A weight of 1 returns that member's own numbers.

    Raises: ValueError for another number of weights than states, and for other names or shapes: the member is named by
    its number, from 1.
    """
    weights = check_weights(weights, len(states), any_weights=True)
    first = states[0]
    for number, state in enumerate(states[1:], 2):
        odd = sorted(first.keys() ^ state.keys())
        odd += sorted(name for name in first.keys() & state.keys() if first[name].shape != state[name].shape)
        odd += sorted(
            name
            for name, value in first.items()
            if name not in odd and not value.is_floating_point() and not torch.equal(value, state[name])
        )
        if odd:
            raise ValueError(f"members 1 and {number} differ in {odd[0]}: they are not of one model")
    chosen = [(weight, state) for weight, state in zip(weights, states, strict=True) if weight]
    if len(chosen) == 1 and chosen[0][0] == 1:
        return dict(chosen[0][1])
    return {name: _mean([(w, state[name]) for w, state in chosen]).to(value.dtype) for name, value in first.items()}


def _mean(terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    if not terms[0][1].is_floating_point():
        return terms[0][1]
    return torch.stack([weight * value.double() for weight, value in terms]).sum(0)


def concatenated(members: Sequence[Mapping[str, Factors]], weights: Sequence[float]) -> dict[str, Factors]:
    """sum_i w_i dW_i of each layer, exact but for one rounding of `up` to float32; scales are 1.

    A layer that a member lacks gets nothing of it. A weight of 0 leaves columns of zeros: leave the member out where
    these are not wanted.
    """
    merged = {}
    for name in sorted({name for member in members for name in member}):
        own = [(w, member[name]) for w, member in zip(weights, members, strict=True) if name in member]
        ups = [(w * one.scale * one.up.double()).float() for w, one in own]
        merged[name] = Factors(torch.cat([one.down.float() for _, one in own]), torch.cat(ups, 1))
    return merged


def truncated(factors: Factors, rank: int) -> Cut:
    """The nearest dW of at most this rank (Eckart and Young, Psychometrika 1, 1936), by the SVD of the exact one.

    With B = Q_b R_b and A' = Q_a R_a the singular values are those of R_b R_a', which is as small as the rank: dW is
    never formed. The root of each singular value goes to either side.
    """
    down, up = factors.down.double().flatten(1), factors.scale * factors.up.double().flatten(1)
    (left, small_left), (right, small_right) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    u, values, v = torch.linalg.svd(small_left @ small_right.T)
    kept = values[:rank]
    new_up, new_down = left @ u[:, : len(kept)] * kept.sqrt(), kept.sqrt()[:, None] * (v[: len(kept)] @ right.T)
    made = Factors(
        new_down.float().reshape(-1, *factors.down.shape[1:]),
        new_up.float().reshape(len(up), -1, *factors.up.shape[2:]),
    )
    return Cut(made, float(values[rank:].square().sum()), float(values.square().sum()))


def check_alike(members: Sequence[LoRAFile]) -> None:
    """Whether the members can be of one base model. Raises: ValueError that names the layer where they cannot."""
    networks = [{name.split(".")[0] for name in member.factors} for member in members]
    for (one, held), (other, known) in combinations(zip(members, networks, strict=True), 2):
        if held != known:
            raise ValueError(f"{one.path} is of the {_told(held)} and {other.path} of the {_told(known)}")
        for name in sorted(one.factors.keys() & other.factors.keys()):
            if one.factors[name].shape != other.factors[name].shape:
                raise ValueError(
                    f"{name} is {[*one.factors[name].shape]} in {one.path} and {[*other.factors[name].shape]} in "
                    f"{other.path}: they are of different base models"
                )


def _told(names: set[str]) -> str:
    return " and ".join(sorted(names))


def merge_loras(
    paths: Sequence[str | Path],
    weights: Sequence[float],
    out: Path,
    rank: int | None = None,
    any_weights: bool = False,
) -> Soup:
    """Write the soup of LoRA policies into a new folder, as `load_lora_weights` and `LoRA(start=...)` take it.

    `soup.json` beside the weights, and the file's header, say what was merged. A weight of 1 with all others 0 gives
    that member's own file, bit for bit, if it is in diffusers' layout and no rank is above `rank`.

    Args:
        paths: run folders, or folders or files of LoRA weights; ranks, alphas and layers may differ.
        rank: the most that a layer has; None for the sum of the members' ranks, which is exact.
        any_weights: see `check_weights`.

    Raises: ValueError for members that do not go together, for weights off the simplex, and for a folder in use.
    """
    weights = check_weights(weights, len(paths), any_weights)
    check_new(out)
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    members = [read_lora(path) for path in paths]
    check_alike(members)
    used = [(weight, member) for weight, member in zip(weights, members, strict=True) if weight]
    exact = concatenated([member.factors for _, member in used], [weight for weight, _ in used])
    merged, error = (exact, 0.0) if rank is None else _fitted(exact, rank)
    ranks = [one.rank for one in merged.values()]
    record = describe(members, weights) | {"rank": rank, "relative_error": error}
    alone = used[0][1] if len(used) == 1 and used[0][0] == 1 else None
    if alone is not None and alone.plain and max(ranks) == max(one.rank for one in exact.values()):
        content = alone.path.read_bytes()
    else:
        content = lora_bytes(merged, {"flowalign_soup": json.dumps(record)})
    with new_folder(out) as making:
        (making / WEIGHTS).write_bytes(content)
        (making / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return Soup(out, (min(ranks), max(ranks)), error)


def describe(members: Sequence[LoRAFile], weights: Sequence[float]) -> dict[str, object]:
    """What was merged, as plain data."""
    told = [
        {"path": str(member.path), "sha256": member.digest, "weight": weight}
        for member, weight in zip(members, weights, strict=True)
    ]
    return {"method": "Rewarded Soups (arXiv:2306.04488), sum of w * alpha / r * B A", "members": told}


def _fitted(exact: Mapping[str, Factors], rank: int) -> tuple[dict[str, Factors], float]:
    """Layers above a rank cut down to it, and the relative error of all; the others stay as they are."""
    cuts = {name: truncated(one, rank) for name, one in exact.items()}
    lost = math.fsum(cut.lost for cut in cuts.values())
    total = math.fsum(cut.total for cut in cuts.values())
    made = {name: cut.factors if exact[name].rank > rank else exact[name] for name, cut in cuts.items()}
    return made, math.sqrt(lost / total) if total else 0.0


def check_new(out: Path) -> None:
    """Raises: ValueError for a folder that holds something, or a file."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is in use; name another folder with --out")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which is `out` once all is written; nothing is left of it where writing fails."""
    making = out.with_name(f".making-{out.name}")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    try:
        yield making
        if out.exists():
            out.rmdir()  # empty, or `check_new` would have refused it
        making.rename(out)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def simplex_grid(members: int, points: int) -> list[tuple[float, ...]]:
    """All weights on the simplex in steps of 1 / (points - 1), `points` along each edge; from the first member on.

    Two members have `points` of them, three a triangle of points (points + 1) / 2.

    Raises: ValueError for fewer than two of either.
    """
    if members < 2 or points < 2:
        raise ValueError(f"a sweep needs at least 2 members and 2 points, got {members} and {points}")
    steps = points - 1

    def split(left: int, parts: int) -> Iterator[tuple[int, ...]]:
        if parts == 1:
            yield (left,)
            return
        for taken in range(left, -1, -1):
            yield from ((taken, *rest) for rest in split(left - taken, parts - 1))

    return [tuple(part / steps for part in parts) for parts in split(steps, members)]
