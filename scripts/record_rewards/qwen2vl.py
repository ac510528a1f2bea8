"""Records what VideoReward's and HPSv3's way to call Qwen2-VL gives, with the transformers that they were made with.

    python -m venv old && old/bin/pip install torch "transformers==4.45.2" "numpy<2.3" pillow safetensors
    old/bin/python scripts/record_rewards/qwen2vl.py tests/golden/rewards/qwen2vl.safetensors

Both projects subclass Qwen2VLForConditionalGeneration, put the picture's features into the text embeddings themselves
and hand the text model no positions and no token ids. In version 4.45.2 that means the positions 0 ... L - 1 on all
three axes. The network is tiny and its weights are drawn by numpy's legacy generator, whose numbers never change, from
a seed that is the crc32 of each weight's name; so are the pictures. Processor and tokenizer are the library's own.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import Qwen2TokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>")  # fmt: skip
VIDEO_MARKS, PICTURE_MARKS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"), ("<|Reward|>",)
VIDEO_TEXT = "Look: <|VQ_reward|> Move: <|MQ_reward|>\n{prompt} <|TA_reward|>\nEND\n"
PICTURE_TEXT = "Rate {prompt}: <|Reward|>\n\nEND\n"
PROMPTS = ("a cat", "two dogs that run over a wide field")
STD = (2.2476, 1.3811, 2.5121)  # of VQ, MQ and TA
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|>{pad}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
)


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """Weights of one name: near one for the scales of norms, else of size 1.5 / sqrt(inputs)."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 1:
        return torch.from_numpy((1.0 if name.endswith("weight") else 0.0) + 0.1 * values).float()
    return torch.from_numpy(1.5 * values / np.sqrt(np.prod(shape[1:]))).float()


def full_size(hidden: int, intermediate: int, heads: int, groups: int, rows: int) -> Tensor:
    """sha256 over the sorted names and shapes of a published size's weights, without lm_head, as 32 bytes."""
    config = Qwen2VLConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads, num_key_value_heads=groups,
        num_hidden_layers=28, vocab_size=rows, rope_theta=1e6,
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
        vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": hidden, "num_heads": 16, "mlp_ratio": 4},
    )  # fmt: skip
    with torch.device("meta"):
        state = Qwen2VLForConditionalGeneration(config).state_dict()
    lines = sorted(f"{name} {tuple(value.shape)}" for name, value in state.items() if not name.startswith("lm_head"))
    return torch.tensor(list(hashlib.sha256("\n".join(lines).encode()).digest()), dtype=torch.uint8)


def levels(seed: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def tokenizer(marks: tuple[str, ...]) -> Qwen2TokenizerFast:
    """Every byte is a token; the special ones after them, then the marks."""
    with tempfile.TemporaryDirectory() as folder:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: index for index, token in enumerate((*letters, *SPECIAL))}
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        made = Qwen2TokenizerFast.from_pretrained(folder, padding_side="right")
    made.add_special_tokens({"additional_special_tokens": [*SPECIAL[1:], *marks]})
    return made


def model(rows: int, head: nn.Module) -> Qwen2VLForConditionalGeneration:
    config = Qwen2VLConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, rms_norm_eps=1e-6, max_position_embeddings=512, rope_theta=1e6, tie_word_embeddings=True,
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}, image_token_id=256 + SPECIAL.index("<|image_pad|>"),
        video_token_id=256 + SPECIAL.index("<|video_pad|>"), attn_implementation="eager",
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 4},
    )  # fmt: skip
    made = Qwen2VLForConditionalGeneration(config)
    made.rm_head = head
    for name, weight in made.named_parameters():
        weight.data.copy_(draw(name, tuple(weight.shape)))
    return made.eval()


def logits(made: Qwen2VLForConditionalGeneration, batch: dict[str, Tensor], patches: Tensor, grid: Tensor,
           pad: int, marks: list[int]) -> Tensor:  # fmt: skip
    """The head's outputs at the marks [b, marks, outputs]."""
    ids = batch["input_ids"]
    embedded = made.model.embed_tokens(ids)
    features = made.visual(patches, grid_thw=grid)
    embedded = embedded.masked_scatter((ids == pad)[..., None].expand_as(embedded), features)
    hidden = made.model(input_ids=None, inputs_embeds=embedded, attention_mask=batch["attention_mask"],
                        position_ids=None, use_cache=False)[0]  # fmt: skip
    marked = torch.isin(ids, torch.tensor(marks))
    return made.rm_head(hidden)[marked].view(len(ids), len(marks), -1)


def record_videos() -> dict[str, Tensor]:
    words = tokenizer(VIDEO_MARKS)
    processor = Qwen2VLProcessor(Qwen2VLImageProcessor(min_pixels=784, max_pixels=200704), words)
    videos = [levels(seed, 4, 3, 28, 56) for seed in (1, 2)]
    texts = [CHAT.format(pad="<|video_pad|>", text=VIDEO_TEXT.format(prompt=prompt)) for prompt in PROMPTS]
    batch = processor(text=texts, videos=[list(video) for video in videos], padding=True, return_tensors="pt")
    plain = processor.image_processor(images=None, videos=[list(videos[0])], do_normalize=False, do_rescale=False)
    marks, pad = words.convert_tokens_to_ids(list(VIDEO_MARKS)), 256 + SPECIAL.index("<|video_pad|>")
    patches = batch["pixel_values_videos"].clone().requires_grad_()
    three = model(len(words), nn.Linear(32, 3, bias=False))
    raw = logits(three, batch, patches, batch["video_grid_thw"], pad, marks).diagonal(dim1=1, dim2=2)
    (raw / torch.tensor(STD)).sum().backward()
    with torch.no_grad():
        one = model(len(words), nn.Linear(32, 1, bias=False))
        single = logits(one, batch, patches, batch["video_grid_thw"], pad, marks).squeeze(2)
    return {
        "video/input_ids": batch["input_ids"].int(),
        "video/patches": torch.from_numpy(np.asarray(plain["pixel_values_videos"])).round().byte(),
        "video/first_patch": batch["pixel_values_videos"][0].clone(),
        "video/three": raw.detach().clone(),
        "video/one": single.clone(),
        "video/gradient": patches.grad[: len(patches) // 2].clone(),
    }


def record_pictures() -> dict[str, Tensor]:
    words = tokenizer(PICTURE_MARKS)
    processor = Qwen2VLProcessor(Qwen2VLImageProcessor(min_pixels=784, max_pixels=200704), words)
    texts = [CHAT.format(pad="<|image_pad|>", text=PICTURE_TEXT.format(prompt=prompt)) for prompt in PROMPTS]
    pictures = [levels(seed, 56, 84, 3) for seed in (3, 4)]
    batch = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    marks, pad = words.convert_tokens_to_ids(list(PICTURE_MARKS)), 256 + SPECIAL.index("<|image_pad|>")
    patches = batch["pixel_values"].clone().requires_grad_()
    head = nn.Sequential(nn.Linear(32, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(),
                         nn.Linear(16, 2))  # fmt: skip
    both = logits(model(len(words), head), batch, patches, batch["image_grid_thw"], pad, marks)[:, 0]
    both[:, 0].sum().backward()
    return {
        "picture/input_ids": batch["input_ids"].int(),
        "picture/outputs": both.detach().clone(),
        "picture/gradient": patches.grad[: len(patches) // 2].view(-1, 3, 2, 14, 14).sum(2),  # both frames are one
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    recorded = record_videos() | record_pictures()
    recorded["keys/2b"] = full_size(1536, 8960, 12, 2, 151660)
    recorded["keys/7b"] = full_size(3584, 18944, 28, 4, 151658)
    save_file({name: value.contiguous() for name, value in recorded.items()}, sys.argv[1])
    for name, value in recorded.items():
        print(name, tuple(value.shape), value.dtype, value.flatten()[:6].tolist())
