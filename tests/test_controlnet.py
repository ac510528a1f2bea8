"""ControlNets against diffusers' own pipeline: latents, gradients, files of a policy, and what memory it will take."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import MultiControlNetModel, StableDiffusionPipeline
from peft import PeftModel
from PIL import Image
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from flowalign.adapters import LoRA
from flowalign.fitting import fitted
from flowalign.lora_files import read_lora
from flowalign.media import load
from flowalign.memory_estimate import Peak, Saved, activations, sampling_peak
from flowalign.models import ControlledUNet, ControlNet, StableDiffusion, as_model
from flowalign.records import Condition, Prompts, Size
from flowalign.rollout import Policy, replay, rollout
from flowalign.schedules import AllSteps, Path
from flowalign.transitions import ODE, FlowSDE
from tests.families import ddim, euler
from tests.tiny import randomise_policy
from tests.tiny_controlnet import tiny_controlnet

PROMPTS = ["a red circle", "two blue squares"]
FAMILIES = [ControlNet, ControlledUNet]
slow = pytest.mark.slow
each = pytest.mark.parametrize("family", FAMILIES)


def picture(file: FilePath, height: int = 32, width: int = 32) -> str:
    generator = np.random.default_rng(len(file.stem))
    Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
    return str(file)


@pytest.fixture
def files(tmp_path: FilePath) -> list[str]:
    return [picture(tmp_path / "a.png"), picture(tmp_path / "bc.png")]


def told(model: ControlNet, files: list[str]) -> Condition:
    return model.condition(Prompts(tuple(PROMPTS), tuple({"image": file} for file in files)))


def noise(model: ControlNet, seed: int = 0) -> Tensor:
    return torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


def sampled(model: ControlNet, files: list[str], guidance: float, steps: int = 4) -> Tensor:
    path = Path((ODE(),) * steps)
    return rollout(model, told(model, files), noise(model), model.sigmas(steps), path, Policy(guidance)).latents


def by_pipeline(pipe: Any, model: ControlNet, files: list[str], guidance: float, scale: float = 1.0) -> Tensor:
    return pipe(
        [*PROMPTS], image=[Image.open(file) for file in files], latents=noise(model), num_inference_steps=4,
        guidance_scale=guidance, height=model.height, width=model.width, controlnet_conditioning_scale=scale,
        output_type="latent",
    ).images  # fmt: skip


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5 * max(1.0, float(theirs.detach().abs().max())), rtol=0)


@pytest.mark.parametrize(("family", "scheduler"), [(ControlNet, ddim), (ControlNet, euler), (ControlledUNet, ddim)])
def test_ode_rollout_is_the_pipeline(family: type[ControlNet], scheduler: Any, tmp_path: FilePath) -> None:
    for height, width, scale in ((32, 32, 1.0), (48, 32, 0.4)):
        model = family(tiny_controlnet(scheduler()), height=height, width=width, conditioning_scale=scale)
        files = [picture(tmp_path / f"{name}-{height}.png", height, width) for name in ("a", "bc")]
        for guidance in (1.0, 4.5):
            ours = sampled(model, files, guidance)
            assert_same(ours, by_pipeline(tiny_controlnet(scheduler()), model, files, guidance, scale))
        assert (ours - noise(model)).abs().max() > 0.1
        assert (sampled(model, files[::-1], 4.5) - ours).abs().max() > 1e-2 * scale


@each
def test_first_ratio_is_exactly_one_and_gradients_reach_all_of_the_policy(family: type[ControlNet], files) -> None:
    model = family(tiny_controlnet())
    randomise_policy(model)
    path, sigmas, policy = AllSteps(FlowSDE(0.7)).resolve(3, 0, 0), model.sigmas(3), Policy(3.0)
    condition = told(model, files)
    made = rollout(model, condition, noise(model), sigmas, path, policy, lambda i: noise(model, i))
    for step in made.steps:
        again = replay(model, step, path.transitions[step.interval.index], condition, policy)
        assert torch.equal(again.log_probs, step.log_probs)
    pixels = model.decode(model.finish(again.mean - sigmas[-2] * again.velocity, 0.0))
    slopes = torch.autograd.grad(pixels.square().sum(), [*model.trainable().values()])
    assert len(slopes) >= 8
    assert all(slope.any() for slope in slopes)


@each
def test_rows_of_sigmas_are_the_calls_of_each(family: type[ControlNet], files) -> None:
    model = family(tiny_controlnet())
    randomise_policy(model)
    condition, sigmas = told(model, files), torch.tensor(model.train_sigmas(), dtype=torch.float64)[[100, 900]]
    together = model.velocity_rows(noise(model), sigmas, condition, 3.0)
    for row, sigma in enumerate(sigmas):
        at = torch.tensor([row])
        alone = model.velocity_split(noise(model)[at], float(sigma), condition.rows(at), 3.0)
        assert_same(together[at], alone)


@each
def test_the_policy_loads_without_us_and_is_gone_on_with(family: type[ControlNet], files, tmp_path) -> None:
    model = family(tiny_controlnet())
    randomise_policy(model)
    model.save(tmp_path / "lora")
    pipe: Any = tiny_controlnet()
    if family is ControlNet:
        PeftModel.from_pretrained(pipe.controlnet, tmp_path / "lora")
    else:
        pipe.load_lora_weights(tmp_path / "lora")
    ours = sampled(model, files, 4.5)
    assert_same(ours, by_pipeline(pipe, model, files, 4.5))
    plain = sampled(family(tiny_controlnet()), files, 4.5)
    assert (ours - plain).abs().max() > 1e-3
    with model.reference():
        assert torch.equal(sampled(model, files, 4.5), plain)
    assert {name.split(".")[0] for name in read_lora(tmp_path / "lora").factors} == {model.network_name}
    after = family(tiny_controlnet(), lora=LoRA(start=str(tmp_path / "lora"), reference="start"))
    assert_same(sampled(after, files, 4.5), ours)
    randomise_policy(after, 0.3)
    assert (sampled(after, files, 4.5) - ours).abs().max() > 1e-3
    with after.reference():
        assert_same(sampled(after, files, 4.5), ours)


@pytest.mark.parametrize(("family", "on"), [(ControlNet, False), pytest.param(ControlledUNet, True, marks=slow)])
def test_predicted_activations_are_a_real_call_s(family: type[ControlNet], on: bool, files) -> None:
    """Those of the network without a policy, which gradients pass through, among them; its weights not."""
    model = family(tiny_controlnet(), gradient_checkpointing=on)
    condition, latents = told(model, files), noise(model)
    saved = Saved(model.pipeline.unet, model.pipeline.controlnet)
    with Peak() as peak:
        with saved_tensors_hooks(saved.pack, lambda value: value):
            velocity = model.network(latents, 0.5, condition)
        velocity.square().sum().backward()
    guess = activations(model, condition, on)
    assert guess.saved == pytest.approx(saved.bytes, rel=0.1 if on else 0.02)  # where little is saved at all
    assert guess.peak == pytest.approx(peak.most, rel=0.05)
    with torch.no_grad(), Peak() as peak:
        model.velocity(latents, 0.5, condition)
    assert sampling_peak(model, condition) == pytest.approx(peak.most, rel=0.05)


@each
def test_half_precision_and_checkpointing_are_of_both_networks(family: type[ControlNet], files) -> None:
    def slopes(**settings: Any) -> list[Tensor]:
        model = family(tiny_controlnet(), **settings)
        randomise_policy(model)
        value = model.velocity(noise(model), 0.5, told(model, files)).square().sum()
        return [*torch.autograd.grad(value, [*model.trainable().values()])]

    kept, anew, half = slopes(), slopes(gradient_checkpointing=True), slopes(mixed_precision="bf16")
    assert all(torch.equal(one, other) for one, other in zip(kept, anew, strict=True))
    assert all((one - other).norm() < 0.1 * one.norm() for one, other in zip(kept, half, strict=True))
    model = family(tiny_controlnet(), mixed_precision="bf16")
    assert {model.pipeline.unet.dtype, model.pipeline.controlnet.dtype} == {torch.bfloat16}


def test_it_is_put_together_from_two_folders(files, tmp_path) -> None:
    whole = tiny_controlnet()
    kept = {name: part for name, part in whole.components.items() if name != "controlnet"}
    StableDiffusionPipeline(**kept, requires_safety_checker=False).save_pretrained(tmp_path / "sd")
    whole.controlnet.save_pretrained(tmp_path / "depth")
    model = ControlNet(str(tmp_path / "sd"), str(tmp_path / "depth"))
    assert torch.equal(sampled(model, files, 3.0), sampled(ControlNet(tiny_controlnet()), files, 3.0))
    half = ControlNet(str(tmp_path / "sd"), str(tmp_path / "depth"), mixed_precision="fp16")
    assert half.pipeline.controlnet.dtype == half.pipeline.unet.dtype == torch.float16
    with pytest.raises(ValueError, match="can be had neither as a folder nor from the hub"):
        ControlNet(str(tmp_path / "sd"), str(tmp_path / "canny"))
    with pytest.raises(ValueError, match="is a StableDiffusionControlNetPipeline, not a StableDiffusionPipeline"):
        ControlNet(tiny_controlnet(), str(tmp_path / "depth"))


def test_a_picture_is_cropped_to_the_size_that_is_made(tmp_path) -> None:
    file = picture(tmp_path / "wide.png", 64, 96)
    model = ControlNet(tiny_controlnet())
    with model.sized(Size(32, 48)):
        wide = told(model, [file, file]).control
    square = told(model, [file, file]).control
    assert wide is not None
    assert square is not None
    assert (wide.shape, square.shape) == ((2, 3, 32, 48), (2, 3, 32, 32))
    assert torch.equal(wide[0], fitted(load(FilePath(file))[0], Size(32, 48)))
    torch.testing.assert_close(square[0], wide[0, :, :, 8:40])


def test_what_cannot_be_done_is_told_in_a_line(files) -> None:
    model = as_model(tiny_controlnet())
    assert type(model) is ControlNet
    with pytest.raises(ValueError, match='there is no control picture: prompts need an "image", the name of a file'):
        sampled_without(model)
    with pytest.raises(ValueError, match="prompt 'two blue squares' has no image"):
        model.condition(Prompts(tuple(PROMPTS), ({"image": files[0]}, {})))
    with pytest.raises(ValueError, match="pools its output"):
        ControlNet(tiny_controlnet(global_pool_conditions=True))
    pipe: Any = tiny_controlnet()
    pipe.register_modules(controlnet=MultiControlNetModel([pipe.controlnet] * 2))
    with pytest.raises(ValueError, match="controlnet is a MultiControlNetModel; it has to be one ControlNetModel"):
        ControlNet(pipe)
    with pytest.raises(ValueError, match="is a StableDiffusionControlNetPipeline, not a StableDiffusionPipeline"):
        StableDiffusion(tiny_controlnet())


def sampled_without(model: ControlNet) -> Tensor:
    return model.network(noise(model), 0.5, model.encode(PROMPTS))
