"""Record how open_clip prepares pictures in evaluation, for tests/test_reward_openclip.py.

    python -m venv env && env/bin/pip install open_clip_torch safetensors "pillow<13"
    env/bin/python scripts/record_rewards/openclip.py tests/golden/rewards/openclip.safetensors

Recorded with open_clip 3.3.0 and pillow 12, which resizes the width first, as when the models were trained:
`image_transform_v2` of each way to resize, to 16 x 16 and 12 x 20.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file

SHAPES = ((48, 31), (23, 40), (16, 16), (20, 9))
WAYS = (
    {"size": 16, "resize_mode": "shortest"},
    {"size": 16, "resize_mode": "squash", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    {"size": (12, 20), "resize_mode": "squash"},
    {"size": 16, "resize_mode": "longest", "fill_color": 128},
    {"size": (12, 20), "resize_mode": "longest"},
)


def main(out: str) -> None:
    """Record into the file `out`."""
    tensors, random = {}, np.random.RandomState(0)
    for i, (height, width) in enumerate(SHAPES):
        coarse = Image.fromarray(random.randint(0, 256, (7, 7, 3)).astype(np.uint8)).resize((width, height))
        levels = np.asarray(coarse).copy()
        levels[random.rand(height, width) < 0.1] = 255
        tensors[f"picture_{i}"] = torch.from_numpy(levels)
        for j, way in enumerate(WAYS):
            prepare = image_transform_v2(PreprocessCfg(**way), is_train=False)
            tensors[f"prepared_{j}_{i}"] = prepare(Image.fromarray(levels)).contiguous()
    ways = [vars(PreprocessCfg(**way)) for way in WAYS]
    save_file(tensors, out, {"ways": json.dumps(ways)})
    print(ways)


if __name__ == "__main__":
    main(sys.argv[1])
