"""The package's weights: what the stages made, in float16, with their hashes."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from transformers import CLIPModel

from flowalign.shapes import WEIGHTS

LIMIT = 12_000_000  # bytes


def _forget_folder(config: Path) -> None:
    """Take the builder's own folder, which diffusers notes in its configs, out of one."""
    held = json.loads(config.read_text())
    if isinstance(held, dict) and held.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(held, indent=2) + "\n")


def export(out: Path) -> None:
    """Write flowalign/shapes/weights; its README is kept by hand."""
    pipe = StableDiffusion3Pipeline.from_pretrained(out / "pipeline", text_encoder_3=None, tokenizer_3=None)
    shutil.rmtree(WEIGHTS / "text-to-image", ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(WEIGHTS / "text-to-image")
    shutil.copytree(out / "clip", WEIGHTS / "clip", dirs_exist_ok=True)
    CLIPModel.from_pretrained(out / "clip").to(torch.float16).save_pretrained(WEIGHTS / "clip")
    for config in WEIGHTS.rglob("*.json"):
        _forget_folder(config)
    files = sorted(file for file in WEIGHTS.rglob("*") if file.suffix in (".json", ".safetensors", ".txt"))
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(WEIGHTS)}\n" for file in files]
    (WEIGHTS / "SHA256SUMS").write_text("".join(sums))
    size = sum(file.stat().st_size for file in files)
    print(f"{size / 1e6:.2f} MB in {len(files)} files")
    if size > LIMIT:
        raise SystemExit(f"the weights take {size} bytes, more than {LIMIT}")
