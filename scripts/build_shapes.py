"""Build the embedded world's weights from nothing: VAE, then text-to-image base, then CLIP, then the package's files.

    python scripts/build_shapes.py vae  --out build/shapes
    python scripts/build_shapes.py base --out build/shapes     # needs the VAE
    python scripts/build_shapes.py clip --out build/shapes     # independent of both
    python scripts/build_shapes.py export --out build/shapes

Every stage saves its state each minute and goes on from it when started again; on two CPU cores all of them together
take less than two hours (the weights' README has the measured times).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
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

from flowalign.shapes import scenes
from flowalign.shapes.prompts import held_out

VAE_STEPS = 5000
VAE_CHANNELS = (24, 48, 64, 64)
LATENT_CHANNELS = 8
BASE_STEPS = 9_000
BASE_BATCH = 128
SCENES = 160_000
TOKENS = 16
# How often a caption of each kind is wrong in one respect, and how often it is left out (for guidance).
WRONG = {"single": 0.05, "size": 0.3, "count": 0.4, "pair": 0.4, "relation": 0.4, "triple": 0.4, "count_pair": 0.4}
DROPPED = 0.1
# The pipeline pads a missing T5 with zero tokens, 256 of them unless told otherwise: a few batches show it so.
PADDED_EVERY, PADDING = 40, 256


def make_vae() -> AutoencoderKL:
    """An SD3-style autoencoder from 32 x 32 pictures to latents of 8 x 4 x 4."""
    levels = len(VAE_CHANNELS)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=VAE_CHANNELS,
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


def batches(total: int, size: int, seed: int, start: int) -> Iterator[Tensor]:
    """Row indexes of endless random batches; batch k is the same wherever a run was interrupted."""
    step = start
    while True:
        yield torch.from_numpy(np.random.default_rng((seed, step)).integers(0, total, size))
        step += 1


def fit(
    name: str,
    module: torch.nn.Module,
    loss_of: Callable[[int], Tensor],
    steps: int,
    learning_rate: float,
    out: Path,
    report: Callable[[], str] = lambda: "",
) -> None:
    """AdamW with warm-up and cosine decay over `loss_of(step)`, an EMA of the weights, and a state file each minute."""
    file = out / f"{name}_state.pt"
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    ema = {key: value.clone() for key, value in module.state_dict().items()}
    start, saved, seconds = 0, time.time(), 0.0
    if file.exists():
        state = torch.load(file, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        ema, start, seconds = state["ema"], state["step"], state["seconds"]
    began = time.time() - seconds
    recent: list[float] = []
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                learning_rate
                * min(1.0, (step + 1) / 200)
                * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            )
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for key, value in module.state_dict().items():
                ema[key].lerp_(value, 1 - decay) if value.is_floating_point() else ema[key].copy_(value)
        recent.append(loss.item())
        if time.time() - saved > 60 or step + 1 == steps:
            saved, seconds = time.time(), time.time() - began
            state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema, "step": step + 1}
            torch.save(state | {"seconds": seconds}, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").rename(file)
            print(f"{name} {step + 1}/{steps} loss {np.mean(recent):.5f} {seconds:.0f}s {report()}", flush=True)
            recent.clear()
    module.load_state_dict(ema)


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

    fit("vae", vae, loss_of, VAE_STEPS, 2e-3, out)
    vae = vae.to(memory_format=torch.contiguous_format).eval()
    with torch.no_grad():
        latents = vae.encode(data[:4096].float() / 127.5 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    vae.save_pretrained(out / "vae")
    print(f"latents: std {latents.std():.4f} mean {latents.mean():.4f}")


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


def captioned(count: int, seed: int, wrong: dict[str, float]) -> Iterator[tuple[scenes.Spec, str, np.ndarray]]:
    """Scenes of training meanings with their pictures and captions, a share of which is wrong in one respect.

    Neither the scene nor the caption of a pair has a held-out meaning.
    """
    rng = np.random.default_rng(seed)
    while count:
        spec = scenes.random_spec(rng)
        if held_out(spec):
            continue
        told = scenes.corrupt(spec, rng) if rng.random() < wrong[spec.kind] else spec
        yield spec, scenes.caption(spec if held_out(told) else told, rng), scenes.render(spec, rng)
        count -= 1


def encode_scenes(vae: AutoencoderKL, out: Path) -> tuple[Tensor, list[str]]:
    """Normalised latents and captions of the base's training set, kept in files for the next start."""
    file, text = out / "latents.npy", out / "captions.json"
    if not file.exists():
        rows = list(captioned(SCENES, 3, WRONG))
        images = torch.from_numpy(np.stack([row[2] for row in rows]))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            parts = [
                vae.encode(images[i : i + 500].float() / 127.5 - 1).latent_dist.mean.float()
                for i in range(0, SCENES, 500)
            ]
        latents = (torch.cat(parts) - vae.config.shift_factor) * vae.config.scaling_factor
        text.write_text(json.dumps([row[1] for row in rows]))
        np.save(file, latents.numpy())
    return torch.from_numpy(np.load(file)), json.loads(text.read_text())


def build_base(out: Path) -> None:
    """Rectified flow on the latents, transformer and text encoders trained together."""
    torch.manual_seed(1)
    vae = AutoencoderKL.from_pretrained(out / "vae").eval()
    latents, captions = encode_scenes(vae, out)
    tokenizer = make_tokenizer(captions)
    pipe = make_pipeline(vae, tokenizer)
    tokens = tokenizer(
        [*captions, ""], padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    module = torch.nn.ModuleDict({"t": pipe.transformer, "e1": pipe.text_encoder, "e2": pipe.text_encoder_2}).train()

    def loss_of(step: int) -> Tensor:
        with_t5 = step % PADDED_EVERY == 0
        rng = torch.Generator().manual_seed(step)
        rows = torch.randint(len(captions), (BASE_BATCH // (4 if with_t5 else 1),), generator=rng)
        target = latents[rows]
        noise = torch.randn(target.shape, generator=rng)
        # Half uniform, half logit-normal: the first steps decide the layout, and plain logit-normal seldom sees them.
        sigma = torch.where(
            torch.rand(len(rows), generator=rng) < 0.5,
            torch.rand(len(rows), generator=rng),
            torch.sigmoid(torch.randn(len(rows), generator=rng)),
        )
        told = torch.where(torch.rand(len(rows), generator=rng) < DROPPED, len(captions), rows)
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

    fit("base", module, loss_of, BASE_STEPS, 1e-3, out)
    pipe.save_pretrained(out / "pipeline")


def encode(pipe: StableDiffusion3Pipeline, tokens: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """What the pipeline's own `encode_prompt` makes of tokens, with gradients: penultimate states and pooled text."""
    states = [coder(tokens, output_hidden_states=True) for coder in (pipe.text_encoder, pipe.text_encoder_2)]
    joint = torch.cat([state.hidden_states[-2] for state in states], dim=-1)
    return F.pad(joint, (0, 0, 0, padding)), torch.cat([state.text_embeds for state in states], dim=-1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["vae", "base", "clip", "export"])
    parser.add_argument("--out", type=Path, default=Path("build/shapes"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    {"vae": build_vae, "base": build_base}[arguments.stage](arguments.out)
