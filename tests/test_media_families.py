"""Real media in training, on tiny pipelines of three families: where a part of the chain starts, and what it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.gradient_plans import LastSteps, LateStep
from flowalign.media import real_media
from flowalign.models import PipelineModel
from flowalign.pictures import to_bytes, to_images
from flowalign.records import Media, Prompts, Size
from flowalign.rollout import Policy
from flowalign.videos import mp4
from rewards.base import FunctionReward
from tests.families import CASES, Case
from tests.jobs import rows
from trainers import Checkpoints, DRaFT, InstructVideo, Optimizer, ReFL, Sampling
from trainers.reward_gradient import RewardGradientTrainer

CHOSEN = [case for case in CASES if case.name in ("wan", "qwen-image", "sdxl")]


def adapted(case: Case) -> PipelineModel:
    return case.adapt(case.make(), **{**case.options, **case.sizes[0]})  # type: ignore[arg-type]


def redness(media: Media, prompts: Prompts) -> Tensor:
    return media.pixels.unflatten(0, (len(media), -1))[..., 0, :, :].flatten(1).mean(1)


def settings(case: Case, folder: Path) -> dict[str, Any]:
    """A model, two prompts with media of another size than it makes, and one optimizer step."""
    model, records = adapted(case), []
    for number in range(2):
        frames = 8 if model.frames else 1
        pixels = torch.rand(frames, 3, 3, 4, generator=torch.Generator().manual_seed(number))
        pixels = torch.nn.functional.interpolate(pixels, (48, 64), mode="bilinear")
        name = folder / f"{number}{'.mp4' if model.frames else '.png'}"
        if model.frames:
            name.write_bytes(mp4(to_bytes(pixels), 8.0))
        else:
            to_images(pixels)[0].save(name)
        records.append({"media": str(name)})
    return {
        "model": model,
        "reward": FunctionReward(redness, differentiable=True),
        "prompts": Prompts(("a red circle", "two stars"), tuple(records)),
        "optimizer": Optimizer(1e-3, ema_decay=0.0),
        "checkpoints": Checkpoints(minutes=0),
        "epochs": 1,
        "folder": str(folder / "run"),
    }


def sampling(plan: Any, guidance_scale: float) -> Sampling:
    return Sampling(plan, groups=2, group_size=1, batch_size=2, steps=3, guidance_scale=guidance_scale)


def trains(made: RewardGradientTrainer, folder: Path) -> None:
    """One optimizer step has a gradient, and moves the LoRA."""
    before = {name: value.detach().clone() for name, value in made.model.trainable().items()}
    made.train(report=False)
    (row,) = [row for row in rows(folder / "run") if "reward" in row]
    assert row["grad_norm"] > 0
    moved = [name for name, value in made.model.trainable().items() if not torch.equal(value, before[name])]
    assert len(moved) >= len(before) / 3  # at its start, where up is 0, down has no gradient; nor what is thrown away


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
def test_a_part_of_the_chain_starts_from_noised_media_and_trains(case: Case, tmp_path: Path) -> None:
    made = InstructVideo(**settings(case, tmp_path), sampling=sampling(LastSteps(1), 2.0), start=0.01)
    epoch = made.collection.epoch(0)
    draw = made.collection.draw(epoch, [0, 1])
    (visit,) = made.rollout(epoch, draw, made.sigmas).visits  # of one step the start is where its gradient is taken
    sigma, model = made.sigmas[-2], made.model
    clean = model.encode_media(real_media(draw.told, model.media_size(Size())))
    assert visit.interval.sigma == sigma
    assert torch.equal(visit.latents, (1 - sigma) * clean + sigma * draw.start)
    assert not torch.equal(clean[0], clean[1])
    trains(made, tmp_path)


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
def test_the_pretraining_loss_of_real_media_is_the_flow_s_and_trains(case: Case, tmp_path: Path) -> None:
    """The margin is reached, so that no other gradient is there."""
    given = settings(case, tmp_path)
    made = ReFL(**given, sampling=sampling(LateStep(1, 2), 1.0), margin=-10.0, pretraining=2.0)
    epoch = made.collection.epoch(0)
    draw = made.collection.draw(epoch, [0, 1])
    found, model = made.beside(epoch, draw), made.model
    clean = model.encode_media(real_media(draw.told, model.media_size(Size())))
    noise = made.collection.noise(epoch, draw.samples, "pretraining", 0)
    expected = []
    for sigma in made.sigmas[:-1]:
        velocity = model.velocity((1 - sigma) * clean + sigma * noise, sigma, draw.condition, Policy().guidance_scale)
        weight = 2.0 * model.training_weights(torch.tensor([sigma])).item()  # an eps model's loss is that of its eps
        expected.append(weight * (velocity - (noise - clean)).square().flatten(1).mean(1).detach())
    assert found is not None
    assert any(torch.allclose(found, one, rtol=1e-4) for one in expected)  # at one of the grid's points
    trains(made, tmp_path)


@pytest.mark.parametrize("kind", [InstructVideo, DRaFT])
def test_prompts_of_several_sizes_are_not_drawn_together(kind: type[RewardGradientTrainer], tmp_path: Path) -> None:
    """Two prompts, calls of two rows: each has a call of its own, of its size, and its media are brought to it."""
    given = settings(CASES[0], tmp_path)
    own = tuple({**row, "height": height} for row, height in zip(given["prompts"].metadata, (16, 32), strict=True))
    seen = list[tuple[int, ...]]()

    def looking(media: Media, prompts: Prompts) -> Tensor:
        assert all(row["height"] == media.pixels.shape[-2] for row in prompts.metadata)
        seen.append(tuple(media.pixels.shape))
        return redness(media, prompts)

    changes = {"prompts": Prompts(given["prompts"].text, own), "reward": FunctionReward(looking, True)}
    made = kind(**given | changes, sampling=sampling(LastSteps(1), 1.0))
    trains(made, tmp_path)
    assert sorted(seen) == [(2, 3, 16, 32), (2, 3, 32, 32)]
