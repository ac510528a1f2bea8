"""HPSv2 and HPSv2.1: a ViT-H/14 CLIP tuned on human preferences (arXiv:2306.09341, Wu et al.)."""

from __future__ import annotations

import html
import importlib
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rewards.base import Card
from rewards.clip import CLIPTowers, load_tokenizer, local_name
from rewards.clip_weights import load_open_clip
from rewards.pixels import CLIP_MEAN, CLIP_STD, normalise, to_eight_bit
from rewards.towers import Dtype, read_weights, weights_file

FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}
HEADS = 16  # of both towers of ViT-H/14
QUOTES = {**dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc", "'"), **dict.fromkeys("\u201c\u201d\u201e\u201f", '"')}
WIDE = [*range(0xFB00, 0xFB07), *range(0xFF01, 0xFF5F), 0x3000]  # Latin ligatures, full-width ASCII and space


@dataclass(frozen=True)
class LongestSide:
    """The longest side to `size`, zeros around it to a square, channels normalised as CLIP's.

    As HPSv2's code does it: on float pixels, so bicubic overshoots stay, and the zeros are black before normalising.
    Where the margin is odd, the smaller half is on the top and the left.

    antialias: torchvision's default since 0.17. HPSv2 was trained, and its first numbers were made, without.
    """

    size: int
    antialias: bool = True

    def __call__(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 k k"]:
        """The network's input for pictures in [0, 1]; differentiable."""
        height, width = pixels.shape[2:]
        scale = self.size / max(height, width)
        new = max(round(height * scale), 1), max(round(width * scale), 1)
        levels = to_eight_bit(pixels)
        if new != (height, width):
            levels = F.interpolate(levels, new, mode="bicubic", antialias=self.antialias)
        top, left = (self.size - new[0]) // 2, (self.size - new[1]) // 2
        around = (left, self.size - new[1] - left, top, self.size - new[0] - top)
        return normalise(F.pad(levels, around), CLIP_MEAN, CLIP_STD)


class HPSv2(CLIPTowers):
    """cos(picture, prompt) of a CLIP tuned on preferences, in float32; differentiable to the pixels.

    About 0.23 to 0.29 for version 2.0 and 0.15 to 0.35 for 2.1; the authors' tables show 100 times that. The versions
    cannot be compared, nor pictures of different prompts. The whole picture is seen, with black bars if not square.

    The published weights were not run here: what is tested is the authors' code on a small model with random weights,
    and all names and shapes of the full one.

    Args:
        version: "2.1" or "2.0": which file is taken from a folder or the hub; of no effect where `model` is a file.
        model: the weights' file (.pt or .safetensors), or a folder or hub id that has it. They are under Apache-2.0.
        processor: a folder or hub id of the CLIPTokenizer; it has to be OpenAI CLIP's vocabulary.
        antialias: of the resize; see `LongestSide`.
        device: where the model stays; by default it follows the pictures.
        batch_size: pictures, or prompts, that pass through the model at once.
        dtype: of the model; the rest is float32. See `rewards.towers.frozen`.
        offload: keeps the model on the CPU between calls. See `rewards.towers.Network`.

    Raises: ValueError where the weights are not there, or not those of such a model.
    """

    name = "hpsv2"
    card = Card("xswu/HPSv2", "Apache-2.0")  # of all versions

    def __init__(
        self,
        version: Literal["2.1", "2.0"] = "2.1",
        model: str = "xswu/HPSv2",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        antialias: bool = True,
        device: str | None = None,
        batch_size: int = 32,
        dtype: Dtype = "float32",
        offload: bool = False,
    ) -> None:
        if version not in FILES:
            raise ValueError(f"version must be '2.1' or '2.0', got {version!r}")
        path, tokenizer = weights_file(model, FILES[version]), load_tokenizer(local_name(processor), processor)
        network = load_open_clip(read_weights(path), HEADS, HEADS, str(path))
        if len(tokenizer) != network.config.text_config.vocab_size:
            words = network.config.text_config.vocab_size
            raise ValueError(f"{processor} has a vocabulary of {len(tokenizer)}, the weights {path} one of {words}")
        prepare = LongestSide(int(network.config.vision_config.image_size), antialias)
        super().__init__(network, tokenizer, prepare, device, batch_size, dtype, offload)
        usual = (0.15, 0.35) if version == "2.1" else (0.23, 0.29)
        self.card = Card(f"xswu/HPSv2 {FILES[version]}", "Apache-2.0", usual)

    def text_features(self, texts: list[str], device: torch.device) -> Float[Tensor, "b d"]:
        return super().text_features([clean(text) for text in texts], device)


def clean(text: str) -> str:
    """A text as open_clip's tokenizer cleans it: repaired, HTML entities resolved twice, single spaces, lower case.

    ftfy does the repair where it is installed. Without it: straight quotes, and plain letters for Latin ligatures and
    full-width characters, composed (NFC); wrongly decoded text (mojibake) then stays as it is.
    """
    fix = _ftfy()
    text = fix(text) if fix else repair(html.unescape(text) if "<" not in text else text)
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


def repair(text: str) -> str:
    """The part of ftfy's fix_text that matters to prompts."""
    table: dict[int, str] = {ord(quote): plain for quote, plain in QUOTES.items()}
    table |= {code: unicodedata.normalize("NFKC", chr(code)) for code in WIDE}
    return unicodedata.normalize("NFC", text.translate(table))


@lru_cache(maxsize=1)
def _ftfy() -> Callable[[str], str] | None:
    try:
        return importlib.import_module("ftfy").fix_text
    except ModuleNotFoundError:
        return None
