"""What makes a big model fit, and the predictions of what it takes, against real runs of tiny pipelines."""

from __future__ import annotations

import sys
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from flowalign.memory_estimate import (
    Peak,
    Saved,
    activations,
    components,
    decode_peak,
    sampling_peak,
    stored_bytes,
    weight_bytes,
)
from flowalign.models import PipelineModel
from flowalign.models.memory import CONVOLUTIONS, Memory, linear_layers, offload_linear, quantize
from flowalign.records import Media, Prompts
from tests.families import CASES, Case
from tests.interrupted import slow_but
from tests.jobs import job, rows
from tests.tiny import randomise_policy, tiny_sd3
from trainers.preflight import Preflight, page
from trainers.preflight import memory as predicted
from trainers.preflight.geometry import floor_rows, geometry, spent_rows
from trainers.preflight.memory import Needs, policy_bytes, present, switches, trajectory_bytes

PROMPTS = ["a red circle", "two blue squares"]
KNOWN = {case.name: case for case in CASES}
each = pytest.mark.parametrize(
    "case", [KNOWN[name] for name in ("sd3", "sd1.5 ddim", "flux dev", "wan")], ids=lambda case: case.name
)


def adapted(case: Case, **more: Any) -> PipelineModel:
    settings: dict[str, Any] = {**case.options, **case.sizes[0], "gradient_checkpointing": True}
    model = case.adapt(case.make(), **settings | more)
    randomise_policy(model)
    return model


def noise(model: PipelineModel) -> Tensor:
    return torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))


def step(model: PipelineModel) -> tuple[Tensor, list[Tensor]]:
    """A velocity and the policy's gradient, after a rollout's call without one; all velocities must be the same."""
    told, latents, sigma = model.encode(PROMPTS), noise(model), model.sigmas(5)[1]
    with torch.no_grad():
        before = model.velocity_split(latents, sigma, told, 2.0)
    velocity = model.velocity_split(latents, sigma, told, 2.0, True)
    slopes = torch.autograd.grad(velocity.square().sum(), [*model.trainable().values()], allow_unused=True)
    assert torch.equal(before, velocity)
    assert all(value.dtype == torch.float32 for value in model.trainable().values())
    return velocity.detach(), [slope for slope in slopes if slope is not None]


def assert_same_step(one: PipelineModel, other: PipelineModel, tolerance: float = 0.0) -> None:
    (velocity, slopes), (expected, known) = step(one), step(other)
    torch.testing.assert_close(velocity, expected, atol=tolerance, rtol=tolerance)
    for slope, right in zip(slopes, known, strict=True):
        torch.testing.assert_close(slope, right, atol=tolerance * float(right.abs().max()), rtol=tolerance)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"attention": "flsh"}, {}, "attention must be one of diffusers' backends flash, "),
    ({"attention": "sage"}, {}, "has no backward pass"),
    ({"attention": "flash"}, {}, "memory.attention flash is for CUDA, and the model is on cpu"),
    ({"attention": "_native_math"}, {}, "SD3Transformer2DModel takes no attention backend but native and xformers"),
    ({"quantize": "int8", "layerwise_casting": True}, {}, "layerwise_casting would cast weights"),
    ({"quantize": "int8", "offload": "group"}, {}, "offload: group moves a layer's weight alone"),
    ({"quantize": "nf4"}, {}, "nf4 is for GPUs"),
    ({"quantize": "fp8"}, {"gradient_checkpointing": False}, "memory.quantize needs gradient_checkpointing"),
    ({"layerwise_casting": True}, {"gradient_checkpointing": False}, "layerwise_casting needs gradient_checkpointing"),
    ({"offload": "group"}, {"gradient_checkpointing": False}, "memory.offload: group needs gradient_checkpointing"),
    ({"offload": "group"}, {"compile": True}, "compile does not go with"),
]


@pytest.mark.parametrize(("memory", "settings", "message"), REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_what_does_not_go_together_is_one_line(memory, settings, message) -> None:
    with pytest.raises(ValueError, match=message) as told:
        adapted(KNOWN["sd3"], memory=Memory(**memory), **settings)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("kind", "package"), [("int8", "torchao"), ("int8_bnb", "bitsandbytes")])
def test_a_missing_package_is_named(kind, package, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"quantize {kind} needs {package}: pip install {package}"):
        adapted(KNOWN["sd3"], memory=Memory(quantize=kind))


# a Stable Diffusion 3 without its third encoder is saved as a folder that diffusers does not read
@pytest.mark.parametrize("case", [KNOWN[name] for name in ("sdxl", "flux dev", "wan")], ids=lambda case: case.name)
def test_a_folder_is_read_as_its_pipeline_is_cast(case: Case, tmp_path: FilePath) -> None:
    """Bit for bit: float32 as before; bf16 as the network and the text encoders cast after they were loaded."""
    case.make().save_pretrained(tmp_path)
    settings: dict[str, Any] = {**case.options, **case.sizes[1], "gradient_checkpointing": True}
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        read = case.adapt(str(tmp_path), **settings, mixed_precision=precision)
        pipe: Any = case.make()
        for name, part in pipe.components.items():
            if name.startswith("text_encoder") and isinstance(part, nn.Module):
                nn.Module.to(part, dtype)
        given = case.adapt(pipe, **settings, mixed_precision=precision)
        assert {value.dtype for value in read.module.parameters()} == {dtype, torch.float32}
        assert {value.dtype for value in components(read)["text_encoder"].parameters()} == {dtype}
        assert {value.dtype for value in components(read)["vae"].parameters()} == {torch.float32}
        for model in (read, given):
            randomise_policy(model)
        assert torch.equal(read.encode(PROMPTS).prompt_embeds, given.encode(PROMPTS).prompt_embeds)
        assert_same_step(read, given)
        assert torch.equal(read.decode(noise(read)), given.decode(noise(given)))
    read = case.adapt(str(tmp_path), **settings, decode_precision="bf16")
    assert {value.dtype for value in components(read)["vae"].parameters()} == {torch.bfloat16}
    torch.testing.assert_close(read.decode(noise(read)), given.decode(noise(given)), atol=0.03, rtol=0)


@each
def test_layers_away_from_the_device_give_the_same_gradient(case: Case, tmp_path: FilePath) -> None:
    """Frozen linear layers wait in files, and what is left of them in memory is nan; only the calls bring them."""
    torch.use_deterministic_algorithms(True)  # fills fresh memory with nan
    try:
        model = adapted(case)
        offload_linear(model.module, torch.device("cpu"), str(tmp_path))
        frozen = [one for name, one in linear_layers(model.module).items() if ".lora_" not in name]
        assert all(one.weight.isnan().all() for one in frozen)
        assert_same_step(model, adapted(case))
        away = [bool(one.weight.isnan().all()) for one in frozen]
        assert sum(away) > len(away) / 2  # recomputing stops inside the last layer that it needs, which then stays
    finally:
        torch.use_deterministic_algorithms(False)


@each
def test_offloading_on_the_host_changes_nothing(case: Case) -> None:
    for offload in ("group", "encoders"):
        assert_same_step(adapted(case, memory=Memory(offload=offload)), adapted(case))


@each
def test_layerwise_casting_is_the_network_of_rounded_weights(case: Case) -> None:
    """Gradients included: none reads a weight that has gone back to 8 bits. Convolutions stay whole."""
    model, plain = adapted(case, memory=Memory(layerwise_casting=True)), adapted(case)
    rounded = 0
    for name, value in model.module.named_parameters():
        if value.dtype == torch.float8_e4m3fn:
            plain.module.get_parameter(name).data = value.data.float()
            rounded += 1
    assert rounded >= 4
    for one in model.module.modules():
        assert not isinstance(one, CONVOLUTIONS) or one.weight.dtype == torch.float32
    assert_same_step(model, plain)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@each
def test_a_quantised_base_is_trained_on(case: Case, kind, tmp_path: FilePath) -> None:
    """As on weights that were packed and unpacked; the policy is saved, and taken up again on a packed base."""
    pytest.importorskip("torchao")
    memory = Memory(quantize=kind, quantize_encoders=kind)
    model, plain = adapted(case, memory=memory), adapted(case)
    assert all(type(one.weight.data) is not Tensor for one in linear_layers(components(model)["text_encoder"]).values())
    for part in components(model).keys() - {"vae"}:
        packed, whole = components(model)[part], components(plain)[part]
        for name, one in linear_layers(packed).items():
            if ".lora_" not in name:
                whole.get_submodule(name).weight.data = one.weight.dequantize()
    assert_same_step(model, plain, 2e-4)
    model.save(tmp_path)
    from flowalign.adapters import LoRA

    again = case.adapt(
        case.make(), **case.options, **case.sizes[0], gradient_checkpointing=True, memory=memory,
        lora=LoRA(start=str(tmp_path)),
    )  # fmt: skip
    assert_same_step(again, model, 1e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8_bnb"])
def test_bitsandbytes_layers_hold_what_they_were_given(kind) -> None:
    pytest.importorskip("bitsandbytes")
    plain = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 64)).requires_grad_(False)
    packed = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 64))
    packed.load_state_dict(plain.state_dict())
    quantize(packed, kind, torch.device("cpu"))
    x = torch.randn(8, 128, requires_grad=True)
    ours, theirs = packed(x), plain(x)
    assert (ours - theirs).norm() / theirs.norm() < 0.15
    (slope,), (known,) = torch.autograd.grad(ours.sum(), x), torch.autograd.grad(theirs.sum(), x)
    assert (slope - known).norm() / known.norm() < 0.15
    held, told = stored_bytes(packed.parameters()), weight_bytes(packed, Memory(quantize=kind), None)
    assert sum(told.values()) == pytest.approx(held, rel=0.05)


def test_a_backend_is_the_network_s_alone() -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    before = Registry.get_active_backend()
    case = KNOWN["flux dev"]
    model = adapted(case, memory=Memory(attention="_native_math"))
    assert Registry.get_active_backend() == before
    assert_same_step(model, adapted(case), 2e-4)


@each
def test_sliced_and_tiled_decoding(case: Case) -> None:
    """Slices are the whole; tiles are differentiable: the slope along a direction is the difference quotient."""
    plain, sliced = adapted(case), adapted(case, memory=Memory(vae_slicing=True))
    torch.testing.assert_close(sliced.decode(noise(plain)), plain.decode(noise(plain)), atol=1e-5, rtol=0)
    tiled = adapted(case, height=64, width=64, memory=Memory(vae_tiling=True))
    vae: Any = tiled.pipeline.vae.double()
    if case.name == "wan":
        vae.enable_tiling(32, 32, 24, 24)
    else:
        vae.tile_sample_min_size, vae.tile_latent_min_size = 32, tiled.latent_shape[-1] // 2
    latents = (0.3 * noise(tiled)).double().requires_grad_()
    along = torch.randn(latents.shape, dtype=torch.float64)

    def pixels(value: Tensor) -> Tensor:
        return tiled.decode_latents(value).square().mean()

    vae.use_tiling = False
    whole = float(pixels(latents.detach()))
    vae.use_tiling = True
    (slope,) = torch.autograd.grad(pixels(latents), latents)
    far = 1e-3  # Wan's VAE rounds to float32 inside
    quotient = (pixels(latents.detach() + far * along) - pixels(latents.detach() - far * along)) / (2 * far)
    assert float((slope * along).sum()) == pytest.approx(float(quotient), rel=1e-2)
    assert float(pixels(latents.detach())) != whole


def test_steps_that_wait_on_the_host_change_nothing(tmp_path: FilePath) -> None:
    for name, memory in (("host", Memory(trajectory_on_cpu=True)), ("device", Memory())):
        model = KNOWN["sd3"].adapt(tiny_sd3(), max_sequence_length=0, memory=memory)
        assert (model.steps_device is None) == (name == "device")
        trainer = job(tmp_path / name, model=model, epochs=1)
        (known, *_), *_ = trainer.collect(0).parts[0].steps, None
        assert known.to(torch.device("meta")).latents_next.device.type == "meta"
        trainer.train(report=False)
    assert rows(tmp_path / "host") == rows(tmp_path / "device")


ADAPTED = (".policy.", ".start.")


def brightness(media: Media, prompts: Prompts) -> Tensor:
    return media.pixels.flatten(1).mean(1)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@each
def test_predicted_bytes_are_the_measured_ones(case: Case, precision, tmp_path: FilePath) -> None:
    """Weights, optimizer and trajectory, which are within 5 per cent by requirement, and here the same."""
    model = case.adapt(case.make(), **case.options, **case.sizes[0], mixed_precision=precision)
    trainer = job(tmp_path, model=model, reward=brightness, epochs=1, updates_per_epoch=1)
    for name, part in components(model).items():
        known = [value for key, value in part.named_parameters() if not any(mark in key for mark in ADAPTED)]
        network = name == model.network_name
        told = weight_bytes(part, Memory(), model.dtype if network else None, not network)
        assert sum(told.values()) == stored_bytes([*known, *part.buffers()])
    batch = trainer.collect(0)
    kept = [part.steps for part in batch.parts] + [one.steps for one in trainer.state.buffer.values()]
    tensors = [value for some in kept for one in some for value in (one.latents, one.latents_next, one.log_probs)]
    assert stored_bytes(tensors) == pytest.approx(2 * trajectory_bytes(trainer, geometry(trainer)), rel=0.05)
    trainer.update(batch)
    optimizer, policy = trainer.optimizer, [*model.trainable().values()]
    moments = [value for held in optimizer.adamw.state.values() for value in held.values()]
    held = stored_bytes([*policy, *optimizer.average.values(), *moments]) + stored_bytes(policy)  # gradients
    assert held == pytest.approx(policy_bytes(trainer), rel=0.05)


@pytest.mark.parametrize(("precision", "checkpointing"), slow_but([("bf16", True)], [("no", False), ("bf16", True)]))
@each
def test_predicted_activations_are_a_real_call_s(case: Case, precision, checkpointing) -> None:
    model = adapted(case, mixed_precision=precision, gradient_checkpointing=checkpointing)
    told, latents = model.encode(PROMPTS), noise(model)
    saved = Saved(model.module)
    with Peak() as peak:
        with saved_tensors_hooks(saved.pack, lambda value: value):
            velocity = model.network(latents, 0.5, told, False, 2.0)
        velocity.square().sum().backward()
    guess = activations(model, told, checkpointing, None, 2.0)
    assert guess.saved == pytest.approx(saved.bytes, rel=0.02)  # 15 per cent by requirement
    assert guess.peak == pytest.approx(peak.most, rel=0.05)
    with torch.no_grad(), Peak() as peak:
        model.velocity(latents, 0.5, told, 2.0)
    assert sampling_peak(model, told, None, 2.0) == pytest.approx(peak.most, rel=0.05)
    with torch.no_grad(), Peak() as peak:
        model.decode(latents)
    assert decode_peak(model, 2) == pytest.approx(peak.most, rel=0.05)


def test_other_settings_are_predicted_from_the_same_model() -> None:
    """bf16 and checkpointing, as a model that was made with them has them."""
    case = KNOWN["sd3"]
    plain, other = adapted(case, gradient_checkpointing=False), adapted(case, mixed_precision="bf16")
    told = plain.encode(PROMPTS)
    assert activations(plain, told, True, torch.bfloat16) == activations(other, told, True)
    assert not plain.module.is_gradient_checkpointing  # type: ignore[operator]
    network = plain.module
    assert weight_bytes(network, Memory(), torch.bfloat16) == weight_bytes(other.module, Memory(), None)
    cast = adapted(case, memory=Memory(layerwise_casting=True)).module
    known = [value for key, value in cast.named_parameters() if ".policy." not in key]
    told = weight_bytes(network, Memory(layerwise_casting=True), torch.float32)
    assert sum(told.values()) == stored_bytes([*known, *cast.buffers()])


def test_check_says_what_makes_a_run_fit(tmp_path: FilePath, monkeypatch) -> None:
    trainer = job(tmp_path / "run", epochs=1)
    cut, epoch = geometry(trainer), trainer.collection.epoch(0)
    counted = ((spent_rows(trainer, epoch, cut), floor_rows(trainer, epoch)),)
    made = predicted.predict(trainer, cut)
    assert made is not None
    assert [fit.turned for fit in made.fits] == [(), (), ()]
    assert page(Preflight(trainer, cut, (), counted, (), memory=made)).count("fits") == 3
    monkeypatch.setattr(predicted, "ROOM", 0.6 * made.needs.total / (24 * 2**30))
    tight = predicted.predict(trainer, cut)
    assert tight is not None
    small, middle, large = tight.fits
    assert large.turned == ()
    assert small.turned[: len(middle.turned)] == middle.turned
    assert small.turned[0][0].startswith("model.mixed_precision: bf16")
    totals = [made.needs.total, *(one.total for _, one in small.turned)]
    assert totals == sorted({*totals}, reverse=True)
    assert small.enough == small.turned[-1][1].fits(24)
    told = " ".join(page(Preflight(trainer, cut, (), counted, (), memory=tight)).split())
    start = "fits with" if small.enough else "does not fit, not even with"
    assert f"on 24 GB {start} model.mixed_precision: bf16" in told
    assert "on 80 GB fits" in told


def test_what_takes_turns_is_not_added_up() -> None:
    needs = Needs({"transformer": 10, "vae": 1}, 2, 4, 8, learning=100, sampling=50, decoding=60, encoding=70)
    assert needs.total == 10 + 1 + 2 + 4 + 8 + 100


def test_switches_that_are_on_are_not_offered(tmp_path: FilePath) -> None:
    model = adapted(KNOWN["sd3"], mixed_precision="bf16", memory=Memory(offload="group", vae_slicing=True))
    trainer = job(tmp_path, model=model)
    told = [choice.changed[-1] for choice in switches(present(trainer, model))]
    assert told == ["model.memory.trajectory_on_cpu: true", "sampling.batch_size: 1, rows_per_call likewise"]
