"""What a check does in its own way for each kind of trainer; all else is the same for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from flowalign.accounting import Rows
from trainers.collection import Epoch

if TYPE_CHECKING:
    from trainers.preflight.costs import Phases, Trial
    from trainers.preflight.geometry import Geometry, PlannedStep
    from trainers.preflight.memory import Passing, Switches
    from trainers.preflight.problems import Found
    from trainers.preflight.trial import Learning, Rollouts


Lines = list[tuple[str, str]]  # of the page: a name, and what is told of it


class Family(ABC):
    """A kind of trainer, as a check tries it; its files are `policy` and `reward_gradient`."""

    @abstractmethod
    def geometry(self, processes: int, batch_size: int) -> Geometry:
        """How an epoch is cut up."""

    @abstractmethod
    def planned_steps(self, epochs: tuple[Epoch, ...]) -> tuple[PlannedStep, ...]:
        """All steps of the grid over epochs. Raises: ValueError where a transition is not defined for its step."""

    @abstractmethod
    def spent_rows(self, epoch: Epoch, cut: Geometry) -> Rows:
        """The network rows that an epoch takes, padding included."""

    @abstractmethod
    def of_settings(self, cut: Geometry, steps: tuple[PlannedStep, ...]) -> list[Found]:
        """What the settings tell that only this kind of trainer has."""

    @abstractmethod
    def roll_out(self) -> Rollouts:
        """First samples. Raises: ValueError where reward or plan do."""

    @abstractmethod
    def learn(self, rollouts: Rollouts) -> Learning:
        """Gradients of a first micro-batch, discarded."""

    @abstractmethod
    def of_trial(self, trial: Trial) -> list[Found]:
        """What the tiny step tells that only this kind of trainer has."""

    @abstractmethod
    def phases(self, cut: Geometry, trial: Trial) -> Phases:
        """Seconds of an epoch, of the busiest process."""

    def judged_beside(self, trial: Trial, groups: int) -> float:
        """Seconds of an evaluation beside those of its pictures, of one of so many processes or groups of them."""
        return 0.0

    @abstractmethod
    def kept_bytes(self, cut: Geometry) -> int:
        """What one process keeps of an epoch's rollouts."""

    @abstractmethod
    def learning_bytes(self, choice: Switches, passing: Passing) -> int:
        """Activations of a micro-batch with gradient."""

    @abstractmethod
    def plan_lines(self, steps: tuple[PlannedStep, ...]) -> Lines:
        """The plan, a line a step."""

    @abstractmethod
    def step_lines(self, trial: Trial, cut: Geometry) -> Lines:
        """What the tiny step has shown, between its prompt and its sheet."""
