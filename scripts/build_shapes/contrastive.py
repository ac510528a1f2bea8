"""A CLIP of the world, trained on right captions of training meanings: the differentiable reward."""

from __future__ import annotations

import json
from dataclasses import replace
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
from flowalign.shapes.scenes import Group, Spec

STEPS = 14_000
PAIRS = 64
SCENES = 80_000
WIDTH = 96
NOISE = 0.08  # the most standard deviation that training pictures get, in [0, 1]
MEAN, STD = [0.5] * 3, [0.5] * 3


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIPModel for 32 x 32 pictures in patches of 4 x 4."""
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 3, "hidden_act": "gelu"}
    text = CLIPTextConfig(
        **shared,
        num_hidden_layers=3,
        vocab_size=len(tokenizer),
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(**shared, num_hidden_layers=6, image_size=scenes.SIZE, patch_size=4)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH))
    model.set_attn_implementation("eager")  # three times as fast as "sdpa" on a CPU at this size
    return model


def neighbour(spec: Spec, rng: np.random.Generator) -> Spec:
    """A meaning that differs in one respect: `corrupt`'s, one object of another kind, one missing or one too many."""
    change = rng.integers(4)
    crowded = change == 3 and spec.kind == "count"  # another object would find no room
    if change < 2 or crowded:
        return scenes.corrupt(spec, rng)
    color = str(rng.choice(sorted(set(scenes.COLORS) - {g.color for g in spec.groups})))
    shape = str(rng.choice(sorted(set(scenes.SHAPES) - {g.shape for g in spec.groups})))
    if change == 2:
        at = int(rng.integers(len(spec.groups)))
        other = {"color": color} if rng.random() < 0.5 else {"shape": shape}
        groups = tuple(replace(g, **other) if i == at else g for i, g in enumerate(spec.groups))
        return replace(spec, groups=groups)
    if len(spec.groups) > 1:
        left = int(rng.integers(len(spec.groups)))
        return Spec(spec.kind, tuple(g for i, g in enumerate(spec.groups) if i != left))
    return Spec("pair", (*spec.groups, Group(color, shape)))


def training_set(out: Path) -> tuple[Tensor, list[list[tuple[str, str]]]]:
    """Pairs of pictures of neighbouring meanings, [n, 2, 3, 32, 32], each with its caption and its meaning's key."""
    file, text = out / "clip_pictures.npy", out / "clip_captions.json"
    if not file.exists():
        rng = np.random.default_rng(6)
        rows, images = [], []
        for spec, told, image in captioned(SCENES, 5, dict.fromkeys(scenes.KINDS, 0.0)):
            other = neighbour(spec, rng)
            while held_out(other):
                other = neighbour(spec, rng)
            rows.append([(told, meaning(spec)), (scenes.caption(other, rng), meaning(other))])
            images.append(np.stack([image, scenes.render(other, rng)]))
        text.write_text(json.dumps(rows))
        np.save(file, np.stack(images))
    return torch.from_numpy(np.load(file)), [[(told, key) for told, key in row] for row in json.loads(text.read_text())]


def imperfect(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures in [-1, 1] as a model might draw them: half of them blurred, all with some noise."""
    pixels = images.float() / 127.5 - 1
    chance = torch.rand(2, len(pixels), 1, 1, 1, generator=generator)
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), "replicate"), 3, 1)
    pixels = torch.lerp(pixels, blurred, (2 * chance[0] - 1).clamp(min=0))
    return pixels + 2 * NOISE * chance[1] * torch.randn(pixels.shape, generator=generator)


def build_clip(out: Path) -> None:
    """The symmetric contrastive loss over pictures and captions that come in pairs which differ in one respect."""
    torch.manual_seed(2)
    images, rows = training_set(out)
    captions = [told for row in rows for told, _ in row]
    tokenizer = make_tokenizer(captions)
    padded = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
    tokens = tokenizer(captions, **padded).input_ids.unflatten(0, (-1, 2))
    names = {name: i for i, name in enumerate(sorted({key for row in rows for _, key in row}))}
    meanings = torch.tensor([[names[key] for _, key in row] for row in rows])
    model = make_clip(tokenizer).train()

    def loss_of(step: int) -> Tensor:
        at = next(batches(len(rows), PAIRS, 7, step))
        pixels = imperfect(images[at].flatten(0, 1), torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16):
            seen = model.get_image_features(pixel_values=pixels).pooler_output
            read = model.get_text_features(input_ids=tokens[at].flatten(0, 1)).pooler_output
        seen, read = F.normalize(seen.float(), dim=-1), F.normalize(read.float(), dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * seen @ read.T
        keys, target = meanings[at].flatten(), torch.arange(2 * PAIRS)
        same = (keys[:, None] == keys) & (target[:, None] != target)
        logits = logits.masked_fill(same, -torch.inf)  # another scene's caption that is right too
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

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
