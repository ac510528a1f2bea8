"""Record what HPSv2's own code makes of pictures and texts with a small random model, for tests/test_reward_hps.py.

    python -m venv env && env/bin/pip install torch torchvision timm ftfy regex huggingface_hub transformers safetensors
    pip download --no-deps --no-binary :all: hpsv2x==1.2.0 && tar xzf hpsv2x-1.2.0.tar.gz
    env/bin/python scripts/record_rewards/hpsv2.py hpsv2x-1.2.0/hpsv2/src tests/golden/rewards/hpsv2.safetensors

The weights are not kept: each is drawn by its name, here and in the test. The network is HPSv2's copy of open_clip's
CLIP in float32, at 2 layers of width 64 and 16 heads; the pixels go through its ResizeMaxSize and its normalisation.
"""

from __future__ import annotations

import functools
import gzip
import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

TEXTS = (
    "A red circle",
    "two  blue \u201csquares\u201d\nabove a cross",
    "the artist\u2019s &amp;amp; of\ufb01ce, <b>3 \uff21\uff22</b>",
    "a photo of a photo of a photo of a photo of a photo of a photo of a photo of a red circle",
    "caf\u00e9 \u65e5\u672c!! it's 1984",
    "caf\u00c3\u00a9 &eacute; sch\u00f6n",
    "",
)
WORDS = ("red", "circle", "two", "blue", "squares", "photo", "of", "above", "cross", "office", "the", "artist")
SIZES = ((48, 32), (40, 56), (32, 32), (20, 27), (45, 64))
VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 4, "patch_size": 8}
TEXT = {"context_length": 24, "width": 32, "heads": 16, "layers": 2}
FULL_VISION = {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14}
FULL_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}


def merges() -> list[str]:
    """Byte pairs that build the words from the left."""
    made: list[str] = []
    for word in WORDS:
        letters = [*word[:-1], word[-1] + "</w>"]
        for i in range(1, len(letters)):
            made.append(f"{''.join(letters[:i])} {letters[i]}")
    return list(dict.fromkeys(made))


def drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight by its name: 0.15 times normal numbers, and 1 more for the scales of layer norms."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape) * 0.15
    return torch.as_tensor(noise + (".ln_" in f".{name}" and name.endswith("weight")), dtype=torch.float32)


def pictures() -> list[Image.Image]:
    """Smooth noise with some pixels of full contrast, of each of the sizes."""
    made = []
    for i, (height, width) in enumerate(SIZES):
        random = np.random.RandomState(i)
        coarse = Image.fromarray(random.randint(0, 256, (7, 7, 3)).astype(np.uint8)).resize((width, height))
        levels = np.asarray(coarse).copy()
        levels[random.rand(height, width) < 0.1] = random.choice([0, 255], 3)
        made.append(Image.fromarray(levels))
    return made


def main(source: str, out: str) -> None:
    """Record into the file `out`, with HPSv2's sources in the folder `source`."""
    sys.path.insert(0, source)
    from open_clip import tokenizer, transform
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bpe.txt.gz"
        path.write_bytes(gzip.compress("\n".join(["#version", *merges()]).encode()))
        tokenizer._tokenizer = tokenizer.SimpleTokenizer(str(path))
    words = tokenizer._tokenizer.vocab_size
    ids = tokenizer.tokenize(list(TEXTS), TEXT["context_length"])
    model = CLIP(16, CLIPVisionCfg(**VISION), CLIPTextCfg(vocab_size=words, **TEXT), output_dict=True).eval()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict({name: drawn(name, shape) for name, shape in shapes.items()})
    with torch.device("meta"):
        full = CLIP(1024, CLIPVisionCfg(**FULL_VISION), CLIPTextCfg(**FULL_TEXT)).state_dict()

    tensors = {"ids": ids.to(torch.int32)}
    resize = transform.F.resize
    for antialias in (True, False):
        transform.F.resize = functools.partial(resize, antialias=antialias)
        prepare = transform.image_transform(VISION["image_size"], is_train=False, resize_longest_max=True)
        scores = []
        for i, picture in enumerate(pictures()):
            pixels = prepare.transforms[1](picture).requires_grad_()
            given = pixels
            for step in prepare.transforms[2:]:
                given = step(given)
            held = model(given[None], ids[i : i + 1])
            score = (held["image_features"] * held["text_features"]).sum()
            scores.append(score.detach())
            if antialias:
                score.backward()
                tensors[f"picture_{i}"] = torch.from_numpy(np.asarray(picture).copy())
                tensors[f"gradient_{i}"] = pixels.grad
        tensors["scores" if antialias else "scores_without_antialias"] = torch.stack(scores)
    said = {
        "texts": TEXTS,
        "cleaned": [tokenizer.whitespace_clean(tokenizer.basic_clean(text)).lower() for text in TEXTS],
        "merges": merges(),
        "shapes": shapes,
        "full_shapes": {name: tuple(value.shape) for name, value in full.items()},
    }
    save_file(tensors, out, {name: json.dumps(value) for name, value in said.items()})
    print(tensors["scores"], tensors["scores_without_antialias"], words)
    print([float(tensors[f"gradient_{i}"].abs().max()) for i in range(len(SIZES))])


if __name__ == "__main__":
    main(*sys.argv[1:])
