"""PixArt: one step of PixArt-DMD, what the network is told, and policies in peft's layout."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from flowalign.adapters import LoRA
from flowalign.lora_files import read_lora
from flowalign.memory_estimate import sampling_peak
from flowalign.models import PixArt
from flowalign.models.pixart import dmd_pipeline
from flowalign.rollout import Policy, rollout
from flowalign.schedules import Path, linear
from flowalign.soups import merge_loras
from flowalign.transitions import ODE
from tests.families import seeded
from tests.tiny import randomise_policy
from tests.tiny_pixart import pixart_ddim, tiny_pixart, tiny_pixart_1024, tiny_pixart_sigma

SIZE: dict[str, Any] = {"height": 32, "width": 32, "max_sequence_length": 24}
PROMPTS = ["a red circle", "two blue squares"]


def ddpm(**changes: Any) -> DDPMScheduler:
    return DDPMScheduler(**{"clip_sample": False} | changes)


def noise(model: PixArt, rows: int = 2) -> Tensor:
    return torch.randn(rows, *model.latent_shape, generator=torch.Generator().manual_seed(0))


def in_one_step(model: PixArt, start: Tensor) -> Tensor:
    path = Path((ODE(),))
    return rollout(model, model.encode(PROMPTS), start, model.sigmas(1), path, Policy(1.0)).latents


def by_pipeline(pipe: Any, start: Tensor, **more: Any) -> Tensor:
    made: Tensor = pipe(
        [*PROMPTS], latents=start.clone(), timesteps=[400], num_inference_steps=1, guidance_scale=1.0,
        use_resolution_binning=False, clean_caption=False, **{**SIZE, "output_type": "latent", **more},
    )[0]  # fmt: skip
    return made


def test_dmd_s_one_step_is_the_pipeline_s() -> None:
    make = seeded(lambda: tiny_pixart(scheduler=ddpm()))
    model = PixArt(make(), timesteps=(400,), **SIZE)
    kept = float(ddpm().alphas_cumprod[400])
    s, alpha = (1 - kept) ** 0.5, kept**0.5
    assert model.sigmas(1) == pytest.approx([s / (s + alpha), 0.0], abs=1e-6)
    assert model.sigmas(1)[0] == pytest.approx(0.67, abs=5e-3)
    start = noise(model)
    ours, theirs = in_one_step(model, start), by_pipeline(make(), start)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decode(ours), by_pipeline(make(), start, output_type="pt"), atol=1e-5, rtol=0)
    assert model.scheduler_note() is None
    assert "adds noise" in str(PixArt(make(), **SIZE).scheduler_note())


def test_dmd_s_pictures_have_a_gradient_in_the_noise() -> None:
    """What ReNO climbs: the slope along a direction is that of small steps to both sides."""
    model = PixArt(seeded(lambda: tiny_pixart(scheduler=ddpm()))(), timesteps=(400,), **SIZE)
    told, start, sigma = model.encode(PROMPTS), noise(model).requires_grad_(), model.sigmas(1)[0]

    def square(noise: Tensor) -> Tensor:
        x = model.start(noise, sigma)
        return model.finish(x - sigma * model.velocity(x, sigma, told), 0.0).double().square().sum()

    (slope,) = torch.autograd.grad(square(start), start)
    along = torch.randn(start.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        rise = (square(start + 1e-2 * along) - square(start - 1e-2 * along)) / 2e-2
    assert float((slope * along).sum()) == pytest.approx(float(rise), rel=1e-3)


def test_dmd_is_put_together_from_two_folders(tmp_path: FilePath) -> None:
    whole, other = seeded(lambda: tiny_pixart(scheduler=ddpm()))(), seeded(lambda: tiny_pixart(num_layers=1))()
    whole.transformer.save_pretrained(tmp_path / "student" / "transformer")
    whole.scheduler.save_pretrained(tmp_path / "student" / "scheduler")
    other.save_pretrained(tmp_path / "base")
    made = dmd_pipeline(str(tmp_path / "student"), str(tmp_path / "base"))
    assert type(made.scheduler) is DDPMScheduler
    assert len(made.transformer.transformer_blocks) == 2
    model = PixArt(made, timesteps=(400,), **SIZE)
    whole.text_encoder = other.text_encoder
    torch.testing.assert_close(in_one_step(model, noise(model)), by_pipeline(whole, noise(model)), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="PixArt-DMD cannot be had from"):
        dmd_pipeline(str(tmp_path / "base" / "vae"), str(tmp_path / "base"))


@pytest.mark.parametrize("order", [1, 2])
def test_steps_are_the_shipped_solver_s_own(order: int) -> None:
    """As PixArt ships it: linspace from 999, and the last step ends at 0. First order is in the conformance suite."""
    scheduler = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, solver_order=order)
    model = PixArt(tiny_pixart(scheduler=scheduler), **SIZE)
    sigmas = model.sigmas(20)
    assert [model.table.timestep(sigma) for sigma in sigmas[:-1]][:3] == [999, 949, 899]
    assert sigmas[-1] == 0.0
    assert "of higher order" in str(model.scheduler_note())


def test_the_network_is_told_the_size_of_its_own_pictures() -> None:
    """Height first; of the pictures that are made, not of those that the network is made for; and it counts."""
    model = PixArt(seeded(tiny_pixart_1024)(), **{**SIZE, "height": 64})
    assert model._added(noise(model, 3))["resolution"].tolist() == [[64.0, 32.0]] * 3
    assert model._added(noise(model, 3))["aspect_ratio"].tolist() == [[2.0]] * 3
    told, start = model.encode(PROMPTS), noise(model)
    with torch.no_grad():
        right = model.network(start, 0.5, told)
        model.height = 2048
        assert (model.network(start, 0.5, told) - right).abs().max() > 1e-4
    assert PixArt(tiny_pixart(), **SIZE)._added(start) == {"resolution": None, "aspect_ratio": None}


def test_defaults_are_the_pipelines() -> None:
    assert PixArt(tiny_pixart()).max_sequence_length == 120
    sigma = PixArt(tiny_pixart_sigma())
    assert (sigma.max_sequence_length, sigma.height, sigma.size_unit()) == (300, 32, 4)


def test_a_policy_in_peft_s_layout_is_gone_on_from(tmp_path: FilePath) -> None:
    make = seeded(tiny_pixart)
    model = PixArt(make(), LoRA(3, 5), **SIZE)
    randomise_policy(model, 0.3)
    model.save(tmp_path / "policy")
    model.save(tmp_path / "again")
    files = sorted(path.name for path in (tmp_path / "policy").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    assert all((tmp_path / "policy" / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    merge_loras([tmp_path / "policy"], [1.0], tmp_path / "soup")  # of diffusers' layout
    start, told, sigma = noise(model), model.encode(PROMPTS), model.sigmas(5)[1]
    with torch.no_grad():
        expected = model.velocity(start, sigma, told)
    for name, reference in (("policy", "start"), ("soup", "base")):
        after = PixArt(make(), LoRA(start=str(tmp_path / name), reference=reference), **SIZE)  # type: ignore[arg-type]
        assert len(after.trainable()) == len(model.trainable())
        with torch.no_grad(), after.reference():
            base = after.velocity(start, sigma, told)
        torch.testing.assert_close(
            after.velocity(start, sigma, told), expected, atol=1e-5 * float(expected.abs().max()), rtol=0
        )
        assert ((base - expected).abs().max() > 1e-2) == (reference == "base")
    after.save(tmp_path / "third")
    mine, theirs = (read_lora(tmp_path / name).factors for name in ("third", "policy"))
    for module, one in theirs.items():
        torch.testing.assert_close(mine[module].delta(), one.delta(), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"is a LoRA of transformer_blocks\.1.*, which PixArtTransformer2DModel"):
        PixArt(tiny_pixart(num_layers=1), LoRA(start=str(tmp_path / "policy")), **SIZE)


def test_memory_can_be_estimated() -> None:
    model = PixArt(tiny_pixart(), **SIZE)
    one, two = (sampling_peak(model, model.encode(PROMPTS[:rows]), guidance_scale=4.5) for rows in (1, 2))
    assert two > one > 0


def test_what_it_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for steps in ((), (400, 400), (1000,), (400, -1)):
        with pytest.raises(ValueError, match="timesteps must fall, from at most 999 to at least 0, got"):
            PixArt(tiny_pixart(), timesteps=steps, **SIZE)
    with pytest.raises(ValueError, match=r"timesteps \[400\] are 1 steps, and 4 are asked for"):
        PixArt(tiny_pixart(), timesteps=(400,), **SIZE).sigmas(4)
    with pytest.raises(ValueError, match="DDPMScheduler clips its samples"):
        PixArt(tiny_pixart(scheduler=ddpm(clip_sample=True)), timesteps=(400,), **SIZE)
    with pytest.raises(ValueError, match="grid is for flow-matching models"):
        PixArt(tiny_pixart(), grid=linear, **SIZE)
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ValueError, match=r"clean_caption needs .*ftfy: pip install"):
        PixArt(tiny_pixart(), clean_caption=True, **SIZE)
    model = PixArt(tiny_pixart(scheduler=pixart_ddim()), **SIZE)
    with pytest.raises(ValueError, match="lacks the prompts' masks"):
        model.network(noise(model), 0.5, replace(model.encode(PROMPTS), prompt_mask=None))
