"""The first-order scheduler whose sigmas a rollout takes, where a pipeline ships a multistep one."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler


def multistep_shift(scheduler: Any) -> float | None:
    """flow_shift of a multistep scheduler (UniPC, DPM-Solver++); None for one that has no such setting."""
    shift = scheduler.config.get("flow_shift")
    return None if shift is None else float(shift)


def first_order(scheduler: Any) -> FlowMatchEulerDiscreteScheduler:
    """A pipeline's own scheduler, or one of first order on its sigmas.

    Raises: ValueError for a multistep scheduler whose sigmas are not a flow's.
    """
    shift = multistep_shift(scheduler)
    if shift is None:
        return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    if not scheduler.config.use_flow_sigmas:
        raise ValueError(
            f"the pipeline's {type(scheduler).__name__} does not say use_flow_sigmas; "
            "give it a FlowMatchEulerDiscreteScheduler with a shift"
        )
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=scheduler.config.num_train_timesteps, shift=shift)
