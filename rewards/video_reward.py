"""VideoReward: visual quality, motion quality and text alignment of videos (arXiv:2501.13918, Liu et al.)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from flowalign.records import Media, Prompts, Scores
from rewards.base import Card, simple_scores
from rewards.pixels import CLIP_MEAN, CLIP_STD, normalise
from rewards.qwen2vl import (
    VIDEO,
    Qwen2VLScorer,
    embedding_rows,
    find,
    load_base,
    read_template,
    resize_frames,
    smart_resize,
)
from rewards.qwen2vl_reward import Qwen2VLReward, check_settings
from rewards.towers import Dtype, read_weights

PARTS = ("VQ", "MQ", "TA")
MARKS = tuple(f"<|{part}_reward|>" for part in PARTS)
MEAN, STD = (3.6757, 1.1646, 2.8105), (2.2476, 1.3811, 2.5121)  # of VQ, MQ, TA (the checkpoint's model_config.json)
LEAST, MOST = 4, 768  # frames
TEMPLATE = """Score this generated video.

How good each frame looks: <|VQ_reward|>
END

How natural and steady the motion is: <|MQ_reward|>
END

What was asked for: {prompt}
How well the video shows it: <|TA_reward|>
END
"""


class VideoReward(Qwen2VLReward):
    """VQ + MQ + TA, each a logit of a tuned Qwen2-VL-2B less its mean, by its deviation; differentiable to the pixels.

    Parts VQ (visual quality), MQ (motion quality) and TA (text alignment) lie about -2 to 2. Mean and deviation are
    those of the checkpoint's model_config.json, where it has no others the authors' published ones.

    Frames are taken evenly at `fps` frames per second, at least 4 and an even number, and resized so that they have
    between min_pixels and max_pixels pixels; the authors read encoded files, whose compression is missing here. A
    gradient through 16 frames of 448 x 448 holds about 15 GB of activations in bfloat16 unless `recompute` is set.

    The published weights were not run here: what is tested is that a small network gives what the authors' way to call
    it gave with transformers 4.45.2, scores and gradients, from the 8-bit frames and the prompt on.

    Args:
        model: a folder or hub id with model_config.json and checkpoint-<n>/model.pth, the last one of which is taken.
            LoRA weights are merged in float32. The weights are under the Apache-2.0 licence, the code under MIT's.
        base: a folder or hub id of the model that was tuned, for its config and tokenizer.
        template: a text file with the instruction, "{prompt}" in it, and the tokens <|VQ_reward|>, <|MQ_reward|> and
            <|TA_reward|>. Published scores need the authors' text, DETAILED_PROMPT_WITH_SPECIAL_TOKEN in
            prompt_template.py of github.com/KwaiVGI/VideoAlign, letter for letter, line breaks at both ends too.
            Without one, a short text of our own is used, and scores are NOT the published ones.
        device: where the model stays; by default it follows the videos.
        batch_size: videos that pass through the model at once.
        dtype: of the model; the head is float32.
        fps: frames per second that the model sees.
        min_pixels: of a frame, before rounding to multiples of 28.
        max_pixels: likewise.
        recompute: recompute activations in the backward pass, for less memory.
        offload: keeps the model on the CPU between calls, see `rewards.towers.Network`; not with `recompute`.

    Raises: ValueError where weights, config or tokenizer cannot be had or do not fit; in a score for pictures, for
        videos of less than two frames and for those that do not say their frames per second.
    """

    name = "video_reward"
    card = Card("KwaiVGI/VideoReward, checkpoint-*/model.pth", "Apache-2.0", (-6.0, 6.0), "video")

    def __init__(
        self,
        model: str = "KwaiVGI/VideoReward",
        base: str = "Qwen/Qwen2-VL-2B-Instruct",
        template: str | None = None,
        device: str | None = None,
        batch_size: int = 4,
        dtype: Dtype = "bfloat16",
        fps: float = 2.0,
        min_pixels: int = 128 * 28 * 28,
        max_pixels: int = 256 * 28 * 28,
        recompute: bool = False,
        offload: bool = False,
    ) -> None:
        check_settings(batch_size, min_pixels, max_pixels, recompute, offload)
        if not fps > 0:
            raise ValueError(f"fps must be above 0, got {fps}")
        text = read_template(template, TEMPLATE, MARKS, type(self).__name__)
        scorer, self.mean, self.std = _load(model, base, text, getattr(torch, dtype))
        super().__init__(scorer, device, batch_size, recompute, offload)
        self.fps, self.min_pixels, self.max_pixels = fps, min_pixels, max_pixels

    def score(self, media: Media, prompts: Prompts) -> Scores:
        raw = three(self.outputs(self._frames(media), prompts.text))
        parts = (raw - raw.new_tensor(self.mean)) / raw.new_tensor(self.std)
        return simple_scores(self.name, parts.sum(1), dict(zip(PARTS, parts.unbind(1), strict=True)))

    def prepare(self, frames: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t 3 k l"]:
        size = smart_resize(frames.shape[3], frames.shape[4], self.min_pixels, self.max_pixels)
        return normalise(resize_frames(frames.flatten(0, 1), *size), CLIP_MEAN, CLIP_STD).unflatten(0, frames.shape[:2])

    def _frames(self, media: Media) -> Float[Tensor, "b t 3 h w"]:
        if not media.is_video:
            raise ValueError(f"VideoReward scores videos [b, f, 3, h, w], got the shape {list(media.pixels.shape)}")
        if media.fps is None:
            raise ValueError(
                "VideoReward has to know how fast a video plays: give its frames per second, Media(pixels, fps=8.0)"
            )
        return media.pixels[:, frame_indices(media.pixels.shape[1], media.fps, self.fps).to(media.pixels.device)]


def three(logits: Float[Tensor, "b 3 o"]) -> Float[Tensor, "b 3"]:
    """One logit per mark: the head's only one, or of three outputs the mark's own."""
    return logits.squeeze(2) if logits.shape[2] == 1 else logits.diagonal(dim1=1, dim2=2)


def frame_indices(frames: int, fps: float, target: float) -> Int[Tensor, " n"]:
    """Evenly spread frames from the first to the last: duration times `target` of them, even, 4 to 768, as there are.

    As VideoAlign's vision_process.py, which goes back to qwen_vl_utils; halves are rounded to even.

    Raises: ValueError for less than two frames, or for frames per second that are not positive.
    """
    if frames < 2 or not 0 < fps < math.inf:
        raise ValueError(f"VideoReward needs two frames and a positive fps, got {frames} frames at {fps} fps")
    wanted = min(max(frames / fps * target, LEAST), min(MOST, frames) // 2 * 2)
    return torch.linspace(0, frames - 1, round(wanted / 2) * 2).round().long()


def merge_lora(state: Mapping[str, Tensor], alpha: float, rslora: bool) -> dict[str, Tensor]:
    """Plain weights out of PEFT's: W + alpha / r B A in float32, or alpha / sqrt(r) if `rslora` (arXiv:2312.03732).

    Weights of an adapter that belong to no layer are left in, under their names.
    """
    merged = {name.removeprefix("base_model.model."): value for name, value in state.items()}
    for name in [name for name in merged if name.endswith(".base_layer.weight")]:
        layer = name.removesuffix(".base_layer.weight")
        down, up = (merged.pop(f"{layer}.lora_{side}.default.weight", None) for side in "AB")
        if down is None or up is None:
            raise ValueError(f"{layer} has no lora_A and lora_B of the adapter 'default'")
        scale = alpha / (math.sqrt(len(down)) if rslora else len(down))
        merged[f"{layer}.weight"] = merged.pop(name).float() + scale * (up.float() @ down.float())
        if (bias := merged.pop(f"{layer}.base_layer.bias", None)) is not None:
            merged[f"{layer}.bias"] = bias
    return merged


def _load(model: str, base: str, template: str, dtype: torch.dtype) -> tuple[Qwen2VLScorer, list[float], list[float]]:
    """The network, and the logits' means and deviations."""
    folder = find(model, ["model_config.json", "checkpoint-*/model.pth"], "VideoReward: the model")
    settings, checkpoint = _settings(folder), _checkpoint(folder)
    config, tokenizer = load_base(base, "VideoReward")
    lora = settings.get("peft_lora_config", {})
    state = merge_lora(
        read_weights(checkpoint), float(lora.get("lora_alpha", 128)), bool(lora.get("use_rslora", False))
    )
    outputs = len(state.get("rm_head.weight", ()))
    if outputs not in (1, 3):
        raise ValueError(f"{checkpoint} has {outputs} outputs (rm_head.weight), VideoReward has 1 or 3")
    config.text_config.vocab_size = embedding_rows(state)
    scorer = Qwen2VLScorer(
        config, nn.Linear(config.text_config.hidden_size, outputs, bias=False), tokenizer, MARKS, template, VIDEO
    )
    scorer.load(state, str(checkpoint), dtype)
    given = settings.get("inference_config") or {}
    mean = [float(given.get(f"{part}_mean", value)) for part, value in zip(PARTS, MEAN, strict=True)]
    std = [float(given.get(f"{part}_std", value)) for part, value in zip(PARTS, STD, strict=True)]
    return scorer, mean, std


def _settings(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "model_config.json").read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"VideoReward: {folder} has no model_config.json that can be read: {error}") from error


def _checkpoint(folder: Path) -> Path:
    """The model.pth of the most steps."""
    found = {int(path.parent.name.split("-")[-1]): path for path in folder.glob("checkpoint-[0-9]*/model.pth")}
    if not found:
        raise ValueError(f"VideoReward: {folder} has no checkpoint-<steps>/model.pth")
    return found[max(found)]
