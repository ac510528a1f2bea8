"""eps-, v- and x_0-prediction as rectified flow: against DDIM's and LCM's own steps, and through the trainer."""

from __future__ import annotations

from pathlib import Path as FilePath

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, PNDMScheduler

from flowalign.models import StableDiffusion, StableDiffusionXL
from flowalign.models.alpha_table import alpha_table, grid, norm
from flowalign.rollout import Policy, rollout
from flowalign.schedules import AllSteps, Path, linear
from flowalign.transitions import ODE, FlowSDE, Renoise
from rewards.base import as_reward
from tests.families import ALPHAS, TURBO, ddim, euler, tiny_sd, tiny_sdxl
from tests.jobs import job, rows
from trainers import Evaluation, Sampling

LCM = {"clip_sample": False, "set_alpha_to_one": True, **ALPHAS}


def test_the_table_is_stable_diffusion_s() -> None:
    table = alpha_table(ddim())
    sigmas = grid(ddim(), table, 20)
    assert (len(sigmas), len(table.sigmas)) == (21, 1000)
    assert sigmas[0] == pytest.approx(0.917, abs=5e-4)  # DDIM's 20 steps start at timestep 951
    assert sigmas[-1] == pytest.approx(0.0283, abs=5e-5)
    assert (np.diff(table.sigmas) > 0).all()
    for time in (0, 1, 500, 998, 999):
        assert table.timestep(table.sigmas[time]) == time
        assert table.timestep(float(np.float32(table.sigmas[time]))) == time
    assert 500 < table.timestep((table.sigmas[500] + table.sigmas[501]) / 2) < 501


def test_zero_terminal_snr_starts_at_pure_noise() -> None:
    scheduler = ddim(rescale_betas_zero_snr=True, timestep_spacing="trailing", steps_offset=0)
    table = alpha_table(scheduler)
    assert grid(scheduler, table, 4)[0] == pytest.approx(1, abs=1e-6)
    assert table.timestep(1.0) == 999
    model = StableDiffusion(tiny_sd(scheduler)())
    with pytest.raises(ValueError, match="an eps model says nothing at alpha = 0"):
        model.network(torch.randn(1, *model.latent_shape), 1.0, model.encode(["a"]))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_ddim_step_is_an_euler_step(prediction: str) -> None:
    """One step of diffusers' scheduler on the UNet's own output, against our Euler step from the same latent."""
    scheduler = ddim(prediction_type=prediction)
    model = StableDiffusion(tiny_sd(scheduler)())
    scheduler.set_timesteps(20)
    sigmas, condition = model.sigmas(20), model.encode(["a red circle"])
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    for step in (0, 9, 19):
        with torch.no_grad():
            time = scheduler.timesteps[step]
            made = model.module(x, time, encoder_hidden_states=condition.prompt_embeds, return_dict=False)[0]
            theirs = scheduler.step(made, time, x).prev_sample
            velocity = model.velocity(x * norm(sigmas[step]), sigmas[step], condition)
        ours = x * norm(sigmas[step]) + velocity * (sigmas[step + 1] - sigmas[step])
        scaled = ours / norm(sigmas[step + 1])
        torch.testing.assert_close(scaled, theirs, atol=1e-6 * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_lcm_s_own_sampler_is_renoising(make) -> None:
    """Four steps of LCMScheduler with known noise, guidance embedded in the UNet, against our transition."""
    adapt = StableDiffusion if make is tiny_sd else StableDiffusionXL
    pipe = make(LCMScheduler(**LCM), time_cond_proj_dim=8)()
    model = adapt(pipe)
    start = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    prompts, generator = ["a red circle", "two blue squares"], torch.Generator().manual_seed(5)
    theirs = make(LCMScheduler(**LCM), time_cond_proj_dim=8)()(
        prompts, num_inference_steps=4, guidance_scale=8.0, latents=start.clone(), generator=generator,
        height=model.height, width=model.width, output_type="latent",
    ).images  # fmt: skip
    again = torch.Generator().manual_seed(5)
    drawn = [torch.randn(start.shape, generator=again) for _ in range(3)]
    path = Path((Renoise(), Renoise(), Renoise(), ODE()))
    assert model.sigmas(4)[-1] == 0
    assert model.calls(8.0, 0.5) == 1
    made = rollout(model, model.encode(prompts), start, model.sigmas(4), path, Policy(8.0), lambda step: drawn[step])
    torch.testing.assert_close(made.latents, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)
    other = rollout(model, model.encode(prompts), start, model.sigmas(4), path, Policy(1.0), lambda step: drawn[step])
    assert (made.latents - other.latents).abs().max() > 1e-3


def test_flow_grpo_on_stable_diffusion_through_the_same_trainer(tmp_path: FilePath) -> None:
    """Endpoints that are neither 1 nor 0: the whole loop runs, the first ratio is 1, and the policy moves."""
    trainer = job(
        tmp_path,
        model=StableDiffusion(tiny_sd(ddim())()),
        reward=as_reward(lambda media, prompts: media.pixels.mean((1, 2, 3)) * 30),
        sampling=Sampling(AllSteps(FlowSDE(0.7)), groups=2, group_size=4, batch_size=2, rows_per_call=2, steps=4),
        evaluation=Evaluation(["a"], every=1, pictures=1),
        updates_per_epoch=1,
        epochs=2,
        clip_range=1e-2,
    )
    trainer.train()
    trained = [row for row in rows(tmp_path) if "reward" in row]
    assert [row["ratio_max"] for row in trained] == [0, 0]
    assert all(row["grad_norm"] > 0 for row in trained)


def test_what_no_flow_can_do_is_refused_and_what_differs_is_told() -> None:
    with pytest.raises(ValueError, match="DDIMScheduler clips its samples"):
        alpha_table(ddim(clip_sample=True))  # the pipeline itself turns it off, and says so
    with pytest.raises(ValueError, match="takes times that are not those of its table"):
        alpha_table(euler(timestep_type="continuous"))
    table = alpha_table(LCMScheduler())  # whose defaults are not DDIM's
    assert table.sigmas[0] == pytest.approx(0.0283, abs=5e-5)
    with pytest.raises(ValueError, match="grid is for flow-matching models"):
        StableDiffusion(tiny_sd(ddim())(), grid=linear)
    assert StableDiffusion(tiny_sd(ddim())()).scheduler_note() is None
    shipped = StableDiffusion(tiny_sd(PNDMScheduler(skip_prk_steps=True, steps_offset=1, **ALPHAS))())
    assert "ships PNDMScheduler, of higher order" in str(shipped.scheduler_note())
    assert shipped.sigmas(20) == StableDiffusion(tiny_sd(ddim())()).sigmas(20)
    assert StableDiffusionXL(tiny_sdxl(euler(**TURBO))()).scheduler_note() is None


def test_check_tells_of_a_shipped_scheduler_of_higher_order(tmp_path: FilePath) -> None:
    from trainers.preflight.problems import _sampler

    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1, **ALPHAS)
    trainer = job(tmp_path, model=StableDiffusion(tiny_sd(scheduler)()))
    assert _sampler(trainer) is not None
    assert "PNDMScheduler" in _sampler(trainer).text
    assert _sampler(job(tmp_path, model=StableDiffusion(tiny_sd(ddim())()))) is None


def test_a_pipeline_s_folder_is_enough(tmp_path: FilePath, capsys: pytest.CaptureFixture[str]) -> None:
    from flowalign.cli import main
    from flowalign.models import as_model

    tiny_sd(ddim())().save_pretrained(tmp_path / "pipe")
    assert type(as_model(str(tmp_path / "pipe"))) is StableDiffusion
    words = ["--prompt", "a cat", "--steps", "2", "--out", str(tmp_path / "out")]
    assert main(["sample", str(tmp_path / "pipe"), *words]) == 0
    assert (tmp_path / "out" / "0000.png").is_file()
    assert main(["sample", str(tmp_path), *words[:-1], str(tmp_path / "other")]) == 2
    assert "is no diffusers pipeline" in capsys.readouterr().err
