"""HPSv2 is its authors' code: recorded scores, pixel gradients, tokens and cleaned texts of a small random model."""

from __future__ import annotations

import html
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_towers import check_bfloat16
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from flowalign.records import Media, Prompts
from rewards import hps
from rewards.clip_weights import clip_config, to_transformers
from rewards.hps import HPSv2, LongestSide, clean, repair
from rewards.pixels import CLIP_MEAN, CLIP_STD, normalise

GOLDEN = Path(__file__).parent / "golden/rewards/hpsv2.safetensors"
PICTURES = 5


def said() -> dict[str, Any]:
    with safe_open(GOLDEN, "pt") as file:
        return {name: json.loads(value) for name, value in file.metadata().items()}


def drawn(name: str, shape: list[int]) -> Tensor:
    """The weights as scripts/record_rewards/hpsv2.py draws them."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape)) * 0.15
    return torch.as_tensor(noise + (".ln_" in f".{name}" and name.endswith("weight")), dtype=torch.float32)


def make_tokenizer(merges: list[str]) -> CLIPTokenizer:
    """The recorded vocabulary in OpenAI CLIP's order: bytes as its code counts them, the same as ends, merges."""
    printed = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(code) for code in printed] + [chr(256 + i) for i in range(256 - len(printed))]
    assert sorted(letters) == sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair.split()) for pair in merges)]
    names += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: i for i, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocabulary, merges=[tuple(pair.split()) for pair in merges], model_max_length=77)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights' file as HPSv2's authors publish it, and a tokenizer beside."""
    path, told = tmp_path_factory.mktemp("hps"), said()
    state = {name: drawn(name, shape) for name, shape in told["shapes"].items()}
    torch.save({"state_dict": state, "epoch": 3}, path / "HPS_v2.1_compressed.pt")
    make_tokenizer(told["merges"]).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reward(folder: Path) -> HPSv2:
    return HPSv2(model=str(folder), processor=str(folder))


def prompts(*texts: str) -> Prompts:
    return Prompts(texts, ({},) * len(texts))


def recorded() -> tuple[dict[str, Tensor], list[Tensor], list[str]]:
    held = load_file(GOLDEN)
    pictures = [held[f"picture_{i}"].permute(2, 0, 1)[None].float() / 255 for i in range(PICTURES)]
    return held, pictures, said()["texts"]


@pytest.mark.parametrize("antialias", [True, False])
def test_scores_are_the_authors(folder: Path, antialias: bool) -> None:
    held, pictures, texts = recorded()
    expected = held["scores" if antialias else "scores_without_antialias"]
    reward = HPSv2("2.1", str(folder / "HPS_v2.1_compressed.pt"), str(folder), antialias)
    ours = [reward(Media(picture), prompts(text)).total for picture, text in zip(pictures, texts, strict=False)]
    assert expected.std() > 0.1
    torch.testing.assert_close(torch.cat(ours), expected, rtol=0, atol=1e-5)


def test_antialias_matters() -> None:
    held, _, _ = recorded()
    assert (held["scores"] - held["scores_without_antialias"]).abs().max() > 0.01


@pytest.mark.parametrize("i", range(PICTURES))
def test_pixel_gradients_are_the_authors(reward: HPSv2, i: int) -> None:
    held, pictures, texts = recorded()
    pixels = pictures[i].requires_grad_()
    reward(Media(pixels), prompts(texts[i]), grad=True).total.sum().backward()
    expected = held[f"gradient_{i}"]
    assert pixels.grad is not None
    assert (pixels.grad[0] - expected).norm() <= 1e-4 * expected.norm()
    assert expected.norm() > 0.1


def test_tokens_are_the_authors(reward: HPSv2) -> None:
    """Of the recorded cleaned texts, so that it holds without ftfy too; beyond the end they pad with other tokens."""
    told, expected = said(), load_file(GOLDEN)["ids"]
    tokens = reward.tokenizer(told["cleaned"], padding="max_length", truncation=True, max_length=24)
    for ours, theirs in zip(tokens.input_ids, expected.tolist(), strict=True):
        end = max(theirs)
        assert ours[: ours.index(end) + 1] == theirs[: theirs.index(end) + 1]
    assert expected[3, -1] == 556, "the long text is cut"


def test_texts_are_cleaned_as_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ftfy, all but the text that was decoded wrongly (the sixth)."""
    told = said()
    monkeypatch.setattr(hps, "_ftfy", lambda: None)
    ours = [clean(text) for text in told["texts"]]
    wrong = [i for i, (a, b) in enumerate(zip(ours, told["cleaned"], strict=True)) if a != b]
    assert wrong == [5]
    assert told["cleaned"][2] == "the artist's & office, <b>3 ab</b>"


def test_ftfy_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hps, "_ftfy", lambda: str.upper)
    assert clean("A  b &amp;") == "a b &"
    monkeypatch.undo()
    ftfy = pytest.importorskip("ftfy")
    assert clean("caf\u00c3\u00a9") == html.unescape(ftfy.fix_text("caf\u00c3\u00a9"))
    assert [clean(text) for text in said()["texts"]] == said()["cleaned"]


def test_repair() -> None:
    assert repair("\u2018a\u2019 \u201cb\u201d e\u0301 \uff38\u3000\ufb03") == "'a' \"b\" \u00e9 X ffi"


def test_longest_side() -> None:
    """Black bars are black before normalising; the odd pixel of a margin is on the right or at the bottom."""
    prepared = LongestSide(8)(torch.ones(1, 3, 8, 3))
    black, white = (normalise(torch.full((1, 3, 1, 1), value), CLIP_MEAN, CLIP_STD)[0, 0, 0, 0] for value in (0.0, 1.0))
    assert torch.equal(prepared[0, 0, 4], torch.stack([black] * 2 + [white] * 3 + [black] * 3))
    assert LongestSide(8)(torch.rand(2, 3, 40, 1)).shape == (2, 3, 8, 8)
    wide = LongestSide(8)(torch.ones(1, 3, 6, 16))[0, 0, :, 0]
    torch.testing.assert_close(wide, torch.stack([black] * 2 + [white] * 3 + [black] * 3), rtol=0, atol=1e-5)


def test_a_score_depends_on_nothing_but_its_own(reward: HPSv2) -> None:
    pixels, texts = torch.rand(7, 3, 40, 56), [*said()["texts"]]
    together = reward(Media(pixels), prompts(*texts)).total
    for chunk in (1, 3):
        torch.testing.assert_close(
            reward(Media(pixels), prompts(*texts), chunk=chunk).total, together, rtol=0, atol=1e-6
        )
    order = [3, 0, 6, 2, 5, 1, 4]
    shuffled = reward(Media(pixels[order]), prompts(*(texts[i] for i in order))).total
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-6)
    assert together.std() > 0.01


def smooth(reward: HPSv2, pixels: Tensor, text: Tensor) -> Tensor:
    """The score without rounding to 8 bit, in the model's precision."""
    features = reward.model.get_image_features(pixel_values=normalise(pixels, CLIP_MEAN, CLIP_STD)).pooler_output
    return (F.normalize(features, dim=1) * text).sum()


def test_gradient_against_finite_differences(folder: Path) -> None:
    """Of the smooth score in float64; and that of the reward on 8-bit levels, where the two agree, is the same."""
    reward, cpu = HPSv2(model=str(folder), processor=str(folder)), torch.device("cpu")
    levels = torch.randint(0, 256, (1, 3, 32, 32)).div(255).requires_grad_()
    total = reward(Media(levels), prompts("a red circle"), grad=True).total
    total.sum().backward()
    text = reward.embed_texts(["a red circle"], cpu).double()
    reward.model.double()
    pixels = levels.detach().double().requires_grad_()
    score = smooth(reward, pixels, text)
    score.backward()
    assert total.item() == pytest.approx(score.item(), abs=1e-5)
    assert levels.grad is not None
    assert pixels.grad is not None
    torch.testing.assert_close(levels.grad.double(), pixels.grad, rtol=1e-3, atol=1e-6)
    assert levels.grad.norm() > 0.1
    for _ in range(8):
        step = 1e-5 * torch.randn_like(pixels)
        with torch.no_grad():
            difference = (smooth(reward, pixels + step, text) - smooth(reward, pixels - step, text)) / 2
        assert difference.item() == pytest.approx((pixels.grad * step).sum().item(), rel=1e-3)


def test_bfloat16_is_near(reward: HPSv2, folder: Path) -> None:
    half = HPSv2(model=str(folder), processor=str(folder), dtype="bfloat16", offload=True)
    given = Media(torch.rand(2, 3, 30, 40))
    check_bfloat16(reward, half, given, prompts("a red circle", "two squares"), 0.02)


def test_a_broken_picture_has_no_score(reward: HPSv2) -> None:
    pixels = torch.rand(3, 3, 40, 32)
    pixels[1, 0, 3, 3] = torch.nan
    assert reward(Media(pixels), prompts("a", "b", "c")).valid.tolist() == [True, False, True]


def test_names_and_shapes_of_the_full_model() -> None:
    """HPSv2's own ViT-H/14, every name and shape, against transformers' CLIPModel of the sizes that these tell."""
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in said()["full_shapes"].items()}
        config = clip_config(state, 16, 16, "HPSv2")
        wanted = {name: tuple(value.shape) for name, value in CLIPModel(config).state_dict().items()}
        made = {name: tuple(value.shape) for name, value in to_transformers(state).items()}
    assert made == wanted
    assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (1280, 32)
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (224, 14)
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (1024, 24)
    assert (config.text_config.eos_token_id, config.projection_dim) == (49407, 1024)
    assert sum(int(np.prod(shape)) for shape in made.values()) == 986_109_441


def changed(folder: Path, to: Path, change: str) -> Path:
    state = torch.load(folder / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    if change == "fewer":
        del state["visual.transformer.resblocks.1.attn.in_proj_bias"]
    if change == "more":
        state["score_predictor.weight"] = torch.zeros(1)
    if change == "shape":
        state["visual.ln_post.bias"] = torch.zeros(63)
    if change == "other":
        state = {"layers.0.weight": torch.zeros(3)}
    save_file(state, to / "weights.safetensors")
    return to / "weights.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("fewer", r"lacks 3 \(vision_model.encoder.layers.1.self_attn.k_proj.bias, "),
        ("more", r"has 1 that do not belong to it \(score_predictor.weight\)"),
        ("shape", r"other shapes than the model: vision_model.post_layernorm.bias \[63\] for \[64\]"),
        ("other", "is no CLIP with vision transformer as open_clip saves it: it lacks visual.conv1.weight"),
    ],
)
def test_other_weights_are_refused(folder: Path, tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        HPSv2(model=str(changed(folder, tmp_path, change)), processor=str(folder))
    assert "\n" not in str(caught.value)


def test_safetensors_are_read_too(folder: Path, tmp_path: Path, reward: HPSv2) -> None:
    """To the bit; what is made of them is rounded by how they lie in memory, a file's being mapped."""
    other = HPSv2(model=str(changed(folder, tmp_path, "")), processor=str(folder))
    weights = reward.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in other.model.state_dict().items())
    media, asked = Media(torch.rand(2, 3, 32, 32)), prompts("a", "b")
    torch.testing.assert_close(other(media, asked).total, reward(media, asked).total, rtol=0, atol=1e-6)


def test_a_pickle_that_would_run_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "path": tmp_path}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        HPSv2(model=str(tmp_path / "weights.pt"), processor=str(folder))


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("held", [b"", b"not weights at all", b"PK" + bytes(40)])
def test_a_file_of_something_else(folder: Path, tmp_path: Path, name: str, held: bytes) -> None:
    (tmp_path / name).write_bytes(held)
    with pytest.raises(ValueError, match="cannot be read as weights: ") as told:
        HPSv2(model=str(tmp_path / name), processor=str(folder))
    assert "\n" not in str(told.value)


def test_a_pickle_of_no_tensors(folder: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": 3}}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="holds no tensors by name"):
        HPSv2(model=str(tmp_path / "weights.pt"), processor=str(folder))


def test_weights_that_are_not_there(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"HPS_v2_compressed.pt: name the weights, or a folder"):
        HPSv2("2.0", str(folder), str(folder))
    with pytest.raises(
        ValueError, match=r"HPS_v2.1_compressed.pt of 'no-one/nothing' cannot be had from the hub"
    ) as told:
        HPSv2(model="no-one/nothing", processor=str(folder))
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match="no-one/nothing has no tokenizer"):
        HPSv2(model=str(folder), processor="no-one/nothing")


def test_wrong_settings(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        HPSv2(model=str(folder), processor=str(folder), batch_size=0)
    make_tokenizer(said()["merges"][:-1]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has a vocabulary of 556, the weights .* one of 557"):
        HPSv2(model=str(folder), processor=str(tmp_path))


def test_card(reward: HPSv2) -> None:
    assert reward.card.licence == "Apache-2.0"
    assert reward.card.weights == "xswu/HPSv2 HPS_v2.1_compressed.pt"
    assert reward.differentiable
