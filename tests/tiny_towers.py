"""Tiny CLIP, SigLIP and ViT with random weights, as the hub has them, and checks of all rewards on such networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from flowalign.records import Media, Prompts
from rewards import Reward

LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = ("<pad>", "</s>", "<unk>", "a", "two", "red", "blue", "circle", "squares", "cross")


def noised(model: PreTrainedModel, scale: float) -> PreTrainedModel:
    """With weights so large that embeddings differ: as made, they hardly do."""
    for parameter in model.parameters():
        parameter.data.add_(scale * torch.randn_like(parameter))
    return model.eval()


def tiny_clip(side: int = 32, scale: float = 0.1) -> tuple[CLIPModel, CLIPTokenizer]:
    """Two layers of width 32 on patches of 8 pixels, 16 numbers; the same weights at every call."""
    tokenizer = byte_tokenizer()
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 40, "pad_token_id": tokenizer.pad_token_id}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = {"image_size": side, "patch_size": 8}
    config = CLIPConfig(text_config=LAYERS | text | ends, vision_config=LAYERS | vision, projection_dim=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = CLIPModel(config)
        noised(model, scale)
    return model, tokenizer


def save_clip(folder: Path, side: int = 32, scale: float = 0.1) -> Path:
    """`tiny_clip` with its tokenizer."""
    model, tokenizer = tiny_clip(side, scale)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_siglip(folder: Path) -> Path:
    """Two layers of width 24, 9 tokens, 16 pixels; the same weights at every call."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokens.save_pretrained(folder)
    layers = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = layers | {"vocab_size": len(WORDS), "max_position_embeddings": 9, "projection_size": 24}
    config = SiglipConfig(text_config=text, vision_config=layers | {"image_size": 16, "patch_size": 8})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        model = SiglipModel(config)
        noised(model, 0.15)
    model.logit_scale.data.fill_(2.0)
    model.logit_bias.data.fill_(-3.0)
    model.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def save_vit(folder: Path) -> Path:
    """Two layers of width 32 on 32 pixels, without a pooler; the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = ViTConfig(**LAYERS, image_size=32, patch_size=8, layer_norm_eps=1e-12)
        noised(ViTModel(config, add_pooling_layer=False), 0.2).save_pretrained(folder)
    return folder


def check_bfloat16(full: Reward, half: Reward, media: Media, asked: Prompts, atol: float) -> None:
    """Scores and pixel gradients of a reward with a network in bfloat16 are near those in float32, and others.

    Rounding to 8 bits of precision is off by up to 2^-9 of a number; the twenty or so of them one after another that a
    network of two layers makes add up, at random, to about 1 % of an embedding, and its cosines are off by about 0.01.
    """
    totals, slopes = [], []
    for reward in (full, half):
        pixels = media.pixels.clone().requires_grad_()
        scores = reward(Media(pixels, media.fps, media.references), asked, grad=True)
        assert scores.total.dtype == torch.float32
        assert all(part.dtype == torch.float32 for part in scores.parts.values())
        assert scores.valid.all()
        totals.append(scores.total.detach())
        slopes.append(torch.autograd.grad(scores.total.sum(), pixels)[0])
    assert not torch.equal(*totals), "the network is in float32 after all"
    torch.testing.assert_close(totals[1], totals[0], rtol=0, atol=atol)
    assert slopes[1].isfinite().all()
    assert F.cosine_similarity(slopes[0].flatten(), slopes[1].flatten(), dim=0) > 0.95


def check_finite_differences(slope: Tensor, function: Callable[[Tensor], Tensor], at: Tensor) -> None:
    """A gradient against central differences, in float64, of a function of one number in eight random directions."""
    assert slope.norm() > 1e-3
    with torch.no_grad():
        for _ in range(8):
            step = 1e-5 * torch.randn(at.shape, dtype=torch.float64)
            measured = (function(at.double() + step) - function(at.double() - step)).item() / 2
            assert measured == pytest.approx((slope.double() * step).sum().item(), rel=1e-3)
