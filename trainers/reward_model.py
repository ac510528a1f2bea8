"""Training a reward from preferences: Bradley-Terry, and Rao-Kupper where there are ties.

    P(a) = sigmoid(r_a - r_b),   loss = -log P(preferred)                        Bradley and Terry, Biometrika 39, 1952
    P(a) = e^a / (e^a + theta e^b),  P(tie) = 1 - P(a) - P(b),  theta >= 1       Rao and Kupper, JASA 62, 1967

The head alone is trained on embeddings computed once, or all of the model is, as PickScore was (arXiv:2305.01569).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from flowalign.progress import Progress
from flowalign.randomness import key_generator
from flowalign.records import Media, Prompts
from rewards.preference import LearntReward, Pair

FIRST, TIE, SECOND = 1, 0, -1
SIGNS = {"first": FIRST, "tie": TIE, "second": SECOND}
BINS = 10
Rates = Callable[[list[int]], tuple[Tensor, Tensor]]
Augment = Callable[[Pair, np.random.Generator], Pair]


def bradley_terry_loss(
    r_win: Float[Tensor, " b"], r_lose: Float[Tensor, " b"], margin: float = 0.0
) -> Float[Tensor, " b"]:
    """softplus(-(r_win - r_lose - margin)) of each pair; with margin 0 -log P(win), log 2 where they are equal.

    margin: by how much the preferred score should lead, in units of the reward (Llama 2, arXiv:2307.09288, eq. 2).
    """
    return F.softplus(-(r_win - r_lose - margin))


def rao_kupper_log_probs(
    r_a: Float[Tensor, " b"], r_b: Float[Tensor, " b"], log_theta: Float[Tensor, ""]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Log probabilities of (a, tie, b); they sum to one. With d = r_a - r_b and l = log_theta,

        P(a) = sigmoid(d - l),   P(b) = sigmoid(-d - l),   P(tie) = (theta^2 - 1) P(a) P(b)

    Args:
        log_theta: at least 0; at 0 there are no ties (log probability -inf), and this is Bradley-Terry.
    """
    win, lose = F.logsigmoid(r_a - r_b - log_theta), F.logsigmoid(r_b - r_a - log_theta)
    return win, torch.log(torch.expm1(2 * log_theta)) + win + lose, lose


def rao_kupper_loss(
    r_a: Float[Tensor, " b"], r_b: Float[Tensor, " b"], label: Int[Tensor, " b"], log_theta: Float[Tensor, ""]
) -> Float[Tensor, " b"]:
    """-log P(label) of each pair; label: FIRST (1) where a is preferred, SECOND (-1) where b is, TIE (0)."""
    win, tie, lose = rao_kupper_log_probs(r_a, r_b, log_theta)
    decided = win.where(label == FIRST, lose)
    return -tie.where(label == TIE, decided) if (label == TIE).any() else -decided


def agreement(difference: Float[Tensor, " b"], first_won: Bool[Tensor, " b"]) -> float:
    """The share of decided pairs where the sign of r_first - r_second is right; equal scores count one half."""
    right = torch.where(first_won, difference, -difference).sign()
    return float((right + 1).mean() / 2)


def calibration_error(difference: Float[Tensor, " b"], first_won: Bool[Tensor, " b"], bins: int = BINS) -> float:
    """Expected calibration error: sum_k n_k / n |mean p - mean outcome| over equal bins of p = sigmoid(difference).

    Guo et al. (arXiv:1706.04599, eq. 3), of the probability that the first picture is preferred. In [0, 1].
    """
    chance = difference.detach().double().sigmoid()
    index = (chance * bins).long().clamp(max=bins - 1)
    gap = chance - first_won.double()
    sums = torch.zeros(bins, dtype=torch.float64, device=gap.device).index_add(0, index, gap)
    return float(sums.abs().sum()) / len(gap)


@dataclass(frozen=True)
class RewardFit:
    """How a reward is trained.

    full: all of the model, or the head alone. margin: of Bradley-Terry; with ties there is none. warmup: steps until
    the learning rate is reached, which then falls linearly to zero. seed: of the order and of `augment`.
    """

    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    margin: float = 0.0
    full: bool = True
    warmup: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1 or self.learning_rate <= 0 or min(self.warmup, self.margin) < 0:
            raise ValueError(
                "epochs and batch_size must be at least 1, learning_rate above 0, warmup and margin not below it: "
                f"{self}"
            )


@dataclass(frozen=True)
class Report:
    """What training gave. before, after: agreement on the decided held-out pairs, in [0, 1], and so many are they.

    calibration: the expected calibration error on them, after. losses: of each epoch. log_theta: 0 without ties.
    """

    before: float
    after: float
    calibration: float
    pairs: int
    losses: tuple[float, ...]
    log_theta: float


def fit(
    reward: LearntReward,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    settings: RewardFit,
    augment: Augment | None = None,
) -> Report:
    """Train the reward in place with AdamW; with ties among `pairs` theta is learnt as well.

    Args:
        held_out: pairs that are only looked at before and after; ties among them are left out.
        augment: makes of a pair another one with the same label, drawn anew each epoch; only with `settings.full`.

    Raises: ValueError without pairs to train on or decided ones to look at, and where the loss is not finite.
    """
    before = agreement(*outcomes(reward, decided(pairs, held_out)))
    with Fitting(reward, pairs, settings, augment) as fitting:
        progress = Progress(fitting.steps)
        for _ in range(settings.epochs):
            fitting.run_epoch(progress)
        progress.close()
    return fitting.report(before, held_out)


def decided(pairs: Sequence[Pair], held_out: Sequence[Pair]) -> list[Pair]:
    """The held-out pairs that are no ties. Raises: ValueError where there is none, or no pair to train on."""
    found = [pair for pair in held_out if pair.label != "tie"]
    if not pairs or not found:
        raise ValueError(f"{len(pairs)} pairs to train on and {len(found)} decided held-out ones: there must be some")
    return found


def outcomes(reward: LearntReward, pairs: Sequence[Pair]) -> tuple[Float[Tensor, " b"], Bool[Tensor, " b"]]:
    """r_first - r_second of each pair, and whether its label is "first"."""
    scores = []
    for start in range(0, len(pairs), reward.batch_size):
        part = pairs[start : start + reward.batch_size]
        prompts = Prompts(tuple(pair.prompt for pair in part), ({},) * len(part))
        sides = ([pair.first for pair in part], [pair.second for pair in part])
        first, second = (reward(Media(torch.stack(side)), prompts).total for side in sides)
        scores.append(first - second)
    difference = torch.cat(scores)
    return difference, torch.tensor([pair.label == "first" for pair in pairs], device=difference.device)


class Fitting:
    """A reward in training, epoch by epoch; while entered its weights carry gradients.

    A run may go on elsewhere: `state` is all that it has become, plain data and tensors.
    """

    def __init__(
        self, reward: LearntReward, pairs: Sequence[Pair], settings: RewardFit, augment: Augment | None = None
    ) -> None:
        if augment is not None and not settings.full:
            raise ValueError("augment needs full: the head alone is trained on embeddings that are computed once")
        self.reward, self.pairs, self.settings, self.augment = reward, pairs, settings, augment
        self.losses: list[float] = []
        self.steps = settings.epochs * math.ceil(len(pairs) / settings.batch_size)

    def __enter__(self) -> Fitting:
        reward, settings = self.reward, self.settings
        self._frozen = None if settings.full else _frozen_rates(reward, self.pairs)
        self.parameters = reward.train_on(settings.full)
        device = next(iter(self.parameters.values())).device
        self.spread = nn.Parameter(torch.zeros((), device=device))  # log theta = softplus(spread)
        self.ties = any(pair.label == "tie" for pair in self.pairs)
        groups: list[dict[str, Any]] = [{"params": [*self.parameters.values()]}]
        groups.append({"params": [self.spread], "lr": max(settings.learning_rate, 0.01), "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(groups, settings.learning_rate, weight_decay=settings.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / max(settings.warmup, 1)) * (1 - step / self.steps)
        )
        return self

    def __exit__(self, kind: object, error: object, at: object) -> None:
        self.reward.freeze()

    def run_epoch(self, progress: Progress) -> None:
        """Each pair once, in an order that is drawn from the seed."""
        settings, epoch = self.settings, len(self.losses)
        rates = self._frozen or _live_rates(self.reward, self.pairs, self.augment, settings.seed, epoch)
        order = key_generator(settings.seed, "reward_order", epoch).permutation(len(self.pairs))
        summed = 0.0
        for batch in np.array_split(order, self.steps // settings.epochs):
            spread = self.spread if self.ties else None
            loss = _loss(rates, self.pairs, batch.tolist(), settings.margin, spread)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            summed += float(loss.detach()) * len(batch)
            progress.update(len(batch), {"loss": float(loss.detach())})
        self.losses.append(summed / len(self.pairs))

    def state(self) -> dict[str, Any]:
        """Weights, optimizer, schedule and losses."""
        return {
            "weights": self.parameters | {"spread": self.spread},
            "optimizer": self.optimizer.state_dict()["state"],
            "steps": self.schedule.last_epoch,
            "losses": self.losses,
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` told; its keys may have become texts. Call it once, while entered."""
        for name, weight in (self.parameters | {"spread": self.spread}).items():
            weight.copy_(state["weights"][name])
        known = self.optimizer.state_dict()
        moments = {int(index): value for index, value in state["optimizer"].items()}
        self.optimizer.load_state_dict({"state": moments, "param_groups": known["param_groups"]})
        self.schedule.last_epoch = state["steps"]
        for group, base, factor in zip(
            self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(state["steps"])
        self.losses = [*state["losses"]]

    def report(self, before: float, held_out: Sequence[Pair]) -> Report:
        """What training gave; call it when it is over."""
        difference, first_won = outcomes(self.reward, decided(self.pairs, held_out))
        after, error = agreement(difference, first_won), calibration_error(difference, first_won)
        log_theta = float(F.softplus(self.spread.detach())) if self.ties else 0.0
        return Report(before, after, error, len(difference), tuple(self.losses), log_theta)


def _loss(
    rates: Rates, pairs: Sequence[Pair], batch: list[int], margin: float, spread: nn.Parameter | None
) -> Float[Tensor, ""]:
    first, second = rates(batch)
    label = torch.tensor([SIGNS[pairs[i].label] for i in batch], device=first.device)
    if spread is not None:
        loss = rao_kupper_loss(first, second, label, F.softplus(spread).to(first.device)).mean()
    else:
        won = label == FIRST
        loss = bradley_terry_loss(first.where(won, second), second.where(won, first), margin).mean()
    if not loss.isfinite():
        raise ValueError(f"the loss is {float(loss.detach())}: lower the learning rate, or look for broken pictures")
    return loss


def _live_rates(reward: LearntReward, pairs: Sequence[Pair], augment: Augment | None, seed: int, epoch: int) -> Rates:
    """Scores of the pairs asked for by all of the model as it is, with their graph."""

    def rates(batch: list[int]) -> tuple[Tensor, Tensor]:
        chosen = [pairs[i] for i in batch]
        if augment is not None:
            drawn = zip(batch, chosen, strict=True)
            chosen = [augment(pair, key_generator(seed, "reward_augment", epoch, i)) for i, pair in drawn]
        images = reward.embed_media(Media(torch.stack([p.first for p in chosen] + [p.second for p in chosen])))
        texts = reward.live_texts([pair.prompt for pair in chosen], images.device)
        first, second = reward.judge(images, texts.repeat(2, 1)).chunk(2)
        return first, second

    return rates


@torch.no_grad()
def _embed(reward: LearntReward, pixels: Sequence[Tensor]) -> Float[Tensor, "b d"]:
    parts = [pixels[i : i + reward.batch_size] for i in range(0, len(pixels), reward.batch_size)]
    return torch.cat([reward.embed_media(Media(torch.stack([*part]))) for part in parts])


def _frozen_rates(reward: LearntReward, pairs: Sequence[Pair]) -> Rates:
    """Scores of the pairs asked for by the head, on embeddings that are computed here, once."""
    first, second = (_embed(reward, side) for side in ([p.first for p in pairs], [p.second for p in pairs]))
    texts = reward.embed_texts([pair.prompt for pair in pairs], first.device)
    return lambda batch: (reward.judge(first[batch], texts[batch]), reward.judge(second[batch], texts[batch]))
