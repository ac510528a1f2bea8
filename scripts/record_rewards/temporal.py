"""Records how VBench prepares the frames of decoded videos, with torchvision itself, for tests/test_reward_temporal.py.

    pip install torch torchvision safetensors
    python scripts/record_rewards/temporal.py tests/golden/rewards/temporal.safetensors

VBench's transforms are torchvision's Resize(224, antialias=False) of 8-bit frames, bilinear for DINO and bicubic for
CLIP; the sizes here are small so that the file is.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file
from torchvision.transforms import InterpolationMode, Resize

SIZES = {"down": ((45, 30), 16), "up": ((10, 13), 16), "wide": ((20, 50), 16)}
MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


def main() -> None:
    """Frames in 8 bits and what the two resizes make of them."""
    torch.manual_seed(0)
    held = {}
    for name, (shape, size) in SIZES.items():
        frames = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8)
        held[f"{name}/frames"] = frames
        for mode, filtered in MODES.items():
            held[f"{name}/{mode}"] = Resize(size, interpolation=filtered, antialias=False)(frames)
    save_file(held, sys.argv[1])


if __name__ == "__main__":
    main()
