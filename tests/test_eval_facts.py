"""What makes another picture or another score, and what does not: the keys of what a sweep keeps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flowalign.config import Call, build, dump_yaml, parse
from flowalign.evaluation import Sweep, plan
from flowalign.evaluation.cells import draw_key, score_key
from flowalign.evaluation.facts import Digests, hub_revision, key_of, model_facts, reward_facts
from flowalign.evaluation.methods import Method, read_method
from flowalign.models import SD3, Model
from flowalign.records import Prompts
from flowalign.whole import Full


def itself(model: Model) -> Model:
    return model


def model(**changes: Any) -> Call:
    config = {"class": "flowalign.models.SD3", "pipeline": "shapes", **changes}
    made: Call = parse(itself, {"model": config}).arguments["model"]
    return made


@pytest.fixture
def digests(tmp_path: Path) -> Digests:
    return Digests(tmp_path / "digests.json")


def lora(folder: Path, value: float) -> Path:
    folder.mkdir(parents=True)
    factors = {f"transformer.block.lora_{part}.weight": torch.full((2, 2), value) for part in "AB"}
    save_file(factors, folder / "pytorch_lora_weights.safetensors")
    return folder


def test_a_model_is_its_weights_and_settings(tmp_path: Path, digests: Digests) -> None:
    one, moved, other = lora(tmp_path / "one", 1.0), tmp_path / "moved", lora(tmp_path / "other", 2.0)
    shutil.copytree(one, moved)
    first = model_facts(model(lora={"start": str(one)}), digests)
    assert first == model_facts(model(lora={"start": str(moved)}), digests)
    assert first != model_facts(model(lora={"start": str(other)}), digests)
    assert first != model_facts(model(), digests)
    assert model_facts(model(), digests) != model_facts(model(pipeline="shapes-few-step"), digests)
    assert model_facts(model(), digests) != model_facts(model(height=64, width=64), digests)
    assert model_facts(model(), digests) == model_facts(model(embeddings=str(tmp_path / "kept")), digests)


def test_files_are_read_again_when_they_change(tmp_path: Path, digests: Digests) -> None:
    file = tmp_path / "weights" / "a.bin"
    file.parent.mkdir()
    file.write_bytes(b"one")
    before = digests.of(file.parent)
    digests.save()
    kept = Digests(digests.file)
    assert kept.of(file.parent) == before
    file.write_bytes(b"other")
    assert kept.of(file.parent) != before
    file.rename(tmp_path / "weights" / "b.bin")
    assert kept.of(file.parent) != before


def test_a_reward_is_its_arguments_with_their_defaults(digests: Digests) -> None:
    def key(config: Any) -> str:
        return key_of(reward_facts(config, False, digests))

    jpeg = {"class": "rewards.JPEGCompressibility"}
    assert key(jpeg) == key("rewards.JPEGCompressibility")
    assert key(jpeg) != key({**jpeg, "quality": 80})
    assert key({**jpeg, "quality": 95}) == key(jpeg)  # its default
    assert key("jpeg") != key("0.5 * jpeg")
    assert key("jpeg") != key(jpeg)


def test_a_repository_of_the_hub_is_its_commit(
    tmp_path: Path, digests: Digests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = {"class": "rewards.CLIPScore", "model": "someone/clip"}
    assert hub_revision("someone/clip") is None
    ref = tmp_path / "models--someone--clip" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    found = []
    for commit in ("a" * 40, "b" * 40):
        ref.write_text(commit)
        found.append(key_of(reward_facts(config, False, digests)))
    assert found[0] != found[1]


def method(**told: Any) -> Method:
    return read_method(told, "m").settled(4, 1.0)


def test_a_method_is_its_settings(digests: Digests) -> None:
    reward = {"class": "rewards.CLIPScore", "model": "shapes"}
    best = {"search": "trainers.BestOfN", "samples": 4, "reward": reward}
    assert method().facts(digests) == method(steps=4, guidance_scale=1.0).facts(digests)
    assert method().facts(digests) != method(steps=5).facts(digests)
    assert method(**best).facts(digests) == method(**best, steps=4).facts(digests)
    assert method(**best).facts(digests) != method(**best | {"samples": 5}).facts(digests)
    assert method(**best).facts(digests) != method(**best | {"reward": "rewards.JPEGCompressibility"}).facts(digests)


def test_a_picture_depends_on_what_a_model_looks_at_and_a_score_on_all_that_is_told(
    tmp_path: Path, digests: Digests
) -> None:
    def prompts(**row: Any) -> Prompts:
        return Prompts(("a cat",), (row,))

    def drawn(told: Prompts, whole: bool = False, seed: int = 0) -> str:
        return draw_key("model", "method", told, seed, whole, digests)

    def scored(told: Prompts, media: str = "digest") -> str:
        return score_key("reward", [media], told, None, digests)

    assert drawn(prompts(seed=0)) == drawn(prompts(seed=0, tag="counting"))
    assert drawn(prompts(seed=0), whole=True) != drawn(prompts(seed=0, tag="counting"), whole=True)
    assert drawn(prompts(seed=0)) != drawn(prompts(seed=1))
    assert drawn(prompts(seed=0)) != drawn(prompts(seed=0), seed=1)
    assert drawn(prompts(seed=0)) != drawn(prompts(seed=0, negative_prompt="blurred"))
    assert scored(prompts(tag="a")) != scored(prompts(tag="b"))
    assert scored(prompts()) != scored(prompts(), "other")
    start = tmp_path / "start.png"
    found = []
    for content in (b"one", b"two"):
        start.write_bytes(content)
        found.append(drawn(prompts(image=str(start))))
    assert found[0] != found[1]


def test_a_run_of_all_weights_brings_its_network(tmp_path: Path) -> None:
    made = SD3("shapes", lora=Full(), max_sequence_length=0)
    run = tmp_path / "whole"
    made.save(run / made.policy_folder)
    config = {"class": "flowalign.models.SD3", "pipeline": "shapes", "lora": {"class": "flowalign.whole.Full"}}
    (run / "config.yaml").write_text(dump_yaml({"trainer": "trainers.FlowGRPO", "model": config}))
    models = {"before": {"target": str(run), "base": True}, "after": str(run)}
    told = {"models": models, "benchmarks": {"s": {"class": "flowalign.evaluation.Shapes", "count": 2}}}
    before, after = plan(build(Sweep, told)).arms
    assert "lora" not in before.config.arguments
    assert after.config.arguments["lora"].target is Full
    assert after.config.arguments["lora"].arguments["start"] == str(run / "transformer")
    assert after.lora == str(run / "transformer")
