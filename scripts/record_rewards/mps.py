"""Records what the authors' code of MPS computes, at a tiny size with made weights, for the tests.

    python -m venv old && old/bin/pip install torch transformers==4.45.2 einops pillow safetensors numpy
    git clone https://github.com/Kwai-Kolors/MPS
    PYTHONPATH=MPS old/bin/python scripts/record_rewards/mps.py tests/golden/rewards/mps.safetensors

The model and the scoring of the authors' evaluation script are run as they are; sizes are replaced, and what the script
imports for other things is left out. Scores and gradient are of float32, for which the code's calls of half() do
nothing; the scores of its own float16 stand beside them. No weights are downloaded.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import types
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPTokenizer

UNUSED = ("cv2", "matplotlib", "matplotlib.pyplot", "fire", "tqdm", "tqdm.auto")
sys.modules.update({name: types.ModuleType(name) for name in UNUSED})
sys.modules["fire"].Fire = sys.modules["tqdm.auto"].tqdm = None
import eval_overall_mps_on_hpdv2 as evaluation  # noqa: E402
from trainer.models.clip_model import CLIPModel, XCLIPModel  # noqa: E402
from trainer.models.cross_modeling import Cross_model  # noqa: E402

for name in UNUSED:
    del sys.modules[name]

LENGTH, WORDS = 16, 514
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"vocab_size": WORDS, "max_position_embeddings": LENGTH, "hidden_act": "gelu"}
TEXT |= {"bos_token_id": WORDS - 2, "eos_token_id": WORDS - 1, "pad_token_id": WORDS - 1}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 8, "hidden_act": "gelu"}
CROSS = {"dim": 24, "layer_num": 2, "dim_head": 8, "heads": 3}
FULL_TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
FULL_VISION = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
FULL_VISION |= {"patch_size": 14}
PROMPTS = ("a red circle", "7 blue", "", "a text that is longer than it can be")
CONDITION = "a"
POSITIONS = "model.text_model.embeddings.position_embedding.weight"


def byte_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer without merges, in which every byte is a token: that of tests/tiny.py."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    Path("vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    Path("merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer("vocab.json", "merges.txt", model_max_length=LENGTH)


def processor(image: Image.Image, return_tensors: str) -> dict[str, torch.Tensor]:
    """Pictures of the network's size, with CLIP's constants."""
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = ((np.asarray(image) / 255 - mean) / std).transpose(2, 0, 1)
    return {"pixel_values": torch.from_numpy(pixels.astype(np.float32))[None]}


def build(config: CLIPConfig, cross: dict[str, int] | None) -> CLIPModel:
    """The authors' module, with a CLIP of random weights in place of a downloaded one, and other sizes if given."""
    kept = XCLIPModel.from_pretrained, CLIPModel.__init__.__globals__["Cross_model"]
    XCLIPModel.from_pretrained = classmethod(lambda cls, _: cls(config))
    CLIPModel.__init__.__globals__["Cross_model"] = lambda **sizes: Cross_model(**(cross or sizes))
    made = CLIPModel("")
    XCLIPModel.from_pretrained, CLIPModel.__init__.__globals__["Cross_model"] = kept
    return made.eval()


def made_weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Weights that every numpy draws alike; tests/test_reward_mps.py draws them the same way."""
    draw, made = np.random.RandomState(7), {}
    for name in sorted(shapes):
        if name.endswith(("position_ids", "inv_freq", "fn.norm.bias", "logit_scale")):
            continue
        shape = shapes[name]
        fan = int(np.prod(shape[1:])) if len(shape) > 1 and "embed" not in name.rsplit(".", 2)[-2] else 4
        value = draw.standard_normal(shape) / np.sqrt(fan)
        if len(shape) == 1:
            value = 0.2 * value + ("norm" in name and name.endswith("weight"))
        if name == POSITIONS:
            value *= 0.05  # so that words differ more than places, and some are far from the condition
        made[name] = torch.from_numpy(value.astype(np.float32))
    return made


def draw_pictures() -> list[Image.Image]:
    draw = np.random.RandomState(8)
    coarse = [Image.fromarray(draw.randint(0, 256, (5, 5, 3)).astype(np.uint8)) for _ in range(3)]
    return [picture.resize((VISION["image_size"],) * 2, Image.BILINEAR) for picture in coarse]


def packed(shapes: dict[str, list[int]]) -> torch.Tensor:
    return torch.frombuffer(bytearray(zlib.compress(json.dumps(shapes, sort_keys=True).encode(), 9)), dtype=torch.uint8)


def shapes_of(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


def score(model: CLIPModel, picture: Image.Image, prompt: str) -> torch.Tensor:
    picture.save("picture.png")
    return evaluation.infer_one_sample("picture.png", prompt, model, processor, byte_tokenizer(), "cpu", CONDITION)[0]


def scores(model: CLIPModel, pictures: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.stack([score(model, picture, text) for text in PROMPTS]) for picture in pictures])


def gradient(model: CLIPModel, picture: Image.Image, prompt: str) -> torch.Tensor:
    """To the normalised pixels, by the authors' scoring without its no_grad."""
    given = processor(picture, "pt")["pixel_values"].requires_grad_()
    picture.save("picture.png")
    plain = evaluation.infer_one_sample.__wrapped__
    kept, torch.no_grad = torch.no_grad, torch.enable_grad
    made = plain(
        "picture.png", prompt, model, lambda *_, **__: {"pixel_values": given}, byte_tokenizer(), "cpu", CONDITION
    )
    torch.no_grad = kept
    return torch.autograd.grad(made[0], given)[0]


def record() -> dict[str, torch.Tensor]:
    config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=CROSS["dim"])
    model, pictures = build(config, CROSS), draw_pictures()
    shapes = shapes_of(model)
    unknown = model.load_state_dict(made_weights(shapes), strict=False)
    assert not unknown.unexpected_keys, unknown
    out = {f"picture_{i}": torch.from_numpy(np.asarray(picture).copy()) for i, picture in enumerate(pictures)}
    half, torch.Tensor.half = torch.Tensor.half, lambda self: self
    out["scores"] = scores(model, pictures)
    out["gradient"] = gradient(model, pictures[0], PROMPTS[0])
    torch.Tensor.half = half
    torch.save(model.half(), "module.pth")  # as the authors publish theirs, and as they read it
    model = torch.load("module.pth", weights_only=False)
    out["half_scores"] = scores(model, pictures)
    full = CLIPConfig(text_config=FULL_TEXT, vision_config=FULL_VISION, projection_dim=1024)
    with torch.device("meta"):
        out["full_shapes"] = packed(shapes_of(build(full, None)))
    return out | {"tiny_shapes": packed(shapes)}


def main() -> None:
    path = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        made = record()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in made.items()}, path)
    print({name: tuple(value.shape) for name, value in made.items()})
    print(made["scores"], made["half_scores"], made["gradient"].abs().max())


if __name__ == "__main__":
    main()
