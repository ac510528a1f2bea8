"""A vision-language model of transformers on this machine, asked as an endpoint is."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from rewards.chat import Chat, Picture, Showing
from rewards.qwen2vl import without
from rewards.verdicts import CHOICES, Answer, spells

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin

LISTED = 1000  # alternatives to the first token
_TURN = threading.RLock()  # a reward server's threads share models, and tokenizers are not made for two at a time

Asked = tuple[tuple[Picture, ...], str]


class LocalVLM(Chat):
    """Any AutoModelForImageTextToText with its processor's chat template: Qwen2.5-VL, LLaVA, Idefics3, SmolVLM ...

    Takes an endpoint's place in every judge. The pictures come first, then the text, in one user's turn. Answers are
    greedy: of the model's own generation settings only the tokens that end an answer are kept. An answer's alternatives
    are the softmax, in float32, of the logits at its first token: the 1000 likeliest, and every spelling of yes, no and
    Q-Align's levels however unlikely, so that log-odds and levels are exact where an endpoint's 20 give a bound.

    Questions are put in batches, padded on the left, or one at a time where the processor pads otherwise. Special
    tokens inside a question are taken out, so that no prompt can end the turn or stand for a picture. There is no
    gradient: processors take pictures in 8 bits and prepare them outside of torch.

    Args:
        model: a folder or hub id of the model with its processor; their licence is their makers'. Processors that also
            read videos, as Qwen2.5-VL's and SmolVLM's, need torchvision. No code beside the weights is run.
        device: where the model stays; by default it follows the pictures.
        dtype: of the model.
        batch_size: questions that pass through the model at once.
        frames: of a video that are shown, evenly spaced, as pictures.
        max_tokens: of an answer.
        options: what the chat template takes, such as {"enable_thinking": false}.

    Raises: ValueError where the model or its processor cannot be had, lacks weights or a chat template, and for
    settings out of range.
    """

    def __init__(
        self,
        model: str,
        device: str | None = None,
        dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
        batch_size: int = 8,
        frames: int = 8,
        max_tokens: int = 1024,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if min(batch_size, frames, max_tokens) < 1:
            raise ValueError("batch_size, frames and max_tokens of a local model must be at least 1")
        self.processor = load_processor(model)
        self.model = load_model(model, getattr(torch, dtype))
        self.device, self.batch_size, self.frames, self.max_tokens = device, batch_size, frames, max_tokens
        self.options = dict(options or {})
        tokenizer = self.processor.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = sorted(special, key=len, reverse=True)
        self.model.generation_config = self._greedy(self.model.generation_config)

    def answers(self, showings: Sequence[Showing], logprobs: bool, tokens: int | None) -> list[list[Answer]]:
        asked = [(showing.pictures, question) for showing in showings for question in showing.questions]
        most = min(tokens or self.max_tokens, self.max_tokens)
        given: list[Answer] = []
        for start in range(0, len(asked), self.batch_size):
            with _TURN:
                given += self._batch(asked[start : start + self.batch_size], logprobs, most)
        left = iter(given)
        return [[next(left) for _ in showing.questions] for showing in showings]

    def inputs(self, asked: Sequence[Asked]) -> dict[str, Tensor]:
        """What the model takes for questions about pictures, padded on the left, on the pictures' device."""
        texts = [self.text(len(pictures), question) for pictures, question in asked]
        images = [[_image(one) for one in pictures] for pictures, _ in asked]
        begun = bool(self.processor.tokenizer.bos_token) and texts[0].startswith(self.processor.tokenizer.bos_token)
        made = self.processor(
            text=texts,
            images=images,
            padding=True,
            padding_side="left",
            add_special_tokens=not begun,  # a template that writes the token that begins a text leaves none to add
            return_tensors="pt",
        )
        return dict(made)

    def text(self, pictures: int, question: str) -> str:
        """The chat, up to where the answer begins."""
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": without(question, self._special)}]
        turns = [{"role": "user", "content": content}]
        return str(
            self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, **self.options)
        )

    def _batch(self, asked: Sequence[Asked], logprobs: bool, most: int) -> list[Answer]:
        inputs = self.inputs(asked)
        if not padded_left(inputs["attention_mask"]):
            return [self._generate(self.inputs([one]), _place(self.device, [one]), logprobs, most)[0] for one in asked]
        return self._generate(inputs, _place(self.device, asked), logprobs, most)

    def _generate(self, inputs: Mapping[str, Tensor], device: torch.device, logprobs: bool, most: int) -> list[Answer]:
        self.model.to(device)
        moved = {name: value.to(device) for name, value in inputs.items()}
        cast = {k: v.to(self.model.dtype) if v.is_floating_point() else v for k, v in moved.items()}
        first = _FirstStep()
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            ids = self.model.generate(**cast, max_new_tokens=most, logits_processor=[first])
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        tops = self._alternatives(first.logits) if logprobs else [()] * len(texts)
        return [Answer(text, top) for text, top in zip(texts, tops, strict=True)]

    def _alternatives(self, logits: Float[Tensor, "b v"]) -> list[tuple[tuple[str, float], ...]]:
        """The first token's likeliest alternatives, and the words that judges read, with their log-probabilities."""
        logp = logits.float().log_softmax(1)[:, : len(self._spelled)].cpu()
        likely = logp.topk(min(LISTED, logp.shape[1]), dim=1).indices
        listed = [torch.cat([row, self._choices]).unique() for row in likely]
        return [
            tuple((self._spelled[i], p) for i, p in zip(index.tolist(), row[index].tolist(), strict=True))
            for index, row in zip(listed, logp, strict=True)
        ]

    @cached_property
    def _spelled(self) -> list[str]:
        """Every token as text; an output layer may have more rows than there are tokens."""
        tokenizer = self.processor.tokenizer
        count = min(len(tokenizer), self.model.get_output_embeddings().weight.shape[0])
        return [tokenizer.decode([i]) for i in range(count)]

    @cached_property
    def _choices(self) -> Int[Tensor, " k"]:
        return torch.tensor([i for i, token in enumerate(self._spelled) if spells(token, CHOICES)], dtype=torch.long)

    def _greedy(self, own: GenerationConfig) -> GenerationConfig:
        """Greedy decoding, without the model's own temperature and repetition penalty."""
        from transformers import GenerationConfig

        tokenizer = self.processor.tokenizer
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        known = sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})
        return GenerationConfig(do_sample=False, eos_token_id=known or None, pad_token_id=tokenizer.pad_token_id)


class _FirstStep:
    """Keeps the logits at the first token of the answers, float32, and changes nothing."""

    logits: Tensor

    def __init__(self) -> None:
        self._seen = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self._seen:
            self.logits, self._seen = scores.clone(), True
        return scores


def _place(device: str | None, asked: Sequence[Asked]) -> torch.device:
    return torch.device(device) if device else asked[0][0][0].device


def _image(picture: Picture) -> Image.Image:
    return Image.fromarray(picture.pixels.permute(1, 2, 0).contiguous().numpy())


def padded_left(mask: Int[Tensor, "b n"]) -> bool:
    """Whether every row ends with a token and has its padding, if any, at its beginning."""
    return bool(mask[:, -1].all() and (mask.diff(dim=1) >= 0).all())


def load_processor(name: str) -> ProcessorMixin:
    """The processor of a folder or hub id.

    Raises: ValueError where there is none, it has no tokenizer or no chat template, or it needs what is not installed.
    """
    from transformers import AutoProcessor, ProcessorMixin

    try:
        processor = AutoProcessor.from_pretrained(_folder(name))
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the processor of {name} needs what is not installed: {reason:.120}") from error
    except (OSError, ValueError) as error:
        raise ValueError(_unavailable(name, error)) from error
    if not isinstance(processor, ProcessorMixin) or processor.chat_template is None:
        raise ValueError(f"{name} has no processor with a chat template (chat_template.jinja): it cannot be asked")
    return processor


def load_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder or hub id with all its weights, frozen; more weights than it has are passed over.

    Raises: ValueError where there is none, or some of its weights are missing or have another shape.
    """
    from transformers import AutoModelForImageTextToText

    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            _folder(name), dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(_unavailable(name, error)) from error
    wrong = [f"missing {key}" for key in sorted(report["missing_keys"])]
    wrong += [f"another shape of {key[0]}" for key in sorted(report["mismatched_keys"])]
    if wrong:
        raise ValueError(
            f"{name} does not fit {type(model).__name__}: {', '.join(wrong[:3])}{' ...' * (len(wrong) > 3)}"
        )
    return model.eval().requires_grad_(False)


def _folder(name: str) -> str:
    folder = Path(name).expanduser()
    if name.startswith((".", "/", "~")) and not folder.is_dir():
        raise FileNotFoundError("it is not a folder")
    return str(folder)


def _unavailable(name: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0]
    return (
        f"the vision-language model {name!r} can be had neither as a folder (pass its path) nor from the hub: "
        f"{reason:.200}"
    )
