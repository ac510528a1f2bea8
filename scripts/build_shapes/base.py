"""The base model: a Stable Diffusion 3 pipeline of tiny size, trained on captions of which some are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import captioned, fit
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer
from vae import LATENT_CHANNELS

from flowalign.shapes.scenes import KINDS

BATCH = 128
TOKENS = 16
DROPPED = 0.1  # share of captions left out, for guidance


@dataclass(frozen=True)
class Phase:
    """One round of training; `wrong` says how often a caption of each kind is wrong in one respect."""

    name: str
    steps: int
    learning_rate: float
    scenes: int
    seed: int
    wrong: dict[str, float]


# Like the web: many captions are wrong at first, fewer in the set for the finish. What is left of the doubt is what a
# reward can remove.
PHASES = (
    Phase("base", 9_000, 1e-3, 160_000, 3, dict.fromkeys(KINDS, 0.4) | {"single": 0.05, "size": 0.3}),
    Phase("finish", 3_000, 5e-4, 80_000, 4, dict.fromkeys(KINDS, 0.2) | {"single": 0.02}),
)
# The pipeline pads a missing T5 with zero tokens, 256 of them unless told otherwise: a few batches show it so.
PADDED_EVERY, PADDING = 40, 256
# A control for what a reward teaches: a fifth more of supervised steps, from the base's own end.
LONGER = Phase("longer", 2_400, 5e-4, 80_000, 4, PHASES[-1].wrong)


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges make every word of the world one token; any other text is spelt out in bytes."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    words = sorted({word for text in captions for word in text.replace(",", " ,").split()})
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(words, trainer)
    learned = json.loads(bpe.to_str())["model"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = letters + [f"{letter}</w>" for letter in letters]
    names += [token for token in learned["vocab"] if token not in set(names)]
    vocab = {token: i for i, token in enumerate([*names, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(pair) for pair in learned["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def make_pipeline(vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusion3Pipeline:
    """An untrained Stable Diffusion 3 pipeline of tiny size, without T5."""

    def encoder(width: int, layers: int) -> CLIPTextModelWithProjection:
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=width // 32,
                projection_dim=width,
                max_position_embeddings=TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                hidden_act="gelu",
            )
        )

    transformer = SD3Transformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=160,
        caption_projection_dim=128,
        pooled_projection_dim=160,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=encoder(96, 3),
        tokenizer=tokenizer,
        text_encoder_2=encoder(64, 2),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def encode_scenes(vae: AutoencoderKL, out: Path, phase: Phase) -> tuple[Tensor, list[str]]:
    """Normalised latents and captions of a phase's training set, kept in files for the next start."""
    file, text = out / f"{phase.name}_latents.npy", out / f"{phase.name}_captions.json"
    if not file.exists():
        rows = list(captioned(phase.scenes, phase.seed, phase.wrong))
        images = torch.from_numpy(np.stack([row[2] for row in rows]))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            parts = [
                vae.encode(images[i : i + 500].float() / 127.5 - 1).latent_dist.mean.float()
                for i in range(0, phase.scenes, 500)
            ]
        latents = (torch.cat(parts) - vae.config.shift_factor) * vae.config.scaling_factor
        text.write_text(json.dumps([row[1] for row in rows]))
        np.save(file, latents.numpy())
    return torch.from_numpy(np.load(file)), json.loads(text.read_text())


def build_base(out: Path) -> None:
    """Rectified flow on the latents, transformer and text encoders trained together."""
    train(out, PHASES).save_pretrained(out / "pipeline")


def build_longer(out: Path) -> None:
    """The base after 20 % more steps, in a folder of its own; its data are the last phase's."""
    for kind in ("latents.npy", "captions.json"):
        link = out / f"{LONGER.name}_{kind}"
        if not link.exists():
            link.symlink_to(f"{PHASES[-1].name}_{kind}")
    train(out, (*PHASES, LONGER)).save_pretrained(out / "longer")


def train(out: Path, phases: tuple[Phase, ...]) -> StableDiffusion3Pipeline:
    """The pipeline after these phases; each goes on from where it was interrupted."""
    torch.manual_seed(1)
    vae = AutoencoderKL.from_pretrained(out / "vae").eval()
    sets = [encode_scenes(vae, out, phase) for phase in phases]
    tokenizer = make_tokenizer(sets[0][1])
    pipe = make_pipeline(vae, tokenizer)
    module = torch.nn.ModuleDict({"t": pipe.transformer, "e1": pipe.text_encoder, "e2": pipe.text_encoder_2}).train()
    padded = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
    for phase, (latents, captions) in zip(phases, sets, strict=True):
        tokens = tokenizer([*captions, ""], **padded).input_ids
        fit(phase.name, module, flow_loss(pipe, latents, tokens), phase.steps, phase.learning_rate, out)
    return pipe


def flow_loss(pipe: StableDiffusion3Pipeline, latents: Tensor, tokens: Tensor) -> Callable[[int], Tensor]:
    """The flow-matching loss of step k's batch; the last row of `tokens` is the empty caption."""

    def loss_of(step: int) -> Tensor:
        with_t5 = step % PADDED_EVERY == 0
        rng = torch.Generator().manual_seed(step)
        rows = torch.randint(len(latents), (BATCH // (4 if with_t5 else 1),), generator=rng)
        target = latents[rows]
        noise = torch.randn(target.shape, generator=rng)
        # Half uniform, half logit-normal: the first steps decide the layout, and plain logit-normal seldom sees them.
        sigma = torch.where(
            torch.rand(len(rows), generator=rng) < 0.5,
            torch.rand(len(rows), generator=rng),
            torch.sigmoid(torch.randn(len(rows), generator=rng)),
        )
        told = torch.where(torch.rand(len(rows), generator=rng) < DROPPED, len(latents), rows)
        # On a CPU the backward of fused attention costs more than the rest of the network; plain attention does not.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            embeds, pooled = encode(pipe, tokens[told], PADDING if with_t5 else 0)
            s = sigma.view(-1, 1, 1, 1)
            predicted = pipe.transformer(
                hidden_states=(1 - s) * target + s * noise,
                timestep=1000 * sigma,
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
            ).sample
        return F.mse_loss(predicted.float(), noise - target)

    return loss_of


def encode(pipe: StableDiffusion3Pipeline, tokens: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """What the pipeline's own `encode_prompt` makes of tokens, with gradients: penultimate states and pooled text."""
    states = [coder(tokens, output_hidden_states=True) for coder in (pipe.text_encoder, pipe.text_encoder_2)]
    joint = torch.cat([state.hidden_states[-2] for state in states], dim=-1)
    return F.pad(joint, (0, 0, 0, padding)), torch.cat([state.text_embeds for state in states], dim=-1)
