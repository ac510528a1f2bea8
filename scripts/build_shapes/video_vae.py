"""The video autoencoder: nine frames of 32 x 32 to latents of 8 x 3 x 4 x 4 and back, of Wan's classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from common import batches, fit
from diffusers import AutoencoderKLWan
from torch import Tensor

from flowalign.shapes.video.prompts import captioned

STEPS, BATCH, LEARNING_RATE = 6_000, 12, 2e-3
SCENES = 20_000
LATENT_CHANNELS = 8


def make_vae(mean: list[float] | None = None, std: list[float] | None = None) -> AutoencoderKLWan:
    """Wan 2.1's autoencoder at tiny size: 8 pixels and 4 frames are one latent."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        latents_mean=mean or [0.0] * LATENT_CHANNELS,
        latents_std=std or [1.0] * LATENT_CHANNELS,
    )


def videos(count: int, seed: int, out: Path) -> Tensor:
    """`count` rendered scenes as uint8 [n, 3, f, h, w], kept in a file for the next start."""
    file = out / f"videos_{seed}_{count}.npy"
    if not file.exists():
        np.save(file, captioned(count, seed).videos.transpose(0, 2, 1, 3, 4))
    return torch.from_numpy(np.load(file, mmap_mode="c"))


def build_video_vae(out: Path) -> None:
    """L1 and L2, more where there is something to see, plus a faint KL; then each channel's mean and deviation."""
    torch.manual_seed(3)
    data, vae = videos(SCENES, 31, out), make_vae()

    def loss_of(step: int) -> Tensor:
        rows = next(batches(len(data), BATCH, 32, step))
        target = data[rows].float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step))
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        weight = 1 + 4 * ((target - target[:, :, :, :1, :1]).abs().amax(1, keepdim=True) > 0.1)
        kl = posterior.kl().float().mean() / target[0].numel()
        return (weight * ((decoded - target).abs() + (decoded - target) ** 2)).mean() + 1e-3 * kl

    fit("video_vae", vae, loss_of, STEPS, LEARNING_RATE, out)
    latents = encode(vae.eval(), data[:2048])
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    vae.save_pretrained(out / "video_vae")
    print(f"latents: mean {mean.tolist()} std {std.tolist()}")


@torch.no_grad()
def encode(vae: AutoencoderKLWan, data: Tensor) -> Tensor:
    """The means of the latents of videos in 8 bit."""
    with torch.autocast("cpu", torch.bfloat16):
        parts = [vae.encode(part.float() / 127.5 - 1).latent_dist.mean.float() for part in data.split(64)]
    return torch.cat(parts)
