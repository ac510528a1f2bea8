"""The package's weights: what the stages made, in float16, with their hashes."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, StableDiffusion3Pipeline, WanPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPModel

from flowalign.shapes import VIDEO_WEIGHTS, WEIGHTS

LIMIT = 12_000_000  # bytes of each world
LORA = "pytorch_lora_weights.safetensors"


def _forget_folder(config: Path) -> None:
    """Take the builder's own folder, which diffusers notes in its configs, out of one."""
    held = json.loads(config.read_text())
    if isinstance(held, dict) and held.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(held, indent=2) + "\n")


def export(out: Path) -> None:
    """Write flowalign/shapes/weights of the stages that are in the folder; its README is kept by hand."""
    if (out / "pipeline").exists():
        pipe = StableDiffusion3Pipeline.from_pretrained(out / "pipeline", text_encoder_3=None, tokenizer_3=None)
        shutil.rmtree(WEIGHTS / "text-to-image", ignore_errors=True)
        pipe.to(torch.float16).save_pretrained(WEIGHTS / "text-to-image")
    if (out / "clip").exists():
        shutil.copytree(out / "clip", WEIGHTS / "clip", dirs_exist_ok=True)
        CLIPModel.from_pretrained(out / "clip").to(torch.float16).save_pretrained(WEIGHTS / "clip")
    if (out / "few_step" / LORA).exists():
        (WEIGHTS / "few-step").mkdir(exist_ok=True)
        with safe_open(out / "few_step" / LORA, "pt") as held:  # its metadata says rank and alpha
            halves = {name: held.get_tensor(name).half() for name in held.keys()}  # noqa: SIM118
            save_file(halves, WEIGHTS / "few-step" / LORA, held.metadata())
    _seal(WEIGHTS)


def export_video(out: Path) -> None:
    """Write flowalign/shapes/video/weights; its README is kept by hand."""
    vae = AutoencoderKLWan.from_pretrained(out / "video_vae_finished")
    pipe = WanPipeline.from_pretrained(out / "video_pipeline", vae=vae)
    shutil.rmtree(VIDEO_WEIGHTS / "text-to-video", ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(VIDEO_WEIGHTS / "text-to-video")
    _seal(VIDEO_WEIGHTS)


def _seal(folder: Path) -> None:
    for config in folder.rglob("*.json"):
        _forget_folder(config)
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".json", ".safetensors", ".txt"))
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(folder)}\n" for file in files]
    (folder / "SHA256SUMS").write_text("".join(sums))
    size = sum(file.stat().st_size for file in files)
    print(f"{size / 1e6:.2f} MB in {len(files)} files")
    if size > LIMIT:
        raise SystemExit(f"the weights take {size} bytes, more than {LIMIT}")
