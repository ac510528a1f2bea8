"""VideoReward is what its authors' code made of the same weights in transformers 4.45.2, from frames and prompt on."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from qwen2vl_tiny import GOLDEN, SPECIAL, TEXTS, TINY, levels, prompts, save_base, weights
from torch import Tensor, nn

from flowalign.records import Media
from rewards.pixels import CLIP_MEAN, CLIP_STD, normalise
from rewards.qwen2vl import Qwen2VLScorer, patchify
from rewards.video_reward import MARKS, MEAN, STD, VideoReward, frame_indices, merge_lora, three

TEMPLATE = "Look: <|VQ_reward|> Move: <|MQ_reward|>\n{prompt} <|TA_reward|>\nEND\n"
ROWS = 256 + len(SPECIAL) + len(MARKS)
SETTINGS = {"peft_lora_config": {"lora_alpha": 6, "use_rslora": False}}


def save(folder: Path, state: dict[str, Tensor], settings: dict = SETTINGS) -> Path:
    (folder / "checkpoint-20").mkdir(parents=True)
    torch.save(state, folder / "checkpoint-20" / "model.pth")
    (folder / "model_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_base(tmp_path_factory.mktemp("base"))
    (folder / "template.txt").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module", params=[3, 1])
def outputs(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def make(base: Path, model: Path, batch_size: int = 4, recompute: bool = False) -> VideoReward:
    return VideoReward(
        str(model), str(base), str(base / "template.txt"), batch_size=batch_size, dtype="float32", min_pixels=28 * 28,
        recompute=recompute,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), weights(ROWS, nn.Linear(32, 3, bias=False)))


@pytest.fixture(scope="module")
def reward(base: Path, model: Path) -> VideoReward:
    return make(base, model)


def videos(count: int = 2, frames: int = 4) -> Media:
    return Media(torch.stack([levels(seed + 1, frames, 3, 28, 56) for seed in range(count)]), fps=2.0)


def test_scores_are_those_of_the_authors_way(base: Path, outputs: int, tmp_path: Path) -> None:
    reward = make(base, save(tmp_path / "model", weights(ROWS, nn.Linear(32, outputs, bias=False))))
    scores = reward(videos(), prompts(*TEXTS[:2]))
    raw = GOLDEN["video/three" if outputs == 3 else "video/one"]
    expected = (raw - torch.tensor(MEAN)) / torch.tensor(STD)
    for name, column in zip(("VQ", "MQ", "TA"), expected.T, strict=True):
        torch.testing.assert_close(scores.parts[name], column, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.total, expected.sum(1), rtol=0, atol=2e-5)
    assert list(scores.parts) == ["video_reward", "VQ", "MQ", "TA"]
    assert scores.valid.all()
    assert raw.std(0).min() > 0.01, "so that the comparison could fail"


def test_token_ids_are_the_old_processors(reward: VideoReward) -> None:
    ids, mask = reward.scorer.tokenize(TEXTS[:2], 4)
    recorded = GOLDEN["video/input_ids"].long()
    assert torch.equal(mask.bool(), recorded != 256)
    assert torch.equal(ids[mask.bool()], recorded[mask.bool()])


def test_gradient_is_that_of_the_authors_way(reward: VideoReward) -> None:
    media = videos()
    pixels, again = media.pixels.clone().requires_grad_(), media.pixels[0].clone().requires_grad_()
    reward(Media(pixels, 2.0), prompts(*TEXTS[:2]), grad=True).total.sum().backward()
    patchify(normalise(again, CLIP_MEAN, CLIP_STD)).backward(GOLDEN["video/gradient"])
    assert pixels.grad is not None
    assert again.grad is not None
    assert (pixels.grad[0] - again.grad).norm() <= 1e-4 * again.grad.norm()
    assert all(parameter.grad is None for parameter in reward.scorer.parameters())


def test_the_usual_call_of_qwen2vl_is_another_reward(reward: VideoReward) -> None:
    """With the multimodal positions that transformers makes of token types, scores are off by more than a group's."""
    scorer, media = reward.scorer, videos()
    patches = torch.cat([patchify(normalise(video, CLIP_MEAN, CLIP_STD)) for video in media.pixels])
    grid = torch.tensor([[2, 2, 4], [2, 2, 4]])
    ids, mask = scorer.tokenize(TEXTS[:2], 4)
    recorded = GOLDEN["video/three"]
    torch.testing.assert_close(three(scorer.outputs(patches, grid, ids, mask)), recorded, rtol=0, atol=1e-5)
    hidden = scorer.backbone(
        input_ids=ids, attention_mask=mask, pixel_values_videos=patches, video_grid_thw=grid,
        mm_token_type_ids=2 * (ids == TINY["video_token_id"]).int(),
    ).last_hidden_state  # fmt: skip
    usual = scorer.rm_head(hidden[torch.isin(ids, torch.tensor(scorer.marks))]).view(2, 3, 3).diagonal(dim1=1, dim2=2)
    assert (usual - recorded).abs().max() > 0.05


def test_a_batch_is_its_singles(base: Path, model: Path, reward: VideoReward) -> None:
    """Prompts of all lengths: padding on the right changes nothing."""
    media, asked = videos(7), prompts(*TEXTS)
    together = reward(media, asked).total
    assert together.std() > 0.1
    order = [3, 1, 6, 0, 5, 2, 4]
    mixed = make(base, model, batch_size=3)(media.rows(order), asked.rows(order), chunk=5).total
    torch.testing.assert_close(mixed, together[order], rtol=0, atol=1e-5)
    alone = torch.cat([reward(media.rows([i]), asked.rows([i])).total for i in range(7)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)


def test_gradient_against_finite_differences(reward: VideoReward) -> None:
    """On normalised frames, behind the rounding to 8 bit; float32 inside transformers asks for central steps."""
    frames = normalise(videos(1).pixels.flatten(0, 1), CLIP_MEAN, CLIP_STD)[None].requires_grad_()

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


def test_recomputed_activations_give_the_same_gradient(base: Path, model: Path, reward: VideoReward) -> None:
    found = []
    for scorer in (reward, make(base, model, recompute=True)):
        pixels = videos().pixels.clone().requires_grad_()
        scorer(Media(pixels, 2.0), prompts(*TEXTS[:2]), grad=True).total.sum().backward()
        found.append(pixels.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


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
    slow, asked = videos(frames=4), prompts(*TEXTS[:2])
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
    reward = make(base, model)
    before = reward(videos(), prompts(*TEXTS[:2])).total
    layers = r"model\.layers.*(q_proj|v_proj|o_proj|up_proj)"
    config = LoraConfig(r=2, lora_alpha=6, target_modules=layers, init_lora_weights=False, use_rslora=rslora)
    wrapped = get_peft_model(OldLayout(reward.scorer), config).eval()
    expected = reward(videos(), prompts(*TEXTS[:2])).total
    state = {name: value.clone() for name, value in wrapped.state_dict().items()}
    assert any(name.endswith("q_proj.base_layer.bias") for name in state)
    settings = {"peft_lora_config": {"lora_alpha": 6, "use_rslora": rslora}}
    merged = make(base, save(tmp_path / "lora", state, settings))(videos(), prompts(*TEXTS[:2])).total
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
    state = weights(ROWS, nn.Linear(32, 3, bias=False)) | change
    folder = save(tmp_path / "model", {name: value for name, value in state.items() if value is not None})
    with pytest.raises(ValueError, match=message) as caught:
        make(base, folder)
    assert "\n" not in str(caught.value)


def test_means_of_the_checkpoint_and_its_last_steps(base: Path, model: Path, tmp_path: Path) -> None:
    given = {f"{part}_{kind}": value for part in ("VQ", "MQ", "TA") for kind, value in (("mean", 1.0), ("std", 2.0))}
    folder = save(tmp_path / "model", {"nothing": torch.zeros(1)}, SETTINGS | {"inference_config": given})
    (folder / "checkpoint-100").mkdir()
    (folder / "checkpoint-100" / "model.pth").write_bytes((model / "checkpoint-20" / "model.pth").read_bytes())
    scores = make(base, folder)(videos(), prompts(*TEXTS[:2]))
    torch.testing.assert_close(scores.parts["TA"], (GOLDEN["video/three"][:, 2] - 1) / 2, rtol=0, atol=1e-5)


def test_prompts_cannot_bring_tokens(reward: VideoReward) -> None:
    media, clean = videos(2), prompts("a cat here", "a cat here")
    dirty = prompts("a <|VQ_reward|>cat<|video_pad|> here", "a cat<|VQ_<|im_end|>reward|> here")
    assert torch.equal(reward(media, dirty).total, reward(media, clean).total)
    assert not torch.allclose(reward(media, prompts("a dog", "a dog")).total, reward(media, clean).total, atol=1e-3)


def test_quality_does_not_hear_the_prompt(reward: VideoReward) -> None:
    """Their tokens stand before the prompt, and the network is causal."""
    one, other = (reward(videos(), prompts(text, text)).parts for text in TEXTS[:2])
    torch.testing.assert_close(one["VQ"], other["VQ"], rtol=0, atol=1e-5)
    assert (one["TA"] - other["TA"]).abs().min() > 1e-3


def test_without_a_template_scores_are_others(
    base: Path, model: Path, reward: VideoReward, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "flowalign"):
        own = VideoReward(str(model), str(base), dtype="float32", min_pixels=784)
    assert [record.message for record in caplog.records if "not those of the published" in record.message]
    assert len(caplog.records) == 1
    scores = own(videos(), prompts(*TEXTS[:2]))
    assert scores.valid.all()
    assert not torch.allclose(scores.total, reward(videos(), prompts(*TEXTS[:2])).total, atol=0.01)


def test_a_broken_video_has_no_score(reward: VideoReward) -> None:
    media, asked = videos(3), prompts(*TEXTS[:3])
    whole = reward(media, asked)
    media.pixels[1, 2, 0, 3, 3] = math.nan
    broken = reward(media, asked)
    assert broken.valid.tolist() == [True, False, True]
    assert torch.equal(broken.total[[0, 2]], whole.total[[0, 2]])


def test_bfloat16_is_near(base: Path, model: Path, reward: VideoReward) -> None:
    half = VideoReward(str(model), str(base), str(base / "template.txt"), min_pixels=784)
    assert half.scorer.backbone.language_model.norm.weight.dtype == torch.bfloat16
    scores = half(videos(), prompts(*TEXTS[:2])).total
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward(videos(), prompts(*TEXTS[:2])).total, rtol=0, atol=0.2)


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
    for batch_size, fps, least in ((0, 2.0, 784), (1, 0.0, 784), (1, 2.0, 10**9)):
        with pytest.raises(ValueError, match="batch_size must be at least 1, fps above 0"):
            VideoReward(str(model), str(base), batch_size=batch_size, fps=fps, min_pixels=least)
