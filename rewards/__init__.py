"""The reward zoo: one contract, and a file per reward."""

from __future__ import annotations

from rewards.base import Minimum, Reward, WeightedSum
from rewards.clip import CLIPScore
from rewards.geneval import GenEval
from rewards.jpeg import JPEGCompressibility, JPEGIncompressibility
from rewards.ocr import OCR
from rewards.pickscore import PickScore
from rewards.shapes import ShapesVerifier

__all__ = [
    "OCR",
    "CLIPScore",
    "GenEval",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "Minimum",
    "PickScore",
    "Reward",
    "ShapesVerifier",
    "WeightedSum",
]
