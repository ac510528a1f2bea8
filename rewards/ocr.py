"""Is the text that the prompt asks for written in the picture? The text-rendering reward of Flow-GRPO."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import numpy as np
import torch
from PIL import Image

from flowalign.pictures import to_images
from flowalign.records import Media, Prompts, Scores
from rewards.base import Reward, simple_scores
from rewards.card import Card
from rewards.pixels import finite, pictures

_log = logging.getLogger("flowalign")


class OCR(Reward):
    """1 - min(edit distance, length) / length of the text read in the picture to that asked for, in [0, 1].

    See `text_score`; not differentiable. The text asked for is the prompt's metadata["text"] if it has one, else what
    the prompt's first double quotes enclose. A picture in which nothing is read scores 0; one that the engine fails
    on is invalid, where Flow-GRPO's code (arXiv:2505.05470) scores it 0.

    The engine is RapidOCR (extra [ocr]), whose wheel brings the PP-OCR detector and recogniser; package and weights
    are under the Apache-2.0 licence. Flow-GRPO reads with PaddleOCR 2.9.1 for English and hands it RGB where it
    expects BGR, so scores agree on text that both read well, and not to the digit.

    Raises: ValueError without the extra, for videos, and for a prompt that asks for no text.
    """

    name = "ocr"
    card = Card("in RapidOCR's wheel: PP-OCR", "Apache-2.0", (0.0, 1.0))

    def __init__(self) -> None:
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ValueError(f"OCR needs the extra: pip install 'flowalign-diffusion[ocr]' ({error})") from error
        if importlib.util.find_spec("onnxruntime") is None:  # rapidocr imports it at the first picture only
            raise ValueError("OCR needs the extra: pip install 'flowalign-diffusion[ocr]' (no onnxruntime)")
        self.engine: Any = RapidOCR(params={"Global.log_level": "error"})

    def score(self, media: Media, prompts: Prompts) -> Scores:
        pixels = pictures(media, "OCR")
        targets = [target_text(prompts, i) for i in range(len(prompts))]
        read = [self._read(image) for image in to_images(pixels)]
        values = [
            float("nan") if text is None else text_score(text, target)
            for text, target in zip(read, targets, strict=True)
        ]
        return simple_scores(self.name, torch.tensor(values, device=pixels.device).where(finite(pixels), torch.nan))

    def _read(self, image: Image.Image) -> str | None:
        """All that is read, line after line, from the top; None where the engine fails."""
        try:
            found = self.engine(np.asarray(image)[:, :, ::-1], use_cls=False)  # BGR; text upside down is not looked for
        except Exception as error:  # whatever the engine and its libraries raise, the picture has no score
            _log.warning("OCR failed on a picture: %s: %s", type(error).__name__, error)
            return None
        return "".join(found.txts or ())


def target_text(prompts: Prompts, index: int) -> str:
    """What a prompt asks to be written: its metadata["text"], else the text from its first double quote to the next.

    Raises: ValueError where there is neither.
    """
    if "text" in prompts.metadata[index]:
        text = str(prompts.metadata[index]["text"])
    else:
        text = [*prompts.text[index].split('"'), ""][1]
    if not text.strip():
        raise ValueError(
            f"prompt {index} ({prompts.text[index]!r}) asks for no text: put it in double quotes, or give the prompt "
            'metadata {"text": ...}'
        )
    return text


def text_score(read: str, target: str) -> float:
    """1 where the target is contained in what was read, else 1 - min(distance, n) / n, n the target's length.

    Both without blanks and in lower case, so that superfluous text costs nothing beside the whole target and no more
    than a missing target without it; as in Flow-GRPO's code.
    """
    read, target = (text.replace(" ", "").lower() for text in (read, target))
    if target in read:
        return 1.0
    return 1 - min(edit_distance(read, target), len(target)) / len(target)


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and replacements of one letter that make `b` of `a` (Levenshtein)."""
    row = list(range(len(b) + 1))  # distances of what is read of a to every beginning of b
    for i, letter in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            replaced = diagonal + (letter != other)
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, replaced)
    return row[-1]
