"""What a config of the embedded worlds teaches, over seeds and with controls, on held-out prompts it never saw.

    python scripts/shapes_evidence.py --out build/evidence --seeds 0 1 2
    python scripts/shapes_evidence.py --out build/evidence --seeds 0 --shuffled     # control: credit is noise
    python scripts/shapes_evidence.py --config flow_grpo/shapes_video --out build/video_evidence

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
from flowalign.media import shown
from flowalign.models.base import Model
from flowalign.records import Prompts
from flowalign.sample import pictures
from rewards.base import Reward


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


def _judging(reward: Reward, prompts: Prompts) -> tuple[Reward, Prompts]:
    return reward, prompts


def strict(model: Model, config: dict[str, Any], reward: Reward, prompts: Prompts) -> Tensor:
    """1 for each prompt whose picture or video is right, 0 otherwise."""
    sampling = config["sampling"]
    drawn = pictures(model, prompts, sampling["steps"], sampling["guidance_scale"], 7, "evidence", 128)
    return reward(shown(torch.cat(list(drawn)), prompts, model.fps), prompts).parts["strict"]


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
    asked = config["evaluation"]["prompts"] | {"count": 512, "seed": 1}
    reward, prompts = build(_judging, {"reward": config["reward"], "prompts": asked})
    unseen = torch.tensor([row["unseen"] for row in prompts.metadata])
    before = strict(model_of(config, None), config, reward, prompts)
    for seed in arguments.seeds:
        folder = arguments.out / f"{'shuffled' if arguments.shuffled else 'seed'}-{seed}"
        seconds = train(override(config, {"seed": seed, "folder": str(folder)}), folder, arguments.shuffled)
        gain = strict(model_of(config, folder / "lora"), config, reward, prompts) - before
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
