"""What the quick start teaches, over seeds and with controls, on held-out prompts that no run has evaluated on.

    python scripts/quick_start_evidence.py --out build/evidence --seeds 0 1 2
    python scripts/quick_start_evidence.py --out build/evidence --seeds 0 --shuffled     # control: credit is noise

Each run's kept policy is compared with the base on 512 held-out prompts from fixed noise: mean strict gain, the lower
end of its paired 95 % interval, and the gain on unseen compositions alone. Results are printed and appended to
OUT/results.jsonl; a run whose folder is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.advantages import flow_grpo_advantages
from flowalign.cli import parse_trainer
from flowalign.config import arguments_of, build, construct, find_config, load_yaml, override
from flowalign.models.base import Model
from flowalign.records import Media
from flowalign.sample import pictures
from flowalign.shapes import held_out_prompts
from rewards import ShapesVerifier


def shuffled_advantages(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """The control: every sample gets the advantage of another one."""
    advantages = flow_grpo_advantages(rewards, group_ids)
    order = torch.randperm(len(advantages), generator=torch.Generator().manual_seed(int(rewards.sum() * 1e4)))
    return advantages[order]


def model_of(config: dict[str, Any], lora: Path | None) -> Model:
    """The config's model, with the policy of a run or without."""
    arguments = config["model"] | ({} if lora is None else {"lora": {"start": str(lora)}})
    return build(_model, {"model": arguments})


def _model(model: Model) -> Model:
    return model


def strict(model: Model, config: dict[str, Any], prompts: Any) -> Tensor:
    """1 for each prompt whose picture is right, 0 otherwise."""
    sampling, verifier = config["sampling"], ShapesVerifier()
    drawn = pictures(model, prompts.text, sampling["steps"], sampling["guidance_scale"], 7, "evidence", 128)
    return verifier.score(Media(torch.cat(list(drawn))), prompts).parts["strict"]


def train(config: dict[str, Any], folder: Path, shuffled: bool) -> float:
    """Run the config unless its folder is there; seconds it took."""
    if folder.exists():
        return float("nan")
    started, call = time.monotonic(), parse_trainer(config)
    trainer = construct(call)
    if shuffled:
        trainer.advantages = shuffled_advantages
    trainer.train(config={"trainer": call.path, **arguments_of(call)})
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="flow_grpo/shapes")
    parser.add_argument("--out", type=Path, default=Path("build/evidence"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shuffled", action="store_true", help="the control with shuffled advantages")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    config = load_yaml(find_config(arguments.config))
    prompts = held_out_prompts(512, 1, tuple(config["evaluation"]["prompts"]["kinds"]))
    unseen = torch.tensor([row["unseen"] for row in prompts.metadata])
    before = strict(model_of(config, None), config, prompts)
    for seed in arguments.seeds:
        folder = arguments.out / f"{'shuffled' if arguments.shuffled else 'seed'}-{seed}"
        seconds = train(override(config, {"seed": seed, "folder": str(folder)}), folder, arguments.shuffled)
        gain = strict(model_of(config, folder / "lora"), config, prompts) - before
        result = {
            "run": folder.name,
            "seconds": round(seconds),
            "before": before.mean().item(),
            "gain": gain.mean().item(),
            "lower": (gain.mean() - 1.96 * gain.std() / len(gain) ** 0.5).item(),
            "gain_unseen": gain[unseen].mean().item(),
        }
        print(json.dumps(result), flush=True)
        with (arguments.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
