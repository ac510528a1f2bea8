"""The autoencoder: 32 x 32 pictures to latents of 8 x 4 x 4 and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from common import batches, fit
from diffusers import AutoencoderKL
from torch import Tensor

from flowalign.shapes import scenes

STEPS = 5000
CHANNELS = (24, 48, 64, 64)
LATENT_CHANNELS = 8


def make_vae() -> AutoencoderKL:
    """An SD3-style autoencoder from 32 x 32 pictures to latents of 8 x 4 x 4."""
    levels = len(CHANNELS)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=scenes.SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def pictures(count: int, seed: int, out: Path) -> Tensor:
    """`count` rendered scenes as uint8 [n, 3, h, w], kept in a file for the next start."""
    file = out / f"pictures_{seed}_{count}.npy"
    if not file.exists():
        rng = np.random.default_rng(seed)
        np.save(file, np.stack([scenes.render(scenes.random_spec(rng), rng) for _ in range(count)]))
    return torch.from_numpy(np.load(file))


def build_vae(out: Path) -> None:
    """L1 plus a faint KL, so that latents stay smooth; then the scaling that gives latents unit variance."""
    torch.manual_seed(0)
    data = pictures(60_000, 1, out)
    vae = make_vae().to(memory_format=torch.channels_last)

    def loss_of(step: int) -> Tensor:
        rows = next(batches(len(data), 64, 2, step))
        target = (data[rows].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step))
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        weight = 1 + 4 * ((target - target[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.1)
        kl = posterior.kl().float().mean() / target[0].numel()
        return (weight * ((decoded - target).abs() + (decoded - target) ** 2)).mean() + 1e-3 * kl

    fit("vae", vae, loss_of, STEPS, 2e-3, out)
    vae = vae.to(memory_format=torch.contiguous_format).eval()
    with torch.no_grad():
        latents = vae.encode(data[:4096].float() / 127.5 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    vae.save_pretrained(out / "vae")
    print(f"latents: std {latents.std():.4f} mean {latents.mean():.4f}")
