"""RLCM and DDPO: their policies against Gaussians in the models' own coordinates, and both through Flow-GRPO."""

from __future__ import annotations

import math
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler
from torch import Tensor
from torch.distributions import Normal

from flowalign.advantages import ddpo_advantages, rlcm_advantages
from flowalign.models import StableDiffusion, as_model
from flowalign.models.alpha_table import alpha_table, norm
from flowalign.randomness import key_noise
from flowalign.records import Step
from flowalign.rollout import Policy, Replay, replay, rollout
from flowalign.schedules import AllSteps
from flowalign.transitions import DDIM, Renoise, gaussian_log_prob, renoise
from rewards.base import as_reward
from tests.families import ALPHAS, ddim, tiny_sd
from tests.jobs import job, rows
from tests.test_shipped_configs import resolved
from tests.tiny import randomise_policy
from trainers import Evaluation, FlowGRPO, Optimizer, Sampling
from trainers.preflight import inspect
from trainers.preflight.geometry import looked_at, planned_steps
from trainers.preflight.policy_findings import no_noise

PROMPTS = ["a red circle", "two blue squares"]
SCALE = 5.0


def lcm(**changes: Any) -> LCMScheduler:
    return LCMScheduler(**{"clip_sample": False, "set_alpha_to_one": True, **ALPHAS} | changes)


def tiny_lcm() -> LatentConsistencyModelPipeline:
    """As LCM_Dreamshaper_v7 is kept: with the guidance scale embedded, and under a pipeline class of its own."""
    made = tiny_sd(ddim(), time_cond_proj_dim=8)()
    kept = {name: part for name, part in made.components.items() if name != "image_encoder"} | {"scheduler": lcm()}
    pipe = LatentConsistencyModelPipeline(**kept, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def roll(model: StableDiffusion, plan: AllSteps, steps: int) -> tuple[Step, ...]:
    start = torch.stack([key_noise(0, "start", row, shape=model.latent_shape) for row in range(2)])

    def noise(step: int) -> Tensor:
        return torch.stack([key_noise(0, "step", step, row, shape=model.latent_shape) for row in range(2)])

    path = plan.resolve(steps, 0, 0)
    return rollout(model, model.encode(PROMPTS), start, model.sigmas(steps), path, Policy(SCALE), noise).steps


def log_density(x: Tensor, mean: Tensor, std: Tensor | float) -> Tensor:
    """Mean over elements, as in both projects' codes."""
    return Normal(mean.double(), std).log_prob(x.double()).flatten(1).mean(1)


@pytest.mark.parametrize("step", range(7))
def test_renoising_is_rlcm_s_policy_but_for_the_scale_of_its_std(step: int) -> None:
    """RLCM: N(sqrt(abar') f, 1 - abar'). A flow's latent is x / (alpha + s), and so are mean and std."""
    scheduler = lcm()
    scheduler.set_timesteps(8)
    time, after = scheduler.timesteps[step : step + 2]
    sigmas, kept = alpha_table(scheduler).sigmas, scheduler.alphas_cumprod[after].double()
    sigma, sigma_next = float(sigmas[time]), float(sigmas[after])
    x, f, older, drawn = torch.randn(4, 3, 4, 5, 5, generator=torch.Generator().manual_seed(step)).double()
    f.requires_grad_()
    per_flow = norm(sigma_next)  # 1 / (alpha' + s')
    x_next = kept.sqrt() * older + (1 - kept).sqrt() * drawn  # drawn by the older policy

    def ours(denoised: Tensor) -> Tensor:
        mean, std = renoise(x, (x - denoised) / sigma, sigma, sigma_next)
        torch.testing.assert_close(mean / per_flow, kept.sqrt() * denoised, atol=1e-12, rtol=1e-12)
        assert std / per_flow == pytest.approx(float((1 - kept).sqrt()), rel=1e-12)
        return gaussian_log_prob(x_next * per_flow, mean, std)

    def theirs(denoised: Tensor) -> Tensor:
        return log_density(x_next, kept.sqrt() * denoised, (1 - kept).sqrt())

    scale = torch.full((3,), -math.log(per_flow)).double()
    torch.testing.assert_close(ours(f) - theirs(f), scale, atol=1e-6, rtol=0)
    ratio, expected = ours(f) - ours(older), theirs(f) - theirs(older)
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(ratio, expected, atol=1e-10, rtol=0)
    gradient = torch.autograd.grad(ratio.sum(), f)[0]  # of a mean over 100 elements
    by_hand = kept.sqrt() * (x_next - kept.sqrt() * f) / (1 - kept) / 100
    torch.testing.assert_close(gradient, by_hand.detach(), atol=1e-12, rtol=1e-9)


def test_the_ratio_of_an_lcm_is_that_of_its_scheduler_s_steps() -> None:
    """Stored steps replayed by a policy that has moved, against LCMScheduler's denoised of the UNet's own output."""
    model, scheduler = StableDiffusion(tiny_lcm()), lcm()
    scheduler.set_timesteps(8)
    steps = roll(model, AllSteps(Renoise(), last_step=False), 8)
    assert len(steps) == 7
    condition, scales = model.encode(PROMPTS), torch.full((2,), SCALE - 1)
    told = model.pipeline.get_guidance_scale_embedding(scales, embedding_dim=8)

    def theirs(step: Step, index: int) -> Tensor:
        time, kept = scheduler.timesteps[index], scheduler.alphas_cumprod[scheduler.timesteps[index + 1]].double()
        x, x_next = (step.latents / norm(step.interval.sigma), step.latents_next / norm(step.interval.sigma_next))
        made = model.module(x, time, encoder_hidden_states=condition.prompt_embeds, timestep_cond=told).sample
        scheduler._step_index = index
        f = scheduler.step(made, time, x, generator=torch.Generator().manual_seed(0)).denoised
        return log_density(x_next, kept.sqrt() * f, (1 - kept).sqrt())

    with torch.no_grad():
        old = [theirs(step, index) for index, step in enumerate(steps)]
        randomise_policy(model, 0.3)
        for index, step in enumerate(steps):
            new = replay(model, step, Renoise(), condition, Policy(SCALE)).log_probs
            expected = theirs(step, index) - old[index]
            assert expected.abs().max() > 1e-5
            torch.testing.assert_close((new - step.log_probs).double(), expected, atol=1e-6, rtol=0)


def test_a_latent_consistency_pipeline_is_a_stable_diffusion(tmp_path: FilePath) -> None:
    pipe = tiny_lcm()
    pipe.save_pretrained(tmp_path / "lcm")
    model = as_model(str(tmp_path / "lcm"))
    assert type(model) is StableDiffusion
    assert model.sigmas(8)[-1] == 0
    assert model.calls(8.0, 0.5) == 1
    start = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    theirs = pipe(
        PROMPTS, num_inference_steps=1, guidance_scale=SCALE, latents=start.clone(), height=model.height,
        width=model.width, output_type="latent",
    ).images  # fmt: skip
    path = AllSteps(Renoise()).resolve(2, 0, 0)  # whose first step's mean is (1 - sigma') f
    mean = rollout(
        model, model.encode(PROMPTS), start, [model.sigmas(1)[0], 0.5, 0.25], path, Policy(SCALE),
        lambda step: torch.zeros_like(start),
    ).steps[0].latents_next  # fmt: skip
    torch.testing.assert_close(mean / 0.5, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)


def test_the_ratio_of_ddpo_is_that_of_diffusers_ddim_step_at_eta_1() -> None:
    """All steps of an eps model under guidance, the last one too, whose grid ends above 0 and so has noise."""
    model, scheduler = StableDiffusion(tiny_sd(ddim())()), ddim()
    scheduler.set_timesteps(5)
    steps, condition = roll(model, AllSteps(DDIM(1.0)), 5), model.encode(PROMPTS)
    assert len(steps) == 5
    empty = model.encode([""] * 2).prompt_embeds

    def theirs(step: Step) -> Tensor:
        time = scheduler.timesteps[step.interval.index]
        x, x_next = (step.latents / norm(step.interval.sigma), step.latents_next / norm(step.interval.sigma_next))
        given, not_given = (
            model.module(x, time, encoder_hidden_states=embeds).sample for embeds in (condition.prompt_embeds, empty)
        )
        eps, one = (not_given + SCALE * (given - not_given)).double(), torch.ones_like(x).double()
        mean, shifted = (
            scheduler.step(eps, time, x.double(), eta=1.0, variance_noise=noise).prev_sample for noise in (0 * one, one)
        )
        std = (shifted - mean).mean()
        assert std > 0.01
        return log_density(x_next, mean, std)

    with torch.no_grad():
        old = [theirs(step) for step in steps]
        for step, expected in zip(steps, old, strict=True):
            scale = math.log(norm(step.interval.sigma_next))
            torch.testing.assert_close(step.log_probs.double() + scale, expected, atol=2e-5, rtol=0)
        randomise_policy(model, 0.3)
        for step, before in zip(steps, old, strict=True):
            new = replay(model, step, DDIM(1.0), condition, Policy(SCALE)).log_probs
            expected = theirs(step) - before
            assert expected.abs().max() > 1e-7
            torch.testing.assert_close((new - step.log_probs).double(), expected, atol=1e-6, rtol=1e-2)


def learner(folder: FilePath, method: str, last_step: bool = False) -> FlowGRPO:
    """One epoch of eight samples, whose first update has them all; brighter pictures are better."""
    if method == "rlcm":
        model, plan = StableDiffusion(tiny_lcm()), AllSteps(Renoise(), last_step)
    else:
        model, plan = StableDiffusion(tiny_sd(ddim())()), AllSteps(DDIM(1.0))
    return job(
        folder,
        model=model,
        reward=as_reward(lambda media, prompts: media.pixels.mean((1, 2, 3)) * 30),
        sampling=Sampling(plan, groups=2, group_size=4, batch_size=8, rows_per_call=8, steps=3, guidance_scale=SCALE),
        optimizer=Optimizer(1e-2, ema_decay=0.0),
        evaluation=Evaluation(),
        advantages=rlcm_advantages if method == "rlcm" else ddpo_advantages,
        unconditional_grad=True,
        updates_per_epoch=1,
        kl_coef=0.0,
        epochs=1,
    )


@pytest.mark.parametrize("method", ["rlcm", "ddpo"])
def test_flow_grpo_goes_up_the_gradient_of_either_policy(method: str, tmp_path: FilePath) -> None:
    """A step of size h along it raises the mean of advantage times log-ratio by h |g|^2; the run's |g| is the same."""
    trainer = learner(tmp_path / "by hand", method)
    batch = trainer.preflight().roll_out().batch
    assert (len(batch.steps), len(batch.advantages)) == (2 if method == "rlcm" else 3, 8)
    condition, parameters = batch.condition(trainer.model, range(8)), list(trainer.model.trainable().values())

    def replays() -> list[tuple[Step, Replay]]:
        rules = [batch.path.transitions[step.interval.index] for step in batch.steps]
        made = zip(batch.steps, rules, strict=True)
        return [(step, replay(trainer.model, step, rule, condition, trainer.policy)) for step, rule in made]

    losses = [trainer.loss(new, step.log_probs, batch.advantages, None, step.interval) for step, new in replays()]
    gradient = torch.autograd.grad(torch.stack(losses).mean(), parameters)
    square = sum(float(one.square().sum()) for one in gradient)
    size = 1e-4 / square
    with torch.no_grad():
        for parameter, one in zip(parameters, gradient, strict=True):
            parameter -= size * one
        risen = [batch.advantages * (new.log_probs - step.log_probs) for step, new in replays()]
    assert float(torch.stack(risen).mean()) == pytest.approx(size * square, rel=0.1)

    learner(tmp_path / "run", method).train()
    (trained,) = (row for row in rows(tmp_path / "run") if "reward" in row)
    assert trained["ratio_max"] == 0  # of log-ratios, bit for bit
    assert trained["grad_norm"] == pytest.approx(square**0.5, rel=1e-3)


def test_check_refuses_a_last_step_without_noise(tmp_path: FilePath) -> None:
    found = inspect(learner(tmp_path / "a", "rlcm", last_step=True), tmp_path / "out").problems
    assert [problem.text for problem in found if problem.kind == "error"] == [
        "step 2 is meant to be stochastic, but its noise has std 0 and so no density: CPS, Renoise and DDIM have no "
        "noise in the step that ends at sigma 0. Leave that step out (last_step: false in the plan)"
    ]
    for method in ("rlcm", "ddpo"):  # Stable Diffusion's own grid ends above 0
        trainer = learner(tmp_path / method, method)
        assert no_noise(planned_steps(trainer, looked_at(trainer))) is None


def test_advantages_are_those_of_the_authors_trackers() -> None:
    """A tracker that holds one group: (r - mean) / (population std + 1e-6), clipped to 5 by DDPO, to 10 by RLCM."""
    few, ids = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), torch.tensor([0, 0, 0, 4, 4, 4])
    expected = torch.tensor([-2.0, -1.0, 3.0, 0.0, 0.0, 0.0]) / (14 / 3) ** 0.5
    for rule in (ddpo_advantages, rlcm_advantages):
        torch.testing.assert_close(rule(few, ids), expected, atol=2e-6, rtol=0)
    one_good = torch.zeros(400).index_fill(0, torch.tensor([7]), 1.0)  # its z-score is sqrt(399)
    everyone = torch.zeros(400, dtype=torch.long)
    assert ddpo_advantages(one_good, everyone).max() == 5
    assert rlcm_advantages(one_good, everyone).max() == 10
    tiny = 1e-6 * few[:3]  # of the size of what is added
    torch.testing.assert_close(ddpo_advantages(tiny, ids[:3])[2], torch.tensor(3 / ((14 / 3) ** 0.5 + 1)))


def test_rlcm_s_settings_are_the_published_ones() -> None:
    config = resolved("flow_grpo/lcm_dreamshaper_aesthetic_rlcm.yaml")
    sampling, optimizer, model = config["sampling"], config["optimizer"], config["model"]
    assert sampling["plan"]["transition"] == {"class": "flowalign.transitions.Renoise"}
    assert (sampling["plan"]["last_step"], sampling["steps"], sampling["guidance_scale"]) == (False, 8, 8.0)
    assert sampling["groups"] * sampling["group_size"] == 4 * 8  # GPUs times samples
    assert (optimizer["learning_rate"], optimizer["weight_decay"], optimizer["max_grad_norm"]) == (1e-4, 0, 5)
    assert (optimizer["decay"], config["epochs"], config["updates_per_epoch"]) == (3 * 100 * 10, 100 * 10, 1)
    assert (config["clip_range"], config["kl_coef"], config["reward"]) == (1e-4, 0, "aesthetic")
    assert config["advantages"] == "flowalign.advantages.rlcm_advantages"
    assert (model["lora"]["rank"], model["lora"]["alpha"], model["height"]) == (8, 8, 768)


@pytest.mark.parametrize(("short", "epochs", "updates"), [("aesthetic", 200, 2), ("jpeg", 100, 4)])
def test_ddpo_s_settings_are_the_published_ones(short: str, epochs: int, updates: int) -> None:
    config = resolved(f"flow_grpo/sd1.4_{short}_ddpo.yaml")
    sampling, optimizer, model = config["sampling"], config["optimizer"], config["model"]
    plan = {"class": "flowalign.schedules.AllSteps", "last_step": True, "shared_noise": False}
    assert sampling["plan"] == plan | {"transition": {"class": "flowalign.transitions.DDIM", "eta": 1.0}}
    assert (sampling["steps"], sampling["guidance_scale"], config["unconditional_grad"]) == (50, 5.0, True)
    assert sampling["groups"] * sampling["group_size"] == 8 * 8 * 4  # GPUs, samples of a batch, batches
    assert (config["epochs"], config["updates_per_epoch"]) == (epochs, updates)
    assert (optimizer["learning_rate"], optimizer["weight_decay"], optimizer["max_grad_norm"]) == (3e-4, 1e-4, 1)
    assert (config["clip_range"], config["kl_coef"], config["step_fraction"]) == (1e-4, 0, 1)
    assert config["advantages"] == "flowalign.advantages.ddpo_advantages"
    assert (model["lora"]["rank"], model["lora"]["alpha"], model["pipeline"]) == (4, 4, "CompVis/stable-diffusion-v1-4")
