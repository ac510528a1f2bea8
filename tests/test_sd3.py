"""StableDiffusion3Pipeline of tiny size with random weights: our loop must be the pipeline's own."""

from __future__ import annotations

from pathlib import Path as FilePath

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from tiny import randomise_policy, tiny_sd3

from flowalign.adapters import LoRA
from flowalign.models.sd3 import SD3
from flowalign.rollout import Policy, replay, rollout
from flowalign.schedules import AllSteps, FanOut, Path, linear
from flowalign.transitions import ODE, FlowSDE

PROMPTS = ["a red circle", "two blue squares"]


def noise(model: SD3, rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("size", [None, 48])
@pytest.mark.parametrize("grid", [None, linear])
def test_ode_rollout_is_the_pipeline(guidance: float, size: int | None, grid) -> None:
    pipe = tiny_sd3()
    model = SD3(pipe, height=size, width=size, max_sequence_length=12, grid=grid)
    start = noise(model, 2)
    sigmas = model.sigmas(5)
    ours = rollout(model, model.encode(PROMPTS), start, sigmas, Path((ODE(),) * 5), Policy(guidance)).latents
    theirs = pipe(
        PROMPTS,
        num_inference_steps=5,
        sigmas=None if grid is None else grid(5)[:-1],
        guidance_scale=guidance,
        latents=start.clone(),
        height=model.height,
        width=model.width,
        max_sequence_length=12,
        output_type="latent",
    ).images
    assert (ours - start).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    pictures = pipe(
        PROMPTS,
        num_inference_steps=5,
        sigmas=None if grid is None else grid(5)[:-1],
        guidance_scale=guidance,
        latents=start.clone(),
        height=model.height,
        width=model.width,
        max_sequence_length=12,
        output_type="pt",
    ).images
    torch.testing.assert_close(model.decode(ours), pictures, atol=1e-5, rtol=0)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("plan", [AllSteps(FlowSDE(0.7)), FanOut(FlowSDE(1.0), steps=(1,))])
def test_first_ratio_is_exactly_one(precision, guidance: float, plan) -> None:
    """Same calls, same shapes: the replay's log-probs are the rollout's, bit for bit, with gradient on."""
    model = SD3(tiny_sd3(), max_sequence_length=12, mixed_precision=precision)
    randomise_policy(model)
    path, sigmas, policy = plan.resolve(4, 0, 0), model.sigmas(4), Policy(guidance)
    members = 3 if path.branch is not None else 1
    condition, start = model.encode(PROMPTS), noise(model, 2)
    drawn = {i: noise(model, 2 * members, i) for i in range(4)}
    made = rollout(model, condition, start, sigmas, path, policy, drawn.__getitem__, members)
    for step in made.steps:
        again = replay(model, step, path.transitions[step.interval.index], condition, policy)
        assert again.log_probs.requires_grad
        assert (again.log_probs - step.log_probs).exp().sub(1).abs().max() == 0


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_ratio_in_another_micro_batch_shape(guidance: float) -> None:
    """Rounding only. SD3's own last step, of std .006, would multiply it by 100: a linear grid's does not."""
    model = SD3(tiny_sd3(), max_sequence_length=12, grid=linear)
    randomise_policy(model)
    path, policy = AllSteps(FlowSDE(0.7)).resolve(4, 0, 0), Policy(guidance)
    condition = model.encode(PROMPTS * 2)
    made = rollout(model, condition, noise(model, 4), model.sigmas(4), path, policy, lambda i: noise(model, 4, i))
    for step in made.steps:
        for row in range(4):
            index = torch.tensor([row])
            again = replay(model, step.rows(index), FlowSDE(0.7), condition.rows(index), policy)
            assert (again.log_probs - step.log_probs[row]).exp().sub(1).abs().max() <= 2.4e-7


def test_gradient_under_guidance() -> None:
    """The unconditional half is detached by default: the gradient is guidance_scale times the conditional call's."""
    model = SD3(tiny_sd3(), max_sequence_length=12)
    randomise_policy(model)
    condition, latents = model.encode(PROMPTS), noise(model, 2)
    parameters = list(model.trainable().values())

    def gradient(velocity: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(velocity.sum(), parameters)])

    plain = gradient(model.network(latents, 0.7, condition, negative=False))
    other = gradient(model.network(latents, 0.7, condition, negative=True))
    split = gradient(model.velocity_split(latents, 0.7, condition, 3.0))
    both = gradient(model.velocity_split(latents, 0.7, condition, 3.0, unconditional_grad=True))
    torch.testing.assert_close(split, 3 * plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both, 3 * plain - 2 * other, atol=1e-4, rtol=1e-4)


def test_equal_prompts_are_encoded_once_and_encoders_can_go() -> None:
    pipe = tiny_sd3()
    model = SD3(pipe, max_sequence_length=12)
    texts: list[str] = []
    pipe.text_encoder.register_forward_pre_hook(lambda module, inputs: texts.append("call"))
    first = model.encode(["a red circle", "a blue square", "a red circle"])
    assert len(texts) == 1
    assert torch.equal(first.prompt_embeds[0], first.prompt_embeds[2])
    assert not torch.equal(first.prompt_embeds[0], first.prompt_embeds[1])
    model.free_encoders()
    assert torch.equal(model.encode(["a blue square"]).prompt_embeds[0], first.prompt_embeds[1])
    with pytest.raises(ValueError, match="'a green cross' was not encoded"):
        model.encode(["a green cross"])


def test_an_embedding_does_not_depend_on_its_company() -> None:
    alone = SD3(tiny_sd3(), max_sequence_length=12).encode(["a red circle"])
    among = SD3(tiny_sd3(), max_sequence_length=12).encode(["x", "a red circle", "y"])
    assert torch.equal(alone.prompt_embeds[0], among.prompt_embeds[1])


def test_reference_is_the_base() -> None:
    pipe = tiny_sd3()
    condition_of = SD3(tiny_sd3(), max_sequence_length=12)
    model = SD3(pipe, max_sequence_length=12)
    latents = noise(model, 2)
    base = condition_of.network(latents, 0.5, condition_of.encode(PROMPTS), negative=False)
    randomise_policy(model)
    policy = model.network(latents, 0.5, model.encode(PROMPTS), negative=False)
    with model.reference():
        reference = model.network(latents, 0.5, model.encode(PROMPTS), negative=False)
    assert torch.equal(reference, base)
    assert not torch.allclose(policy, base, atol=1e-3)
    assert torch.equal(model.network(latents, 0.5, model.encode(PROMPTS), negative=False), policy)
    assert all(parameter.requires_grad for parameter in model.trainable().values())


def test_embeddings_beyond_the_limit_are_made_again() -> None:
    plain = SD3(tiny_sd3(), max_sequence_length=0)
    texts = [f"{count} boxes" for count in range(6)]
    size = sum(one[0].nbytes for one in (plain.encode(texts).prompt_embeds, plain.encode(texts).pooled_prompt_embeds))
    model = SD3(tiny_sd3(), max_sequence_length=0, embeddings_gb=3.5 * size / 1e9)
    for some in (texts[:2], texts[2:4], texts[:1], texts[4:]):
        assert torch.equal(model.encode(some).prompt_embeds, plain.encode(some).prompt_embeds)
    assert [*model.encoded.rows] == [texts[4], texts[5], ""], "the last used stay, and the negative prompt"
    assert torch.equal(model.encode(texts).pooled_prompt_embeds, plain.encode(texts).pooled_prompt_embeds)
    model.free_encoders()
    assert torch.equal(model.encode(texts[::-1]).prompt_embeds, plain.encode(texts[::-1]).prompt_embeds)
    with pytest.raises(ValueError, match="was not encoded before"):
        model.encode(["another"])


@pytest.mark.parametrize("reference", ["base", "start"])
def test_saved_policy_loads_in_plain_diffusers_and_goes_on(reference, tmp_path: FilePath, caplog) -> None:
    model = SD3(tiny_sd3(), max_sequence_length=12)
    randomise_policy(model)
    model.save(tmp_path)
    latents = noise(model, 2)
    path = Path((ODE(),) * 3)
    ours = rollout(model, model.encode(PROMPTS), latents, model.sigmas(3), path).latents
    pipe: StableDiffusion3Pipeline = tiny_sd3()
    pipe.load_lora_weights(tmp_path)
    config = pipe.transformer.peft_config["default_0"]
    assert (config.r, config.lora_alpha) == (32, 64)
    theirs = pipe(
        PROMPTS,
        num_inference_steps=3,
        guidance_scale=1.0,
        latents=latents,
        max_sequence_length=12,
        output_type="latent",
    ).images
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)

    assert "No LoRA keys associated to CLIPTextModelWithProjection" in caplog.text  # by diffusers itself
    caplog.clear()
    onward = SD3(tiny_sd3(), lora=LoRA(start=str(tmp_path), reference=reference), max_sequence_length=12)
    assert caplog.messages == []  # that there is no LoRA of the text encoders is no news
    condition = onward.encode(PROMPTS)
    started = onward.network(latents, 0.5, condition, negative=False)
    torch.testing.assert_close(started, model.network(latents, 0.5, condition, negative=False), atol=1e-6, rtol=0)
    assert set(onward.trainable()) == set(model.trainable())
    for parameter in onward.trainable().values():
        parameter.data.zero_()
    fresh = SD3(tiny_sd3(), max_sequence_length=12)
    expected = started if reference == "start" else fresh.network(latents, 0.5, condition, negative=False)
    with onward.reference():
        torch.testing.assert_close(onward.network(latents, 0.5, condition, negative=False), expected, atol=1e-6, rtol=0)
    assert all(p.requires_grad for p in onward.trainable().values())
    assert not any(p.requires_grad for n, p in onward.module.named_parameters() if n not in onward.trainable())


def test_a_frozen_start_gathers_no_gradient(tmp_path: FilePath) -> None:
    first = SD3(tiny_sd3(), max_sequence_length=12)
    randomise_policy(first)
    first.save(tmp_path)
    model = SD3(tiny_sd3(), lora=LoRA(start=str(tmp_path), reference="start"), max_sequence_length=12)
    frozen = {name: p for name, p in model.module.named_parameters() if ".start." in name}
    assert frozen.keys() & model.trainable().keys() == set()
    assert len(frozen) == len(model.trainable())
    randomise_policy(model)
    condition, latents = model.encode(PROMPTS), noise(model, 2)
    loss = torch.zeros(())
    for sigma in (0.9, 0.5):  # the second step's latents depend on the policy, and so does the reference's velocity
        velocity = model.network(latents, sigma, condition)
        with model.reference():
            away = velocity - model.network(latents, sigma, condition)
        assert {name for name, p in model.module.named_parameters() if p.requires_grad} == model.trainable().keys()
        loss, latents = loss + away.square().mean(), latents - 0.4 * velocity
    loss.backward()
    assert all(p.grad is None for p in frozen.values())
    assert sum(p.grad is not None and p.grad.abs().max() > 0 for p in model.trainable().values()) > len(frozen) // 2


def test_bad_arguments_name_themselves() -> None:
    with pytest.raises(ValueError, match=r"'attn\.nope' names no module of SD3Transformer2DModel"):
        SD3(tiny_sd3(), lora=LoRA(targets=("attn.nope",)))
    with pytest.raises(ValueError, match="height must be a multiple of 16, got 40"):
        SD3(tiny_sd3(), height=40)
