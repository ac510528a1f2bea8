"""The video autoencoder: nine frames of 32 x 32 to latents of 16 x 3 x 4 x 4 and back, of Wan's classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import batches, fit
from diffusers import AutoencoderKLWan
from torch import Tensor

from flowalign.shapes.video.prompts import captioned
from flowalign.shapes.video.render import render
from flowalign.shapes.video.scenes import KINDS, random_spec

STEPS, BATCH, LEARNING_RATE = 6_000, 12, 2e-3
# The decoder's phases: steps, learning rate, and whether it sees the meanings too that no caption of training has.
DECODER_PHASES = {"video_decoder": (12_000, 1e-3, False), "video_decoder_all": (4_000, 7e-4, True)}
EDGES = 2  # pixels about an object whose background counts as much: otherwise outlines grow round
MISSED = 0.05  # of a latent's deviation: noise that the decoder learns with, as the base's latents are never exact
SCENES = 20_000
LATENT_CHANNELS = 16
FRAMES = 9, 5  # of one step and of the next: the fewer cost half the time


def make_vae(mean: list[float] | None = None, std: list[float] | None = None) -> AutoencoderKLWan:
    """Wan's autoencoder at tiny size: 8 pixels and 4 frames are one latent.

    As Wan 2.2's it works on squares of 2 x 2 pixels, a fourth of the cost.
    """
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=8,
        latents_mean=mean or [0.0] * LATENT_CHANNELS,
        latents_std=std or [1.0] * LATENT_CHANNELS,
    )


def videos(count: int, seed: int, out: Path, held_out: bool = False) -> Tensor:
    """`count` rendered scenes as uint8 [n, 3, f, h, w], kept in a file for the next start.

    held_out: take scenes of all meanings, and not only of those of training.
    """
    file = out / f"videos_{seed}_{count}{'_all' if held_out else ''}.npy"
    if not file.exists():
        rng = np.random.default_rng(seed)
        specs = [random_spec(rng, KINDS) for _ in range(count)] if held_out else []
        made = render(specs, rng, max(FRAMES)) if held_out else captioned(count, seed).videos
        np.save(file, made.transpose(0, 2, 1, 3, 4))
    return torch.from_numpy(np.load(file, mmap_mode="c"))


def misfit(decoded: Tensor, target: Tensor, margin: int = 0) -> Tensor:
    """L1 and L2 in [-1, 1], five times where there is something to see or, in pixels, as near as the margin."""
    seen = ((target - target[:, :, :, :1, :1]).abs().amax(1, keepdim=True) > 0.1).float()
    weight = 1 + 4 * F.max_pool3d(seen, (1, 2 * margin + 1, 2 * margin + 1), 1, (0, margin, margin))
    return (weight * ((decoded - target).abs() + (decoded - target) ** 2)).mean()


def build_video_vae(out: Path) -> None:
    """The misfit and a faint KL; then each channel's mean and deviation."""
    torch.manual_seed(3)
    data, vae = videos(SCENES, 31, out), make_vae()

    def loss_of(step: int) -> Tensor:
        rows = next(batches(len(data), BATCH, 32, step))
        frames = FRAMES[step % 2]
        first = int(torch.randint(data.shape[2] - frames + 1, (), generator=torch.Generator().manual_seed(step)))
        target = data[rows][:, :, first : first + frames].float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step))
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        return misfit(decoded, target) + 1e-3 * posterior.kl().float().mean() / target[0].numel()

    fit("video_vae", vae, loss_of, STEPS, LEARNING_RATE, out)
    latents = encode(vae.eval(), data[:2048])
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    vae.save_pretrained(out / "video_vae")
    print(f"latents: mean {mean.tolist()} std {std.tolist()}")


def build_video_decoder(out: Path) -> None:
    """The decoder for longer, alone, on the latents that it has: the base can be trained on them meanwhile."""
    torch.manual_seed(5)
    vae = AutoencoderKLWan.from_pretrained(out / "video_vae").eval()
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    decoder = torch.nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    for name, (steps, learning_rate, held_out) in DECODER_PHASES.items():
        data, file = videos(SCENES, 36 if held_out else 31, out, held_out), out / f"{name}_latents.npy"
        if not file.exists():
            np.save(file, encode(vae, data).numpy())
        loss = decoder_loss(vae, data, torch.from_numpy(np.load(file)), std)
        fit(name, decoder, loss, steps, learning_rate, out)
    vae.save_pretrained(out / "video_vae_finished")


def decoder_loss(vae: AutoencoderKLWan, data: Tensor, latents: Tensor, std: Tensor) -> Callable[[int], Tensor]:
    """The misfit of what the decoder makes of a batch's noised latents."""

    def loss_of(step: int) -> Tensor:
        rows = next(batches(len(data), BATCH, 35, step))
        noise = torch.randn((len(rows), *latents.shape[1:]), generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode(latents[rows] + MISSED * std * noise).sample.float()
        return misfit(decoded, data[rows].float() / 127.5 - 1, EDGES)

    return loss_of


@torch.no_grad()
def encode(vae: AutoencoderKLWan, data: Tensor) -> Tensor:
    """The means of the latents of videos in 8 bit."""
    with torch.autocast("cpu", torch.bfloat16):
        parts = [vae.encode(part.float() / 127.5 - 1).latent_dist.mean.float() for part in data.split(64)]
    return torch.cat(parts)
