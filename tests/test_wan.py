"""Wan: its grid beside the scheduler that it ships, frames, precision, and a decode that goes frame by frame."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from PIL import Image
from torch import Tensor

from flowalign.models import Wan, WanImageToVideo, as_model
from flowalign.models.wan import decode_recomputed
from flowalign.prompts import as_prompts
from flowalign.records import Condition, Prompts
from flowalign.rollout import Policy, rollout
from flowalign.schedules import AllSteps, linear
from flowalign.schedules import Path as Steps
from flowalign.transitions import ODE, FlowSDE
from rewards.base import as_reward
from tests.families import seeded
from tests.jobs import job, rows
from tests.tiny import randomise_policy
from tests.tiny_wan import tiny_wan, tiny_wan_5b, tiny_wan_i2v, wan_transformer
from trainers import Evaluation, Sampling

SMALL = {"height": 32, "width": 32, "frames": 9, "max_sequence_length": 12}


def unipc(**changes: Any) -> UniPCMultistepScheduler:
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return UniPCMultistepScheduler(**settings | changes)


def small(make: Any = tiny_wan, **changes: Any) -> Wan:
    return Wan(seeded(make)(), **SMALL | changes)


def test_the_grid_is_the_first_order_one_of_the_shipped_shift() -> None:
    model = small(lambda: tiny_wan(unipc()))
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(20)
    assert model.sigmas(20) == [float(sigma) for sigma in euler.sigmas]
    note = str(model.scheduler_note())
    assert "UniPCMultistepScheduler, a multistep scheduler" in note
    assert "its shift, 3," in note
    assert small().scheduler_note() is None


def test_a_linear_grid_is_the_shipped_scheduler_s_own() -> None:
    model, theirs = small(lambda: tiny_wan(unipc()), grid=linear), unipc()
    theirs.set_timesteps(20)
    ours = np.array(model.sigmas(20))
    unshifted = [s / (3 - 2 * s) for s in (ours, theirs.sigmas.numpy())]
    assert np.abs(unshifted[0] - unshifted[1]).max() < 1.1e-3
    assert np.abs(ours - np.array(small(lambda: tiny_wan(unipc())).sigmas(20))).max() > 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 8}, r"frames must be 4 k \+ 1, got 8; the nearest is 9"),
        ({"frames": 82}, r"got 82; the nearest is 81"),
        ({"frames": 0}, r"got 0; the nearest is 1"),
        ({"fps": 0}, "fps must be positive"),
        ({"height": 40}, "height must be a multiple of 16, got 40"),
    ],
)
def test_sizes_that_cannot_be_made_are_one_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_pipelines_that_are_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has two transformers \(Wan 2.2 14B"):
        small(lambda: tiny_wan(transformer_2=wan_transformer(), boundary_ratio=0.875))
    with pytest.raises(ValueError, match="UniPCMultistepScheduler does not say use_flow_sigmas"):
        small(lambda: tiny_wan(unipc(use_flow_sigmas=False)))
    pipe = seeded(tiny_wan)()
    pipe.vae.enable_tiling()
    with pytest.raises(ValueError, match="frame by frame, without tiles"):
        Wan(pipe, **SMALL, decode_checkpointing=True)
    assert as_model(seeded(tiny_wan)()).latent_shape == (4, 21, 60, 104)  # 81 frames of 480 x 832


def test_what_a_prompt_leaves_of_its_tokens_is_zeros() -> None:
    told = small(max_sequence_length=30).encode(["a", "a red circle"]).prompt_embeds
    lengths = [int((row.abs().sum(1) > 0).sum()) for row in told]
    assert lengths[0] < lengths[1] < 30
    for row, length in zip(told, lengths, strict=True):
        assert (row[:length].abs().sum(1) > 0).all()


@pytest.mark.parametrize("make", [tiny_wan, tiny_wan_5b])
def test_decode_has_a_gradient_in_every_frame_and_looks_back_only(make: Any) -> None:
    model = small(make)
    latents = torch.randn(1, *model.latent_shape, requires_grad=True)
    pixels = model.decode(latents)
    assert pixels.shape == (1, 9, 3, 32, 32)
    for first, told in ((0, 1), (1, 2), (4, 2), (5, 3), (8, 3)):  # a pixel frame, and the latent frames before its end
        (slope,) = torch.autograd.grad(pixels[:, first].sum(), latents, retain_graph=True)
        reached = slope.abs().amax((0, 1, 3, 4)) > 0
        assert reached.tolist() == [frame < told for frame in range(3)]


@pytest.mark.parametrize("make", [tiny_wan, tiny_wan_5b])
def test_a_recomputed_decode_is_the_same_and_keeps_less(make: Any) -> None:
    plain, thrifty = small(make), small(make, decode_checkpointing=True)
    start = torch.randn(2, *plain.latent_shape, generator=torch.Generator().manual_seed(0))
    found = [_decoded(model, start.clone().requires_grad_()) for model in (plain, thrifty)]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[1][2] < 0.25 * found[0][2]
    with torch.no_grad():
        assert torch.equal(thrifty.decode(start), found[0][0])
        scaled = torch.randn(1, 4, 2, 4, 4)
        assert torch.equal(decode_recomputed(plain.pipeline.vae, scaled), plain.pipeline.vae.decode(scaled).sample)


def _decoded(model: Wan, latents: Tensor) -> tuple[Tensor, Tensor, int]:
    """Pixels, the latents' gradient, and the bytes that the graph keeps."""
    held: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        pixels = model.decode(latents)
    (slope,) = torch.autograd.grad(pixels.square().sum(), latents)
    return pixels.detach(), slope, sum(held.values())


def test_half_precision_keeps_what_diffusers_keeps(tmp_path: Path) -> None:
    """A pipeline loaded in bfloat16 leaves some parameters in float32: the velocity is that of its own network."""
    seeded(tiny_wan)().save_pretrained(tmp_path)
    pipe = WanPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model = Wan(pipe, **SMALL)
    kinds = {parameter.dtype for name, parameter in model.module.named_parameters() if ".policy." not in name}
    assert kinds == {torch.float32, torch.bfloat16}
    condition, latents = model.encode(["a red circle"]), torch.randn(1, *model.latent_shape)
    with torch.no_grad(), model.reference():
        ours = model.velocity(latents, 0.5, condition)
        theirs = model.module(latents.bfloat16(), torch.tensor([500.0]), condition.prompt_embeds, return_dict=False)[0]
    assert torch.equal(ours, theirs.float())
    exact = small(frames=9).velocity(latents, 0.5, small().encode(["a red circle"]))
    assert 0 < (ours - exact).abs().max() < 0.05


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two pictures of noise, of other sizes than the videos."""
    folder, drawn = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, size in (("a", (48, 64, 3)), ("b", (40, 40, 3))):
        Image.fromarray(drawn.integers(0, 255, size, dtype=np.uint8)).save(folder / f"{name}.png")
    return [str(folder / "a.png"), str(folder / "b.png")]


def from_pictures(frames: int = 9, **changes: Any) -> WanImageToVideo:
    return WanImageToVideo(seeded(tiny_wan_i2v)(), height=32, width=32, frames=frames, **changes)


def started(model: WanImageToVideo, files: list[str], start: Tensor, guidance: float) -> Tensor:
    condition = model.condition_on(model.encode(["a red circle", "two blue squares"]), files)
    return rollout(model, condition, start, model.sigmas(3), Steps((ODE(),) * 3), Policy(guidance)).latents


@pytest.mark.parametrize("frames", [5, 9])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_a_video_from_a_picture_is_the_pipeline_s(pictures: list[str], guidance: float, frames: int) -> None:
    model = from_pictures(frames)
    start = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    for file in pictures:  # the pipeline takes one picture for all prompts of a call
        ours, asked = started(model, [file, file], start, guidance), {"num_inference_steps": 3, "num_frames": frames}
        told = model.encode(["a red circle", "two blue squares"])  # itself it cannot encode prompts without ftfy
        theirs = seeded(tiny_wan_i2v)()(
            Image.open(file), prompt_embeds=told.prompt_embeds, negative_prompt_embeds=told.negative_prompt_embeds,
            latents=start.clone(), guidance_scale=guidance, height=32, width=32, output_type="latent", **asked,
        ).frames  # fmt: skip
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)
    each = started(model, pictures, start, guidance)
    torch.testing.assert_close(each[1], ours[1], atol=1e-5, rtol=0)
    assert (each[0] - ours[0]).abs().max() > 1e-2


def test_a_condition_carries_its_picture(pictures: list[str]) -> None:
    model = from_pictures()
    condition = model.condition_on(model.encode(["a", "b"]), pictures)
    assert condition.image is not None
    assert condition.image_embeds is not None
    mask, latents = condition.image.split([4, 4], 1)
    assert (mask[:, :, 0] == 1).all()
    assert (mask[:, :, 1:] == 0).all()
    seen = model.decode(latents)[:, 0]  # the picture's own latents, as the VAE reads them
    assert (seen[0] - seen[1]).abs().max() > 0.01
    swapped = condition.rows(torch.tensor([1, 0, 1]))
    assert swapped.image is not None
    assert swapped.image_embeds is not None
    assert torch.equal(swapped.image, condition.image[[1, 0, 1]])
    assert torch.equal(swapped.image_embeds, condition.image_embeds[[1, 0, 1]])
    x, split = torch.randn(2, *model.latent_shape), {"guidance_scale": 3.0}
    doubled = model.velocity(x, 0.5, condition, **split)
    torch.testing.assert_close(doubled, model.velocity_split(x, 0.5, condition, **split), atol=1e-5, rtol=0)


def test_a_trained_policy_from_pictures_loads_in_plain_diffusers(pictures: list[str], tmp_path: Path) -> None:
    model = from_pictures()
    randomise_policy(model)
    start = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    ours, told = started(model, pictures[:1] * 2, start, 4.5), model.encode(["a red circle", "two blue squares"])
    model.save(tmp_path)
    pipe = seeded(tiny_wan_i2v)()
    pipe.load_lora_weights(tmp_path)
    theirs = pipe(
        Image.open(pictures[0]), prompt_embeds=told.prompt_embeds, negative_prompt_embeds=told.negative_prompt_embeds,
        latents=start, guidance_scale=4.5, height=32, width=32, num_frames=9, num_inference_steps=3,
        output_type="latent",
    ).frames  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)


def test_flow_grpo_from_pictures_that_prompts_name(pictures: list[str], tmp_path: Path) -> None:
    """Rollout, replay and evaluation start from each prompt's own picture: the first ratio is 1."""
    folder = Path(pictures[0]).parent
    lines = [{"prompt": f"prompt {name}", "image": f"{name}.png"} for name in "ab"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen: list[tuple[str, ...]] = []
    model = from_pictures(5)
    asked = model.condition_on

    def remember(condition: Condition, images: Sequence[str]) -> Condition:
        seen.append(tuple(Path(file).name for file in images))
        return asked(condition, images)

    model.condition_on = remember  # type: ignore[method-assign]
    trainer = job(
        tmp_path,
        model=model,
        prompts=str(folder / "prompts.jsonl"),
        reward=as_reward(lambda media, prompts: media.pixels.mean((1, 2, 3, 4)) * 30),
        sampling=Sampling(AllSteps(FlowSDE(0.7)), groups=2, group_size=2, batch_size=2, rows_per_call=2, steps=2),
        evaluation=Evaluation(str(folder / "prompts.jsonl"), every=1, pictures=1),
        updates_per_epoch=1,
        epochs=1,
    )
    trainer.train()
    (trained,) = [row for row in rows(tmp_path) if "reward" in row]
    assert trained["ratio_max"] == 0
    assert trained["grad_norm"] > 0
    assert {("a.png", "a.png"), ("b.png", "b.png"), ("a.png", "b.png")} == {*seen}


def test_an_image_is_a_file_of_the_prompts_folder(pictures: list[str]) -> None:
    folder = Path(pictures[0]).parent
    for name, message in (("../a.png", "lies outside"), ("c.png", "c.png is not a file")):
        (folder / "bad.jsonl").write_text(json.dumps({"prompt": "a", "image": name}) + "\n")
        with pytest.raises(ValueError, match=message):
            as_prompts(str(folder / "bad.jsonl")).all()
    some = Prompts(("a", "b"), ({"image": pictures[0]}, {}))
    assert small().condition(some).image is None
    with pytest.raises(ValueError, match="prompt 'b' has no image to start from"):
        from_pictures().condition(some)


def test_what_a_model_from_pictures_needs(pictures: list[str]) -> None:
    model = from_pictures()
    with pytest.raises(ValueError, match="there is no picture to start from"):
        model.velocity(torch.randn(1, *model.latent_shape), 0.5, model.encode(["a"]))
    with pytest.raises(ValueError, match="Wan starts from no picture"):
        small().condition_on(small().encode(["a"]), pictures[:1])
    with pytest.raises(ValueError, match="max_sequence_length must be 512, got 12"):
        from_pictures(max_sequence_length=12)
    with pytest.raises(ValueError, match=r"Wan 2\.2's 5B keeps its picture by times"):
        WanImageToVideo(seeded(lambda: tiny_wan_i2v(expand_timesteps=True))())
    assert type(as_model(seeded(tiny_wan_i2v)())) is WanImageToVideo
    calls: list[str] = []
    model.pipeline.image_encoder.register_forward_hook(lambda *_: calls.append("call"))
    for _ in range(2):
        model.condition_on(model.encode(["a", "b"]), pictures)
    assert len(calls) == 2  # each picture is looked at once
