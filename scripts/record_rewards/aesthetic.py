"""Record the scores of the two published aesthetic heads for fixed unit embeddings, for tests/test_reward_aesthetic.py.

    git clone https://github.com/christophschuhmann/improved-aesthetic-predictor laion
    git clone https://github.com/discus0434/aesthetic-predictor-v2-5 v25
    python scripts/record_rewards/aesthetic.py "laion/sac+logos+ava1-l14-linearMSE.pth" \
        v25/models/aesthetic_predictor_v2_5.pth tests/golden/rewards/aesthetic.safetensors

Layer by layer in float64, as both define them. Scores, the length of the summed head and its constant are kept, not the
heads: the second one is under AGPL-3.0.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor


def embeddings(width: int) -> Tensor:
    """Eight unit vectors."""
    made = torch.from_numpy(np.random.RandomState(0).standard_normal((8, width)))
    return made / made.norm(dim=1, keepdim=True)


def scores(path: str, prefix: str, layers: tuple[int, ...], given: Tensor) -> Tensor:
    """What the layers of a file make of embeddings."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    for layer in layers:
        weight, bias = (state[f"{prefix}.{layer}.{kind}"].double() for kind in ("weight", "bias"))
        given = given @ weight.T + bias
    return given[:, 0]


def main(laion: str, v25: str, out: str) -> None:
    """Record both heads into the file `out`."""
    made: dict[str, Tensor] = {}
    heads = {"laion": (laion, "layers", (0, 2, 4, 6, 7), 768), "v25": (v25, "scoring_head", (0, 2, 4, 6, 8), 1152)}
    for name, (path, prefix, layers, width) in heads.items():
        made[f"{name}/scores"] = scores(path, prefix, layers, embeddings(width))
        constant = scores(path, prefix, layers, torch.zeros(1, width, dtype=torch.float64))
        slopes = scores(path, prefix, layers, torch.eye(width, dtype=torch.float64)) - constant
        made[f"{name}/bias"], made[f"{name}/norm"] = constant, slopes.norm()[None]
    save_file(made, out)
    print(made)


if __name__ == "__main__":
    main(*sys.argv[1:])
