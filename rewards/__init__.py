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
from rewards.averaging import average_rewards
from rewards.base import Card, Minimum, Product, Reward, WeightedSum
from rewards.chat import Chat, Endpoint
from rewards.clip import CLIPScore
from rewards.colourfulness import Colourfulness
from rewards.consistency import EdgeConsistency
from rewards.ctc import CTCText
from rewards.dynamics import DynamicDegree, FlowDynamics
from rewards.expression import parse_reward
from rewards.face import FaceIdentity
from rewards.finders import Finder, GroundingDINO, ShapesFinder
from rewards.frames import OnFrames
from rewards.geneval import GenEval
from rewards.goal import GoalBaselineCLIP
from rewards.groups import GroupDiversity, PairwiseWinRate, Rank, WinRate
from rewards.hps import HPSv2
from rewards.hpsv3 import HPSv3
from rewards.image_reward import ImageReward
from rewards.jpeg import JPEGCompressibility, JPEGIncompressibility
from rewards.judge import Judge, PairJudge
from rewards.judges import QualityLevels, SoftTIFA, UnifiedReward, UnifiedRewardThink, VQAScore
from rewards.local_vlm import LocalVLM
from rewards.move import Position, Resize, Translation
from rewards.mps import MPS
from rewards.mtcnn import MTCNN
from rewards.object_edit import ObjectEdit
from rewards.ocr import OCR
from rewards.openclip import OpenCLIPScore
from rewards.pickscore import PickScore
from rewards.pixelwise import DepthConsistency, SegmentConsistency
from rewards.placed import OnDevice
from rewards.preference import LearntReward, Pair
from rewards.process import OwnProcess
from rewards.remote import RemoteReward
from rewards.sets import MMD, CLIPEmbedder, FrechetDistance, VendiScore
from rewards.shapes import ShapesVerifier
from rewards.shapes_video import ShapesVideoVerifier
from rewards.shaping import PAR, LambdaHarmonic, LogSigmoid, TextNorm, UncertaintyWeighted
from rewards.siglip import SigLIPScore
from rewards.subject import CLIPImageScore, DINOScore, DINOv2Score
from rewards.temporal import BackgroundConsistency, FrameDynamics, SubjectConsistency, TemporalFlickering
from rewards.video_reward import VideoReward
from rewards.vision_reward import VisionReward, VisionRewardVideo

__all__ = [
    "MMD",
    "MPS",
    "MTCNN",
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
    "Chat",
    "Clip",
    "Colourfulness",
    "DINOScore",
    "DINOv2Score",
    "DepthConsistency",
    "DynamicDegree",
    "EdgeConsistency",
    "Endpoint",
    "FaceIdentity",
    "Finder",
    "FlowDynamics",
    "FrameDynamics",
    "FrechetDistance",
    "Gate",
    "GenEval",
    "GoalBaselineCLIP",
    "GroundingDINO",
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
    "LocalVLM",
    "LogSigmoid",
    "Mean",
    "MeanMinusStd",
    "Minimum",
    "Normalise",
    "ObjectEdit",
    "OnDevice",
    "OnFrames",
    "OpenCLIPScore",
    "OwnProcess",
    "Pair",
    "PairJudge",
    "PairwiseWinRate",
    "PickScore",
    "Position",
    "Product",
    "QualityLevels",
    "Rank",
    "RemoteReward",
    "Resize",
    "Reward",
    "RunningNormalise",
    "SegmentConsistency",
    "ShapesFinder",
    "ShapesVerifier",
    "ShapesVideoVerifier",
    "SigLIPScore",
    "SoftTIFA",
    "Spread",
    "SubjectConsistency",
    "TemporalFlickering",
    "TextNorm",
    "Translation",
    "UncertaintyWeighted",
    "UnifiedReward",
    "UnifiedRewardThink",
    "VQAScore",
    "VendiScore",
    "VideoReward",
    "VisionReward",
    "VisionRewardVideo",
    "WeightedSum",
    "WinRate",
    "WorstCase",
    "average_rewards",
    "parse_reward",
]
