"""Alignment of diffusion and flow models. What is listed below loads on first use: `import flowalign` is cheap."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowalign.config import ConfigError
    from flowalign.records import Condition, Media, Prompts, Scores, Trajectory
    from flowalign.tracking import Run

__version__ = "0.1.0"
__all__ = ["Condition", "ConfigError", "Media", "Prompts", "Run", "Scores", "Trajectory", "__version__"]

_HOME = {"ConfigError": "flowalign.config", "Run": "flowalign.tracking"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'flowalign' has no attribute {name!r}")
    return getattr(import_module(_HOME.get(name, "flowalign.records")), name)
