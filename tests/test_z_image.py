"""Z-Image: prompts of different lengths, guidance that is bounded and ends early, its sigmas."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch

from flowalign.adapters import LoRA
from flowalign.models import PipelineModel, ZImage
from flowalign.models.memory import Memory
from flowalign.rollout import Policy, rollout
from flowalign.schedules import Path
from flowalign.transitions import ODE
from tests.families import seeded
from tests.tiny_z_image import tiny_z_image

MAKE = seeded(tiny_z_image)
LONG, SHORT = "a big red circle over two blue squares", "a dot"  # of which one is padded to 64 tokens, and one to 32


def small(**more: object) -> ZImage:
    return ZImage(MAKE(), height=32, width=32, **{"max_sequence_length": 48, **more})  # type: ignore[arg-type]


def noise(model: ZImage, rows: int) -> torch.Tensor:
    return torch.randn(rows, *model.latent_shape, generator=torch.Generator().manual_seed(0))


def sampled(model: ZImage, prompts: list[str], start: torch.Tensor) -> torch.Tensor:
    return rollout(model, model.encode(prompts), start, model.sigmas(3), Path((ODE(),) * 3), Policy(5.0)).latents


def test_prompts_of_different_lengths_in_one_batch_are_as_alone() -> None:
    """Bit for bit, whatever micro-batch an update puts a sample in."""
    model = small()
    start = noise(model, 2)
    both = sampled(model, [LONG, SHORT], start)
    for row, prompt in enumerate((LONG, SHORT)):
        alone = sampled(model, [prompt], start[row : row + 1])
        assert torch.equal(both[row : row + 1], alone)
        theirs = MAKE()(
            [prompt], latents=start[row : row + 1], num_inference_steps=3, height=32, width=32, guidance_scale=4.0,
            output_type="latent",
        ).images  # fmt: skip
        torch.testing.assert_close(both[row : row + 1], theirs, atol=1e-5, rtol=0)


def test_the_network_sees_a_prompt_s_own_tokens_alone() -> None:
    model, wide = small(), small(max_sequence_length=80)
    start, condition = noise(model, 2), model.encode([LONG, SHORT])
    assert condition.prompt_mask is not None
    assert condition.prompt_mask.sum(1).tolist() == [len(LONG) + 3, len(SHORT) + 3]
    filled = torch.where(condition.prompt_mask[..., None], condition.prompt_embeds, 7.0)
    with torch.no_grad():
        expected = model.network(start, 0.5, condition)
        assert torch.equal(model.network(start, 0.5, replace(condition, prompt_embeds=filled)), expected)
        torch.testing.assert_close(wide.network(start, 0.5, wide.encode([LONG, SHORT])), expected, atol=2e-6, rtol=0)


def test_guidance_is_no_longer_than_a_multiple_of_what_it_guides() -> None:
    """By hand, a sample of one number: v_c = 3, v_u = 1; at w = 4 the sum is 9, and the bound 2 * 3."""
    conditional, unconditional = torch.zeros(3, 4, 16, 16), torch.zeros(3, 4, 16, 16)
    conditional[0, 1, 2, 3], unconditional[0, 1, 2, 3] = 3.0, 1.0
    conditional[1, 0, 0, 0], unconditional[1, 0, 0, 0] = 3.0, 2.5  # 4.5, within the bound
    conditional[2, 0, 0, 0], unconditional[2, 0, 0, 1] = 3.0, 4.0  # (12, -12), of length 288^.5
    guided = {bound: small(cfg_normalization=bound).combine(conditional, unconditional, 4.0) for bound in (0.0, 2.0)}
    assert guided[0.0][0, 1, 2, 3] == 9
    assert guided[2.0][0, 1, 2, 3] == pytest.approx(6)
    assert guided[2.0][1, 0, 0, 0] == guided[0.0][1, 0, 0, 0] == 4.5
    assert guided[2.0][2, 0, 0, :2].tolist() == pytest.approx([6 / 2**0.5, -6 / 2**0.5])


def test_guidance_ends_where_it_is_truncated() -> None:
    model = small(cfg_truncation=0.5)
    assert [model.calls(5.0, sigma) for sigma in (1.0, 0.75, 0.5, 0.4, 0.1)] == [2, 2, 2, 1, 1]
    assert [model.calls(scale, 1.0) for scale in (0.0, 1.0, 1.1)] == [1, 1, 2]
    assert small().calls(5.0, 0.001) == 2
    start, condition = noise(model, 1), model.encode([LONG])
    with torch.no_grad():
        for sigma, same in ((0.6, False), (0.4, True)):
            guided, plain = (model.velocity(start, sigma, condition, scale) for scale in (5.0, 1.0))
            assert torch.equal(guided, plain) == same
            assert torch.equal(model.velocity_split(start, sigma, condition, 5.0), guided)
    assert model.meter.rows.forward == 2 + 1 + 2 + 1 + 1 + 1


def test_sigmas_are_shifted_as_the_scheduler_says() -> None:
    assert small().sigmas(4) == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    by_size = ZImage(seeded(lambda: tiny_z_image(dynamic=True))(), height=64, width=64)
    assert by_size.resolution_shift() == pytest.approx(0.5)  # 256 tokens
    assert by_size.sigmas(2)[1] == pytest.approx(0.62246, abs=1e-5)  # e^.5 / (e^.5 + 1)
    assert ZImage(MAKE()).latent_shape == (4, 512, 512)


def test_arguments_are_those_of_every_pipeline_and_two_more() -> None:
    own, every = (inspect.signature(kind.__init__).parameters for kind in (ZImage, PipelineModel))
    assert {name: own[name].default for name in every} == {name: told.default for name, told in every.items()}
    assert {*own} - {*every} == {"cfg_normalization", "cfg_truncation"}
    told = {"negative_prompt": "no", "prompts_per_call": 3, "embeddings_gb": 2.0, "mixed_precision": "bf16"}
    model = small(**told, lora=LoRA(rank=2), memory=Memory(trajectory_on_cpu=True))
    assert (model.negative_prompt, model.encoded.per_call, model.embeddings_limit) == ("no", 3, 2e9)
    assert (model.lora.rank, model.memory.trajectory_on_cpu, model.dtype) == (2, True, torch.bfloat16)


def test_what_means_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cfg_normalization must be at least 0, .* got -1"):
        small(cfg_normalization=-1)
    model = small()
    with pytest.raises(ValueError, match="lacks the prompts' masks"):
        model.network(noise(model, 1), 1.0, replace(model.encode(["a"]), prompt_mask=None))
