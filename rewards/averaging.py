"""WARM (arXiv:2401.12187): the average of the weights of reward models that were trained from the same weights.

    theta = sum_m w_m theta_m,   w_m = 1 / M in the paper

One model at one model's cost; to first order it scores as the members' ensemble does, and what only some of them have
learnt, such as wrong labels, is averaged away. Members may differ in data order, data and hyperparameters, not in where
they started: the paper also starts them from one head, as `PreferenceHead` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.soups import RECORD, average, check_new, check_weights, new_folder
from rewards.preference import SETTINGS, LearntReward

# Of matrices with the same start; independent ones of one size are sqrt(2) apart, fine-tuned ones a few hundredths.
APART = 0.5
NOTES = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")  # of a config that say nothing of the model


def average_rewards(
    folders: Sequence[str | Path], weights: Sequence[float], out: Path, any_weights: bool = False
) -> LearntReward:
    """Write the average of rewards that `LearntReward.save` wrote into a new folder, for `LearntReward(out)`.

    Heads and models are averaged as plain parameters, in float64; where the heads alone were trained the models are
    equal, and stay so to the last bit. `soup.json` says what was averaged. All members are in memory at once.

    Raises: ValueError for weights off the simplex (see `flowalign.soups.check_weights`), for a folder that is no such
    reward or is in use, and for members of different models, tokenizers, pixels or heads.
    """
    weights = check_weights(weights, len(folders), any_weights)
    check_new(out)
    places = [Path(folder).expanduser() for folder in folders]
    for place in places:
        if not (place / SETTINGS).is_file():
            raise ValueError(
                f"{place} holds no learnt reward (no {SETTINGS}); reward models are averaged with each other"
            )
    members = [LearntReward(str(place)) for place in places]
    for place, member in zip(places[1:], members[1:], strict=True):
        _check_alike(places[0], members[0], place, member)
    models = average([member.model.state_dict() for member in members], weights)
    heads = average([member.head.state_dict() for member in members], weights)
    members[0].model.load_state_dict(models)
    members[0].head.load_state_dict(heads)
    with new_folder(out) as making:
        members[0].save(making)
        (making / RECORD).write_text(json.dumps(_record(places, weights), indent=1) + "\n")
    return members[0]


def _check_alike(one: Path, first: LearntReward, other: Path, member: LearntReward) -> None:
    pairs = {
        "models (config.json)": (_settings(first), _settings(member)),
        "tokenizers": (first.tokenizer.get_vocab(), member.tokenizer.get_vocab()),
        "pixels (preprocessor_config.json)": (first.config, member.config),
        "heads (hidden units)": (first.head.hidden, member.head.hidden),
    }
    for what, (known, found) in pairs.items():
        if known != found:
            raise ValueError(f"{one} and {other} have different {what}: their average means nothing")
    apart = distance(first.model.state_dict(), member.model.state_dict())
    if apart > APART:
        raise ValueError(
            f"the models of {one} and {other} are {apart:.2f} of their norm apart, so they were not trained from the "
            "same weights: their average means nothing"
        )


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """||a - b|| / sqrt(||a|| ||b||) of all matrices together: 0 if equal, sqrt(2) if unrelated and of one norm.

    Vectors are left out: the scales of norms start at 1 in every model.
    """
    squares = torch.zeros(3, dtype=torch.float64)
    for name, value in one.items():
        if value.ndim > 1 and value.is_floating_point():
            a, b = value.double(), other[name].double()
            squares += torch.stack([(a - b).square().sum(), a.square().sum(), b.square().sum()]).cpu()
    return float(squares[0].sqrt() / (squares[1] * squares[2]) ** 0.25) if squares[1] * squares[2] > 0 else 0.0


def _settings(reward: LearntReward) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: plain(inner) for key, inner in value.items() if key not in NOTES}

    told: dict[str, Any] = plain(reward.model.config.to_dict())
    return told


def _record(places: Sequence[Path], weights: Sequence[float]) -> dict[str, object]:
    members = []
    for place, weight in zip(places, weights, strict=True):
        hashes = {}
        for file in sorted(place.glob("*.safetensors")):
            with file.open("rb") as stream:
                hashes[file.name] = file_digest(stream, "sha256").hexdigest()
        members.append({"path": str(place), "sha256": hashes, "weight": weight})
    return {"method": "WARM (arXiv:2401.12187), average of weights", "members": members}
