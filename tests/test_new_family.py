"""The family that the models' README adds, as it stands there: its rollout is the pipeline's."""

from __future__ import annotations

import re
from pathlib import Path as FilePath
from typing import Any

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

from flowalign.models import PipelineModel
from flowalign.rollout import Policy, rollout
from flowalign.schedules import Path
from flowalign.transitions import ODE
from tests.families import seeded
from tests.tiny import byte_tokenizer, small_vae
from tests.tiny_wan import wan_encoder

README = FilePath(__file__).parents[1] / "flowalign" / "models" / "README.md"


def family() -> Any:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    made: dict[str, Any] = {}
    exec(compile(code, str(README), "exec"), made)
    return made["AuraFlow"]


def pipeline() -> AuraFlowPipeline:
    transformer = AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    return AuraFlowPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=wan_encoder(),
        vae=small_vae(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def test_the_readme_s_family_is_right() -> None:
    make = seeded(pipeline)
    prompts = ["a red circle", "two blue squares"]
    for guidance in (1.0, 3.5):
        model: PipelineModel = family()(make(), max_sequence_length=20)
        start = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
        path = Path((ODE(),) * 4)
        ours = rollout(model, model.encode(prompts), start, model.sigmas(4), path, Policy(guidance)).latents
        theirs = make()(
            prompts, num_inference_steps=4, guidance_scale=guidance, latents=start.clone(), height=model.height,
            width=model.width, max_sequence_length=20, output_type="latent",
        )[0]  # fmt: skip
        assert (ours - start).abs().max() > 0.1
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)
