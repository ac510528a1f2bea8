"""Tiny vision-language models, saved in a folder as the hub has them, and how they are asked by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPACE = "\u0120"  # as byte-level BPE writes a blank
WORDS = (
    "Yes", "No", f"{SPACE}yes", f"{SPACE}No", "NO", "excellent", f"{SPACE}good", "Fair", "fai", "poor", "bad", "two",
    "2", "red",
)  # fmt: skip
YES, NO = ("Yes", f"{SPACE}yes"), ("No", f"{SPACE}No", "NO")  # as judges read them
SPECIAL = (
    "<pad>", "<s>", "</s>", "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<|vision_start|>",
    "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content %}"
    "{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ opening | default('assistant') }}:{% endif %}"
)
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 1024, "pad_token_id": None,
}  # fmt: skip
EYES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
    "image_size": 16,
}  # fmt: skip


def tokenizer(padding_side: str = "right") -> PreTrainedTokenizerFast:
    """Every byte is a token, then come whole words, which only a model writes, and the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [word for word in WORDS if word not in letters]
    core = Tokenizer(BPE({token: i for i, token in enumerate((*letters, *words))}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side=padding_side
    )
    made.add_tokens(list(SPECIAL), special_tokens=True)
    return made


def llava(folder: Path, **opinions: float) -> Path:
    """A LLaVA of 2 + 2 layers; `opinions` as in `opinionated`."""
    words = tokenizer()
    text = LlamaConfig(**TEXT, vocab_size=len(words) + 5, bos_token_id=None, eos_token_id=words.eos_token_id)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**EYES),
        text_config=text,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    torch.manual_seed(1)
    model = opinionated(LlavaForConditionalGeneration(config), words, opinions)
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16),
        words,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )
    return _saved(folder, model, processor)


def idefics3(folder: Path) -> Path:
    """An Idefics3, which SmolVLM is, that does not split pictures."""
    words = tokenizer()
    text = LlamaConfig(**TEXT, vocab_size=len(words), bos_token_id=None, eos_token_id=words.eos_token_id)
    config = Idefics3Config(
        vision_config=EYES, text_config=text, image_token_id=words.convert_tokens_to_ids("<image>"), scale_factor=2
    )
    torch.manual_seed(2)
    model = opinionated(Idefics3ForConditionalGeneration(config), words, {})
    sight = Idefics3ImageProcessorPil(
        size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False
    )
    template = TEMPLATE.replace("IMAGE", "<image>")
    return _saved(folder, model, Idefics3Processor(sight, words, image_seq_len=4, chat_template=template))


def qwen2_5_vl(folder: Path) -> Path:
    """A Qwen2.5-VL; its processor, which also reads videos, needs torchvision."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessorPil,
        Qwen2VLVideoProcessor,
    )

    words = tokenizer()
    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    start, end, image, video = (words.convert_tokens_to_ids(mark) for mark in marks)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    config = Qwen2_5_VLConfig(
        text_config=TEXT | {"vocab_size": len(words), "rope_parameters": rope, "eos_token_id": words.eos_token_id},
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
            "fullatt_block_indexes": [1], "window_size": 56,
        },
        vision_start_token_id=start, vision_end_token_id=end, image_token_id=image, video_token_id=video,
    )  # fmt: skip
    torch.manual_seed(3)
    model = opinionated(Qwen2_5_VLForConditionalGeneration(config), words, {})
    sizes = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessorPil(size=sizes),
        words,
        Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return _saved(folder, model, processor)


def opinionated(model: PreTrainedModel, words: PreTrainedTokenizerFast, opinions: dict[str, float]) -> PreTrainedModel:
    """The model with weights large enough to see with and, if any, the given tokens' logits over all others'.

    A token's opinion multiplies one direction, the same for all; all other tokens' logits are 0.
    """
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.copy_(torch.randn(value.shape) * 1.5 / value[0].numel() ** 0.5)
        head = model.get_output_embeddings().weight
        if opinions:
            direction = head[0].clone()
            head.zero_()
            for token, strength in opinions.items():
                head[words.convert_tokens_to_ids(token)] = strength * direction
    return model


def _saved(folder: Path, model: PreTrainedModel, processor: object) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


class ByHand:
    """One unpadded chat at a time through transformers' own classes."""

    def __init__(self, folder: str, dtype: torch.dtype = torch.float32) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    def inputs(self, shown: Sequence[Tensor], text: str) -> dict[str, Tensor]:
        images = [Image.fromarray((one * 255).round().byte().permute(1, 2, 0).numpy()) for one in shown]
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
        made = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return {k: v.to(self.model.dtype) if v.is_floating_point() else v for k, v in made.items()}

    @torch.no_grad()
    def logits(self, shown: Sequence[Tensor], text: str) -> Tensor:
        return self.model(**self.inputs(shown, text)).logits[0, -1].float()

    def mass(self, logits: Tensor, words: Sequence[str]) -> float:
        ids = self.processor.tokenizer.convert_tokens_to_ids(list(words))
        return float(logits.double().softmax(0)[ids].sum())

    def log_odds(self, shown: Sequence[Tensor], text: str) -> float:
        logits = self.logits(shown, text)
        return math.log(self.mass(logits, YES) / self.mass(logits, NO))

    def word(self, shown: Sequence[Tensor], text: str) -> str:
        """The likeliest first token."""
        return str(self.processor.tokenizer.decode([int(self.logits(shown, text).argmax())]))
