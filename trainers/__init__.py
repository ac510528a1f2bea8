"""The trainers: the shared loop, and a file per method."""

from __future__ import annotations

from trainers.batch import Sampling
from trainers.best_of_n import BestOfN
from trainers.ctrl_u import CtrlU
from trainers.dense_grpo import DenseGRPO
from trainers.draft import DRaFT
from trainers.evaluation import Evaluation
from trainers.flow_dpo import FlowDPO, Margin
from trainers.flow_grpo import FlowGRPO
from trainers.flow_rwr import FlowRWR
from trainers.forward_source import Pairs
from trainers.forward_times import GridTimes, LogitNormalTimes, UniformTimes
from trainers.instruct_video import InstructVideo
from trainers.ipro import IPRO
from trainers.keeper import Checkpoints
from trainers.noise_calibration import BinomialBalance, Calibration, CountBalance, FractionBalance
from trainers.optim import Optimizer
from trainers.raft import RAFT
from trainers.refl import ReFL
from trainers.reno import ReNO
from trainers.reward_model import RewardFit
from trainers.reward_run import RewardModel

__all__ = [
    "IPRO",
    "RAFT",
    "BestOfN",
    "BinomialBalance",
    "Calibration",
    "Checkpoints",
    "CountBalance",
    "CtrlU",
    "DRaFT",
    "DenseGRPO",
    "Evaluation",
    "FlowDPO",
    "FlowGRPO",
    "FlowRWR",
    "FractionBalance",
    "GridTimes",
    "InstructVideo",
    "LogitNormalTimes",
    "Margin",
    "Optimizer",
    "Pairs",
    "ReFL",
    "ReNO",
    "RewardFit",
    "RewardModel",
    "Sampling",
    "UniformTimes",
]
