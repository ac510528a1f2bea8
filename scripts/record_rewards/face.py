"""Records what arcface_torch's IResNet computes, with made weights, for the tests.

    python -m venv arc && arc/bin/pip install torch numpy safetensors
    git clone https://github.com/deepinsight/insightface
    PYTHONPATH=insightface/recognition/arcface_torch/backbones arc/bin/python \\
        scripts/record_rewards/face.py tests/golden/rewards/face.safetensors

The network has the authors' widths, few blocks and short embeddings; the names and shapes are those of r50 and r100.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from iresnet import IBasicBlock, IResNet, iresnet50, iresnet100
from safetensors.torch import save_file

BLOCKS, FEATURES = [1, 2, 1, 1], 16


def made_weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Weights that every numpy draws alike; tests/test_reward_face.py draws them the same way."""
    draw, made = np.random.RandomState(3), {}
    for name, shape in sorted(shapes.items()):
        if name.endswith("num_batches_tracked"):
            made[name] = torch.tensor(0)
            continue
        value = draw.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        if len(shape) == 1:
            value = 0.1 * value + name.endswith(("weight", "running_var"))
        made[name] = torch.from_numpy(value.astype(np.float32))
    return made


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).uniform(-1, 1, shape).astype(np.float32))


def shapes_of(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


def packed(shapes: dict[str, list[int]]) -> torch.Tensor:
    return torch.frombuffer(bytearray(zlib.compress(json.dumps(shapes, sort_keys=True).encode(), 9)), dtype=torch.uint8)


def main() -> None:
    path = Path(sys.argv[1]).resolve()
    network = IResNet(IBasicBlock, BLOCKS, num_features=FEATURES).eval()
    network.load_state_dict(made_weights(shapes_of(network)))
    crops = drawn(4, 2, 3, 112, 112).requires_grad_()
    embedded = network(crops)
    (slope,) = torch.autograd.grad((embedded * drawn(5, 2, FEATURES)).sum(), crops)
    out = {"embedded": embedded.detach(), "slopes": (slope * drawn(6, 8, 2, 3, 112, 112)).flatten(1).sum(1)}
    out["tiny_shapes"] = packed(shapes_of(network))
    with torch.device("meta"):
        out |= {"r50_shapes": packed(shapes_of(iresnet50())), "r100_shapes": packed(shapes_of(iresnet100()))}
    save_file({name: value.contiguous() for name, value in out.items()}, path)
    print({name: tuple(value.shape) for name, value in out.items()}, out["embedded"], out["slopes"])


if __name__ == "__main__":
    main()
