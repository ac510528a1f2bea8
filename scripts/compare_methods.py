"""Trainers against each other on an embedded world at equal compute, over seeds: a table, and the curves behind it.

    python scripts/compare_methods.py --out build/methods --seeds 0 1 2 --compute 200000 --gain 0.05 0.10 \\
        --arm 'Flow-GRPO = flow_grpo/shapes' --arm 'DenseGRPO = dense_grpo/shapes --completion_steps 2' \\
        --arm 'Flow-DPO + 56000 = flow_dpo/shapes'

An arm is a name, a config and options of it, as `flowalign train` takes them; what stored pairs took to be made is told
with a plus. Each is trained with each seed; what has been trained in part goes on, and what is in OUT/table.jsonl is
not done again. Compute is counted in forwards of one network row: a row with its backward is 3, and so are decode and
reward where gradients go through them; what those two cost is measured once for each arm, and kept. Evaluations are not
counted. With --compute an arm gets as many epochs as it pays for, and its learning rate falls over all of them. Of each
run the curve of held-out scores is written to OUT/curves.jsonl, and to the table:

    gain       of the kept policy over the base on 2,048 held-out prompts that no run looked at, and the lower end of
               its paired 95 % interval
    cost of g  compute until the run's own evaluations were at least g above the base for the first time
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.cli import parse_trainer
from flowalign.config import arguments_of, build, construct, find_config, load_yaml, override, read_options
from flowalign.media import shown
from flowalign.models.base import Model
from flowalign.records import Prompts
from flowalign.report.comparing import difference
from flowalign.report.reading import read_run
from flowalign.sample import pictures
from rewards.base import Reward
from trainers import BestOfN
from trainers.base import Trainer
from trainers.forward_process import ForwardProcessTrainer
from trainers.reward_gradient import RewardGradientTrainer

CYCLE = 12  # epochs, after which plans that take steps in turn have taken all alike
JUDGED, SEED = 2048, 1  # held-out prompts of the table, which have another seed than the configs' own


@dataclass(frozen=True)
class Arm:
    """A method: its name, the config with its options, what was spent before, as on stored pairs, and `sample_cost`."""

    name: str
    config: dict[str, Any]
    spent: float = 0.0
    per_epoch: float = 0.0

    @classmethod
    def of(cls, text: str) -> Arm:
        """From "NAME = CONFIG --key value ...", or "NAME + SPENT = ..."."""
        told, _, rest = text.partition("=")
        name, _, spent = told.partition("+")
        config, *words = shlex.split(rest)
        return cls(name.strip(), override(load_yaml(find_config(config)), read_options(words)), float(spent or 0))

    def trainer(self, folder: Path, seed: int) -> tuple[Trainer, dict[str, Any]]:
        """A trainer, and its resolved config."""
        call = parse_trainer(override(self.config, {"folder": str(folder), "seed": seed}))
        return construct(call), {"trainer": call.path, **arguments_of(call)}

    def priced(self, out: Path) -> Arm:
        """The same with its `sample_cost`: the one in OUT, so that runs go on with the epochs that they began with."""
        kept, key = out / "costs.json", f"{self.name} {digest(self.config)}"
        costs = json.loads(kept.read_text()) if kept.exists() else {}
        if key not in costs:
            costs[key] = sample_cost(self.trainer(out / "unused", 0)[0])
            kept.write_text(json.dumps(costs, indent=1) + "\n")
        return replace(self, per_epoch=costs[key])

    def paid_by(self, compute: float, folder: Path) -> Arm:
        """The same with as many epochs as so much compute pays for, five evaluations, and the decay over all."""
        trainer, _ = self.trainer(folder, 0)
        cycle = [trainer.needed(trainer.collection.epoch(number)) for number in range(CYCLE)]
        rows = sum(one.forward + 3 * one.gradient for one in cycle) / CYCLE
        epochs = max(1, round((compute - self.spent) / (rows + self.per_epoch)))
        changed = {"epochs": epochs, "optimizer.decay": epochs * trainer.updates_per_epoch}
        return replace(self, config=override(self.config, changed | {"evaluation.every": -(-epochs // 5)}))


@dataclass(frozen=True)
class Point:
    """An evaluation: compute until then, and the held-out scores by name."""

    epoch: int
    compute: float
    scores: dict[str, float]


def digest(config: dict[str, Any]) -> str:
    """A short name of an arm's settings."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:12]


def sample_cost(trainer: Trainer) -> float:
    """Decode and reward of an epoch's samples, in forwards of one network row."""
    sampling, model, reward = trainer.sampling, trainer.model, trainer.reward
    if isinstance(trainer, ForwardProcessTrainer) and trainer.stored:
        return 0.0  # nothing is sampled
    one = trainer.collection.told(range(1))
    prices = BestOfN(
        model, reward, one, 1, sampling.steps, sampling.guidance_scale, batch_size=sampling.rows_per_call
    ).start().prices  # fmt: skip
    epochs = [trainer.collection.epoch(number) for number in range(CYCLE)]
    scored = sum(trainer.collection.media(epoch) for epoch in epochs) / CYCLE
    if isinstance(trainer, RewardGradientTrainer):
        return 3 * scored * trainer.views * (prices.decode + prices.reward)
    return scored * (prices.decode + prices.reward)


def curve(folder: Path, spent: float, per_epoch: float) -> Iterator[Point]:
    """The evaluations of a run, with what it had cost until then, and before."""
    run = read_run(folder)
    costs = [row.get("rows/forward") + 3 * row.get("rows/gradient") + per_epoch for row in run.epochs]
    for row in run.evaluations:
        told = [name for name in row.values if "/clause/" not in name and not name.startswith("time/")]
        scores = {name.removeprefix("held-out/"): row.get(name) for name in told}
        yield Point(row.step, spent + sum(costs[: row.step]), scores)


def judged(config: dict[str, Any], lora: Path | None) -> Tensor:
    """1 for each of the table's prompts that a policy gets right, 0 otherwise; without a LoRA it is the base."""
    evaluation, sampling = config["evaluation"], config["sampling"]
    model = config["model"] | ({} if lora is None else {"lora": {"start": str(lora)}})
    prompts = evaluation["prompts"] | {"count": JUDGED, "seed": SEED}
    asked = {"model": model, "reward": evaluation.get("reward") or config["reward"], "prompts": prompts}
    policy, reward, told = build(_parts, asked)
    steps, scale = (evaluation.get(name) or sampling[name] for name in ("steps", "guidance_scale"))
    drawn = torch.cat([*pictures(policy, told, steps, scale, 7, "evidence", 128)])
    return reward(shown(drawn, told, policy.fps), told).parts[evaluation["metric"]]


def _parts(model: Model, reward: Reward, prompts: Prompts) -> tuple[Model, Reward, Prompts]:
    return model, reward, prompts


def run(arm: Arm, seed: int, out: Path, gains: list[float], before: Tensor) -> dict[str, Any]:
    """Train, if it has not been done, and say what came of it."""
    folder, started = out / f"{arm.name}-{seed}".replace(" ", "_"), time.monotonic()
    trainer, config = arm.trainer(folder, seed)
    trainer.train(config, resume=folder.is_dir())  # returns at once where all epochs are made
    points = [*curve(folder, arm.spent, arm.per_epoch)]
    with (out / "curves.jsonl").open("a") as file:
        file.writelines(json.dumps({"arm": arm.name, "seed": seed, **asdict(one)}) + "\n" for one in points)
    after = judged(arm.config, folder / "lora")
    found = difference([*zip(before.tolist(), after.tolist(), strict=True)])
    assert found is not None
    base = points[0].scores["held-out"]
    reached = {f"cost of {gain:g}": first(points, base + gain) for gain in gains}
    return {
        "arm": arm.name, "seed": seed, "settings": digest(arm.config), "before": round(found.before, 4),
        "gain": round(found.change, 4), "lower": round(found.low, 4), "compute": round(points[-1].compute),
        "last": round(points[-1].scores["held-out"] - base, 4), **reached,
        "seconds": round(time.monotonic() - started),
    }  # fmt: skip


def first(points: list[Point], score: float) -> int | None:
    """Compute until a score was first reached; None if it never was."""
    return next((round(one.compute) for one in points if one.scores["held-out"] >= score), None)


def rows_of(table: Path) -> dict[tuple[Any, ...], str]:
    """Lines of a table by arm, seed and settings."""
    lines = table.read_text().splitlines() if table.exists() else []
    return {tuple(map(json.loads(line).get, ("arm", "seed", "settings"))): line for line in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", action="append", required=True, type=Arm.of, metavar="'NAME = CONFIG --key value'")
    parser.add_argument("--out", type=Path, default=Path("build/methods"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--compute", type=float, help="of each run, in forwards; by default what its config comes to")
    parser.add_argument("--gain", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    table = arguments.out / "table.jsonl"
    done = rows_of(table)
    for asked in arguments.arm:
        arm = asked.priced(arguments.out)
        if arguments.compute:
            arm = arm.paid_by(arguments.compute, arguments.out / "unused")
        keys = {seed: (arm.name, seed, digest(arm.config)) for seed in arguments.seeds}
        before = judged(arm.config, None) if keys.values() - done.keys() else None
        for seed, key in keys.items():
            if key in done or before is None:
                print(done[key], flush=True)
                continue
            line = json.dumps(run(arm, seed, arguments.out, arguments.gain, before))
            print(line, flush=True)
            with table.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
