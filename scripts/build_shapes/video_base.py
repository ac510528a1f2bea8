"""The video base model: a Wan pipeline of tiny size, trained on captions of which some are wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from base import DROPPED, Phase, make_tokenizer
from common import fit
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTokenizer, UMT5Config, UMT5EncoderModel
from video_vae import LATENT_CHANNELS, encode

from flowalign.shapes.video.prompts import captioned
from flowalign.shapes.video.scenes import KINDS

BATCH = 64
TOKENS = 20
WIDTH = 128
PHASES = (
    Phase("video_base", 15_000, 1e-3, 50_000, 33, dict.fromkeys(KINDS, 0.3)),
    Phase("video_finish", 4_000, 5e-4, 25_000, 34, dict.fromkeys(KINDS, 0.15)),
)
# The pipeline pads prompts with zeros, 512 tokens unless told otherwise: a few batches show it so.
PADDED_EVERY, PADDED = 40, 512


def make_pipeline(vae: AutoencoderKLWan, tokenizer: CLIPTokenizer) -> WanPipeline:
    """An untrained Wan 2.1 pipeline of tiny size."""
    encoder = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=WIDTH,
        freq_dim=64,
        ffn_dim=4 * WIDTH,
        num_layers=7,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(encoder),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        transformer=transformer,
    )


def training_set(vae: AutoencoderKLWan, out: Path, phase: Phase) -> tuple[Tensor, list[str]]:
    """Normalised latents and captions of a phase, kept in files for the next start."""
    file, text = out / f"{phase.name}_latents.npy", out / f"{phase.name}_captions.json"
    if not file.exists():
        parts, captions = [], list[str]()
        for chunk in range(0, phase.scenes, 5_000):
            made = captioned(5_000, phase.seed * 1_000 + chunk // 5_000, phase.wrong)
            parts.append(encode(vae, torch.from_numpy(made.videos.transpose(0, 2, 1, 3, 4))))
            captions += made.captions
            print(f"{phase.name} scenes {chunk + 5_000}/{phase.scenes}", flush=True)
        mean, std = (
            torch.tensor(one).view(1, -1, 1, 1, 1) for one in (vae.config.latents_mean, vae.config.latents_std)
        )
        text.write_text(json.dumps(captions))
        np.save(file, ((torch.cat(parts) - mean) / std).numpy())
    return torch.from_numpy(np.load(file)), json.loads(text.read_text())


def build_video_base(out: Path) -> None:
    """Rectified flow on the latents, transformer and text encoder trained together."""
    torch.manual_seed(4)
    vae = AutoencoderKLWan.from_pretrained(out / "video_vae").eval()
    sets = [training_set(vae, out, phase) for phase in PHASES]
    tokenizer = make_tokenizer(sets[0][1])
    tokenizer.model_max_length = TOKENS
    pipe = make_pipeline(vae, tokenizer)
    module = torch.nn.ModuleDict({"t": pipe.transformer, "e": pipe.text_encoder}).train()
    if shutil.which("c++"):  # half the time of a step: most of it is small elementwise operations
        pipe.transformer.compile()
        pipe.text_encoder.compile()
    padded = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
    for phase, (latents, captions) in zip(PHASES, sets, strict=True):
        tokens = tokenizer([*captions, ""], **padded)
        loss = flow_loss(pipe, latents, tokens.input_ids, tokens.attention_mask)
        fit(phase.name, module, loss, phase.steps, phase.learning_rate, out)
    pipe.save_pretrained(out / "video_pipeline")


def flow_loss(pipe: WanPipeline, latents: Tensor, ids: Tensor, mask: Tensor) -> Callable[[int], Tensor]:
    """The flow-matching loss of step k's batch; the last row of the tokens is the empty caption."""

    def loss_of(step: int) -> Tensor:
        whole = step % PADDED_EVERY == 0
        rng = torch.Generator().manual_seed(step)
        rows = torch.randint(len(latents), (BATCH // (8 if whole else 1),), generator=rng)
        target = latents[rows]
        noise = torch.randn(target.shape, generator=rng)
        sigma = torch.where(
            torch.rand(len(rows), generator=rng) < 0.5,
            torch.rand(len(rows), generator=rng),
            torch.sigmoid(torch.randn(len(rows), generator=rng)),
        )
        told = torch.where(torch.rand(len(rows), generator=rng) < DROPPED, len(latents), rows)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            read = pipe.text_encoder.forward if whole else pipe.text_encoder
            states = read(ids[told], mask[told]).last_hidden_state * mask[told][..., None]
            s = sigma.view(-1, 1, 1, 1, 1)
            call = pipe.transformer.forward if whole else pipe.transformer  # the former is not compiled
            predicted = call(
                hidden_states=(1 - s) * target + s * noise,
                timestep=1000 * sigma,
                encoder_hidden_states=F.pad(states, (0, 0, 0, PADDED - TOKENS if whole else 0)),
                return_dict=False,
            )[0]
        return F.mse_loss(predicted.float(), noise - target)

    return loss_of
