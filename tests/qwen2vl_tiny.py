"""A tiny Qwen2-VL in the published files' layout, its weights drawn as scripts/record_rewards/qwen2vl.py draws them."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLModel

from flowalign.records import Media, Prompts
from rewards.hpsv3 import FILE, HPSv3, head
from rewards.towers import Dtype
from rewards.video_reward import MARKS, VideoReward

GOLDEN = load_file(Path(__file__).parent / "golden" / "rewards" / "qwen2vl.safetensors")
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
TEXTS = ("a cat", "two dogs that run over a wide field", "", "a red ball", "x" * 40, "snow", "one more cat")
HPSV3_TEMPLATE = "Rate {prompt}: <|Reward|>\n\nEND\n"
VIDEO_TEMPLATE = "Look: <|VQ_reward|> Move: <|MQ_reward|>\n{prompt} <|TA_reward|>\nEND\n"
HPSV3_ROWS, VIDEO_ROWS = 256 + len(SPECIAL) + 1, 256 + len(SPECIAL) + len(MARKS)
SETTINGS = {"peft_lora_config": {"lora_alpha": 6, "use_rslora": False}}
TINY = {
    "model_type": "qwen2_vl", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "max_position_embeddings": 512,
    "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "tie_word_embeddings": True,
    "image_token_id": 261, "video_token_id": 262, "vocab_size": 263,
    "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 4},
}  # fmt: skip


def published(hidden: int, intermediate: int, heads: int, groups: int, rows: int) -> dict:
    """What the config.json of Qwen2-VL-2B-Instruct and -7B-Instruct hold, as far as it matters."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "vision_token_id": 151654, "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu",
        "hidden_size": hidden, "initializer_range": 0.02, "intermediate_size": intermediate,
        "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2_vl",
        "num_attention_heads": heads, "num_hidden_layers": 28, "num_key_value_heads": groups, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": hidden == 1536,
        "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False,
        "vision_config": {
            "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": hidden,
            "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": rows,
    }  # fmt: skip


def prompts(*texts: str) -> Prompts:
    return Prompts(texts, ({},) * len(texts))


def levels(seed: int, *shape: int) -> Tensor:
    """8-bit noise as numbers in [0, 1]."""
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 256, shape)).float() / 255


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 1:
        return torch.from_numpy((1.0 if name.endswith("weight") else 0.0) + 0.1 * values).float()
    return torch.from_numpy(1.5 * values / np.sqrt(np.prod(shape[1:]))).float()


def save_base(folder: Path, config: dict = TINY) -> Path:
    """Config and tokenizer: every byte is a token, then come the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate((*letters, *SPECIAL))}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    added = {str(256 + i): {"content": token, "special": True} for i, token in enumerate(SPECIAL)}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": SPECIAL[0], "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shapes(config: dict, rows: int) -> dict[str, torch.Size]:
    """Names and shapes of a Qwen2VLForConditionalGeneration's weights in transformers 4.45, without lm_head."""
    made = Qwen2VLConfig(**config)
    made.text_config.vocab_size = rows
    with torch.device("meta"):
        state = Qwen2VLModel(made).state_dict()
    return {name.replace("language_model.", "model."): value.shape for name, value in state.items()}


def weights(rows: int, head: nn.Module) -> dict[str, Tensor]:
    """The recorded network's weights under the old names, with an output layer that is not used."""
    wanted = shapes(TINY, rows) | {f"rm_head.{name}": value.shape for name, value in head.state_dict().items()}
    state = {name: draw(name, tuple(shape)) for name, shape in wanted.items()}
    return state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}


def save_hpsv3(folder: Path) -> Path:
    """HPSv3's file of the recorded network."""
    save_file(weights(HPSV3_ROWS, head(32)), folder / FILE)
    return folder


def save_video_reward(folder: Path, state: dict[str, Tensor] | None = None, settings: dict = SETTINGS) -> Path:
    """VideoReward's files, by default of the recorded network with three outputs."""
    (folder / "checkpoint-20").mkdir(parents=True)
    given = weights(VIDEO_ROWS, nn.Linear(32, 3, bias=False)) if state is None else state
    torch.save(given, folder / "checkpoint-20" / "model.pth")
    (folder / "model_config.json").write_text(json.dumps(settings))
    return folder


def make_hpsv3(
    base: Path, model: Path, batch_size: int = 8, dtype: Dtype = "float32", recompute: bool = False,
    offload: bool = False, template: bool = True,
) -> HPSv3:  # fmt: skip
    (base / "hpsv3.txt").write_text(HPSV3_TEMPLATE)
    text = str(base / "hpsv3.txt") if template else None
    return HPSv3(
        str(model), str(base), text, batch_size=batch_size, dtype=dtype, min_pixels=784, recompute=recompute,
        offload=offload,
    )  # fmt: skip


def make_video_reward(
    base: Path, model: Path, batch_size: int = 4, dtype: Dtype = "float32", recompute: bool = False,
    offload: bool = False, template: bool = True,
) -> VideoReward:  # fmt: skip
    (base / "video.txt").write_text(VIDEO_TEMPLATE)
    text = str(base / "video.txt") if template else None
    return VideoReward(
        str(model), str(base), text, batch_size=batch_size, dtype=dtype, min_pixels=784, recompute=recompute,
        offload=offload,
    )  # fmt: skip


def some_pictures(count: int = 2) -> Media:
    """The recorded pictures, which are [h, w, c], and more of their kind."""
    return Media(torch.stack([levels(seed + 3, 56, 84, 3).permute(2, 0, 1) for seed in range(count)]))


def some_videos(count: int = 2) -> Media:
    """The recorded videos of four frames, and more of their kind."""
    return Media(torch.stack([levels(seed + 1, 4, 3, 28, 56) for seed in range(count)]), fps=2.0)
