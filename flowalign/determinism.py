"""`deterministic: true` in a config: on one machine, with the same libraries, the same command gives the same bits.

All random numbers are keyed anyway (`flowalign.randomness`); what is left are kernels that add in another order each
time. Not promised: the same bits on another device, with other libraries, or on another number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

COST = (
    "deterministic: kernels that add in one order alone; on CUDA they are slower, and attention keeps whole matrices, "
    "which takes memory that grows with the square of the tokens; on a CPU it costs next to nothing"
)
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
SIGN = "does not have a deterministic implementation"  # in torch's error


def start(config: Mapping[str, Any]) -> None:
    """Make this process deterministic; to be called before CUDA is used.

    Args:
        config: resolved, of what is to run.

    Raises: ValueError where it names an attention kernel whose backward pass adds in any order.
    """
    attention = _attention(config)
    if attention not in ("native", "_native_math"):
        raise ValueError(
            f"deterministic: the backward pass of memory.attention {attention} adds in any order; take native"
        )
    os.environ.setdefault(WORKSPACE, ":4096:8")  # cuBLAS: buffers of a fixed size
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    if torch.cuda.is_available():
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.enable_math_sdp(True)


def _attention(config: Mapping[str, Any]) -> str:
    model = config.get("model")
    memory = model.get("memory") if isinstance(model, Mapping) else None
    return str(memory.get("attention", "native")) if isinstance(memory, Mapping) else "native"


def explained(error: BaseException) -> str | None:
    """One line for an operation that cannot be had deterministic; None for any other error."""
    text = str(error)
    if not isinstance(error, RuntimeError) or SIGN not in text:
        return None
    operation = text.split(SIGN)[0].split()[-1]
    return f"{operation} has no deterministic form on this device: leave deterministic: true out, or run on another"
