"""Exports: what diffusers' own readers make of them, what the card says, and that nothing private gets out."""

from __future__ import annotations

import base64
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load, load_file, safe_open, save_file
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from flowalign import export_command
from flowalign.adapters import LoRA
from flowalign.cli import main
from flowalign.config import config_root, dump_yaml, load_yaml
from flowalign.exporting import check_space
from flowalign.kohya import joined, kohya_bytes, kohya_tensors, layout_of
from flowalign.licences import licence_of, warnings_of
from flowalign.lora_files import Factors, read_lora
from flowalign.models import SD3, WanImageToVideo
from flowalign.models.loading import EMBEDDED
from flowalign.pictures import zipped
from flowalign.publishing import public, public_prose
from flowalign.records import Prompts
from flowalign.tracking import json_lines
from tests.families import CASES, Case, seeded
from tests.tiny import byte_tokenizer, randomise_policy, tiny_sd3
from tests.tiny_pixart import tiny_pixart
from tests.tiny_wan import tiny_wan_i2v

KNOWN = {case.name: case for case in CASES}
I2V = Case("wan i2v", seeded(tiny_wan_i2v), WanImageToVideo, sizes=({"height": 32, "width": 32, "frames": 5},))
# layers that no family adapts by default, where diffusers reads them from kohya's layout too
MORE = {
    "sd1.5 ddim": ("to_q", "to_out.0", "ff.net.0.proj", "proj_in", "resnets.0.conv1"),
    "sdxl": ("to_k", "to_v", "ff.net.2", "proj_out"),
    "wan": (
        "to_q",
        "to_out.0",
        "ffn.net.0.proj",
        "ffn.net.2",
        "time_embedder.linear_1",
        "condition_embedder.time_proj",
    ),
    "qwen-image": ("to_q", "to_add_out", "add_k_proj", "img_mlp.net.0.proj", "txt_mod.1", "norm_out.linear"),
    "z-image": ("to_q", "to_out.0", "feed_forward.w1", "layers.0.adaLN_modulation.0"),
}


def policy(case: Case, folder: Path, targets: tuple[str, ...] | None = None, rank: int = 3) -> dict[str, Factors]:
    """A policy off its start, saved by a model; its scale is no power of two."""
    options = dict(case.options) | (dict(case.sizes[0]) if "wan" in case.name else {})
    model = case.adapt(case.make(), lora=LoRA(rank=rank, alpha=4, targets=targets), **options)
    randomise_policy(model)
    model.save(folder)
    return dict(read_lora(folder).factors)


def loaded_deltas(pipe: Any, network: str, path: Path) -> dict[str, Tensor]:
    """dW of every layer, as diffusers has loaded a file."""
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="read")
    layers = getattr(pipe, network).named_modules()
    named = {f"{network}.{name}": one for name, one in layers if isinstance(one, BaseTunerLayer)}
    return {name: one.get_delta_weight("read").detach() for name, one in named.items()}  # type: ignore[operator]


def check_same(found: Mapping[str, Tensor], factors: Mapping[str, Factors]) -> None:
    assert found.keys() == factors.keys()
    for name, one in factors.items():
        torch.testing.assert_close(found[name].double(), one.delta(), rtol=1e-5, atol=1e-7)
        assert one.delta().abs().max() > 1e-3


@pytest.mark.parametrize("name", [*MORE, "wan i2v"])
def test_diffusers_reads_what_is_written_for_kohya(name: str, tmp_path: Path) -> None:
    case = I2V if name == "wan i2v" else KNOWN[name]
    factors = policy(case, tmp_path / "lora", MORE.get(name))
    pipe = case.make()
    layout = layout_of(type(pipe).__name__)
    file = tmp_path / "kohya.safetensors"
    file.write_bytes(kohya_bytes(layout, factors, {"ss_output_name": "mine"}))
    check_same(loaded_deltas(pipe, layout.network, file), factors)
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    assert (header["ss_network_dim"], header["ss_network_alpha"], header["ss_output_name"]) == ("3", "4", "mine")


def test_diffusers_reads_flux_joint_blocks(tmp_path: Path) -> None:
    """Of single blocks its reader knows FLUX.1's width alone: they have a test of their own."""
    case = KNOWN["flux dev"]
    targets = (*case.adapt.targets, "ff_context.net.0.proj", "norm1.linear")
    held = policy(case, tmp_path / "lora", targets)
    factors = {name: one for name, one in held.items() if ".single_" not in name}
    file = tmp_path / "kohya.safetensors"
    file.write_bytes(kohya_bytes(layout_of("FluxPipeline"), factors, {}))
    found = loaded_deltas(case.make(), "transformer", file)
    check_same(found, factors)


def random_factors(rank: int, rows: int, columns: int, scale: float, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator), scale)


@pytest.mark.parametrize("missing", ["", "proj_mlp", "attn.to_k"])
def test_diffusers_reads_flux_single_blocks(missing: str) -> None:
    heights = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    ranks = {"attn.to_q": 2, "attn.to_k": 3, "attn.to_v": 2, "proj_mlp": 1}
    block = "transformer.single_transformer_blocks.7."
    factors = {
        block + name: random_factors(ranks[name], rows, 3072, 0.5 + number, number)
        for number, (name, rows) in enumerate(heights.items())
        if name != missing
    }
    made = kohya_tensors(layout_of("FluxPipeline"), factors)
    assert {key.split(".")[0] for key in made} == {"lora_unet_single_blocks_7_linear1"}
    read = FluxPipeline.lora_state_dict(dict(made))
    for name, rows in heights.items():
        down, up = read[f"{block}{name}.lora_A.weight"], read[f"{block}{name}.lora_B.weight"]
        chosen = torch.arange(0, rows, 511)
        own = factors.get(block + name)
        wanted = torch.zeros(len(chosen), 3072) if own is None else own.scale * own.up[chosen] @ own.down
        torch.testing.assert_close(up[chosen] @ down, wanted, rtol=1e-4, atol=1e-4)


def test_flux_layers_outside_the_blocks() -> None:
    """diffusers' reader names them without the network, and its loader leaves them out: its reader alone is asked."""
    sizes = {"x_embedder": (8, 4), "context_embedder": (8, 6), "norm_out.linear": (16, 8), "proj_out": (4, 8)}
    sizes |= {f"time_text_embed.{one}_embedder.linear_1": (8, 8) for one in ("timestep", "guidance", "text")}
    factors = {name: random_factors(2, *size, 3.0, number) for number, (name, size) in enumerate(sizes.items())}
    named = {f"transformer.{name}": one for name, one in factors.items()}
    read = FluxPipeline.lora_state_dict(kohya_tensors(layout_of("FluxPipeline"), named))
    found = {name: read[f"{name}.lora_B.weight"] @ read[f"{name}.lora_A.weight"] for name in factors}
    check_same(found, factors)


class Weights(dict[str, Tensor]):
    """An SD3 checkpoint in which everything that is not there is zero."""

    def pop(self, key: str, *default: Any) -> Tensor:
        return super().pop(key, torch.zeros(6, 6))


def test_sd3_stands_where_diffusers_converts_original_weights_to(tmp_path: Path) -> None:
    """diffusers reads no LoRA of SD3 in this layout, but a whole checkpoint, which changes as its weights do."""
    case = KNOWN["sd3"]
    targets = (*case.adapt.targets, "ff.net.0.proj", "ff_context.net.2", "norm1_context.linear", "norm_out.linear")
    factors = policy(case, tmp_path / "lora", targets)
    made = load(kohya_bytes(layout_of("StableDiffusion3Pipeline"), factors, {}))
    original = Weights({"context_embedder.weight": torch.zeros(32, 32)})
    modules = {key.removesuffix(".alpha") for key in made if key.endswith(".alpha")}
    names = {one.replace(".", "_"): one for one in SD3_MODULES}
    for module in modules:
        down, up, alpha = (made[f"{module}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        original[f"{names[module.removeprefix('lora_unet_')]}.weight"] = alpha / len(down) * up @ down
    converted = convert_sd3_transformer_checkpoint_to_diffusers(original)
    check_same({name: converted[f"{name.partition('.')[2]}.weight"] for name in factors}, factors)


SD3_MODULES = [
    f"joint_blocks.{block}.{module}"
    for block in range(2)
    for module in (
        *(f"{side}.{one}" for side in ("x_block", "context_block") for one in ("attn.qkv", "attn.proj", "mlp.fc1")),
        "context_block.mlp.fc2",
        "context_block.adaLN_modulation.1",
    )
] + ["final_layer.adaLN_modulation.1"]


def test_layers_side_by_side_by_hand() -> None:
    one, two = random_factors(2, 4, 5, 0.5, 0), random_factors(1, 8, 5, 3.0, 1)
    whole = joined({0: one, 2: two}, (1, 1, 2))
    assert (whole.rank, whole.scale) == (3, 1.0)
    torch.testing.assert_close(whole.delta(), torch.cat([one.delta(), torch.zeros(4, 5), two.delta()]))
    alike = joined({0: one, 1: one}, (1, 1))
    assert alike.scale == 0.5
    torch.testing.assert_close(alike.delta(), torch.cat([one.delta(), one.delta()]))


def test_families_without_kohyas_layout_and_unknown_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no names for a PixArtAlphaPipeline, it has for .*SD3.*--format diffusers"):
        layout_of("PixArtAlphaPipeline")
    odd = {"transformer.blocks.0.norm2": random_factors(1, 2, 2, 1.0, 0)}
    with pytest.raises(ValueError, match="norm2 has no name in kohya's layout of Wan"):
        kohya_tensors(layout_of("WanPipeline"), odd)
    with pytest.raises(ValueError, match="LoRA of the controlnet"):
        kohya_tensors(layout_of("StableDiffusionPipeline"), {"controlnet.x": odd["transformer.blocks.0.norm2"]})


TOKEN = "hf_" + "a1B2c3D4" * 4
SCORES = {0: (0.1, 0.4, 0.3, 0.2), 2: (0.3, 0.5, 0.6, 0.4), 4: (0.2, 0.4, 0.5, 0.3)}


def evaluate(run: Path) -> None:
    """What evaluations leave: scores that rise and fall again, and pictures."""
    folder = run / "evaluations"
    folder.mkdir()
    (folder / "prompts.jsonl").write_bytes(json_lines([{"prompt": f"prompt | {i}"} for i in range(4)]))
    rows = []
    for epoch, scores in SCORES.items():
        lines = [{"total": score, "valid": True, "red": score / 2} for score in scores]
        (folder / f"epoch-{epoch:06d}.jsonl").write_bytes(json_lines(lines))
        pixels = [torch.full((3, 32, 32), 40 * epoch + i, dtype=torch.uint8) for i in range(4)]
        (folder / f"epoch-{epoch:06d}.zip").write_bytes(zipped(pixels, 4))
        rows += [{"step": epoch, "seconds": 1.0 + epoch, "reward": 0.1 * epoch}] if epoch else []
        rows.append({"step": epoch, "seconds": 1.5 + epoch, "held-out": sum(scores) / 4})
    (run / "metrics.jsonl").write_bytes(json_lines(rows))
    (run / "best.json").write_text(json.dumps({"epoch": 2, "held-out": 0.45}))
    held = {"python": "3.11", "torch": "2.13", "processes": 2, "devices": ["cpu"], "platform": "Linux-of-example"}
    (run / "environment.json").write_text(json.dumps(held))
    (run / "events.jsonl").write_bytes(json_lines([{"event": "alarm", "detail": "diversity fell by a half"}]))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model in it, and a run on it."""
    folder = tmp_path_factory.mktemp("work")
    pipe = tiny_sd3()
    with torch.random.fork_rng(devices=[]):
        encoder = T5EncoderModel(T5Config(vocab_size=len(byte_tokenizer()), d_model=32, d_kv=8, d_ff=32, num_layers=1))
    pipe.register_modules(text_encoder_3=encoder.eval(), tokenizer_3=byte_tokenizer(64))
    pipe.save_pretrained(folder / "tiny-base")
    licence = "---\nlicense: other\nlicense_name: tiny-licence\nlicense_link: https://x.org/l\n---\n# Tiny\n"
    (folder / "tiny-base" / "README.md").write_text(licence)
    model, run = SD3(str(folder / "tiny-base"), max_sequence_length=12, lora=LoRA(4, 8)), folder / "a run"
    randomise_policy(model)
    model.save(run / "lora")
    randomise_policy(model, -0.05)
    model.save(run / "checkpoints" / "step-00000004-evaluated" / "lora")
    state = {"epoch": 4, "facts": {"prompts": "7 prompts, SHA-256 0123"}}
    (run / "checkpoints" / "step-00000004-evaluated" / "state.json").write_text(json.dumps(state))
    (run / "checkpoints" / "step-00000004-evaluated" / "manifest.json").write_text("{}")
    remote = {"class": "rewards.RemoteReward", "url": "https://secret-host.lan:8000/r", "token_file": "/etc/tok"}
    config = {
        "trainer": "trainers.FlowGRPO",
        "folder": str(run),
        "model": {"class": "flowalign.models.SD3", "pipeline": str(folder / "tiny-base"), "max_sequence_length": 12},
        "reward": {"class": "rewards.Minimum", "rewards": ["rewards.FaceIdentity", remote, "rewards.PickScore"]},
        "prompts": str(folder / "prompts.txt"),
        "sampling": {"steps": 3, "guidance_scale": 2.0, "groups": 4},
        "note": f"made with {TOKEN}",
        "epochs": 4,
        "seed": 5,
    }
    (run / "config.yaml").write_text(dump_yaml(config))
    evaluate(run)
    return folder


def export(*words: str | Path) -> int:
    return main(["export", *map(str, words)])


def code_of(folder: Path) -> str:
    found = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(found) == 1
    return str(found[0])


@pytest.mark.slow
def test_the_code_on_the_card_runs_in_plain_diffusers(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(work / "a run", "--out", out) == 0
    name = "pytorch_lora_weights.safetensors"
    assert (out / name).read_bytes() == (work / "a run" / "lora" / name).read_bytes()
    (out / "tiny-base").symlink_to(work / "tiny-base")
    code = code_of(out) + "\nimport sys\nassert 'flowalign' not in sys.modules\nprint(pipe.transformer.peft_config)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=out, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "lora_alpha=8" in done.stdout
    model = SD3(str(work / "tiny-base"), max_sequence_length=12, lora=LoRA(start=str(work / "a run" / "lora")))
    told = {"max_sequence_length": 12, "num_inference_steps": 3, "guidance_scale": 2.0}
    made = model.pipeline("prompt | 0", generator=torch.Generator("cpu").manual_seed(0), **told).images[0]
    with model.reference():
        base = model.pipeline("prompt | 0", generator=torch.Generator("cpu").manual_seed(0), **told).images[0]
    seen = np.asarray(Image.open(out / "picture.png")).astype(int)
    assert np.abs(seen - np.asarray(made).astype(int)).max() <= 1
    assert np.abs(seen - np.asarray(base).astype(int)).max() > 10


def test_the_card_tells_what_the_run_did(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(work / "a run", "--out", out, "--name", "tiny aligned", "--base-model", "someone/tiny") == 0
    card = huggingface_hub.ModelCard.load(out / "README.md")
    data, text = card.data.to_dict(), card.text
    assert data["base_model"] == "someone/tiny"
    assert (data["base_model_relation"], data["library_name"], data["pipeline_tag"]) == (
        "adapter",
        "diffusers",
        "text-to-image",
    )
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "tiny-licence", "https://x.org/l")
    assert data["inference"] == {"parameters": {"num_inference_steps": 3, "guidance_scale": 2.0}}
    assert "lora" in data["tags"]
    # changes .2, .1, .3, .2: mean .2, sd sqrt(.02 / 3), t of 3 degrees of freedom 3.182446
    assert "| **total** | 0.250 | 0.450 | +0.200 | +0.070 to +0.330 | 4 |" in text
    assert "| red | 0.125 | 0.225 | +0.100 | +0.035 to +0.165 | 4 |" in text
    assert "by Flow-GRPO; the policy after 2 epochs" in text
    assert "[arXiv:2505.05470](https://arxiv.org/abs/2505.05470)" in text
    assert "`rewards.FaceIdentity` (non-commercial research only) forbids it" in text
    assert "yuvalkirstain/PickScore_v1 | none named (code: MIT)" in text
    assert "7 prompts, SHA-256 0123" in text
    assert "best of 3 evaluations on these very prompts" in text
    assert "Alarm while training: diversity fell by a half" in text
    assert "Only 4 held-out prompts" in text
    assert "LoRA rank | `4`" in text
    with Image.open(out / "before_after.png") as picture:
        assert min(picture.size) > 60
    assert json.loads((out / "environment.json").read_text())["torch"] == "2.13"


def test_nothing_private_gets_out(work: Path, tmp_path: Path) -> None:
    for format in ("diffusers", "kohya", "merged"):
        out = tmp_path / format
        assert export(work / "a run", "--out", out, "--format", format) == 0
        for file in out.rglob("*"):
            content = file.read_bytes() if file.is_file() else b""
            for secret in (str(work), TOKEN, "secret-host", "/etc/tok", "Linux-of-example", str(tmp_path)):
                assert secret.encode() not in content, (file.name, secret)
    config = load_yaml(tmp_path / "merged" / "config.yaml")
    assert config["prompts"] == "prompts.txt"
    assert config["model"]["pipeline"] == "tiny-base"
    assert config["reward"]["rewards"][1]["url"] == "https://HOST/r"


def test_public_by_hand() -> None:
    told = {"api_key": "MY_KEY", "max_tokens": 5, "tokenizer": "openai/clip", "a": ["~/x/y", "C:\\me\\z.txt", "runs/a"]}
    kept = {"api_key": "(left out)", "max_tokens": 5, "tokenizer": "openai/clip", "a": ["y", "z.txt", "runs/a"]}
    assert public(told) == kept
    said = "see /home/me/runs/a.png, https://x.lan/y/z or (clip + ocr)/2/3"
    assert public_prose(said) == "see a.png, https://HOST/y/z or (clip + ocr)/2/3"


def test_a_checkpoint_is_exported_with_its_own_numbers(work: Path, tmp_path: Path) -> None:
    name = "step-00000004-evaluated"
    assert export(work / "a run", "--out", tmp_path / "out", "--checkpoint", name) == 0
    made = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    own = load_file(work / "a run" / "checkpoints" / name / "lora" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(made[key], own[key]) for key in own)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| **total** | 0.250 | 0.350 | +0.100 |" in text
    assert "after 4 epochs" in text
    assert "best of" not in text


def pictures(pipe: Any) -> np.ndarray:
    given = {"num_inference_steps": 3, "max_sequence_length": 12, "output_type": "np"}
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red fox", generator=torch.Generator("cpu").manual_seed(1), **given).images


def test_a_merged_pipeline_draws_what_the_lora_does(work: Path, tmp_path: Path) -> None:
    assert export(work / "a run", "--out", tmp_path / "whole", "--format", "merged") == 0
    merged = pictures(StableDiffusion3Pipeline.from_pretrained(tmp_path / "whole"))
    pipe = StableDiffusion3Pipeline.from_pretrained(work / "tiny-base")
    base = pictures(pipe)
    pipe.load_lora_weights(work / "a run" / "lora")
    assert np.abs(merged - pictures(pipe)).max() < 1e-5
    assert np.abs(merged - base).max() > 1e-2
    assert 'from_pretrained(".")' in code_of(tmp_path / "whole")
    assert huggingface_hub.ModelCard.load(tmp_path / "whole" / "README.md").data.tags == [
        "diffusers",
        "text-to-image",
        "flowalign",
        "alignment",
    ]


def test_an_embedded_model_is_merged_and_drawn_by_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no T5, which plain diffusers has to be told."""
    model = SD3("shapes", max_sequence_length=0, lora=LoRA(2, 2))
    randomise_policy(model)
    model.save(tmp_path / "lora")
    for number, words in enumerate(([], ["--format", "merged"])):
        out = tmp_path / f"out{number}"
        assert export(tmp_path / "lora", "--model", "shapes", "--out", out, *words) == 0
        monkeypatch.chdir(out)
        assert ("text_encoder_3=None" in code_of(out)) == bool(number)
        code = code_of(out).replace("    prompt=", "    max_sequence_length=0, num_inference_steps=2, prompt=")
        exec(code, {})
    seen = [np.asarray(Image.open(tmp_path / f"out{number}" / "picture.png")).astype(int) for number in range(2)]
    assert np.abs(seen[0] - seen[1]).max() <= 1
    merged = SD3(str(tmp_path / "out1"), max_sequence_length=0)  # a base to train on
    assert merged.pipeline.text_encoder_3 is None
    with torch.no_grad():
        latents, told = torch.ones(1, *model.latent_shape), model.condition(Prompts(("a red circle",), ({},)))
        torch.testing.assert_close(merged.velocity(latents, 0.5, told), model.velocity(latents, 0.5, told))


def test_merging_in_half_precision_says_what_it_costs(work: Path, tmp_path: Path) -> None:
    assert export(work / "a run", "--out", tmp_path / "half", "--format", "merged", "--dtype", "bf16") == 0
    told = re.search(
        r"to bf16 moved them by ([\d.]+) times what the LoRA", (tmp_path / "half" / "README.md").read_text()
    )
    lora, lost, total = read_lora(work / "a run").factors, 0.0, 0.0
    half = load_file(tmp_path / "half" / "transformer" / "diffusion_pytorch_model.safetensors")
    base = load_file(work / "tiny-base" / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, one in lora.items():
        key = f"{name.partition('.')[2]}.weight"
        assert half[key].dtype == torch.bfloat16
        lost += float((half[key].double() - base[key].double() - one.delta()).square().sum())
        total += float(one.delta().square().sum())
    assert told is None or abs(float(told[1]) - (lost / total) ** 0.5) < 0.01
    assert (told is None) == ((lost / total) ** 0.5 <= 0.01)


def test_full_fine_tuning_is_exported_whole(work: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(work / "tiny-base" / "transformer", run / "transformer")
    file = run / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = {name: value + 0.01 for name, value in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    model = {"class": "flowalign.models.SD3", "pipeline": str(work / "tiny-base"), "lora": None}
    (run / "config.yaml").write_text(dump_yaml({"trainer": "trainers.FlowGRPO", "model": model}))
    assert export(run, "--out", tmp_path / "out", "--format", "merged") == 0
    made = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(made[name], value) for name, value in weights.items())
    assert "not known" in (tmp_path / "out" / "README.md").read_text()


def test_a_lora_without_a_run_and_comfyui(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Notes in a file's header may tell paths, and stay behind."""
    held = load_file(work / "a run" / "lora" / "pytorch_lora_weights.safetensors")
    with safe_open(work / "a run" / "lora" / "pytorch_lora_weights.safetensors", "pt") as opened:
        header = opened.metadata() | {"flowalign_soup": str(work)}
    save_file(held, tmp_path / "mine.safetensors", header)
    words = [tmp_path / "mine.safetensors", "--model", work / "tiny-base"]
    assert export(*words, "--out", tmp_path / "plain") == 0
    with safe_open(tmp_path / "plain" / "pytorch_lora_weights.safetensors", "pt") as opened:
        assert "flowalign_soup" not in opened.metadata()
    again, first = (read_lora(path).factors for path in (tmp_path / "plain", work / "a run"))
    assert all(torch.equal(again[name].delta(), one.delta()) for name, one in first.items())
    assert export(*words, "--out", tmp_path / "comfy", "--format", "kohya", "--name", "fox", "--dtype", "bf16") == 0
    text = (tmp_path / "comfy" / "README.md").read_text()
    assert "put `fox.safetensors` into `models/loras`" in text
    assert "```python" not in text  # diffusers reads no LoRA of SD3 in this layout
    made = load_file(tmp_path / "comfy" / "fox.safetensors")
    assert made["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight"].dtype == torch.bfloat16
    assert export(words[0], "--out", tmp_path / "x") == 2
    assert "name the LoRA's base model with --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--checkpoint", "step-00000004-evaluatd"], "did you mean 'step-00000004-evaluated'?"),
        (["--out", "full"], "full is in use; name another folder with --out"),
        (["--dtype", "bf16"], "--dtype is for --format merged and kohya"),
        (["--private"], "--private is for --push OWNER/NAME"),
        (["--name", "../x"], "--name '../x': take letters"),
        (["--push", "me"], "--push takes OWNER/NAME, got 'me'"),
        (["--push", "me/no way"], "--push me/no way"),
        (["--push", "me/name"], "HF_HUB_OFFLINE is set"),
        (["--model", "nothing/here"], "'nothing/here' is no diffusers pipeline"),
        (["--steps", "3"], "--steps is no option of export"),
    ],
)
def test_bad_input_is_one_line(
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert export(work / "a run", *(words if "--out" in words else [*words, "--out", "out"])) == 2
    error = capsys.readouterr().err.strip()
    assert told in error
    assert "\n" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_runs_without_a_policy_and_wrong_bases_are_refused(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copyfile(work / "a run" / "config.yaml", run / "config.yaml")
    assert export(run, "--out", tmp_path / "out") == 2
    assert "holds no policy, neither lora/ nor transformer/" in capsys.readouterr().err
    shutil.copytree(work / "tiny-base" / "transformer", run / "transformer")
    assert export(run, "--out", tmp_path / "out") == 2
    assert "all of the transformer's weights and no LoRA" in capsys.readouterr().err
    lora = work / "a run" / "lora"
    assert export(lora, "--model", "shapes", "--out", tmp_path / "out", "--format", "merged") == 2
    assert "another base model" in capsys.readouterr().err
    tiny_pixart().save_pretrained(tmp_path / "pixart")
    assert export(lora, "--model", tmp_path / "pixart", "--out", tmp_path / "out", "--format", "kohya") == 2
    assert "no names for a PixArtAlphaPipeline" in capsys.readouterr().err
    assert export(lora, "--model", tmp_path / "pixart", "--out", tmp_path / "out") == 2
    assert "which PixArtAlphaPipeline does not load for its transformer" in capsys.readouterr().err
    save_file({f"unet.x.lora_{one}.weight": torch.zeros(2, 2) for one in "AB"}, tmp_path / "unet.safetensors")
    assert export(tmp_path / "unet.safetensors", "--model", "shapes", "--out", tmp_path / "out") == 2
    told = "is a LoRA of the unet, and a policy of a StableDiffusion3Pipeline is on its transformer"
    assert told in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"takes 1000000000.0 GB and the disk of .* has"):
        check_space(tmp_path, 10**18)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pixart", "run", "unet.safetensors"]


def test_a_family_without_a_loader_of_loras_goes_by_peft(tmp_path: Path) -> None:
    case = KNOWN["pixart-alpha"]
    factors = policy(case, tmp_path / "lora")
    case.make().save_pretrained(tmp_path / "base")
    words = [tmp_path / "lora", "--model", tmp_path / "base"]
    assert export(*words, "--out", tmp_path / "out") == 0
    assert 'PeftModel.from_pretrained(pipe.transformer, ".")' in code_of(tmp_path / "out")
    pipe = case.make()
    PeftModel.from_pretrained(pipe.transformer, tmp_path / "out", adapter_name="read")
    layers = {name: one for name, one in pipe.transformer.named_modules() if isinstance(one, BaseTunerLayer)}
    check_same({f"transformer.{name}": one.get_delta_weight("read").detach() for name, one in layers.items()}, factors)
    assert export(*words, "--out", tmp_path / "whole", "--format", "merged") == 0
    made = load_file(tmp_path / "whole" / "transformer" / "diffusion_pytorch_model.safetensors")
    plain = case.make().transformer.state_dict()
    for name, one in factors.items():
        key = f"{name.partition('.')[2]}.weight"
        torch.testing.assert_close(made[key].double(), plain[key].double() + one.delta(), rtol=0, atol=1e-6)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A hub on this machine, as far as creating a repository and one commit go; what came is in what is yielded."""
    came: dict[str, Any] = {"paths": [], "tokens": set(), "files": {}, "status": 200}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            came["paths"].append(self.path)
            came["tokens"].add(self.headers.get("Authorization"))
            self.answer(came["status"], self.told(body))

        def told(self, body: bytes) -> dict[str, Any]:
            address = f"http://{self.headers['Host']}/me/aligned"
            if self.path.endswith("/repos/create"):
                came["repo"] = json.loads(body)
                return {"url": address, "id": "me/aligned", "name": "me/aligned"}
            if "/preupload/" in self.path:
                names = [one["path"] for one in json.loads(body)["files"]]
                return {"files": [{"path": one, "uploadMode": "regular", "shouldIgnore": False} for one in names]}
            if "/commit/" in self.path:
                rows = [json.loads(line) for line in body.splitlines()]
                files = [row["value"] for row in rows if row["key"] == "file"]
                came["files"] |= {one["path"]: base64.b64decode(one["content"]) for one in files}
                return {"success": True, "commitOid": "0" * 40, "commitUrl": f"{address}/commit/0"}
            return {"errors": [], "warnings": []}

        def do_GET(self) -> None:
            came["paths"].append(self.path)
            self.answer(404, {"error": "not here"})

        def answer(self, status: int, told: dict[str, Any]) -> None:
            content = json.dumps(told if status == 200 else {"error": "You may not write here"}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield came
    server.shutdown()
    server.server_close()


def test_push_puts_the_folder_onto_the_hub(
    work: Path, tmp_path: Path, hub: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """By huggingface_hub's own client, against a server of this machine."""
    out = tmp_path / "out"
    assert export(work / "a run", "--out", out, "--push", "me/aligned", "--private") == 0
    said = capsys.readouterr()
    assert said.out.strip().endswith("/me/aligned")
    assert TOKEN not in said.out + said.err
    assert hub["tokens"] == {f"Bearer {TOKEN}"}
    assert hub["repo"]["name"] == "aligned"
    assert (hub["repo"].get("private"), hub["repo"].get("visibility")) in ((True, None), (None, "private"))
    assert hub["files"] == {file.name: file.read_bytes() for file in out.iterdir()}
    assert 'pipe.load_lora_weights("me/aligned")' in code_of(out)


def test_a_push_that_fails_leaves_the_folder_whole(
    work: Path, tmp_path: Path, hub: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub["status"] = 403
    assert export(work / "a run", "--out", tmp_path / "one", "--push", "me/aligned") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "could not be pushed to me/aligned" in error
    assert "hf upload me/aligned" in error
    assert TOKEN not in error
    assert (tmp_path / "one" / "README.md").is_file()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert export(work / "a run", "--out", tmp_path / "two", "--push", "me/aligned") == 2
    assert "could not be pushed to me/aligned" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert export(work / "a run", "--out", tmp_path / "three", "--push", "me/aligned") == 2
    assert "--push needs a login" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_licences_of_rewards_wherever_a_config_names_them() -> None:
    def named(reward: Any) -> list[str]:
        return [name for name, _, _ in export_command._rewards(reward)]

    assert named("pickscore/26 + 0.5*clip(ocr, 0, 1)") == ["rewards.pickscore.PickScore", "rewards.ocr.OCR"]
    inner = {"class": "rewards.OnFrames", "reward": {"class": "rewards.CLIPScore", "model": "shapes"}}
    assert [*export_command._rewards(inner)] == [("rewards.CLIPScore", "the embedded ones", "Apache-2.0")]
    local = export_command._rewards({"class": "rewards.FaceIdentity", "model": "/data/arcface.pth"})
    ((_, weights, licence),) = local
    assert weights == "arcface.pth"
    assert "non-commercial" in licence
    assert named({"class": "mine.Reward", "weight": 2}) == ["mine.Reward"]
    assert named(None) == []
    forbidden, unnamed = warnings_of([("a", "CC-BY-NC-4.0"), ("b", "none named (code: MIT)"), ("c", "MIT")])
    assert "`a` (CC-BY-NC-4.0)" in forbidden
    assert "`b`" in unnamed
    assert "`c`" not in forbidden + unnamed
    assert licence_of("shapes").short == "apache-2.0"
    assert not licence_of("nobody/nothing").short
    assert set(EMBEDDED) == {"shapes", "shapes-few-step", "shapes-video"}


def test_every_shipped_config_has_a_method_and_rewards() -> None:
    for file in sorted(config_root().rglob("*.yaml")):
        config = load_yaml(file)
        if "trainer" not in config or file.parent.name == "reward_model":  # others leave no policy
            continue
        assert re.match(r"\w.*[.:]", export_command._method(config["trainer"])), file
        found = [*export_command._rewards(config.get("reward"))]
        assert found or config.get("reward") is None, file
