"""The loop that all trainers share: collect an epoch's rollouts, score them, give credit, update the policy.

A method overrides `loss`, and perhaps `credit`; the order of things stands here alone.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.distributed import sum_over_ranks
from flowalign.models import as_model
from flowalign.models.base import Model
from flowalign.prompts import as_prompts, epoch_prompts
from flowalign.randomness import key_generator, key_noise
from flowalign.records import Condition, Interval, Media, Prompts, Scores, Step, expand_rows, join_steps
from flowalign.rollout import Policy, Replay, replay, rollout
from flowalign.schedules import Path
from flowalign.tracking import Progress, Run, TrackerName
from flowalign.transitions import Transition
from rewards.base import Reward, as_reward
from trainers.batch import Batch, Sampling, State, detached, join_scores, summary, valid_rows
from trainers.evaluation import Evaluation, Evaluator
from trainers.optim import Optimizer, PolicyOptimizer


class Trainer(ABC):
    """See the subclasses; `train()` runs all epochs and leaves a run folder."""

    def __init__(
        self,
        model: Model | DiffusionPipeline,
        reward: Reward | Callable[..., Any],
        prompts: Prompts | Sequence[str] | str,
        sampling: Sampling,
        policy: Policy,
        optimizer: Optimizer,
        evaluation: Evaluation,
        epochs: int,
        updates_per_epoch: int,
        folder: str,
        seed: int,
        on_invalid: Literal["stop", "drop"],
        log_with: Sequence[TrackerName],
    ) -> None:
        self.model, self.reward, self.prompts = as_model(model), as_reward(reward), as_prompts(prompts)
        self.sampling, self.policy, self.evaluation = sampling, policy, evaluation
        self.epochs, self.updates_per_epoch, self.seed = epochs, updates_per_epoch, seed
        self.folder, self.on_invalid, self.log_with = FilePath(folder), on_invalid, tuple(log_with)
        self.sigmas = self.model.sigmas(sampling.steps)
        self.optimizer = PolicyOptimizer(self.model.trainable(), optimizer, self.model.scale_loss)
        self.state = State()
        self._check()

    @abstractmethod
    def loss(
        self,
        new: Replay,
        old_log_probs: Float[Tensor, " b"],
        advantages: Float[Tensor, " b"],
        reference: Replay | None,
        interval: Interval,
    ) -> Float[Tensor, " b"]:
        """The objective of each sample at one step, not yet averaged."""

    @abstractmethod
    def credit(self, scores: Scores, group_ids: Int[Tensor, " b"]) -> Float[Tensor, b * t]:
        """Advantages of an epoch's valid samples."""

    def trained_steps(self, path: Path) -> tuple[int, ...]:
        """The steps whose log-probs the loss reads, by default all stochastic ones."""
        return path.stochastic

    def needs_reference(self) -> bool:
        """Whether the loss reads the reference model; its pass is left out otherwise."""
        return False

    def _check(self) -> None:
        path = self.sampling.plan.resolve(self.sampling.steps, 0, self.seed)
        if not self.trained_steps(path):
            raise ValueError("the plan has no stochastic step to train on: a ratio of densities needs one")
        rows = self.sampling.groups * (1 if path.branch is not None else self.sampling.group_size)
        if not 1 <= self.updates_per_epoch <= rows:
            raise ValueError(
                f"updates_per_epoch must lie in 1 ... {rows} (the rows of an epoch), not {self.updates_per_epoch}"
            )

    def train(self, config: Mapping[str, Any] | None = None) -> FilePath:
        """Run all epochs; returns the run folder. The policy's weights are left in its `lora/`."""
        evaluator = Evaluator(self.model, self.reward, self.evaluation, self.sampling, self.seed)
        with Run(self.folder, config, log_with=self.log_with) as run:
            progress = Progress(self.epochs)
            evaluator.encode()
            self._evaluate(run, evaluator)
            while self.state.epoch < self.epochs:
                batch = self.collect(self.state.epoch)
                metrics = summary(batch) | self.update(batch)
                self.state.epoch += 1
                run.log(self.state.epoch, metrics)
                if self.state.epoch % self.evaluation.every == 0 or self.state.epoch == self.epochs:
                    self._evaluate(run, evaluator)
                shown = {"reward": metrics["reward"], "held-out": evaluator.last, "best": self.state.best}
                progress.update(len(batch.weights), shown)
            progress.close()
            evaluator.finish(run, self.state.best_epoch)
        return self.folder

    def _evaluate(self, run: Run, evaluator: Evaluator) -> None:
        with self.optimizer.averaged():
            metrics = evaluator.run(run, self.state.epoch)
            if metrics is None:
                self.model.save(run.folder / "lora")
                return
            score = metrics["held-out"]
            self.state.history.append({"epoch": self.state.epoch, **metrics})
            if self.state.best is None or score > self.state.best:
                self.state.best, self.state.best_epoch = score, self.state.epoch
            evaluator.keep(run, self.state.epoch, self.state.best_epoch)

    def collect(self, epoch: int) -> Batch:
        """Rollouts, scores and advantages of one epoch; a function of policy, seed and epoch."""
        sampling = self.sampling
        path = sampling.plan.resolve(sampling.steps, epoch, self.seed)
        chosen = epoch_prompts(len(self.prompts), sampling.groups, epoch, self.seed)
        fanned = path.branch is not None
        members = sampling.group_size if fanned else 1
        rows = [(group, member) for group in range(sampling.groups) for member in range(sampling.group_size // members)]
        parts = [
            self._collect_rows(epoch, path, [*micro], chosen, members) for micro in _chunks(rows, sampling.batch_size)
        ]
        steps = tuple(join_steps(same) for same in zip(*(steps for steps, _ in parts), strict=True))
        scores = join_scores([scores for _, scores in parts])
        group_ids = torch.arange(sampling.groups).repeat_interleave(sampling.group_size)
        advantages, weights = self._valid_credit(scores, group_ids, epoch)
        texts = tuple(self.prompts.text[chosen[group]] for group, _ in rows)
        return Batch(path, texts, steps, scores, group_ids, advantages, weights)

    def _collect_rows(
        self, epoch: int, path: Path, rows: list[tuple[int, int]], chosen: list[int], members: int
    ) -> tuple[tuple[Step, ...], Scores]:
        """One micro-batch, padded to the shape of the others so that its replay can have it too."""
        real = len(rows)
        padded = rows + [rows[-1]] * (self.sampling.batch_size - real)
        shape, shared = self.model.latent_shape, members > 1
        samples = [(g, m) for g, first in padded for m in range(first, first + members)]

        def step_noise(step: int) -> Tensor:
            return torch.stack([key_noise(self.seed, "step", epoch, g, m, step, shape=shape) for g, m in samples])

        start = torch.stack(
            [key_noise(self.seed, "start", epoch, g, -1 if shared else m, shape=shape) for g, m in padded]
        )
        made = rollout(
            self.model,
            self.model.encode([self.prompts.text[chosen[group]] for group, _ in padded]),
            start.to(self.model.device),
            self.sigmas,
            path,
            self.policy,
            step_noise,
            members,
            self.sampling.rows_per_call,
        )
        kept = real * members
        pixels = self.decode(made.latents[:kept])
        scores = self.reward.score(Media(pixels), self.prompts.rows([chosen[group] for group, _ in samples[:kept]]))
        return tuple(step.rows(torch.arange(real)) for step in made.steps), detached(scores)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of latents, `rows_per_call` at a time."""
        return torch.cat([self.model.decode(part) for part in latents.split(self.sampling.rows_per_call)])

    def _valid_credit(self, scores: Scores, group_ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        invalid = int((~scores.valid).sum())
        if invalid and self.on_invalid == "stop":
            raise ValueError(
                f"{invalid} of {len(scores)} scores of epoch {epoch} are not valid; "
                "mend the reward, or set on_invalid: drop"
            )
        known = scores.valid
        credited = self.credit(valid_rows(scores), group_ids[known])
        advantages = credited.new_zeros(len(scores), *credited.shape[1:])
        advantages[known] = credited
        return advantages, known.float()

    def update(self, batch: Batch, order: Int[Tensor, " p"] | None = None) -> dict[str, float]:
        """One pass over the batch in `updates_per_epoch` optimizer steps.

        Each step's loss is divided once, by its weighted number of samples times trained steps over all processes.

        Args:
            order: the order in which rows are taken; by default drawn from the seed and the epoch.
        """
        rows = len(batch.texts)
        if order is None:
            drawn = key_generator(self.seed, "update_order", self.state.epoch).permutation(rows)
            order = torch.from_numpy(drawn)
        watch: list[dict[str, Tensor]] = []
        norms = []
        for part in order.tensor_split(self.updates_per_epoch):
            self._accumulate(batch, part, watch)
            norms.append(self.optimizer.step())
            self.state.updates += 1
        means = {name: torch.stack([row[name] for row in watch]).mean().item() for name in (watch[0] if watch else ())}
        return means | {"grad_norm": sum(norms) / len(norms), "lr": self.optimizer.learning_rate}

    def _accumulate(self, batch: Batch, rows: Int[Tensor, " p"], watch: list[dict[str, Tensor]]) -> None:
        trained = self.trained_steps(batch.path)
        members = batch.steps[0].members
        total = batch.weights[expand_rows(rows, members)].sum() * len(trained)
        sum_over_ranks([total])
        if total == 0:
            return
        for micro in rows.split(self.sampling.batch_size):
            padded = torch.cat([micro, micro[-1:].expand(self.sampling.batch_size - len(micro))])
            weights = batch.weights[expand_rows(padded, members)].clone()
            weights[len(micro) * members :] = 0
            condition = self.model.encode([batch.texts[row] for row in padded.tolist()])
            for at, step in enumerate(batch.steps):
                if step.interval.index not in trained:
                    continue
                transition = batch.path.transitions[step.interval.index]
                taken = step.rows(padded.to(step.latents.device))
                advantages = batch.advantages[expand_rows(padded, members)]
                advantages = advantages if advantages.ndim == 1 else advantages[:, at]
                if not self.needs_reference() and not (advantages * weights).any():
                    continue  # nothing to learn from: no call
                reference = self._reference(taken, transition, condition)
                new = replay(self.model, taken, transition, condition, self.policy)
                device = new.log_probs.device
                losses = self.loss(new, taken.log_probs, advantages.to(device), reference, step.interval)
                self.optimizer.backward((losses * weights.to(device)).sum() / total.to(device))
                watch.append(self.watch(new, taken.log_probs, reference, step.interval, weights.to(device)))

    @torch.no_grad()
    def _reference(self, step: Step, transition: Transition, condition: Condition) -> Replay | None:
        if not self.needs_reference():
            return None
        with self.model.reference():
            return replay(self.model, step, transition, condition, self.policy)

    def watch(
        self, new: Replay, old_log_probs: Tensor, reference: Replay | None, interval: Interval, weights: Tensor
    ) -> dict[str, Tensor]:
        """Numbers of one micro-batch to log."""
        return {}


def _chunks(rows: Sequence[Any], size: int) -> Iterator[tuple[Any, ...]]:
    walk = iter(rows)
    while chunk := tuple(itertools.islice(walk, size)):
        yield chunk
