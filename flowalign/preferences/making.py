"""A model's own samples, judged by a reward: what `flowalign prefer` makes preferences of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from flowalign.distributed import check_started, world_size
from flowalign.media import shown
from flowalign.models.base import Model
from flowalign.pictures import to_bytes
from flowalign.preferences.records import Pairing
from flowalign.prompts import PromptData
from flowalign.randomness import key_noise
from flowalign.records import Media, Prompts, Scores
from flowalign.rollout import Policy, rollout
from flowalign.schedules import Path
from flowalign.sizes import Call, calls_of
from flowalign.transitions import ODE

Judge = Callable[[Media, Prompts], Scores]  # what scores samples: any reward


@dataclass(frozen=True)
class Settings:
    """How pairs are made.

    samples: of each prompt. pairing: which pairs they become. margin: what the better score must lead by at least; with
    a smaller lead, or none, two samples are a tie, and dropped. batch_size: samples made at a time.
    """

    steps: int
    guidance_scale: float
    pairing: Pairing
    samples: int = 4
    margin: float = 0.0
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("samples", 2), ("batch_size", 1), ("margin", 0)):
            if not least <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Judged:
    """All samples of one prompt in 8 bits, on the CPU, with their scores."""

    media: UInt8[Tensor, "n *frames 3 h w"]
    scores: Scores


class Maker:
    """Makes preferences of a model's samples, prompt by prompt.

    Args:
        model, judge: what draws, and what scores.
        prompts: sample j of prompt i is drawn from noise keyed by settings.seed, the prompt's seed or number, and j.

    Raises: ValueError on more than one process.
    """

    def __init__(self, model: Model, judge: Judge, prompts: Prompts, settings: Settings) -> None:
        check_started()
        if world_size() > 1:
            raise ValueError("prefer is one process; start it without a launcher, and give each a share of the prompts")
        self.model, self.judge, self.prompts, self.settings = model, judge, prompts, settings
        together = max(1, settings.batch_size // settings.samples)
        self.calls = calls_of(model, prompts, together)
        self.rows_per_call = min(settings.batch_size, together * settings.samples)

    def key(self, number: int) -> int:
        """What the noise of a prompt's samples is keyed by."""
        return self.prompts.rows([number]).noise_keys([number])[0]

    def judged(self, call: Call) -> list[Judged]:
        """The samples of a call's prompts. What shares a call decides nothing but how numbers are rounded."""
        members = self.settings.samples
        rows = [(number, member) for number in call.rows for member in range(members)]
        media = torch.cat([*self._draw(call, rows)])
        told = self.prompts.rows([number for number, _ in rows])
        told = Prompts(told.text, told.metadata, tuple(number for number, _ in rows))
        pixels = media.to(self.model.device).float() / 255  # what is kept is what is judged
        with torch.no_grad():
            scores = self.judge(shown(pixels, told, self.model.fps), told)
        starts = range(0, len(rows), members)
        return [Judged(media[i : i + members], _rows(scores, range(i, i + members))) for i in starts]

    @torch.no_grad()
    def _draw(self, call: Call, rows: Sequence[tuple[int, int]]) -> Iterator[UInt8[Tensor, "b *frames 3 h w"]]:
        """Samples in calls of one shape; the last one is filled up."""
        asked, most = self.settings, self.rows_per_call
        for start in range(0, len(rows), most):
            some = [*rows[start : start + most]]
            padded = some + some[-1:] * (most - len(some))
            told = self.prompts.rows([number for number, _ in padded])
            with self.model.sized(call.size):
                shape = self.model.latent_shape
                noise = [key_noise(asked.seed, "prefer", self.key(i), j, shape=shape) for i, j in padded]
                sigmas, steps = self.model.sigmas(asked.steps), Path((ODE(),) * asked.steps)
                start_at, policy = torch.stack(noise).to(self.model.device), Policy(asked.guidance_scale)
                made = rollout(self.model, self.model.condition(told), start_at, sigmas, steps, policy)
                yield to_bytes(self.model.decode_rows(made.latents, most))[: len(some)]


def parts(model: Model, reward: Judge | str, prompts: PromptData) -> tuple[Model, Judge | str, PromptData]:
    """What a config of a making names."""
    return model, reward, prompts


def _rows(scores: Scores, index: range) -> Scores:
    chosen = scores.rows(index)
    named = {name: value.detach().cpu() for name, value in chosen.parts.items()}
    return Scores(chosen.total.detach().cpu(), named, chosen.valid.cpu())
