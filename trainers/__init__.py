"""The trainers: the shared loop, and a file per method."""

from __future__ import annotations

from trainers.batch import Sampling
from trainers.best_of_n import BestOfN
from trainers.draft import DRaFT
from trainers.evaluation import Evaluation
from trainers.flow_grpo import FlowGRPO
from trainers.instruct_video import InstructVideo
from trainers.ipro import IPRO
from trainers.keeper import Checkpoints
from trainers.optim import Optimizer
from trainers.refl import ReFL
from trainers.reno import ReNO
from trainers.reward_model import RewardFit
from trainers.reward_run import RewardModel

__all__ = [
    "IPRO",
    "BestOfN",
    "Checkpoints",
    "DRaFT",
    "Evaluation",
    "FlowGRPO",
    "InstructVideo",
    "Optimizer",
    "ReFL",
    "ReNO",
    "RewardFit",
    "RewardModel",
    "Sampling",
]
