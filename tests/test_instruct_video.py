"""InstructVideo's part of a chain against its closed form, real media made latents, and IPRO's weighted loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from flowalign.fitting import centre_crop
from flowalign.gradient_plans import LastSteps, LateStep
from flowalign.media import real_media
from flowalign.models import SD3
from flowalign.pictures import to_bytes, to_images
from flowalign.prompts import as_prompts
from flowalign.records import Prompts, Size, intervals
from flowalign.rollout import Policy
from flowalign.schedules import linear
from flowalign.shapes.scenes import random_spec, render
from flowalign.transitions import DDIM, ODE, TableSDE, exact_kl, velocity_mse_kl
from flowalign.videos import mp4
from rewards.base import FunctionReward
from rewards.frames import attenuated
from tests.jobs import rows
from tests.test_draft import GRID, Plane, gradient, nearness
from tests.tiny import tiny_sd3
from trainers import IPRO, Checkpoints, InstructVideo, Optimizer, Sampling
from trainers.draft import path_kl
from trainers.instruct_video import first_below
from trainers.ipro import weighted_velocity_kl


class Drawing(Plane):
    """Its real media are pictures of one pixel, whose first two channels are the point."""

    def encode_media(self, pixels: Float[Tensor, "b 3 1 1"]) -> Float[Tensor, "b 2"]:
        return pixels[:, :2, 0, 0]

    def media_size(self, asked: Size) -> Size:
        return Size(1, 1)


TABLE = TableSDE((0.1, 0.2, 0.3, 0.4, 0.5))
COLOURS = [(255, 0, 0), (0, 255, 0), (51, 102, 204)]


def pictures(folder: Path) -> Path:
    """A file of prompts with a picture each."""
    folder.mkdir(exist_ok=True)
    lines = []
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (3, 2), colour).save(folder / f"{i}.png")
        lines.append(json.dumps({"prompt": f"picture {i}", "media": f"{i}.png"}))
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder / "prompts.jsonl"


def trainer(folder: Path, **changes: Any) -> InstructVideo:
    sampling = Sampling(changes.pop("plan", LastSteps(1)), 6, 1, 4, 64, 5, 1.0)
    settings: dict[str, Any] = {"optimizer": Optimizer(0.1, ema_decay=0.0), "checkpoints": Checkpoints(minutes=0)}
    reward = FunctionReward(nearness, differentiable=True)
    prompts = changes.pop("prompts", None) or str(pictures(folder))
    return InstructVideo(Drawing(), reward, prompts, sampling, folder=str(folder / "run"), **settings | changes)


@pytest.mark.parametrize(("start", "first"), [(1.0, 0), (0.6, 2), (0.59, 3), (0.2, 4), (0.1, 4)])
def test_the_chain_starts_at_the_first_point_that_is_not_above(start, first):
    assert first_below(GRID, start) == first


def test_sixty_percent_of_an_even_grid_are_the_authors_twelve_of_twenty_steps():
    assert 20 - first_below(linear(20), 0.6) == 12


@pytest.mark.parametrize("transition", [ODE(), DDIM(1.0), TABLE], ids=["ode", "ddim", "table"])
def test_the_part_of_the_chain_is_the_flow_from_the_noised_media(transition, tmp_path):
    """A step's noise, and its g in a table, are those of its number in the whole chain."""
    made = trainer(tmp_path, plan=LastSteps(1, transition))
    epoch = made.collection.epoch(0)
    draw = made.collection.draw(epoch, [*range(6)])
    drawn = made.rollout(epoch, draw, made.sigmas)
    numbers = [int(text.split()[1]) for text in draw.told.text]
    clean = torch.tensor([COLOURS[number][:2] for number in numbers]) / 255
    latents = 0.4 * clean + 0.6 * draw.start
    for interval in intervals(GRID)[2:]:
        velocity = made.model.network(latents, interval.sigma, draw.condition)
        mean, std = transition(latents, velocity, interval)
        latents = mean + std * draw.step_noise(interval.index)
    torch.testing.assert_close(drawn.latents.detach(), latents.detach(), rtol=0, atol=1e-6)
    assert [visit.interval for visit in drawn.visits] == [intervals(GRID)[4]]


def test_only_the_last_step_has_gradient_and_the_first_ones_are_not_made(tmp_path):
    made = trainer(tmp_path, epochs=1, recompute=False)
    found = gradient(made)
    gain, bias = found[: len(GRID)], found[len(GRID) :].view(len(GRID), 2)
    assert gain[4] != 0
    assert bias[4].all()
    assert not bias[:4].any()
    made.model.meter.take()
    made.train(report=False)
    (row,) = [row for row in rows(tmp_path / "run") if "reward" in row]
    assert (row["floor/forward"], row["floor/gradient"]) == (6 * 2, 6)
    assert (row["rows/forward"], row["rows/gradient"]) == (8 * 2, 8)


def test_it_learns(tmp_path):
    made = trainer(tmp_path, epochs=30)
    made.train(report=False)
    told = [row["reward"] for row in rows(tmp_path / "run") if "reward" in row]
    assert sum(told[-5:]) / 5 > sum(told[:5]) / 5 + 0.5


def test_settings_that_do_not_fit_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="makes the steps from 2 on, and the plan has gradient from step 1: choose"):
        trainer(tmp_path, plan=LastSteps(4))
    with pytest.raises(ValueError, match="from step 3 in one jump"):
        trainer(tmp_path, plan=LateStep(3, 3))
    with pytest.raises(ValueError, match=r"start must lie in \(0, 1\], got 0"):
        trainer(tmp_path, start=0.0)
    with pytest.raises(ValueError, match="prompt 'x' names no real media: give its record the key \"media\""):
        trainer(tmp_path, prompts=["x"]).train()


def test_real_media_are_fitted_to_a_size(tmp_path):
    wide = torch.zeros(3, 8, 24)
    wide[0, :, 8:16] = 1.0
    to_images(wide[None])[0].save(tmp_path / "wide.png")
    video = torch.linspace(0, 1, 9)[:, None, None, None].expand(9, 3, 16, 16)
    (tmp_path / "clip.mp4").write_bytes(mp4(to_bytes(video), 8.0))

    def named(name: str) -> Prompts:
        return Prompts(("x",), ({"media": str(tmp_path / name)},))

    middle = real_media(named("wide.png"), Size(8, 8))
    assert middle.shape == (1, 3, 8, 8)
    assert middle[0, 0].min() == 1
    assert not middle[0, 1:].any()
    larger = real_media(named("wide.png"), Size(16, 16))
    assert torch.equal(larger, centre_crop(wide[None], 16, 16))
    assert (larger.min(), larger.max()) == (0, 1)  # bicubics overshoot, and are clipped
    some = real_media(named("clip.mp4"), Size(16, 16, 5))
    assert some.shape == (1, 5, 3, 16, 16)
    torch.testing.assert_close(some[0, :, 0].mean((1, 2)), torch.linspace(0, 1, 5), atol=0.05, rtol=0)
    with pytest.raises(ValueError, match=r"clip\.mp4: a video has 9 frames, and the model makes 17"):
        real_media(named("clip.mp4"), Size(16, 16, 17))
    with pytest.raises(ValueError, match=r"wide\.png: this is a picture, and the model makes videos"):
        real_media(named("wide.png"), Size(8, 8, 5))


def test_a_file_of_prompts_keeps_its_media_in_its_folder(tmp_path):
    path = pictures(tmp_path)
    assert as_prompts(str(path)).all().metadata[1]["media"] == str((tmp_path / "1.png").resolve())
    path.write_text(json.dumps({"prompt": "x", "media": "../0.png"}))
    with pytest.raises(ValueError, match="lies outside"):
        as_prompts(str(path))


def test_what_is_encoded_decodes_to_itself():
    """The embedded VAE gives a scene back; a wrong scale, shift or range would not."""
    model = SD3("shapes", max_sequence_length=0)
    generator = np.random.default_rng(0)
    drawn = [render(random_spec(generator), generator) for _ in range(4)]
    pixels = torch.from_numpy(np.stack(drawn)).float() / 255
    latents = model.encode_media(pixels)
    assert latents.shape == (4, *model.latent_shape)
    assert latents.std() == pytest.approx(1.0, abs=0.35)
    assert (model.decode(latents) - pixels).abs().mean() < 0.03


def test_latents_are_scaled_as_the_pipeline_scales_them():
    model = SD3(tiny_sd3(), max_sequence_length=0)
    pixels = torch.rand(2, 3, 32, 32)
    mean = model.pipeline.vae.encode(pixels * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(model.encode_media(pixels), ((mean - 0.1) * 0.7).detach())


def test_the_authors_weights_are_ours_times_their_sum():
    """16 frames, indices 2, 6, 10, 14 and attenuation 1: .0025, .1353, .1353, .0025, mean .069."""
    index = torch.tensor([[2, 6, 10, 14]])
    raw = torch.exp(-(index.double() - 8).abs())
    assert raw[0].tolist() == pytest.approx([0.0025, 0.1353, 0.1353, 0.0025], abs=5e-5)
    assert raw.mean().item() == pytest.approx(0.069, abs=5e-4)
    torch.testing.assert_close(attenuated(index, 16, 1.0) * raw.sum(), raw)


def ipro(folder: Path, **changes: Any) -> IPRO:
    sampling = Sampling(LastSteps(4), 8, 1, 8, 64, 5, 1.0)
    reward = FunctionReward(nearness, differentiable=True)
    return IPRO(Plane(), reward, ["x"], sampling, folder=str(folder), checkpoints=Checkpoints(minutes=0), **changes)


def test_ipro_weighs_reward_and_kl(tmp_path):
    plain, weighed = gradient(ipro(tmp_path, kl_coef=0.0, reward_coef=1.0)), gradient(ipro(tmp_path))
    torch.testing.assert_close(weighed, 0.1 * plain)  # on the reference the KL has no gradient
    bias = plain[len(GRID) :].view(len(GRID), 2)
    assert not bias[0].any()
    assert bias[1:5].all()


def test_ipro_s_kl_is_the_sum_over_its_steps(tmp_path):
    """A policy that adds a constant to the velocity of every step is (constant)^2 away in each."""
    made = ipro(tmp_path)
    made.model.bias.data.fill_(0.5)
    epoch = made.collection.epoch(0)
    draw = made.collection.draw(epoch, [*range(8)])
    drawn = made.rollout(epoch, draw, made.sigmas)
    scored = made_scored(made, drawn, draw)
    assert path_kl(velocity_mse_kl, scored, Policy()).tolist() == pytest.approx([4 * 0.25] * 8, rel=1e-5)
    assert path_kl(weighted_velocity_kl, scored, Policy()).tolist() == pytest.approx([0.8 * 0.25] * 8, rel=1e-5)
    with pytest.raises(ValueError, match="a step without noise"):
        path_kl(exact_kl, scored, Policy())


def made_scored(made: IPRO, drawn: Any, draw: Any) -> Any:
    from flowalign.differentiate import reference_velocity
    from trainers.path_steps import Scored

    references = tuple(reference_velocity(made.model, visit, draw.condition) for visit in drawn.visits)
    return Scored(torch.zeros(8), drawn.visits, references)
