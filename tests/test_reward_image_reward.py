"""ImageReward is the authors' package to the last bits: scores, gradients, tokens, pictures, and its weights' names.

The numbers are those of image-reward 1.5 on weights drawn here as they were drawn there (scripts/record_rewards).
"""

from __future__ import annotations

import copy
import json
import logging
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_towers import check_bfloat16
from torch import Tensor
from transformers import BertTokenizer

from flowalign.records import Media, Prompts
from rewards.image_reward import ImageReward, Tower, check_weights, configs, renamed
from rewards.pixels import CLIP_MEAN, CLIP_STD, normalise, rounded_center_crop

GOLDEN = load_file(Path(__file__).parent / "golden" / "rewards" / "image_reward.safetensors")
PICTURES = [GOLDEN[f"picture_{i}"].permute(2, 0, 1)[None].float() / 255 for i in range(5)]
TEXTS = ("a red circle", "Two RED circles, one's 7.", "red " * 60 + "circle", "", "caf\u00e9 \u732b circle")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "circle", "##s", ".", ",", "'")
VOCABULARY = [*WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS if letter != "s")]
MED = {
    "vocab_size": len(VOCABULARY) + 2, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
    "pad_token_id": 0, "encoder_width": 768, "add_cross_attention": True, "model_type": "bert",
}  # fmt: skip
FULL = {"vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
FULL_MED = MED | FULL | {"num_attention_heads": 12, "max_position_embeddings": 512}


def shapes(name: str) -> dict[str, list[int]]:
    """Names and shapes of the authors' state dict, at one of two sizes."""
    return json.loads(zlib.decompress(GOLDEN[name].numpy().tobytes()))


def made_weights() -> dict[str, Tensor]:
    """The weights that the authors' model had when it was recorded, and a buffer that their checkpoint has too."""
    draw, made = np.random.RandomState(7), {}
    for name, shape in sorted(shapes("tiny_shapes").items()):
        if name.endswith("position_ids"):
            made[name] = torch.arange(64)[None]
            continue
        fan = int(np.prod(shape[1:])) if len(shape) > 1 and "embed" not in name.rsplit(".", 2)[-2] else 4
        value = draw.standard_normal(shape) / np.sqrt(fan)
        if len(shape) == 1:
            value = 0.2 * value + ("norm" in name.lower() and name.endswith("weight"))
        made[name] = torch.from_numpy(value.astype(np.float32))
    return made


def written(folder: Path, weights: dict[str, Tensor]) -> Path:
    torch.save(weights, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("weights"), made_weights())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    BertTokenizer(vocab={word: i for i, word in enumerate(VOCABULARY)}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reward(folder: Path, tokenizer: Path) -> ImageReward:
    return ImageReward(str(folder), str(tokenizer), batch_size=3)


def prompts(*texts: str) -> Prompts:
    return Prompts(texts, ({},) * len(texts))


@pytest.mark.parametrize("i", range(5))
def test_scores_are_the_packages(reward: ImageReward, i: int) -> None:
    """All prompts for a picture; pictures 2 to 4 are not the network's size, and the crop of 2 and 3 has to round."""
    expected = GOLDEN["scores"][i]
    assert expected.std() > 0.1
    scores = reward(Media(PICTURES[i].expand(5, -1, -1, -1)), prompts(*TEXTS))
    torch.testing.assert_close(scores.total, expected, rtol=1e-5, atol=1e-5)
    assert scores.parts["image_reward"].equal(scores.total)
    assert scores.valid.all()


def test_gradients_are_the_packages(reward: ImageReward) -> None:
    """At the network's own size the gradient to the pixels is that to the normalised pixels, divided by CLIP's std."""
    pixels = torch.cat(PICTURES[:2]).requires_grad_()
    (slope,) = torch.autograd.grad(reward(Media(pixels), prompts(*TEXTS[:2]), grad=True).total.sum(), pixels)
    expected = GOLDEN["gradient"] / torch.tensor(CLIP_STD)[:, None, None]
    assert expected.abs().max() > 0.05
    assert (slope - expected).norm() / expected.norm() < 1e-5
    assert all(parameter.grad is None for parameter in reward.tower.parameters())


def test_gradient_against_finite_differences(reward: ImageReward) -> None:
    """The network's input is a picture of the network's size, so that nothing is rounded; differences in float64."""
    pixels = PICTURES[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(reward(Media(pixels), prompts(TEXTS[1]), grad=True).total.sum(), pixels)
    tower = copy.deepcopy(reward.tower).double()
    ids, mask = reward.tokens([TEXTS[1]])

    def value(shift: Tensor) -> Tensor:
        return tower(normalise(pixels.detach().double() + shift, CLIP_MEAN, CLIP_STD), ids, mask)

    for _ in range(8):
        direction = torch.randn(pixels.shape, dtype=torch.float64)
        measured = (value(1e-4 * direction) - value(-1e-4 * direction)).item() / 2e-4
        assert (slope * direction).sum().item() == pytest.approx(measured, rel=1e-3, abs=1e-5)


def test_the_gradient_climbs_and_reaches_pixels_that_are_resized(reward: ImageReward) -> None:
    pixels = (0.2 + 0.6 * PICTURES[2]).requires_grad_()
    before = reward(Media(pixels), prompts(TEXTS[0]), grad=True).total
    (slope,) = torch.autograd.grad(before.sum(), pixels)
    assert (slope != 0).float().mean() > 0.5
    step = 0.05 * slope / slope.abs().max()
    up, down = (reward(Media(pixels.detach() + sign * step), prompts(TEXTS[0])).total for sign in (1, -1))
    assert down + 0.01 < before < up - 0.01


def test_tokens_are_the_packages(reward: ImageReward) -> None:
    ids, mask = reward.tokens(TEXTS)
    assert torch.equal(ids, GOLDEN["ids"])
    assert torch.equal(mask, GOLDEN["mask"])


def test_cut_prompts_are_counted_and_said_once(folder: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture) -> None:
    reward, media = ImageReward(str(folder), str(tokenizer)), Media(PICTURES[0].expand(3, -1, -1, -1))
    just, over = "red " * 33, "red " * 34
    with caplog.at_level(logging.WARNING, "flowalign"):
        reward(media, prompts(just, "a", "b"))
        assert not caplog.records, "35 tokens with [CLS] and [SEP] are read to their end"
        reward(media, prompts(over, over, "a"))
        reward(media, prompts("circle " * 90, over, "a"))
    assert [record.getMessage() for record in caplog.records] == [
        "ImageReward reads 35 tokens: it does not see the end of 1 of 2 prompts (said once)"
    ]
    assert reward.cut == {over, "circle " * 90}
    scores = reward(media, prompts(over, over + "circle", just)).total
    torch.testing.assert_close(scores, scores[:1].expand(3), rtol=0, atol=1e-6)


def test_a_score_does_not_depend_on_its_batch(reward: ImageReward) -> None:
    pixels = torch.rand(7, 3, 60, 52)
    asked = prompts(*TEXTS, "a", "red circles")
    together = reward(Media(pixels), asked).total
    assert together.std() > 0.05
    singles = torch.cat([reward(Media(pixels[i : i + 1]), asked.rows([i])).total for i in range(7)])
    torch.testing.assert_close(singles, together, rtol=0, atol=1e-5)
    order = [3, 6, 0, 2, 5, 1, 4]
    shuffled = reward(Media(pixels).rows(order), asked.rows(order), chunk=2).total
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-5)


def test_crop_rounds_half_to_even() -> None:
    ramp = torch.arange(12.0).expand(1, 3, 4, 12)
    for width, first in [(4, 0), (5, 0), (6, 1), (7, 2), (9, 2), (11, 4)]:
        assert rounded_center_crop(ramp[..., :width], 4)[0, 0, 0].tolist() == [*range(first, first + 4)]


def test_all_weights_at_full_size() -> None:
    """Every name and shape of the authors' state dict has its place, and nothing of the tower stays empty."""
    theirs = shapes("full_shapes")
    assert len(theirs) == 625
    weights = {name: torch.empty(shape, device="meta") for name, shape in theirs.items()}
    with torch.device("meta"):
        tower = Tower(*configs(weights, FULL_MED, "full"))
    check_weights(renamed(weights), tower, "full")
    unused = 256 * (1024 + 1) + 256 * (768 + 1)
    assert sum(parameter.numel() for parameter in tower.parameters()) + unused == 446_665_953
    vision, text = tower.vision_model.config, tower.text_encoder.config
    assert (vision.image_size, vision.patch_size, vision.num_attention_heads) == (224, 16, 16)
    assert (vision.layer_norm_eps, text.layer_norm_eps) == (1e-6, 1e-12)
    assert text.encoder_hidden_size == 1024


def test_safetensors_or_the_file_itself(folder: Path, tokenizer: Path, tmp_path: Path, reward: ImageReward) -> None:
    save_file(made_weights(), tmp_path / "ImageReward.safetensors")
    (tmp_path / "med_config.json").write_bytes((folder / "med_config.json").read_bytes())
    media, asked = Media(torch.cat(PICTURES[:2])), prompts(*TEXTS[:2])
    for name in (tmp_path, tmp_path / "ImageReward.safetensors", folder / "ImageReward.pt"):
        other = ImageReward(str(name), str(tokenizer))
        assert torch.equal(other(media, asked).total, reward(media, asked).total)


def test_scores_are_float32_under_autocast(reward: ImageReward) -> None:
    media = Media(torch.cat(PICTURES[:2]))
    plain = reward(media, prompts(*TEXTS[:2])).total
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward(media, prompts(*TEXTS[:2])).total, plain)


def test_bfloat16_is_near(reward: ImageReward, folder: Path, tokenizer: Path) -> None:
    """The head, in float32, spreads an error of 1 % of a state with its weights' norm."""
    half = ImageReward(str(folder), str(tokenizer), batch_size=3, dtype="bfloat16", offload=True)
    assert half.tower.vision_model.post_layernorm.weight.dtype == torch.bfloat16
    assert half.tower.text_encoder.embeddings.LayerNorm.weight.dtype == torch.bfloat16
    assert torch.equal(half.tower.head[0].weight, reward.tower.head[0].weight)
    given = Media(PICTURES[2].expand(2, -1, -1, -1))
    check_bfloat16(reward, half, given, prompts(*TEXTS[:2]), 0.03)


def test_a_broken_picture_has_no_score(reward: ImageReward) -> None:
    pixels = torch.cat([PICTURES[0]] * 3)
    pixels[1, 0, 5, 5] = torch.nan
    assert reward(Media(pixels), prompts(*TEXTS[:3])).valid.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp.layers.7.bias": None}, r"lacks 1 \(head.7.bias\)"),
        (
            {"blip.text_encoder.pooler.dense.bias": torch.zeros(3)},
            r"has 1 that do not belong to it \(text_encoder",
        ),
        ({"mlp.layers.7.bias": torch.zeros(2)}, "1 weights of .* have another shape than the model's: head.7.bias"),
        ({"blip.visual_encoder.pos_embed": None}, "lack blip.visual_encoder.pos_embed"),
    ],
)
def test_other_weights_are_refused(tokenizer: Path, tmp_path: Path, change: dict, message: str) -> None:
    weights = {name: value for name, value in (made_weights() | change).items() if value is not None}
    with pytest.raises(ValueError, match=message) as caught:
        ImageReward(str(written(tmp_path, weights)), str(tokenizer))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./no/such/folder", "no-one/no-such-model"])
def test_a_wrong_name_is_one_clear_line(name: str, tokenizer: Path) -> None:
    with pytest.raises(ValueError, match=r"ImageReward\.pt") as caught:
        ImageReward(name, str(tokenizer))
    assert name.removeprefix("./") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pickle_that_runs_code_is_refused(folder: Path, tokenizer: Path, tmp_path: Path) -> None:
    written(tmp_path, {"weights": Path("x")})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="cannot be read"):
        ImageReward(str(tmp_path), str(tokenizer))


def test_a_folder_without_config(folder: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "ImageReward.pt").write_bytes((folder / "ImageReward.pt").read_bytes())
    with pytest.raises(ValueError, match=r"med_config\.json"):
        ImageReward(str(tmp_path), str(tokenizer))


def test_a_wrong_tokenizer(folder: Path, tmp_path: Path) -> None:
    for name in ("no-one/no-such-tokenizer", str(tmp_path)):
        with pytest.raises(
            ValueError, match=f"tokenizer '{name}' can be had neither .*pass tokenizer=FOLDER"
        ) as caught:
            ImageReward(str(folder), name)
        assert "\n" not in str(caught.value)
    words = {word: i for i, word in enumerate([*VOCABULARY, *(f"word{i}" for i in range(9))])}
    BertTokenizer(vocab=words).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a tokenizer of 91 tokens, the model was made for 84"):
        ImageReward(str(folder), str(tmp_path))


def test_wrong_settings(folder: Path, tokenizer: Path, reward: ImageReward) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        ImageReward(str(folder), str(tokenizer), batch_size=0)
    with pytest.raises(ValueError, match="ImageReward scores pictures"):
        reward(Media(torch.rand(1, 2, 3, 48, 48)), prompts("a"))
