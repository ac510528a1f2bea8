"""Qwen2-VL (arXiv:2409.12191) as a judge: scores read off the hidden states of marked tokens, by a small head.

VideoReward and HPSv3 were trained with transformers 4.45.2, in a way that left out the multimodal rotary positions:
every token, of picture or text, has its place in the sequence on all three axes. A call of today's Qwen2VLModel with
its processor's output has other positions and gives other scores, so positions are passed here.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rewards.pixels import straight_through, to_eight_bit

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer, Qwen2VLConfig

_log = logging.getLogger("flowalign")

PATCH, MERGE, FRAMES = 14, 2, 2  # pixels of a patch's side, patches of a token's side, frames of a patch
FACTOR = PATCH * MERGE
LONGEST = 200  # the longer side by the shorter one, at most; the limit of Qwen's own preprocessing
PICTURE, VIDEO = "<|image_pad|>", "<|video_pad|>"  # stand where the features go, once per token
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|>{pads}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
)  # the model's chat template for one picture or video, then text, asking for an answer
TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", PICTURE, VIDEO)


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width in multiples of 28 near the given ones, with an area between the limits where rounding allows.

    Raises: ValueError where one side is more than 200 times the other.
    """
    if max(height, width) > LONGEST * min(height, width):
        raise ValueError(f"a picture of {height} x {width} is more than {LONGEST} times as long as it is wide")
    sides = [max(FACTOR, round(side / FACTOR) * FACTOR) for side in (height, width)]
    if math.prod(sides) > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        sides = [max(FACTOR, math.floor(side / scale / FACTOR) * FACTOR) for side in (height, width)]
    elif math.prod(sides) < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        sides = [math.ceil(side * scale / FACTOR) * FACTOR for side in (height, width)]
    return sides[0], sides[1]


def resize_frames(frames: Float[Tensor, "n 3 h w"], height: int, width: int) -> Float[Tensor, "n 3 k l"]:
    """Bicubic, antialiased, in float and rounded to 8 bit once: torchvision's `resize` of 8-bit tensors.

    qwen_vl_utils reads videos so; PIL, which resizes its pictures, rounds after each axis (`rewards.pixels.resize`).
    The gradient passes through the rounding.
    """
    levels = to_eight_bit(frames.float()) * 255
    if frames.shape[2:] == (height, width):
        return levels / 255
    resized = F.interpolate(levels, (height, width), mode="bicubic", antialias=True)
    return straight_through(resized.clamp(0, 255).round(), resized) / 255


def patchify(frames: Float[Tensor, "t c h w"]) -> Float[Tensor, "n d"]:
    """The visual network's input: rows of 2 x 14 x 14 pixels in the order of Qwen2VLImageProcessor; differentiable.

    Rows run over pairs of frames, then over tokens, then over the 2 x 2 patches of a token; columns over channel,
    frame, height, width. An odd last frame is doubled, so that a picture is a video of one frame.

    Args:
        frames: normalised, sides in multiples of 28.
    """
    if len(frames) % FRAMES:
        frames = torch.cat([frames, frames[-1:]])
    t, c, h, w = frames.shape
    cut = frames.reshape(t // FRAMES, FRAMES, c, h // FACTOR, MERGE, PATCH, w // FACTOR, MERGE, PATCH)
    return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, c * FRAMES * PATCH * PATCH)


def flat_positions(batch: int, length: int) -> Int[Tensor, "3 b n"]:
    """0 ... n - 1 on the axes of time, height and width alike, padding or not."""
    return torch.arange(length).expand(3, batch, length)


def read_template(path: str | None, default: str, marks: Sequence[str], name: str) -> str:
    """The instruction text: of a file, or the default one, which gives other scores than those published.

    Args:
        path: a text file that holds "{prompt}", or "{text_prompt}" as the authors write it, and each mark, in order.

    Raises: ValueError where the file cannot be read or lacks one of these.
    """
    if path is None:
        _log.warning("%s: no template given, so scores are not those of the published reward (see its docstring)", name)
        return default
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: the template {path} cannot be read: {error}") from error
    text = text.replace("{text_prompt}", "{prompt}")
    if text.count("{prompt}") != 1 or any(text.count(mark) != 1 for mark in marks):
        raise ValueError(f"{name}: the template {path} must hold each of {{prompt}}, {', '.join(marks)} once")
    if sorted(marks, key=text.index) != list(marks):
        raise ValueError(f"{name}: the template {path} must hold {', '.join(marks)} in this order")
    return text


class Qwen2VLScorer(nn.Module):
    """A Qwen2VLModel and a head in float32 on the hidden states of marked tokens.

    Args:
        config: of the model; its vocabulary is made as large as the checkpoint's.
        head: what maps hidden states [..., d] to outputs [..., o].
        tokenizer: of the model; the marks are added to it, in order.
        template: the user's text, with "{prompt}" and every mark in it once.
        pad: the token that stands for the pixels, `PICTURE` or `VIDEO`.
    """

    def __init__(
        self, config: Qwen2VLConfig, head: nn.Module, tokenizer: Qwen2Tokenizer, marks: Sequence[str], template: str,
        pad: str,
    ) -> None:  # fmt: skip
        from transformers import Qwen2VLModel

        super().__init__()
        with torch.device("meta"):
            self.backbone = Qwen2VLModel(config)
        self.rm_head, self.tokenizer, self.template, self.pad = head, tokenizer, template, pad
        tokenizer.add_tokens(list(marks), special_tokens=True)
        self.marks = [int(tokenizer.convert_tokens_to_ids(mark)) for mark in marks]
        self._special = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)

    def load(self, state: Mapping[str, Tensor], source: str, dtype: torch.dtype) -> None:
        """Takes the weights over, under the names of transformers 4 or 5; the model in `dtype`, the head in float32.

        Raises: ValueError that names what is missing, is left over or has another shape.
        """
        given, expected = renamed(state), self.state_dict()
        wrong = [f"missing {name}" for name in expected if name not in given]
        wrong += [f"unexpected {name}" for name in given if name not in expected]
        shared = [name for name in expected if name in given]
        wrong += [f"another shape of {name}" for name in shared if given[name].shape != expected[name].shape]
        if wrong:
            raise ValueError(f"{source} does not fit: {', '.join(wrong[:4])}{' ...' * (len(wrong) > 4)}")
        if max(self.marks) >= len(given["backbone.language_model.embed_tokens.weight"]):
            raise ValueError(f"{source} has no embeddings of the marks, tokens {self.marks}: is the tokenizer its own?")
        heads = [name for name in given if name.startswith("rm_head.")]
        cast = {name: value.to(torch.float32 if name in heads else dtype) for name, value in given.items()}
        self.load_state_dict(cast, assign=True)
        text, visual = self.backbone.language_model, self.backbone.visual  # their frequencies are in no checkpoint
        text.rotary_emb = type(text.rotary_emb)(text.config)
        visual.rotary_pos_emb = type(visual.rotary_pos_emb)(visual.config)
        self.eval().requires_grad_(False)

    def recompute(self) -> None:
        """Keep no activations for the backward pass but those between layers; nothing else depends on the mode."""
        with warnings.catch_warnings():  # 5.23 has another name for it, which 5.20 has not
            warnings.simplefilter("ignore", FutureWarning)
            self.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        self.backbone.train()

    def forward(self, frames: Float[Tensor, "b t 3 h w"], prompts: Sequence[str]) -> Float[Tensor, "b m o"]:
        """The head's outputs at each of the marks, for normalised frames on the model's device."""
        b, t, _, h, w = frames.shape
        grid = torch.tensor([[-(-t // FRAMES), h // PATCH, w // PATCH]], device=frames.device).expand(b, 3)
        patches = torch.cat([patchify(video) for video in frames])
        ids, mask = self.tokenize(prompts, int(grid[0].prod()) // MERGE**2)
        return self.outputs(patches, grid, ids.to(frames.device), mask.to(frames.device))

    def outputs(
        self, patches: Float[Tensor, "n d"], grid: Int[Tensor, "b 3"], ids: Int[Tensor, "b l"], mask: Int[Tensor, "b l"]
    ) -> Float[Tensor, "b m o"]:
        """The same for patches and token ids, padded on the right."""
        embedded = self.backbone.get_input_embeddings()(ids)
        features = self.backbone.visual(patches.to(embedded.dtype), grid_thw=grid).pooler_output
        place = (ids == self.tokenizer.convert_tokens_to_ids(self.pad))[..., None].expand_as(embedded)
        hidden = self.backbone.language_model(
            inputs_embeds=embedded.masked_scatter(place, features.to(embedded.dtype)),
            attention_mask=mask,
            position_ids=flat_positions(*ids.shape).to(ids.device),
            use_cache=False,
        ).last_hidden_state
        marked = hidden[torch.isin(ids, torch.tensor(self.marks, device=ids.device))]
        return self.rm_head(marked.float()).view(len(ids), len(self.marks), -1)

    def tokenize(self, prompts: Sequence[str], pads: int) -> tuple[Int[Tensor, "b l"], Int[Tensor, "b l"]]:
        """Token ids and their mask, on the right filled up with a token that is never seen."""
        texts = [self.template.replace("{prompt}", without(prompt, self._special)) for prompt in prompts]
        chats = [CHAT.replace("{pads}", self.pad * pads).replace("{text}", text) for text in texts]
        rows = [torch.tensor(self.tokenizer(chat).input_ids) for chat in chats]
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return pad_sequence(rows, batch_first=True), mask


def without(text: str, tokens: Sequence[str]) -> str:
    """The text without any of the tokens, also those that come to be where another is taken out."""
    while found := [token for token in tokens if token in text]:
        text = text.replace(found[0], "")
    return text


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under `Qwen2VLScorer`'s names, from those of Qwen2VLForConditionalGeneration, old or new."""
    made = {}
    for name, value in state.items():
        short = name.removeprefix("model.")
        if short.startswith(("visual.", "language_model.")):
            made[f"backbone.{short}"] = value
        elif name.startswith("rm_head."):
            made[name] = value
        elif not name.startswith("lm_head."):
            made[f"backbone.language_model.{short}"] = value
    return made


def embedding_rows(state: Mapping[str, Tensor]) -> int:
    """The size of a checkpoint's vocabulary, 0 where it has none; configs do not count the tokens that were added."""
    rows = [len(value) for name, value in state.items() if name.endswith("embed_tokens.weight")]
    return rows[0] if rows else 0


def load_base(base: str, name: str) -> tuple[Qwen2VLConfig, Qwen2Tokenizer]:
    """Config and tokenizer of the Qwen2-VL that a reward was tuned from; none of its weights.

    Raises: ValueError where it cannot be had or is something else.
    """
    from transformers import PretrainedConfig, Qwen2Tokenizer, Qwen2VLConfig

    folder = find(base, ["*.json", "merges.txt"], f"{name}: the base model")
    try:
        kind = PretrainedConfig.get_config_dict(folder)[0].get("model_type")
        if kind != "qwen2_vl":
            raise ValueError(f"{name}: {base} holds a model of type {kind!r}, not 'qwen2_vl'")
        config, tokenizer = Qwen2VLConfig.from_pretrained(folder), Qwen2Tokenizer.from_pretrained(folder)
    except OSError as error:
        raise ValueError(_unavailable(base, f"{name}: the base model", error)) from error
    if any(token not in tokenizer.get_vocab() for token in TOKENS):
        raise ValueError(
            f"{name}: {base} has no tokenizer of a Qwen2-VL: tokenizer.json, or vocab.json with merges.txt"
        )
    return config, tokenizer


def find(name: str, files: list[str], what: str) -> Path:
    """The folder itself, or that of the hub's files in the local cache.

    Raises: ValueError where neither can be had.
    """
    from huggingface_hub import snapshot_download

    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    try:
        if name.startswith((".", "/", "~")):
            raise FileNotFoundError("it is not a folder")
        return Path(snapshot_download(name, allow_patterns=files))
    except (OSError, ValueError) as error:
        raise ValueError(_unavailable(name, what, error)) from error


def _unavailable(name: str, what: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0]
    return f"{what} {name!r} can be had neither as a folder (pass its path) nor from the hub: {reason}"
