"""The embedded world of videos: captioned scenes of coloured shapes that move, and a verifier of their pixels."""

from __future__ import annotations

from flowalign.shapes.video.prompts import Captioned, captioned, held_out_prompts, train_prompts

__all__ = ["Captioned", "captioned", "held_out_prompts", "train_prompts"]
