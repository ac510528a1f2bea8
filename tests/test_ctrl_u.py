"""Ctrl-U: its loss by hand and by finite differences, what it is drawn from, and whole runs with a tiny ControlNet."""

from __future__ import annotations

import functools
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from flowalign.gradient_plans import LastSteps
from flowalign.memory_estimate import Peak
from flowalign.models import ControlledUNet, ControlNet, StableDiffusion
from flowalign.randomness import key_noise
from flowalign.records import Maps, Prompts
from rewards import EdgeConsistency
from rewards.base import FunctionReward
from rewards.consistency import ValueConsistency
from tests import processes
from tests.families import ddim, tiny_sd
from tests.interrupted import dying
from tests.jobs import digest, rows
from tests.test_draft import GRID, gradient, nearness
from tests.test_instruct_video import Drawing
from tests.test_shipped_configs import resolved
from tests.tiny import randomise_policy
from tests.tiny_controlnet import tiny_controlnet
from trainers import Checkpoints, CtrlU, Evaluation, Optimizer, Sampling
from trainers.batch import parts_of
from trainers.ctrl_u import next_point, other_noise, rectified
from trainers.path_steps import PathSteps, Scored
from trainers.preflight import inspect, page
from trainers.preflight.geometry import floor_rows, geometry, looked_at, spent_rows
from trainers.preflight.memory import Passing, _most_rows, present
from trainers.pretraining import noised_at, pretraining_loss
from trainers.watch import Watch


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ALL = torch.ones(2, 3, 4, dtype=torch.bool)


def test_without_uncertainty_it_is_the_plain_loss():
    errors = maps(2, 3, 4)
    found = rectified(errors, torch.zeros_like(errors), ALL, 0.7, 0.1)
    torch.testing.assert_close(found, 0.7 * errors.mean((1, 2)))
    counted = ALL.clone()
    counted[0, 0] = False
    counted[1] = False
    found = rectified(errors, torch.zeros_like(errors), counted, 1.0, 0.1)
    torch.testing.assert_close(found, torch.stack([errors[0, 1:].mean(), errors.new_zeros(())]))


def test_by_hand():
    errors, uncertainty = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, np.log(2.0)]]])
    found = rectified(errors, uncertainty, torch.ones(1, 1, 2, dtype=torch.bool), 3.0, 0.5)
    assert found.item() == pytest.approx(3 * (1 + 1) / 2 + 0.5 * np.log(2) / 2)


def test_uncertainty_has_the_gradient_of_both_terms():
    """-scale exp(-U) E + weight: a large error pulls U up, a small one lets the last term push it down."""
    errors, uncertainty = maps(2, 3, 4), maps(2, 3, 4, seed=1).requires_grad_()
    (slope,) = torch.autograd.grad(rectified(errors, uncertainty, ALL, 1.0, 0.3).sum(), uncertainty)
    expected = (0.3 - (-uncertainty.detach()).exp() * errors) / 12
    torch.testing.assert_close(slope, expected)
    assert (slope > 0).any()
    assert (slope < 0).any()
    for weight, sign in ((0.0, -1), (2.0, 1)):
        (slope,) = torch.autograd.grad(rectified(errors, uncertainty, ALL, 1.0, weight).sum(), uncertainty)
        assert (slope.sign() == sign).all()
    with torch.no_grad():
        moved = uncertainty.clone()
        moved[1, 2, 3] += 1e-6
        change = rectified(errors, moved, ALL, 1.0, 2.0) - rectified(errors, uncertainty, ALL, 1.0, 2.0)
    assert change[1].item() / 1e-6 == pytest.approx(slope[1, 2, 3].item(), rel=1e-4)


def test_the_second_picture_differs_in_time_or_in_noise():
    points, noise, other = torch.tensor([3, 400]), maps(2, 4), maps(2, 4, seed=1)
    later, same = next_point(points, noise, other)
    assert later.tolist() == [4, 401]
    assert same is noise
    at, drawn = other_noise(points, noise, other)
    assert at is points
    assert drawn is other


class Waves(ValueConsistency):
    """Of a picture's colours, bent; so that maps, errors and their distances are smooth."""

    name, of_media = "waves", False

    def predict(self, pixels: Float[Tensor, "b 3 h w"]) -> Tensor:
        return (2 * pixels).sin()

    def told(self, pixels: Float[Tensor, "b 3 h w"]) -> Tensor:
        return pixels


def drawings(folder: Path) -> Prompts:
    """Prompts with a real picture of a pixel each, and a control picture."""
    folder.mkdir(exist_ok=True)
    records = []
    for number, colour in enumerate([(255, 0, 0), (0, 255, 0), (51, 102, 204)]):
        names = {"media": colour, "image": colour[::-1]}
        for key, value in names.items():
            Image.new("RGB", (3, 2), value).save(folder / f"{key}-{number}.png")
        records.append({key: str(folder / f"{key}-{number}.png") for key in names})
    return Prompts(("a", "b", "c"), tuple(records))


def trainer(folder: Path, **changes: Any) -> CtrlU:
    model = changes.pop("model", None) or Drawing()
    sampling = Sampling(groups=6, group_size=1, batch_size=changes.pop("batch_size", 4), steps=5, guidance_scale=1.0)
    settings: dict[str, Any] = {
        "optimizer": Optimizer(0.03, ema_decay=0.0), "checkpoints": Checkpoints(minutes=0), "latest": 0.9, "ramp": 0,
        "reward": Waves(), "prompts": drawings(folder), "sampling": sampling, "folder": str(folder / "run"),
    }  # fmt: skip
    return CtrlU(model, **settings | changes)


def value(made: CtrlU) -> Tensor:
    """The loss of the first epoch's samples, put together without the steps of a trainer."""
    epoch = made.collection.epoch(0)
    draw = made.collection.draw(epoch, [*range(6)])
    drawn = made.rollout(epoch, draw, made.sigmas)
    told = draw.told.rows([row for row in range(6) for _ in range(2)])
    pixels = made.model.decode(drawn.latents)
    predicted = (2 * pixels).sin()
    wanted = torch.stack([torch.tensor(np.array(Image.open(row["image"]).convert("RGB"))[0, 0] / 255)
                          for row in told.metadata])[:, :, None, None]  # fmt: skip
    errors = (predicted - wanted).square().mean(1)
    seen = Maps(predicted, errors, torch.ones_like(errors, dtype=torch.bool))
    beside = made.beside(epoch, draw)
    total = made.loss(Scored(errors.mean((1, 2)), (), (), seen)).mean()
    return total if beside is None else total + beside.mean()


@pytest.mark.parametrize("twin", [next_point, other_noise])
@pytest.mark.parametrize("pretraining", [0.0, 0.7])
def test_its_gradient_is_that_of_finite_differences(twin, pretraining, tmp_path, monkeypatch):
    """In float64, through both pictures, exp(-U) and the loss beside."""
    monkeypatch.setattr("trainers.collection.key_noise", lambda *key, shape: key_noise(*key, shape=shape).double())
    made = trainer(tmp_path, twin=twin, pretraining=pretraining, uncertainty=0.4, scale=2.0)
    model = made.model
    model.gain, model.bias = (nn.Parameter(one.detach().double()) for one in (model.gain, model.bias))
    made.optimizer.parameters = model.trainable()
    randomise_policy(model, 0.3)
    found, width = gradient(made), 1e-6
    compared = 0
    for offset, parameter in ((0, model.gain), (len(GRID), model.bias)):
        flat = parameter.data.view(-1)
        for i in range(0, len(flat), 2):
            sides = []
            for sign in (1, -1):
                flat[i] += sign * width
                sides.append(value(made).item())
                flat[i] -= sign * width
            assert found[offset + i].item() == pytest.approx((sides[0] - sides[1]) / (2 * width), rel=1e-4, abs=1e-7)
            compared += abs(sides[0] - sides[1]) > 0
    assert compared >= 4


def test_pictures_are_made_in_one_step_from_real_ones_with_noise(tmp_path):
    made = trainer(tmp_path)
    epoch = made.collection.epoch(0)
    draw = made.collection.draw(epoch, [*range(6)])
    table = made.table
    assert table.tolist() == sorted(GRID[:-1])
    drawn = made.rollout(epoch, draw, made.sigmas).latents.detach()
    colours = np.array([np.array(Image.open(row["media"]))[0, 0, :2] for row in draw.told.metadata])
    clean = torch.tensor(colours / 255)
    for row, sample in enumerate(draw.samples):
        points = [at for at in range(made.rewarded()) if _jump(made, clean[row], draw.start[row], at, drawn[2 * row])]
        assert points, sample
        later = min(points[0] + 1, len(table) - 1)
        assert _jump(made, clean[row], draw.start[row], later, drawn[2 * row + 1])


def _jump(made: CtrlU, clean: Tensor, noise: Tensor, point: int, found: Tensor) -> bool:
    """Whether x0hat from that point is what was found."""
    sigma = float(made.table[point])
    noised = ((1 - sigma) * clean + sigma * noise)[None].float()
    velocity = made.model.network(noised, sigma, made.model.encode(["x"])).detach()
    return torch.allclose((noised - sigma * velocity)[0], found, atol=1e-5)


def test_points_are_a_sample_s_own_and_up_to_time_400(tmp_path):
    made = trainer(tmp_path, model=StableDiffusion(tiny_sd(ddim())()), latest=0.4)
    assert made.rewarded() == 401
    assert float(made.table[400]) == pytest.approx(float(made.model.table.sigmas[400]))
    epoch = made.collection.epoch(3)
    whole, part = (made.collection.draw(epoch, at) for at in ([*range(6)], [4, 1]))
    points = made._points(epoch, whole, "reward_point", 401)
    assert made._points(epoch, part, "reward_point", 401).tolist() == points[[4, 1]].tolist()
    drawn = [made._points(made.collection.epoch(n), whole, "reward_point", 401) for n in range(300)]
    assert 0 <= int(torch.cat(drawn).min()) < 10 < 390 < int(torch.cat(drawn).max()) <= 400


def test_the_reward_s_weight_rises_with_the_optimizer_steps(tmp_path):
    made = trainer(tmp_path, ramp=4, epochs=6)
    assert made.rising() == 0.25
    made.optimizer.steps = 2
    assert made.rising() == 0.75
    made.optimizer.steps = 40
    assert made.rising() == 1
    assert trainer(tmp_path, ramp=0).rising() == 1
    seen = Scored(torch.zeros(2), (), (), Maps(*_of_twins()))
    made.optimizer.steps = 0
    expected = 0.25 * 0.5 + 0.1 * 0  # the maps are equal, and so nothing is uncertain
    assert made.loss(seen).tolist() == pytest.approx([expected] * 2)


def _of_twins() -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones(2, 3, 1, 1), torch.tensor([[[0.5]], [[9.0]]]), torch.ones(2, 1, 1, dtype=torch.bool)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_pretraining_loss_is_the_network_s_own(prediction):
    """Against diffusers' training: noise added by the scheduler, and the error of what the UNet predicts."""
    scheduler = ddim(prediction_type=prediction)
    model = StableDiffusion(tiny_sd(scheduler)())
    randomise_policy(model)
    clean, noise = (torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    times, told = torch.tensor([5, 400, 990]), model.encode(["a", "b", "c"])
    sigmas = torch.tensor(model.train_sigmas()[::-1], dtype=torch.float64)[times]
    found = pretraining_loss(model, clean, noise, sigmas, told, False)
    made = model.module(scheduler.add_noise(clean, noise, times), times, encoder_hidden_states=told.prompt_embeds)[0]
    target = {"epsilon": noise, "v_prediction": scheduler.get_velocity(clean, noise, times), "sample": clean}
    expected = (made - target[prediction]).square().mean((1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-5)
    assert noised_at(clean, noise, torch.zeros(3, dtype=torch.float64)).equal(clean)


def test_it_learns(tmp_path):
    made = trainer(
        tmp_path, prompts=drawings(tmp_path).rows([2]), epochs=20, optimizer=Optimizer(0.2, ema_decay=0.0),
        pretraining=0.0,
    )  # fmt: skip
    made.train(report=False)
    told = [row["reward"] for row in rows(tmp_path / "run") if "reward" in row]
    assert sum(told[-5:]) > 0.5 * sum(told[:5])
    assert all(row["uncertainty"] > 0 for row in rows(tmp_path / "run") if "reward" in row)


def circles(folder: Path) -> Prompts:
    """Prompts with a real picture and a control picture each, of 32 pixels."""
    folder.mkdir(exist_ok=True)
    y, x = np.mgrid[:32, :32]
    records = []
    for number in range(3):
        inside = (y - 16) ** 2 + (x - 10 - 4 * number) ** 2 < 60
        edge = np.abs(np.sqrt((y - 16) ** 2 + (x - 10 - 4 * number) ** 2) - np.sqrt(60)) < 1
        for name, mask in (("media", inside), ("image", edge)):
            shown = np.where(mask, 255, 40 if name == "media" else 0).astype("uint8")
            Image.fromarray(shown).convert("RGB").save(folder / f"{name}-{number}.png")
        records.append({name: str(folder / f"{name}-{number}.png") for name in ("media", "image")})
    return Prompts(("a red circle", "a blue circle", "two stars"), tuple(records))


def whole(folder: Path, family: type[ControlNet] = ControlNet, **changes: Any) -> CtrlU:
    """Two optimizer steps an epoch of odd micro-batches, an average of the weights, and evaluation."""
    told = circles(folder.parent / "circles")
    sampling = Sampling(groups=3, group_size=2, batch_size=2, rows_per_call=2, steps=3, guidance_scale=2.0)
    settings: dict[str, Any] = {
        "model": family(tiny_controlnet()), "reward": EdgeConsistency(), "prompts": told, "sampling": sampling,
        "optimizer": Optimizer(1e-2, ema_decay=0.5, ema_every=1, warmup=3, max_skipped=1), "updates_per_epoch": 2,
        "evaluation": Evaluation(told, every=1, pictures=2), "checkpoints": Checkpoints(every=1, minutes=0),
        "epochs": 2, "seed": 5, "ramp": 4, "folder": str(folder),
    }  # fmt: skip
    return CtrlU(**settings | changes)


def test_a_whole_run_with_a_controlnet(tmp_path):
    made = whole(tmp_path / "run", epochs=1)
    before = {name: value.detach().clone() for name, value in made.model.trainable().items()}
    cut, (epoch,) = geometry(made), looked_at(made)
    made.train(report=False)
    assert all(not torch.equal(value, before[name]) for name, value in made.model.trainable().items())
    logged = rows(tmp_path / "run")
    (row,) = [row for row in logged if "uncertainty" in row]
    assert row["uncertainty"] > 0
    assert -1 < row["reward"] < 0
    assert [one["step"] for one in logged if "held-out" in one] == [0, 1]
    spent, floor = spent_rows(made, epoch, cut), floor_rows(made, epoch)
    assert (row["floor/gradient"], row["floor/forward"]) == (floor.gradient, floor.forward) == (6 * 3, 0)
    assert (row["rows/gradient"], row["rows/forward"]) == (spent.gradient, spent.forward) == (8 * 3, 8 * 3)
    assert (tmp_path / "run" / "lora" / "adapter_model.safetensors").is_file()


def train(folder: Path, rank: int = 0, **changes: Any) -> None:
    whole(folder, ControlledUNet, **changes).train(resume=True, report=False)


@pytest.mark.slow
def test_a_killed_run_comes_to_the_same(tmp_path):
    """Amid the second optimizer step of an epoch, after a checkpoint: rise, samples and points go on as they were."""
    processes.run(1, tmp_path, functools.partial(train, tmp_path / "whole", epochs=1))
    work = functools.partial(train, tmp_path / "run", epochs=1)
    assert processes.killed(dying(work, "path", 3, 0, signal.SIGKILL)) == -signal.SIGKILL
    assert processes.killed(work) == 0
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def first_gradient(folder: Path, rank: int = 0) -> list[Any]:
    made, seen = whole(folder, epochs=1, updates_per_epoch=1, evaluation=Evaluation()), list[Any]()
    values = [*made.model.trainable().values()]
    made.optimizer.adamw.register_step_pre_hook(lambda *_: seen.extend(v.grad.numpy().copy() for v in values))
    made.train(report=False)
    return seen


def test_its_gradient_is_the_same_on_two_processes(tmp_path):
    (alone,) = processes.run(1, tmp_path, functools.partial(first_gradient, tmp_path / "1"))
    assert max(np.abs(one).max() for one in alone) > 1e-4
    for found in processes.run(2, tmp_path, functools.partial(first_gradient, tmp_path / "2")):
        assert max(np.abs(a - b).max() for a, b in zip(found, alone, strict=True)) <= 1e-7


def test_a_check_tries_it_and_tells_what_is_special(tmp_path):
    made = whole(tmp_path / "run", epochs=1)
    found = inspect(made, tmp_path / "out")
    assert found.errors == 0
    assert found.trial is not None
    assert found.trial.learning.grad_norm > 0
    assert found.trial.rollouts.repeatable
    assert found.memory is not None
    assert found.memory.with_reward
    told = " ".join(page(found).split())
    assert "no rollout: pictures are made in one step, from real ones with noise" in told
    assert "at the first 401 of 1000 points, up to sigma 0.5" in told
    assert "0.25 of its weight in the first step, all from 4 on" in told


@pytest.mark.slow  # of fakes
@pytest.mark.parametrize("recompute", [True, False])
def test_the_memory_of_a_micro_batch_is_predicted(recompute, tmp_path):
    made = whole(tmp_path / "run", recompute=recompute)
    steps = PathSteps(made, made.collection.epoch(0), None)
    first = steps.micro_batches(parts_of(6, 2, made.seed, 0)[0])[0]

    def work() -> None:
        steps.micro_batch(first, 0, 2, Watch(made.watched(), 1.0, made.model.device))
        made.optimizer.discard()

    work()  # prompts are encoded
    with Peak() as measured:
        work()
    passing = Passing(made, made.model, _most_rows(made, geometry(made)))
    predicted = made.preflight().learning_bytes(present(made, made.model), passing)
    assert measured.most <= predicted <= 1.2 * measured.most


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 0.0}, "scale must be positive, ramp, uncertainty and pretraining at least 0"),
        ({"latest": 1.2}, r"and latest in \(0, 1\], got 1.0, 0, 0.1, 1.0 and 1.2"),
        ({"reward": FunctionReward(nearness, True)}, "CtrlU weighs pixels: .* is no rewards.consistency.Consistency"),
        ({"sampling": Sampling(LastSteps(1))}, "CtrlU makes no rollouts in training: leave out sampling.plan"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changes)


def test_pictures_that_are_missing_are_told_before_anything_is_done(tmp_path):
    told = circles(tmp_path / "circles")
    for key, message in (("media", "names no real media"), ("image", "names no picture, which the model needs")):
        records = ({k: v for k, v in told.metadata[0].items() if k != key}, *told.metadata[1:])
        with pytest.raises(ValueError, match=f"prompt 'a red circle' {message}"):
            whole(tmp_path / "run", prompts=replace(told, metadata=records))
    away = (told.metadata[0] | {"image": "none.png"}, *told.metadata[1:])
    with pytest.raises(ValueError, match=r"none\.png, the picture of prompt 'a red circle', is not a file"):
        whole(tmp_path / "run", prompts=replace(told, metadata=away))


def test_the_shipped_settings_are_the_authors():
    config = resolved("ctrl_u/sd1.5_depth.yaml")
    assert [config[key] for key in ("scale", "ramp", "uncertainty", "latest", "pretraining")] == [1, 5000, 0.1, 0.4, 1]
    assert config["twin"] == "trainers.ctrl_u.next_point"
    assert config["sampling"]["groups"] * config["sampling"]["group_size"] == 32 * config["updates_per_epoch"]
    assert config["epochs"] * config["updates_per_epoch"] == 55_000
    assert (config["optimizer"]["learning_rate"], config["optimizer"]["warmup"]) == (1e-5, 2000)
    assert (config["model"]["height"], config["reward"]["model"]) == (512, "Intel/dpt-hybrid-midas")
