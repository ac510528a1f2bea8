"""The reward zoo: one contract, and a file per reward."""

from __future__ import annotations

from rewards.aesthetic import Aesthetic, AestheticV25
from rewards.algebra import (
    Clip,
    Gate,
    GroupNormalise,
    Mean,
    MeanMinusStd,
    Normalise,
    RunningNormalise,
    Spread,
    WorstCase,
)
from rewards.base import Card, Minimum, Product, Reward, WeightedSum
from rewards.clip import CLIPScore
from rewards.ctc import CTCText
from rewards.expression import parse_reward
from rewards.frames import OnFrames
from rewards.geneval import GenEval
from rewards.goal import GoalBaselineCLIP
from rewards.groups import GroupDiversity, PairwiseWinRate, Rank, WinRate
from rewards.hps import HPSv2
from rewards.hpsv3 import HPSv3
from rewards.image_reward import ImageReward
from rewards.jpeg import JPEGCompressibility, JPEGIncompressibility
from rewards.judge import Endpoint, Judge, PairJudge
from rewards.judges import QualityLevels, SoftTIFA, UnifiedReward, UnifiedRewardThink, VQAScore
from rewards.ocr import OCR
from rewards.openclip import OpenCLIPScore
from rewards.pickscore import PickScore
from rewards.preference import LearntReward, Pair
from rewards.remote import RemoteReward
from rewards.sets import MMD, CLIPEmbedder, FrechetDistance, VendiScore
from rewards.shapes import ShapesVerifier
from rewards.shaping import PAR, LambdaHarmonic, LogSigmoid, TextNorm, UncertaintyWeighted
from rewards.siglip import SigLIPScore
from rewards.subject import CLIPImageScore, DINOScore, DINOv2Score
from rewards.temporal import BackgroundConsistency, FrameDynamics, SubjectConsistency, TemporalFlickering
from rewards.video_reward import VideoReward

__all__ = [
    "MMD",
    "OCR",
    "PAR",
    "Aesthetic",
    "AestheticV25",
    "BackgroundConsistency",
    "CLIPEmbedder",
    "CLIPImageScore",
    "CLIPScore",
    "CTCText",
    "Card",
    "Clip",
    "DINOScore",
    "DINOv2Score",
    "Endpoint",
    "FrameDynamics",
    "FrechetDistance",
    "Gate",
    "GenEval",
    "GoalBaselineCLIP",
    "GroupDiversity",
    "GroupNormalise",
    "HPSv2",
    "HPSv3",
    "ImageReward",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "Judge",
    "LambdaHarmonic",
    "LearntReward",
    "LogSigmoid",
    "Mean",
    "MeanMinusStd",
    "Minimum",
    "Normalise",
    "OnFrames",
    "OpenCLIPScore",
    "Pair",
    "PairJudge",
    "PairwiseWinRate",
    "PickScore",
    "Product",
    "QualityLevels",
    "Rank",
    "RemoteReward",
    "Reward",
    "RunningNormalise",
    "ShapesVerifier",
    "SigLIPScore",
    "SoftTIFA",
    "Spread",
    "SubjectConsistency",
    "TemporalFlickering",
    "TextNorm",
    "UncertaintyWeighted",
    "UnifiedReward",
    "UnifiedRewardThink",
    "VQAScore",
    "VendiScore",
    "VideoReward",
    "WeightedSum",
    "WinRate",
    "WorstCase",
    "parse_reward",
]
