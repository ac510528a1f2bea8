"""VideoReward is what its authors' code made of the same weights in transformers 4.45.2, from frames and prompt on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from qwen2vl_tiny import (
    GOLDEN,
    SETTINGS,
    TEXTS,
    TINY,
    VIDEO_ROWS,
    VIDEO_TEMPLATE,
    make_video_reward,
    prompts,
    save_base,
    save_video_reward,
    some_videos,
    weights,
)
from torch import Tensor, nn

from flowalign.records import Media
from rewards.pixels import CLIP_MEAN, CLIP_STD, normalise
from rewards.qwen2vl import Qwen2VLScorer
from rewards.video_reward import MEAN, STD, VideoReward, frame_indices, merge_lora, three


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_base(tmp_path_factory.mktemp("base"))
    (folder / "template.txt").write_text(VIDEO_TEMPLATE)
    return folder


@pytest.fixture(scope="module", params=[3, 1])
def outputs(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_video_reward(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reward(base: Path, model: Path) -> VideoReward:
    return make_video_reward(base, model)


def test_scores_are_those_of_the_authors_way(base: Path, outputs: int, tmp_path: Path) -> None:
    reward = make_video_reward(
        base, save_video_reward(tmp_path / "model", weights(VIDEO_ROWS, nn.Linear(32, outputs, bias=False)))
    )
    scores = reward(some_videos(), prompts(*TEXTS[:2]))
    raw = GOLDEN["video/three" if outputs == 3 else "video/one"]
    expected = (raw - torch.tensor(MEAN)) / torch.tensor(STD)
    for name, column in zip(("VQ", "MQ", "TA"), expected.T, strict=True):
        torch.testing.assert_close(scores.parts[name], column, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.total, expected.sum(1), rtol=0, atol=2e-5)
    assert list(scores.parts) == ["video_reward", "VQ", "MQ", "TA"]
    assert scores.valid.all()
    assert raw.std(0).min() > 0.01, "so that the comparison could fail"


def test_gradient_against_finite_differences(reward: VideoReward) -> None:
    """On normalised frames, behind the rounding to 8 bit; float32 inside transformers asks for central steps."""
    frames = normalise(some_videos(1).pixels.flatten(0, 1), CLIP_MEAN, CLIP_STD)[None].requires_grad_()

    def value(x: Tensor) -> Tensor:
        return three(reward.scorer(x, TEXTS[:1])).double().sum()

    (slope,) = torch.autograd.grad(value(frames), frames)
    noise = torch.randn(8, *frames.shape[1:], generator=torch.Generator().manual_seed(4))
    for direction in noise + 40 * slope / slope.norm():  # each with its own noise, steep enough to be measured
        step = 1e-2 * direction[None] / direction.norm()
        with torch.no_grad():
            wide, near = (value(frames + k * step) - value(frames - k * step) for k in (2, 1))
        measured = (8 * near - wide) / 12  # fourth order
        assert measured.item() == pytest.approx((slope * step).sum().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("frames", "fps", "expected"),
    [
        (16, 8.0, [0, 5, 10, 15]),
        (81, 16.0, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),
        (5, 8.0, [0, 1, 3, 4]),
        (3, 2.0, [0, 2]),
        (2, 30.0, [0, 1]),
        (6, 2.0, [0, 1, 2, 3, 4, 5]),
        (7, 2.0, [0, 1, 2, 4, 5, 6]),
        (49, 8.0, [0, 4, 9, 13, 17, 22, 26, 31, 35, 39, 44, 48]),
    ],
)
def test_frames_are_spread_evenly(frames: int, fps: float, expected: list[int]) -> None:
    assert frame_indices(frames, fps, 2.0).tolist() == expected


def test_other_speeds_are_resampled(reward: VideoReward) -> None:
    slow, asked = some_videos(), prompts(*TEXTS[:2])
    fast = Media(slow.pixels.repeat_interleave(4, dim=1), fps=8.0)
    picked = [0, 5, 10, 15]
    assert torch.equal(fast.pixels[:, picked], slow.pixels)
    assert torch.equal(reward(fast, asked).total, reward(slow, asked).total)
    assert not torch.allclose(reward(Media(fast.pixels, 2.0), asked).total, reward(slow, asked).total)
    assert len(frame_indices(2000, 1.0, 2.0)) == 768


class OldLayout(nn.Module):
    """The modules of a scorer under the names that the authors' model has."""

    def __init__(self, scorer: Qwen2VLScorer) -> None:
        super().__init__()
        self.visual, self.model = scorer.backbone.visual, scorer.backbone.language_model
        self.rm_head = scorer.rm_head


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_is_merged_as_peft_merges_it(base: Path, model: Path, tmp_path: Path, rslora: bool) -> None:
    reward = make_video_reward(base, model)
    before = reward(some_videos(), prompts(*TEXTS[:2])).total
    layers = r"model\.layers.*(q_proj|v_proj|o_proj|up_proj)"
    config = LoraConfig(r=2, lora_alpha=6, target_modules=layers, init_lora_weights=False, use_rslora=rslora)
    wrapped = get_peft_model(OldLayout(reward.scorer), config).eval()
    expected = reward(some_videos(), prompts(*TEXTS[:2])).total
    state = {name: value.clone() for name, value in wrapped.state_dict().items()}
    assert any(name.endswith("q_proj.base_layer.bias") for name in state)
    settings = {"peft_lora_config": {"lora_alpha": 6, "use_rslora": rslora}}
    merged = make_video_reward(base, save_video_reward(tmp_path / "lora", state, settings))(
        some_videos(), prompts(*TEXTS[:2])
    ).total
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)


def test_lora_by_hand() -> None:
    up, down, plain = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]), torch.eye(2).bfloat16()
    state = {"base_model.model.a.base_layer.weight": plain, "base_model.model.a.lora_A.default.weight": down,
             "base_model.model.a.lora_B.default.weight": up, "base_model.model.b.weight": plain}  # fmt: skip
    merged = merge_lora(state, 2.0, rslora=False)
    assert merged["a.weight"].tolist() == [[7.0, 8.0], [12.0, 17.0]]
    assert sorted(merged) == ["a.weight", "b.weight"]
    with pytest.raises(ValueError, match="a has no lora_A and lora_B"):
        merge_lora({"a.base_layer.weight": plain}, 2.0, rslora=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, r"missing backbone\.language_model\.norm\.weight"),
        ({"visual.extra": torch.zeros(1)}, r"unexpected backbone\.visual\.extra"),
        ({"model.norm.weight": torch.zeros(31)}, r"another shape of backbone\.language_model\.norm\.weight"),
        ({"rm_head.weight": torch.zeros(4, 32)}, "has 4 outputs"),
        ({"model.embed_tokens.weight": torch.zeros(260, 32)}, "has no embeddings of the marks"),
        ({"a.lora_A.default.weight": torch.zeros(1, 1)}, "unexpected"),
    ],
)
def test_weights_that_do_not_fit(base: Path, tmp_path: Path, change: dict, message: str) -> None:
    state = weights(VIDEO_ROWS, nn.Linear(32, 3, bias=False)) | change
    folder = save_video_reward(tmp_path / "model", {name: value for name, value in state.items() if value is not None})
    with pytest.raises(ValueError, match=message) as caught:
        make_video_reward(base, folder)
    assert "\n" not in str(caught.value)


def test_means_of_the_checkpoint_and_its_last_steps(base: Path, model: Path, tmp_path: Path) -> None:
    given = {f"{part}_{kind}": value for part in ("VQ", "MQ", "TA") for kind, value in (("mean", 1.0), ("std", 2.0))}
    folder = save_video_reward(tmp_path / "model", {"nothing": torch.zeros(1)}, SETTINGS | {"inference_config": given})
    (folder / "checkpoint-100").mkdir()
    (folder / "checkpoint-100" / "model.pth").write_bytes((model / "checkpoint-20" / "model.pth").read_bytes())
    scores = make_video_reward(base, folder)(some_videos(), prompts(*TEXTS[:2]))
    torch.testing.assert_close(scores.parts["TA"], (GOLDEN["video/three"][:, 2] - 1) / 2, rtol=0, atol=1e-5)


def test_quality_does_not_hear_the_prompt(reward: VideoReward) -> None:
    """Their tokens stand before the prompt, and the network is causal."""
    one, other = (reward(some_videos(), prompts(text, text)).parts for text in TEXTS[:2])
    torch.testing.assert_close(one["VQ"], other["VQ"], rtol=0, atol=1e-5)
    assert (one["TA"] - other["TA"]).abs().min() > 1e-3


def test_media_that_cannot_be_scored(reward: VideoReward) -> None:
    with pytest.raises(ValueError, match="and these are pictures"):
        reward(Media(torch.rand(1, 3, 28, 28)), prompts("a"))
    with pytest.raises(ValueError, match="VideoReward scores videos"):
        reward.score(Media(torch.rand(1, 3, 28, 28)), prompts("a"))
    with pytest.raises(ValueError, match=r"give its frames per second, Media\(pixels, fps=8\.0\)"):
        reward(Media(torch.rand(1, 4, 3, 28, 28)), prompts("a"))
    with pytest.raises(ValueError, match="two frames and a positive fps, got 1 frames"):
        reward(Media(torch.rand(1, 1, 3, 28, 28), fps=2.0), prompts("a"))
    with pytest.raises(ValueError, match=r"4 frames at 0\.0 fps"):
        reward(Media(torch.rand(1, 4, 3, 28, 28), fps=0.0), prompts("a"))


def test_what_cannot_be_had(base: Path, model: Path, tmp_path: Path) -> None:
    template = str(base / "template.txt")
    for name in ("./none", "no-one/no-such-model"):
        with pytest.raises(ValueError, match=f"the model '{name}' can be had neither") as caught:
            VideoReward(name, str(base), template)
        assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match=f"the base model '{name}' can be had neither"):
            VideoReward(str(model), name, template)
    with pytest.raises(ValueError, match=r"has no model_config\.json"):
        VideoReward(str(tmp_path), str(base), template)
    (tmp_path / "model_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no checkpoint-<steps>/model\.pth"):
        VideoReward(str(tmp_path), str(base), template)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "model.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        VideoReward(str(tmp_path), str(base), template)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(ValueError, match="has no tokenizer of a Qwen2-VL"):
        VideoReward(str(model), str(tmp_path), template)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="holds a model of type 'clip'"):
        VideoReward(str(model), str(tmp_path), template)


def test_wrong_settings(base: Path, model: Path) -> None:
    for batch_size, least in ((0, 784), (1, 10**9)):
        with pytest.raises(ValueError, match="batch_size must be at least 1"):
            VideoReward(str(model), str(base), batch_size=batch_size, min_pixels=least)
    with pytest.raises(ValueError, match=r"fps must be above 0, got 0\.0"):
        VideoReward(str(model), str(base), fps=0.0)
