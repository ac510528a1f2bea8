"""Image to image by a partial start: a rollout begins at each prompt's own picture, noised in part (SDEdit).

    x = (1 - sigma) x_source + sigma e,   sigma: the first point of the grid that is left

SDEdit (arXiv:2108.01073) on rectified flow, as diffusers' img2img pipelines do it with `strength` s in (0, 1]: of n
steps they make the last n - floor(n - n s), about n s, so that the first sigma is about s before its shift. What is
asked for here is the number of steps that are made, which is what all plans, costs and gradients count; n is the most
that leaves so many: 6 steps at strength 0.6 are the pipeline's 10, and any of its grids has a strength that gives it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from flowalign.media import REAL, VIDEOS, is_inline, real_media
from flowalign.models.base import Latents
from flowalign.models.sized import SizedModel
from flowalign.records import Condition, Prompts, Size

KEPT_BYTES = 2**28  # of sources' latents on the host; those that were not used for longest go


class EditingModel(SizedModel):
    """A model whose rollouts may start from the prompts' own pictures, `fitted` to the size that is made.

    A prompt names its picture with the key "media" in its record. It is encoded once, alone, to the mean of the VAE's
    distribution (diffusers' pipelines draw from it), so that no sample depends on what it shares a call with. The
    network is not told the picture: what the start keeps of it, and the prompt, is all there is.

    strength: None for rollouts that start from noise.
    """

    edits: ClassVar[bool] = False  # whether diffusers has an img2img pipeline of this family that goes by the rule
    strength: float | None = None

    @abstractmethod
    def full_sigmas(self, steps: int) -> list[float]:
        """The grid of `steps` steps from noise, steps + 1 values, that the pipeline itself would sample on."""

    def start_from(self, strength: float | None) -> None:
        """Make a strength the model's own. Raises: ValueError for one outside (0, 1], and for other families."""
        if strength is not None and not self.edits:
            raise ValueError(
                f"strength is for families with an img2img pipeline of flow matching (SD3, Flux, QwenImage, ZImage), "
                f"and {type(self).__name__} is none of them: leave it out"
            )
        if strength is not None and not 0 < strength <= 1:
            raise ValueError(f"strength must lie in (0, 1], got {strength}")
        self.strength, self._sources = strength, dict[tuple[str, Size], Tensor]()

    def sigmas(self, steps: int) -> list[float]:
        """See `Model.sigmas`; with a strength, the end of a longer grid."""
        if self.strength is None:
            return self.full_sigmas(steps)
        return self.full_sigmas(steps_in_all(steps, self.strength))[-steps - 1 :]

    def start(self, noise: Latents, sigma: float, condition: Condition | None = None) -> Latents:
        """See `Model.start`. Raises: ValueError where a strength is set and the condition has no sources."""
        if self.strength is None:
            return super().start(noise, sigma)
        if condition is None or condition.source is None:
            raise ValueError("there is no picture to start from: take the condition of prompts, `Model.condition`")
        return (1 - sigma) * condition.source.to(noise) + sigma * noise

    def condition(self, prompts: Prompts) -> Condition:
        told = super().condition(prompts)
        if self.strength is None:
            return told
        self.check_prompts(prompts)
        size = self.media_size(Size())
        sources = [self._source(prompts.rows([i]), size) for i in range(len(prompts))]
        return replace(told, source=torch.stack(sources).to(self.device))

    def _source(self, prompt: Prompts, size: Size) -> Tensor:
        """The latents of one prompt's picture, on the host."""
        asked = prompt.metadata[0][REAL], size
        made = self._sources.pop(asked, None)
        if made is None:
            made = self.encode_media(real_media(prompt, size))[0].cpu()
        self._sources[asked] = made  # the last one is the one used last
        while len(self._sources) > max(1, KEPT_BYTES // made.nbytes):
            self._sources.pop(next(iter(self._sources)))
        return made

    def check_prompts(self, prompts: Prompts) -> None:
        if self.strength is None:
            return
        named = {i: row[REAL] for i, row in enumerate(prompts.metadata) if isinstance(row.get(REAL), str)}
        first = next((i for i in range(len(prompts)) if i not in named), None)
        if first is not None:
            raise ValueError(
                f"prompt {first} ({prompts.text[first]!r}) names no picture, and model.strength {self.strength:g} "
                f'starts from one: give its record the key "{REAL}", a file, or leave strength out '
                f"({len(prompts) - len(named)} of the {len(prompts)} prompts looked at name none)"
            )
        for i, name in named.items():
            text = prompts.text[i]
            if Path(name).suffix.lower() in VIDEOS and not is_inline(name):
                raise ValueError(f"{name}, which prompt {text!r} starts from, is a video; it has to be a picture")
            if not is_inline(name) and not Path(name).is_file():
                raise ValueError(f"{name}, which prompt {text!r} starts from, is not a file")


def steps_made(steps: int, strength: float) -> int:
    """How many of `steps` steps diffusers' img2img pipelines of flow matching make."""
    return steps - int(max(steps - min(steps * strength, steps), 0))


def steps_in_all(made: int, strength: float) -> int:
    """The most steps of a grid of which so many are made: made / strength, rounded down.

    Each step more makes one more at most, so that there is one for every number; rounding may be off by one either way.
    """
    about = int(made / strength)
    return next(steps for steps in (about + 1, about, about - 1) if steps_made(steps, strength) == made)
