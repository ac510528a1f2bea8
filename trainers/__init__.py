"""The trainers: the shared loop, and a file per method."""

from __future__ import annotations

from trainers.batch import Sampling
from trainers.evaluation import Evaluation
from trainers.flow_grpo import FlowGRPO
from trainers.keeper import Checkpoints
from trainers.optim import Optimizer
from trainers.reward_model import RewardFit
from trainers.reward_run import RewardModel

__all__ = ["Checkpoints", "Evaluation", "FlowGRPO", "Optimizer", "RewardFit", "RewardModel", "Sampling"]
