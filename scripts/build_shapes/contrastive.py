"""A CLIP of the world, trained on right captions of training meanings: the differentiable reward."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from base import TOKENS, make_tokenizer
from common import batches, captioned, fit
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from flowalign.shapes import scenes
from flowalign.shapes.prompts import held_out, held_out_prompts, meaning

STEPS = 1_500
BATCH = 96
SCENES = 80_000
WIDTH = 96
MEAN, STD = [0.5] * 3, [0.5] * 3


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIPModel for 32 x 32 pictures in patches of 4 x 4."""
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "hidden_act": "gelu"}
    text = CLIPTextConfig(
        **shared,
        num_hidden_layers=3,
        vocab_size=len(tokenizer),
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(**shared, num_hidden_layers=4, image_size=scenes.SIZE, patch_size=4)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH))


def training_set(out: Path) -> tuple[Tensor, list[tuple[str, str, str]]]:
    """Pictures, and for each its caption, a caption that is wrong in one respect, and its meaning; kept in files."""
    file, text = out / "clip_pictures.npy", out / "clip_captions.json"
    if not file.exists():
        rng = np.random.default_rng(6)
        rows, images = [], []
        for spec, told, image in captioned(SCENES, 5, dict.fromkeys(scenes.KINDS, 0.0)):
            wrong = scenes.corrupt(spec, rng)
            while held_out(wrong):
                wrong = scenes.random_spec(rng)
            rows.append((told, scenes.caption(wrong, rng), meaning(spec)))
            images.append(image)
        text.write_text(json.dumps(rows))
        np.save(file, np.stack(images))
    return torch.from_numpy(np.load(file)), [tuple(row) for row in json.loads(text.read_text())]


def build_clip(out: Path) -> None:
    """The symmetric contrastive loss; each picture also sees a caption that is wrong in one respect."""
    torch.manual_seed(2)
    images, rows = training_set(out)
    tokenizer = make_tokenizer([row[0] for row in rows])
    padded = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
    tokens = torch.stack([tokenizer([row[i] for row in rows], **padded).input_ids for i in (0, 1)])
    names = {name: i for i, name in enumerate(sorted({row[2] for row in rows}))}
    meanings = torch.tensor([names[row[2]] for row in rows])
    model = make_clip(tokenizer).train()

    def loss_of(step: int) -> Tensor:
        at = next(batches(len(rows), BATCH, 7, step))
        with torch.autocast("cpu", torch.bfloat16):
            seen = model.get_image_features(pixel_values=images[at].float() / 127.5 - 1).pooler_output
            read = model.get_text_features(input_ids=tokens[:, at].flatten(0, 1)).pooler_output
        seen, read = F.normalize(seen.float(), dim=-1), F.normalize(read.float(), dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * seen @ read.T
        same = (meanings[at][:, None] == meanings[at]) & ~torch.eye(BATCH, dtype=torch.bool)
        logits = logits.masked_fill(F.pad(same, (0, BATCH)), -torch.inf)  # another scene's caption that is right too
        target = torch.arange(BATCH)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :BATCH].T, target)) / 2

    fit("clip", model, loss_of, STEPS, 1e-3, out)
    model.save_pretrained(out / "clip")
    tokenizer.save_pretrained(out / "clip")
    size = {"height": scenes.SIZE, "width": scenes.SIZE}
    processor = {"size": {"shortest_edge": scenes.SIZE}, "crop_size": size, "image_mean": MEAN, "image_std": STD}
    processor |= {"do_convert_rgb": True, "image_processor_type": "CLIPImageProcessor", "resample": 3}
    (out / "clip" / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
    print(f"right caption first among 32 held-out ones: {retrieval(model, tokenizer):.3f}")


@torch.no_grad()
def retrieval(model: CLIPModel, tokenizer: CLIPTokenizer, groups: int = 32, size: int = 32) -> float:
    """Share of held-out pictures whose own caption comes first among `size` of different meanings."""
    prompts = held_out_prompts(groups * size, seed=1)
    rng = np.random.default_rng(8)
    specs = [scenes.Spec.from_dict(row["spec"]) for row in prompts.metadata]
    images = torch.from_numpy(np.stack([scenes.render(spec, rng) for spec in specs])).float() / 127.5 - 1
    tokens = tokenizer(list(prompts.text), padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    seen = F.normalize(model.eval().get_image_features(pixel_values=images).pooler_output, dim=-1)
    read = F.normalize(model.get_text_features(input_ids=tokens).pooler_output, dim=-1)
    right = 0
    for at in torch.arange(len(specs)).split(size):
        scores = seen[at] @ read[at].T
        keys = [meaning(specs[i]) for i in at]
        for row, best in enumerate(scores.argmax(1).tolist()):
            right += keys[best] == keys[row]
    return right / len(specs)
