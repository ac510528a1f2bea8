"""`flowalign eval`: models, LoRAs and inference methods on benchmarks, as one sweep that tells what is real.

At the top of the packages: it may import rewards and trainers, and nothing imports it but the command.
"""

from __future__ import annotations

from flowalign.evaluation.benchmarks import Benchmark, PromptBenchmark, Scorer, Set, Shapes, ShapesVideo
from flowalign.evaluation.evaluate import Evaluated, evaluate
from flowalign.evaluation.inception import InceptionFeatures
from flowalign.evaluation.published import (
    DrawBench,
    GenEval,
    HPDv2,
    PartiPrompts,
    PickAPic,
    T2ICompBench,
    TextRendering,
)
from flowalign.evaluation.suites import DreamBench, VBench
from flowalign.evaluation.sweep import Entrant, Plan, Sweep, plan

__all__ = [
    "Benchmark",
    "DrawBench",
    "DreamBench",
    "Entrant",
    "Evaluated",
    "GenEval",
    "HPDv2",
    "InceptionFeatures",
    "PartiPrompts",
    "PickAPic",
    "Plan",
    "PromptBenchmark",
    "Scorer",
    "Set",
    "Shapes",
    "ShapesVideo",
    "Sweep",
    "T2ICompBench",
    "TextRendering",
    "VBench",
    "evaluate",
    "plan",
]
