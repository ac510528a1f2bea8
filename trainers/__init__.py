"""The trainers: the shared loop, and a file per method."""

from __future__ import annotations

from trainers.active_steps import ActiveSteps
from trainers.awm import AWM
from trainers.batch import Sampling
from trainers.best_of_n import BestOfN
from trainers.ctrl_u import CtrlU
from trainers.dense_grpo import DenseGRPO
from trainers.draft import DRaFT
from trainers.euphonium import Euphonium
from trainers.evaluation import Evaluation
from trainers.flow_dpo import FlowDPO, Margin
from trainers.flow_grpo import FlowGRPO
from trainers.flow_rwr import FlowRWR
from trainers.forward_source import Pairs
from trainers.forward_times import GridTimes, LogitNormalTimes, StratifiedTimes, UniformTimes
from trainers.g2rpo import G2RPO
from trainers.grpo_guard import GRPOGuard
from trainers.hacking_watch import HackingWatch
from trainers.instruct_video import InstructVideo
from trainers.ipro import IPRO
from trainers.keeper import Checkpoints
from trainers.nft import DiffusionNFT
from trainers.noise_calibration import BinomialBalance, Calibration, CountBalance, FractionBalance
from trainers.optim import Optimizer
from trainers.raft import RAFT
from trainers.refl import ReFL
from trainers.regularisers import BandCoefficient, ProportionalCoefficient, Refresh
from trainers.reno import ReNO
from trainers.resampling import Balanced, BestAndWorst, DropEqual, HasSpread, Resample
from trainers.reward_model import RewardFit
from trainers.reward_run import RewardModel
from trainers.supervised import Supervised
from trainers.talk2move import Talk2Move
from trainers.tree_grpo import TreeGRPO

__all__ = [
    "AWM",
    "G2RPO",
    "IPRO",
    "RAFT",
    "ActiveSteps",
    "Balanced",
    "BandCoefficient",
    "BestAndWorst",
    "BestOfN",
    "BinomialBalance",
    "Calibration",
    "Checkpoints",
    "CountBalance",
    "CtrlU",
    "DRaFT",
    "DenseGRPO",
    "DiffusionNFT",
    "DropEqual",
    "Euphonium",
    "Evaluation",
    "FlowDPO",
    "FlowGRPO",
    "FlowRWR",
    "FractionBalance",
    "GRPOGuard",
    "GridTimes",
    "HackingWatch",
    "HasSpread",
    "InstructVideo",
    "LogitNormalTimes",
    "Margin",
    "Optimizer",
    "Pairs",
    "ProportionalCoefficient",
    "ReFL",
    "ReNO",
    "Refresh",
    "Resample",
    "RewardFit",
    "RewardModel",
    "Sampling",
    "StratifiedTimes",
    "Supervised",
    "Talk2Move",
    "TreeGRPO",
    "UniformTimes",
]
