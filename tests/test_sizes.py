"""Prompts that say their own size, negative prompt and seed: in training, evaluation and `flowalign sample`."""

from __future__ import annotations

import functools
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import randomise_policy, tiny_sd3

from flowalign.accounting import Rows
from flowalign.cli import main
from flowalign.models.gaussian import GaussianModel
from flowalign.models.sd3 import SD3
from flowalign.pictures import grid
from flowalign.records import Media, Prompts, Size
from flowalign.sample import pictures, start_noise
from flowalign.schedules import AllSteps, FanOut
from flowalign.sizes import calls_of, in_order
from flowalign.transitions import FlowSDE
from rewards.base import as_reward
from tests import processes
from tests.families import CASES
from tests.interrupted import dying
from tests.jobs import digest, job
from trainers import Evaluation, Optimizer, Sampling
from trainers.preflight.checking import inspect
from trainers.preflight.geometry import floor_rows, geometry, spent_rows

WIDE, TALL, OWN = Size(16, 32), Size(32, 16), Size(32, 32)
ASKED = ({}, {"height": 16}, {"width": 16, "negative_prompt": "blurry"}, {"height": 32, "width": 32}, {"height": 16})
MIXED = Prompts(("a red circle", "a blue square", "two stars", "a star", "a cross"), ASKED)
HELD_OUT = Prompts(("one", "two", "three"), ({"height": 16}, {"seed": 7}, {"height": 16, "seed": 7}))
PLANS = {
    "all": Sampling(AllSteps(FlowSDE(0.7)), 5, 2, batch_size=3, rows_per_call=2, steps=3, guidance_scale=2.0),
    "fanned": Sampling(FanOut(FlowSDE(0.7), (1,)), 5, 2, batch_size=2, rows_per_call=3, steps=3, guidance_scale=2.0),
}


def model(**changes: Any) -> SD3:
    return SD3(tiny_sd3(), max_sequence_length=0, **changes)


def level(media: Media, prompts: Prompts) -> torch.Tensor:
    """One channel's mean; of a call's media all have one size, and it is the one that was asked for."""
    for metadata in prompts.metadata:
        asked = metadata.get("height") or 32, metadata.get("width") or 32
        assert media.pixels.shape[-2:] == asked
    return 30 * media.pixels[:, 0].mean((1, 2))


def mixed(folder: Path, plan: str = "all", **changes: Any) -> Any:
    settings = {
        "reward": as_reward(level), "prompts": MIXED, "sampling": PLANS[plan], "evaluation": Evaluation(HELD_OUT, 1),
        "optimizer": Optimizer(3e-4, ema_decay=0.5, ema_every=1),
    }  # fmt: skip
    return job(folder, **settings | changes)


@pytest.mark.parametrize("plan", PLANS)
def test_a_micro_batch_has_one_size(plan, tmp_path):
    """Largest first; each row is in one micro-batch, and no group is split between sizes."""
    collection = mixed(tmp_path, plan).collection
    for number in range(3):
        epoch = collection.epoch(number)
        assert sorted(epoch.prompts) == [0, 1, 2, 3, 4]
        assert [bucket.size for bucket in epoch.buckets] == [OWN, WIDE, TALL]
        size_of = [collection.sizes[Size.of(ASKED[epoch.prompts[group]])] for group, _ in epoch.rows]
        total = collection.micro_batches(epoch)
        rows = [[*collection.rows_of(epoch, range(i, i + 1))] for i in range(total)]
        assert [row for one in rows for row in one] == [*range(len(epoch.rows))]
        assert all(len({size_of[row] for row in one}) == 1 for one in rows)
        counts = [size_of.count(size) for size in (OWN, WIDE, TALL)]
        assert total == sum(math.ceil(count / collection.sampling.batch_size) for count in counts)
    assert [collection.epoch(n).prompts for n in range(3)] == [collection.epoch(n).prompts for n in range(3)]
    assert collection.epoch(0).prompts != collection.epoch(1).prompts


def test_padding_of_each_size_is_waste(tmp_path):
    """10 rows: 4 of the model's own size and 4 of another in 2 calls of 3 each, and 2 in one; the floor has none."""
    trainer = mixed(tmp_path)
    cut = geometry(trainer)
    assert (cut.shares, cut.rows, cut.rollout_padding) == ((5,), 10, pytest.approx(0.5))
    epoch = trainer.collection.epoch(0)
    floor, spent = floor_rows(trainer, epoch), spent_rows(trainer, epoch, cut)
    assert floor == Rows(60 + 30 + 60, 30)  # 3 steps with guidance: rollouts; the update's other half; the reference
    assert spent.forward > 1.4 * floor.forward
    trainer.model.meter.take()
    trainer.collect(0)
    assert trainer.state.rows == Rows(15 * 6, 0)


@pytest.mark.parametrize("plan", PLANS)
def test_a_check_tries_the_largest_size(plan, tmp_path):
    found = inspect(mixed(tmp_path / "run", plan), tmp_path / "check")
    assert found.trial is not None
    assert [problem.text for problem in found.problems if problem.kind == "error"] == []
    assert found.trial.rollouts.pixels.shape[1:] == (3, 32, 32)
    assert found.trial.learning.off == 0


def rollout(folder: Path, plan: str, rank: int = 0) -> dict[str, Any]:
    batch = mixed(folder, plan).collect(0)
    steps = [(one.rows.tolist(), [step.latents_next.numpy() for step in one.steps]) for one in batch.parts]
    return {"steps": steps, "rewards": batch.scores.total.numpy()}


@pytest.mark.parametrize("plan", PLANS)
def test_rollouts_do_not_depend_on_the_processes(plan, tmp_path):
    work = functools.partial(rollout, tmp_path / "run", plan)
    (alone,) = processes.run(1, tmp_path, work)
    assert [len(rows) for rows, _ in alone["steps"]] == ([4, 4, 2] if plan == "all" else [2, 2, 1])
    for world in (2, 3):
        found = processes.run(world, tmp_path, work)
        latents: dict[int, list[np.ndarray]] = {}
        for one in found:
            assert np.array_equal(one["rewards"], alone["rewards"])
            for rows, steps in one["steps"]:
                each = len(steps[0]) // len(rows)
                latents |= {row: [step[i * each : (i + 1) * each] for step in steps] for i, row in enumerate(rows)}
        for rows, steps in alone["steps"]:
            for at, step in enumerate(steps):
                assert np.array_equal(np.concatenate([latents[row][at] for row in rows]), step)


def test_the_policy_that_sampled_has_ratio_one(tmp_path):
    """A replay of each size in the rollout's own calls: the log-probs are the stored ones, bit for bit."""
    trainer = mixed(tmp_path, updates_per_epoch=1)
    randomise_policy(trainer.model)
    batch = trainer.collect(0)
    metrics = trainer.update(batch)
    assert metrics["ratio_max"] == 0
    assert metrics["clip_fraction"] == 0


def policy(folder: Path, rank: int = 0) -> dict[str, Any]:
    trainer = mixed(folder, epochs=2)
    trainer.train(report=False)
    return {name: value.detach().numpy() for name, value in trainer.model.trainable().items()}


def test_a_run_comes_to_the_same_on_two_processes(tmp_path):
    (alone,) = processes.run(1, tmp_path, functools.partial(policy, tmp_path / "1"))
    for one in processes.run(2, tmp_path, functools.partial(policy, tmp_path / "2")):
        assert max(np.abs(one[name] - alone[name]).max() for name in alone) <= 1e-6
    kept = {path.name for path in (tmp_path / "1" / "samples").iterdir()}
    assert {"before_after.png", "epoch-000000.png"} <= kept


def resumable(folder: Path, rank: int = 0) -> None:
    mixed(folder, epochs=2).train(resume=True, report=False)


@pytest.mark.slow
@pytest.mark.parametrize(("place", "turn"), [("rollout", 3), ("update", 4)])
def test_a_killed_run_goes_on_to_the_same(place, turn, tmp_path):
    work, whole = functools.partial(resumable, tmp_path / "run"), functools.partial(resumable, tmp_path / "whole")
    assert processes.killed(dying(work, place, turn, 0, 9)) == -9
    assert processes.killed(work) == processes.killed(whole) == 0
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def test_one_size_for_all_is_that_of_a_model_of_this_size(tmp_path):
    """Rows that ask for 16 x 32 and a model made for it: the same samples and scores."""
    asked = Prompts(("a", "b"), ({"height": 16},) * 2)
    one = job(tmp_path / "a", reward=as_reward(level), prompts=asked, evaluation=Evaluation())
    reward = as_reward(lambda media, prompts: 30 * media.pixels[:, 0].mean((1, 2)))
    other = job(tmp_path / "b", model=model(height=16), reward=reward, prompts=["a", "b"], evaluation=Evaluation())
    mine, theirs = one.collect(0), other.collect(0)
    assert torch.equal(mine.scores.total, theirs.scores.total)
    assert all(torch.equal(a.latents_next, b.latents_next) for a, b in zip(mine.steps, theirs.steps, strict=True))
    assert one.model.latent_shape == (4, 4, 4), "the model's own size is as it was"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_family_makes_other_sizes_as_a_model_made_for_them(case):
    """Latents, sigmas, guided velocities and pictures; and afterwards its own size is as it was."""
    own, asked = case.sizes[0], case.sizes[1]
    both = [case.adapt(case.make(), **{**case.options, **size}) for size in (own, asked)]
    before = both[0].latent_shape, both[0].sigmas(case.steps)
    found = []
    for one in both:
        with one.sized(one.media_size(Size(**asked))):
            latents = torch.randn(2, *one.latent_shape, generator=torch.Generator().manual_seed(0))
            sigmas, told = one.sigmas(case.steps), one.encode(["a", "b"])
            velocity = one.velocity(latents, sigmas[1] if case.steps > 1 else sigmas[0], told, case.guided)
            found.append((torch.tensor(sigmas), velocity, one.decode(latents)))
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)
    assert (both[0].latent_shape, both[0].sigmas(case.steps)) == before


def test_a_size_that_cannot_be_made_is_refused_at_once(tmp_path):
    odd = Prompts(("a", "b"), ({}, {"height": 17}))
    with pytest.raises(ValueError, match="height must be a multiple of"):
        job(tmp_path, prompts=odd)
    with pytest.raises(ValueError, match="height must be a multiple of"):
        job(tmp_path, evaluation=Evaluation(odd))
    with pytest.raises(ValueError, match="frames is for videos, and SD3 makes pictures"):
        job(tmp_path, prompts=Prompts(("a",), ({"frames": 5},)))
    with pytest.raises(ValueError, match="GaussianModel makes media of one size"):
        GaussianModel().media_size(Size(16))


def test_each_row_is_guided_away_from_its_own_negative_prompt():
    """A batch with several is, row for row, what models with those negative prompts make of it."""
    texts, negatives = ["a red circle", "two stars", "a cross"], [None, "blurry", "dark"]
    guided = model(negative_prompt="ugly")
    told = guided.encode(texts, negatives)
    latents = torch.randn(3, *guided.latent_shape, generator=torch.Generator().manual_seed(0))
    velocity = guided.velocity(latents, 0.5, told, 3.0)
    for row, negative in enumerate(["ugly", "blurry", "dark"]):
        alone = model(negative_prompt=negative)
        expected = alone.velocity(latents, 0.5, alone.encode(texts), 3.0)[row]
        torch.testing.assert_close(velocity[row], expected, atol=1e-5, rtol=1e-5)
        others = [one for one in range(3) if one != row]
        assert all((velocity[one] - alone.velocity(latents, 0.5, alone.encode(texts), 3.0)[one]).abs().max() > 1e-4
                   for one in others)  # fmt: skip
    same = guided.encode(texts, ["dark"] * 3)
    assert torch.equal(same.negative_prompt_embeds, model(negative_prompt="dark").encode(texts).negative_prompt_embeds)


def test_training_is_told_the_negative_prompts(tmp_path):
    seen: list[tuple[Any, ...]] = []
    trainer = mixed(tmp_path)
    encode = trainer.model.encode

    def heard(prompts: Any, negatives: Any = None) -> Any:
        seen.append(tuple(zip(prompts, negatives, strict=True)))
        return encode(prompts, negatives)

    trainer.model.encode = heard
    trainer.update(trainer.collect(0))
    told = {pair for call in seen for pair in call}
    assert told == {(text, row.get("negative_prompt")) for text, row in zip(MIXED.text, MIXED.metadata, strict=True)}
    assert sum(("two stars", "blurry") in call for call in seen) >= 2, "in the rollout and in the update"


def test_calls_hold_one_size_each_in_order():
    found = calls_of(model(), MIXED, 2)
    assert [(call.size, call.rows) for call in found] == [(OWN, (0, 3)), (WIDE, (1, 4)), (TALL, (2,))]
    assert in_order(found) == [0, 2, 4, 1, 3]
    plain = calls_of(model(), Prompts(("a",) * 5, ({},) * 5), 2)
    assert [call.rows for call in plain] == [(0, 1), (2, 3), (4,)]


def test_pictures_have_the_size_and_the_noise_that_was_asked_for():
    """A prompt's seed stands for its number: prompt 1's noise is that of number 7, whatever its place."""
    drawn = model()
    made = dict(zip([0, 2, 1], [one for call in pictures(drawn, HELD_OUT, 2, 1.0) for one in call], strict=True))
    assert [made[i].shape for i in range(3)] == [(3, 16, 32), (3, 32, 32), (3, 16, 32)]
    eighth = [*pictures(drawn, ["x"] * 7 + ["two"], 2, 1.0, rows_per_call=1)][7]
    torch.testing.assert_close(made[1], eighth[0], atol=1e-5, rtol=0)
    with drawn.sized(WIDE):
        assert start_noise(drawn, 0, "sample", [7]).shape == (1, 4, 2, 4)


def test_an_evaluation_keeps_the_order_of_its_prompts(tmp_path):
    """Scores, pictures and lines are those of prompts made alone, whatever calls they were made in."""
    trainer = mixed(tmp_path)
    seen = trainer.evaluator.sample()
    assert [tuple(one.shape) for one in seen.stills] == [(3, 16, 32), (3, 32, 32), (3, 16, 32)]
    means = torch.stack([30 * one[0].float().mean() / 255 for one in seen.stills])
    torch.testing.assert_close(seen.scores.total, means, atol=0.1, rtol=0)
    assert seen.scores.total.diff().abs().min() > 0.2, "or the order could not be told"


def evaluated(folder: Path, rank: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    seen = mixed(folder).evaluator.sample()
    return [one.numpy() for one in seen.stills], seen.scores.total.numpy()


def test_an_evaluation_does_not_depend_on_the_processes(tmp_path):
    work = functools.partial(evaluated, tmp_path / "run")
    ((stills, scores),) = processes.run(1, tmp_path, work)
    for pixels, found in processes.run(3, tmp_path, work):
        assert np.array_equal(found, scores)
        assert all(np.array_equal(one, other) for one, other in zip(pixels, stills, strict=True))


def test_sample_writes_each_picture_under_its_number(tmp_path):
    rows = [{"prompt": "a red circle"}, {"prompt": "a cross", "width": 16}, {"prompt": "a star", "seed": 0}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--prompts", str(tmp_path / "p.jsonl"), "--steps", "2", "--guidance-scale", "1"]
    assert main(["sample", "shapes", *words, "--out", str(tmp_path / "out")]) == 0
    images = [Image.open(tmp_path / "out" / f"{i:04d}.png") for i in range(3)]
    assert [image.size for image in images] == [(32, 32), (16, 32), (32, 32)]
    assert (tmp_path / "out" / "grid.png").is_file()


def test_a_sheet_fits_smaller_pictures_into_the_largest_one_s_place():
    """A white 64 x 128 beside a 128 x 128: it stands at full height in the left half of its place."""
    sheet = Image.open(io.BytesIO(grid([torch.zeros(3, 128, 128), torch.zeros(3, 128, 64)])))
    dark = np.asarray(sheet.convert("L"))[6:134] < 128
    assert dark.shape[1] == 2 * 128 + 3 * 6
    assert dark[:, 6:134].all()
    assert dark[:, 140:204].all()
    assert not dark[:, 204:].any()
