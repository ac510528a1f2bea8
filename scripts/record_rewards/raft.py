"""Records the flows of torchvision's and of the authors' RAFT on weights made here, for tests/test_reward_raft.py.

    git clone https://github.com/princeton-vl/RAFT
    pip install torch torchvision scipy safetensors
    python scripts/record_rewards/raft.py RAFT tests/golden/rewards/raft.safetensors

No weights are downloaded: they are drawn by a rule that the tests follow too, from the names in both state dicts, which
are recorded with their shapes. Of each flow every fifth pixel is kept, which has all places in the squares of 8.
"""

from __future__ import annotations

import json
import sys
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torchvision.models.optical_flow import raft_large

SIZE = (128, 152)  # 128 is torchvision's least
UPDATES = 20


def made_weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Weights that every numpy draws alike; tests/test_reward_raft.py draws them the same way."""
    draw, made = np.random.RandomState(7), {}
    for name, shape in sorted(shapes.items()):
        if not shape:
            made[name] = torch.tensor(0)
            continue
        value = draw.standard_normal(shape) * (np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.2)
        if name.endswith("running_var"):
            value = np.exp(value)
        elif len(shape) == 1 and name.endswith("weight"):
            value = value + 1
        elif "flow_head.conv2" in name:
            value = 0.1 * value  # so that flows stay within the pictures
        made[name] = torch.from_numpy(value.astype(np.float32))
    return {name: made[name.replace("norm3.", "downsample.1.")] for name in made}  # the authors' two names of one layer


def pictures() -> torch.Tensor:
    """Two pairs in 8 bits: squares of random colours that move, and others that have nothing to do with each other."""
    draw = np.random.RandomState(8)
    squares = [np.kron(draw.randint(0, 256, (3, 16, 19)), np.ones((1, 8, 8), np.int64)) for _ in range(3)]
    first, second = np.stack(squares[:2]), np.stack([np.roll(squares[0], (3, -5), (1, 2)), squares[2]])
    return torch.from_numpy(np.stack([first, second]).astype(np.uint8))


def shapes_of(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


def packed(shapes: dict[str, list[int]]) -> torch.Tensor:
    return torch.frombuffer(bytearray(zlib.compress(json.dumps(shapes, sort_keys=True).encode(), 9)), dtype=torch.uint8)


@torch.no_grad()
def main() -> None:
    """Names, shapes and flows of both."""
    sys.path.insert(0, str(Path(sys.argv[1]) / "core"))
    from raft import RAFT

    first, second = pictures().float()
    theirs = RAFT(Namespace(small=False, mixed_precision=False, alternate_corr=False, dropout=0)).eval()
    visions = raft_large(weights=None).eval()
    held = {"authors_shapes": packed(shapes_of(theirs)), "torchvision_shapes": packed(shapes_of(visions))}
    theirs.load_state_dict(made_weights(shapes_of(theirs)))
    visions.load_state_dict(made_weights(shapes_of(visions)))
    flows = {
        "authors": theirs(first, second, iters=UPDATES, test_mode=True)[1],
        "torchvision": visions(2 * (first / 255) - 1, 2 * (second / 255) - 1, num_flow_updates=UPDATES)[-1],
    }
    for name, flow in flows.items():
        print(name, "largest", flow.abs().max().item(), "mean", flow.abs().mean().item())
        held[f"{name}_flow"] = flow[:, :, ::5, ::5].contiguous()
    save_file(held, sys.argv[2])


if __name__ == "__main__":
    main()
