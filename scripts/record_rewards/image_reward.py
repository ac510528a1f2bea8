"""Records what the image-reward 1.5 package computes, at a tiny size with made weights, for the tests.

    python -m venv old && old/bin/pip install torch torchvision transformers==4.30.2 timm==0.6.13 "numpy<2" safetensors
    old/bin/pip install --no-deps image-reward==1.5
    old/bin/python scripts/record_rewards/image_reward.py tests/golden/rewards/image_reward.safetensors

The package's own model, preprocessing and scoring are run; only the sizes are replaced, and the modules that it imports
for other things (its other scorers, its trainer, activation checkpointing) are left out. No weights are downloaded.
"""

from __future__ import annotations

import importlib.util
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

SIZE = 48  # of the tiny network's pictures, 3 x 3 patches
MED = {"vocab_size": 0, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
MED |= {"max_position_embeddings": 64, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "pad_token_id": 0}
MED |= {"type_vocab_size": 2, "add_cross_attention": True, "encoder_width": 128, "model_type": "bert"}
FULL = {"vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
FULL |= {"num_attention_heads": 12, "max_position_embeddings": 512, "encoder_width": 768}

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "circle", "##s", ".", ",", "'")
VOCABULARY = [*WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS if letter != "s")]
PROMPTS = [
    "a red circle",
    "Two RED circles, one's 7.",
    "red " * 60 + "circle",
    "",
    "caf\u00e9 \u732b circle",
]


def import_the_package() -> tuple[types.ModuleType, types.ModuleType]:
    """Its modules of the model, without running the package's own __init__ files, which import far more."""
    found = importlib.util.find_spec("ImageReward")
    folder = Path(str(found.submodule_search_locations[0]))
    for name in ("ImageReward", "ImageReward.models"):
        stub = types.ModuleType(name)
        stub.__path__ = [str(folder.parent / name.replace(".", "/"))]
        sys.modules[name] = stub
    checkpointing = types.ModuleType("fairscale.nn.checkpoint.checkpoint_activations")
    checkpointing.checkpoint_wrapper = lambda module: module
    for name in ("fairscale", "fairscale.nn", "fairscale.nn.checkpoint"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[checkpointing.__name__] = checkpointing
    import ImageReward.ImageReward as model
    import ImageReward.models.BLIP.blip_pretrain as blip

    return model, blip


def tiny(model: types.ModuleType, blip: types.ModuleType) -> torch.nn.Module:
    """The package's ImageReward with a vision tower of 2 blocks and a text encoder of 2 layers."""
    vit = blip.create_vit.__globals__["VisionTransformer"]
    made = vit(img_size=SIZE, patch_size=16, embed_dim=128, depth=2, num_heads=2)
    kept = blip.create_vit, model.MLP, model._transform
    blip.create_vit = lambda *_: (made, 128)
    model.MLP = lambda _: kept[1](MED["hidden_size"])
    model._transform = lambda _: kept[2](SIZE)
    Path("med_config.json").write_text(json.dumps(MED | {"vocab_size": len(VOCABULARY) + 2}))
    reward = model.ImageReward("med_config.json")
    blip.create_vit, model.MLP, model._transform = kept
    return reward.eval()


def made_weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Weights that every numpy draws alike; tests/test_reward_image_reward.py draws them the same way."""
    draw, made = np.random.RandomState(7), {}
    for name in sorted(shapes):
        if name.endswith("position_ids"):
            continue
        shape = shapes[name]
        fan = int(np.prod(shape[1:])) if len(shape) > 1 and "embed" not in name.rsplit(".", 2)[-2] else 4
        value = draw.standard_normal(shape) / np.sqrt(fan)
        if len(shape) == 1:
            value = 0.2 * value + ("norm" in name.lower() and name.endswith("weight"))
        made[name] = torch.from_numpy(value.astype(np.float32))
    return made


def draw_pictures() -> list[np.ndarray]:
    """Smooth noise at the network's own size (twice), and at sizes where the resize and the crop have to round."""
    draw, made = np.random.RandomState(8), []
    for height, width in [(48, 48), (48, 48), (80, 105), (51, 48), (30, 47)]:
        coarse = Image.fromarray(draw.randint(0, 256, (7, 7, 3)).astype(np.uint8))
        made.append(np.asarray(coarse.resize((width, height), Image.BILINEAR)))
    return made


def packed(shapes: dict[str, list[int]]) -> torch.Tensor:
    return torch.frombuffer(bytearray(zlib.compress(json.dumps(shapes, sort_keys=True).encode(), 9)), dtype=torch.uint8)


def shapes_of(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


def record(model: types.ModuleType, blip: types.ModuleType) -> dict[str, torch.Tensor]:
    reward = tiny(model, blip)
    shapes, out = shapes_of(reward), {}
    unknown = reward.load_state_dict(made_weights(shapes), strict=False)
    assert not unknown.unexpected_keys, unknown
    pictures = [Image.fromarray(picture) for picture in draw_pictures()]
    scores = [[reward.score(prompt, picture) for prompt in PROMPTS] for picture in pictures]
    tokens = reward.blip.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    for i, picture in enumerate(pictures):
        out[f"picture_{i}"] = torch.from_numpy(np.asarray(picture).copy())
    inputs = torch.stack([reward.preprocess(picture) for picture in pictures[:2]]).requires_grad_()
    score = reward.score_gard(tokens.input_ids[:2], tokens.attention_mask[:2], inputs)
    (out["gradient"],) = torch.autograd.grad(score.sum(), inputs)
    Path("med_config.json").write_text(json.dumps(MED | FULL))
    full = shapes_of(model.ImageReward("med_config.json"))
    return out | {
        "scores": torch.tensor(scores), "ids": tokens.input_ids, "mask": tokens.attention_mask,
        "tiny_shapes": packed(shapes), "full_shapes": packed(full),
    }  # fmt: skip


def main() -> None:
    path = Path(sys.argv[1]).resolve()
    model, blip = import_the_package()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("bert-base-uncased").mkdir()  # where the package's tokenizer looks before the hub
        Path("bert-base-uncased/vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
        made = record(model, blip)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in made.items()}, path)
    print({name: tuple(value.shape) for name, value in made.items()})
    print(made["scores"], made["gradient"].abs().max())


if __name__ == "__main__":
    main()
