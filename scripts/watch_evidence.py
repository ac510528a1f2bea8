"""Whether the watch tells exploiting runs from healthy ones: when it raises its alarm, and what the metric did.

    python scripts/watch_evidence.py --out build/watch --seeds 0 1 2
    python scripts/watch_evidence.py --out build/watch --runs hacked_video --seeds 11 --epochs 30

Evaluated every five epochs by the verifier, strict, with the trained CLIP beside it at weight 0 where CLIP is trained.
Of each run: the first alarm with its reason, held-out strict then against the start, and the first evaluation at which
strict has fallen by 0.05. A run whose folder has finished is not run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from flowalign.cli import parse_trainer
from flowalign.config import arguments_of, construct, find_config, load_yaml, override

FALL = 0.05  # of the share of held-out prompts that are right
# by name: the config, options, and epochs
RUNS: dict[str, tuple[str, dict[str, Any], int]] = {
    "hacked_video": ("draft/shapes_video", {"kl_coef": 0.0}, 60),
    "hacked": ("draft/shapes", {"kl_coef": 0.0}, 160),
    "healthy_video": ("draft/shapes_video", {}, 60),
    "healthy": ("flow_grpo/shapes", {}, 60),
}


def rows(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "held-out" in line]


def train(name: str, seed: int, epochs: int | None, folder: Path) -> None:
    """Run it, or go on with it."""
    config, changes, usual = RUNS[name]
    options = changes | {"seed": seed, "epochs": epochs or usual, "evaluation.every": 5, "folder": str(folder)}
    call = parse_trainer(override(load_yaml(find_config(config)), options))
    construct(call).train(config={"trainer": call.path, **arguments_of(call)}, resume=True)


def told(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """What the watch and the metric said."""
    found = rows(folder)
    start = found[0]["held-out/strict"]
    alarm = next((row for row in found if any(key.startswith("watch/alarm/") for key in row)), None)
    fallen = next((row["step"] for row in found if row["held-out/strict"] <= start - FALL), None)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    reasons = [event["detail"] for event in events if event["event"] == "alarm"]
    return {
        "run": name,
        "seed": seed,
        "alarm": None if alarm is None else alarm["step"],
        "strict at start": round(start, 3),
        "strict at alarm": None if alarm is None else round(alarm["held-out/strict"], 3),
        "strict at end": round(found[-1]["held-out/strict"], 3),
        "fallen by 0.05": fallen,
        "in time": None if alarm is None else fallen is None or alarm["step"] <= fallen,
        "reasons": reasons,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/watch"))
    parser.add_argument("--runs", nargs="+", choices=[*RUNS], default=["hacked_video", "healthy_video", "healthy"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="of each run, in place of its own")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.runs:
        for seed in arguments.seeds:
            folder = arguments.out / f"{name}-{seed}"
            train(name, seed, arguments.epochs, folder)
            result = told(name, seed, folder)
            print(json.dumps(result), flush=True)
            with (arguments.out / "results.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
