"""MPS is the authors' code to the last bits: scores, gradients, and the names of its weights.

The numbers are those of their evaluation script, on weights drawn here as they were there (scripts/record_rewards).
"""

from __future__ import annotations

import copy
import json
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flowalign.records import Media, Prompts
from rewards.mps import MPS, OVERALL, kept
from rewards.mps_tower import Texts, build_tower, read_module, renamed, rotary_angles
from rewards.pixels import CLIP_MEAN, CLIP_STD, normalise

GOLDEN = load_file(Path(__file__).parent / "golden" / "rewards" / "mps.safetensors")
PICTURES = torch.stack([GOLDEN[f"picture_{i}"] for i in range(3)]).permute(0, 3, 1, 2).float() / 255
TEXTS = ("a red circle", "7 blue", "", "a text that is longer than it can be")
CONDITION = "a"
POSITIONS = "model.text_model.embeddings.position_embedding.weight"
TEXT = {
    "vocab_size": 514, "max_position_embeddings": 16, "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu", "bos_token_id": 512, "eos_token_id": 513,
    "pad_token_id": 513,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8, "hidden_act": "gelu",
}  # fmt: skip
CONFIG = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)


def shapes(name: str) -> dict[str, list[int]]:
    """Names and shapes of the authors' state dict, at one of two sizes."""
    return json.loads(zlib.decompress(GOLDEN[name].numpy().tobytes()))


def made_weights() -> dict[str, Tensor]:
    """The weights that the authors' model had when it was recorded."""
    draw, made = np.random.RandomState(7), {}
    for name, shape in sorted(shapes("tiny_shapes").items()):
        if name.endswith(("position_ids", "inv_freq", "fn.norm.bias", "logit_scale")):
            continue
        fan = int(np.prod(shape[1:])) if len(shape) > 1 and "embed" not in name.rsplit(".", 2)[-2] else 4
        value = draw.standard_normal(shape) / np.sqrt(fan)
        if len(shape) == 1:
            value = 0.2 * value + ("norm" in name and name.endswith("weight"))
        if name == POSITIONS:
            value *= 0.05  # so that words differ more than places, and some are far from the condition
        made[name] = torch.from_numpy(value.astype(np.float32))
    made["model.logit_scale"] = torch.tensor(2.6592)
    for layer in range(2):
        made |= {f"cross_model.layers.{layer}.{block}.fn.norm.bias": torch.zeros(24) for block in (0, 1)}
        frequencies = 10000 ** (-torch.arange(0, 8, 2) / 8)
        made[f"cross_model.layers.{layer}.1.fn.rotary_emb.inv_freq"] = frequencies
    return made


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processor")
    byte_tokenizer(16).save_pretrained(folder)
    CONFIG.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights with imscore's prefix, and a buffer that old transformers saved."""
    folder = tmp_path_factory.mktemp("weights")
    weights = made_weights() | {"model.text_model.embeddings.position_ids": torch.arange(16)[None]}
    save_file({f"mps.{name}": value for name, value in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def reward(folder: Path, processor: Path) -> MPS:
    return MPS(str(folder), str(processor), CONDITION, batch_size=3)


def prompts(*texts: str) -> Prompts:
    return Prompts(texts, ({},) * len(texts))


@pytest.mark.parametrize("i", range(3))
def test_scores_are_the_authors(reward: MPS, i: int) -> None:
    expected = GOLDEN["scores"][i]
    assert expected.std() > 0.1
    scores = reward(Media(PICTURES[i].expand(4, -1, -1, -1)), prompts(*TEXTS))
    torch.testing.assert_close(scores.total, expected, rtol=1e-5, atol=2e-5)
    assert scores.parts["mps"].equal(scores.total)
    assert scores.valid.all()


def test_gradients_are_the_authors(reward: MPS) -> None:
    pixels = PICTURES[:1].clone().requires_grad_()
    (slope,) = torch.autograd.grad(reward(Media(pixels), prompts(TEXTS[0]), grad=True).total.sum(), pixels)
    expected = GOLDEN["gradient"] / torch.tensor(CLIP_STD)[:, None, None]
    assert expected.abs().max() > 0.05
    assert (slope - expected).norm() / expected.norm() < 1e-5
    assert all(parameter.grad is None for parameter in reward.tower.parameters())


def test_half_weights_are_read_as_the_authors_run_them(processor: Path, tmp_path: Path) -> None:
    """Their float16 scores, within what float16 leaves of numbers up to 4."""
    save_file({name: value.half() for name, value in made_weights().items()}, tmp_path / "model.safetensors")
    reward = MPS(str(tmp_path), str(processor), CONDITION)
    scores = torch.stack([reward(Media(one.expand(4, -1, -1, -1)), prompts(*TEXTS)).total for one in PICTURES])
    torch.testing.assert_close(scores, GOLDEN["half_scores"].float(), rtol=0, atol=0.02)
    assert reward.tower.layers[0].own.precision == torch.float16
    rounded, exact = (rotary_angles(200, 8, dtype) for dtype in (torch.float16, torch.float32))
    assert torch.equal(rounded, rounded.half().float())
    assert 0.01 < (rounded - exact).abs().max() < 0.1


def test_a_token_far_from_the_condition_is_not_seen() -> None:
    """Dot products of 4, 1 and -2 with the nearest of two words: a fourth of the largest is kept below 1/4 only."""
    states = torch.tensor([[[4.0, 0.0], [1.0, -3.0], [-2.0, -9.0]]])
    condition = torch.tensor([[1.0, 0.0], [0.0, 0.1]])
    assert kept(states, condition, 0.2).tolist() == [[True, True, False]]
    assert kept(states, condition, 0.3).tolist() == [[True, False, False]]
    other = torch.cat([states, 100 * states])
    assert kept(other, condition, 0.3).tolist() == [[True, False, False]] * 2  # each by its own largest


def test_masked_tokens_do_not_matter_and_others_do(reward: MPS) -> None:
    texts = reward.read(TEXTS[:1], torch.device("cpu"))
    shown = reward.prepare(PICTURES[:1])
    before = reward.tower(shown, texts)
    dropped = int(texts.keep[0].long().argmin())
    assert not texts.keep[0, dropped]
    for token, moves in ((dropped, False), (int(texts.keep[0].long().argmax()), True)):
        states = texts.states.clone()
        states[0, token] += 1
        assert bool((reward.tower(shown, Texts(states, texts.ends, texts.keep)) - before).abs() > 1e-4) == moves


def test_gradient_against_finite_differences(reward: MPS) -> None:
    """Pictures of the network's size, so that nothing is resized; differences in float64."""
    pixels = PICTURES[1:2].clone().requires_grad_()
    (slope,) = torch.autograd.grad(reward(Media(pixels), prompts(TEXTS[1]), grad=True).total.sum(), pixels)
    tower, texts = copy.deepcopy(reward.tower).double(), reward.read([TEXTS[1]], torch.device("cpu"))
    given = Texts(texts.states.double(), texts.ends.double(), texts.keep)
    generator = torch.Generator().manual_seed(4)
    for _ in range(8):
        direction = torch.randn(pixels.shape, dtype=torch.float64, generator=generator)
        shifted = (normalise(pixels.double() + e * direction, CLIP_MEAN, CLIP_STD) for e in (1e-4, -1e-4))
        up, down = (tower(one, given) for one in shifted)
        measured = ((up - down) / 2e-4).item()
        assert (slope * direction).sum().item() == pytest.approx(measured, rel=1e-3, abs=1e-5)


def test_the_gradient_climbs_and_reaches_pixels_that_are_resized(reward: MPS) -> None:
    pixels = torch.rand(1, 3, 48, 60, generator=torch.Generator().manual_seed(5)).mul(0.6).add(0.2).requires_grad_()
    before = reward(Media(pixels), prompts(TEXTS[0]), grad=True).total
    (slope,) = torch.autograd.grad(before.sum(), pixels)
    assert (slope != 0).float().mean() > 0.5
    step = 0.05 * slope / slope.abs().max()
    up, down = (reward(Media(pixels.detach() + sign * step), prompts(TEXTS[0])).total for sign in (1, -1))
    assert down + 0.001 < before < up - 0.001


def test_a_score_does_not_depend_on_its_batch(reward: MPS) -> None:
    pixels = torch.rand(7, 3, 40, 34, generator=torch.Generator().manual_seed(6))
    asked = prompts(*TEXTS, "a", "red circles", TEXTS[0])
    together = reward(Media(pixels), asked).total
    assert together.std() > 0.05
    singles = torch.cat([reward(Media(pixels[i : i + 1]), asked.rows([i])).total for i in range(7)])
    torch.testing.assert_close(singles, together, rtol=0, atol=1e-5)
    order = [3, 6, 0, 2, 5, 1, 4]
    shuffled = reward(Media(pixels).rows(order), asked.rows(order), chunk=2).total
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-5)


def test_the_condition_matters(folder: Path, processor: Path, reward: MPS) -> None:
    media, asked = Media(PICTURES), prompts(*TEXTS[:3])
    open_to_all = MPS(str(folder), str(processor), CONDITION, threshold=0.0)(media, asked).total
    other = MPS(str(folder), str(processor), "face, hair")(media, asked).total
    assert (open_to_all - reward(media, asked).total).abs().max() > 1e-3
    assert (other - reward(media, asked).total).abs().max() > 1e-3
    assert MPS(str(folder), str(processor)).condition == OVERALL
    assert (len(OVERALL.split(", ")), OVERALL[-7:]) == (22, "things.")


def test_all_weights_at_full_size() -> None:
    """Every name and shape of the authors' state dict has its place, and nothing of the tower stays empty."""
    theirs = shapes("full_shapes")
    weights = {name: torch.empty(shape, device="meta") for name, shape in theirs.items()}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    config = CLIPConfig(text_config=text, vision_config=vision | {"patch_size": 14}, projection_dim=1024)
    with torch.device("meta"):
        tower = build_tower(renamed(weights), config, "full")
    assert len(tower.layers) == 4
    assert tower.layers[0].own.sizes == (1024, 64, 64, 8192)
    clip = sum(parameter.numel() for parameter in tower.clip.parameters())
    assert clip == 986_109_441
    assert sum(parameter.numel() for parameter in tower.layers.parameters()) == 118_505_472


class Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn, self.helper = fn, print  # a function beside the weights, as the real file has some


def pickled_module(path: Path) -> None:
    """A torch file of a whole module with the tiny weights, made of classes that cannot be imported later."""
    module = types.ModuleType("trainer")
    module.Residual = type("Residual", (Residual,), {"__module__": "trainer"})
    sys.modules["trainer"] = module
    root = nn.Module()
    root.model = CLIPModel(CONFIG)
    for name, value in made_weights().items():
        *parents, last = name.split(".")
        at = root
        for parent in parents:
            if parent not in dict(at.named_children()):
                at.add_module(
                    parent, module.Residual(nn.Module()) if parent in "01" and at is not root else nn.Module()
                )
            at = at.get_submodule(parent)
        if last in dict(at.named_parameters(recurse=False)):
            at.get_parameter(last).data = value
        else:
            at.register_buffer(last, value)
    torch.save(root, path)
    del sys.modules["trainer"]


def test_the_authors_pickled_module_is_read_without_its_code(processor: Path, tmp_path: Path, reward: MPS) -> None:
    path = tmp_path / "MPS_overall_checkpoint.pth"
    pickled_module(path)
    with pytest.raises(ModuleNotFoundError, match="trainer"):
        torch.load(path, weights_only=False)
    read = read_module(path)
    assert {name for name in read if not name.endswith("position_ids")} == set(made_weights())
    other = MPS(str(path), str(processor), CONDITION)
    media, asked = Media(PICTURES), prompts(*TEXTS[:3])
    assert torch.equal(other(media, asked).total, reward(media, asked).total)


class Harmful:
    def __reduce__(self) -> tuple:
        return print, ("run",)


def test_what_is_pickled_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model.logit_scale": torch.zeros(1), "harm": Harmful()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth holds neither"):
        read_module(tmp_path / "bad.pth")
    assert capsys.readouterr().out == ""


def test_scores_are_float32_under_autocast(reward: MPS) -> None:
    media, asked = Media(PICTURES), prompts(*TEXTS[:3])
    plain = reward(media, asked).total
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward(media, asked).total, plain)


def test_half_precision_and_lent_weights(folder: Path, processor: Path, reward: MPS) -> None:
    """Scores with logit scale 14: bfloat16 cosines are off by a percent; lent weights are the same to the bit."""
    media, asked = Media(PICTURES), prompts(*TEXTS[:3])
    plain = reward(media, asked).total
    low = MPS(str(folder), str(processor), CONDITION, dtype="bfloat16")(media, asked).total
    assert low.dtype == torch.float32
    assert 0 < (low - plain).abs().max() < 0.3
    lent = MPS(str(folder), str(processor), CONDITION, batch_size=3, offload=True)
    assert torch.equal(lent(media, asked).total, plain)


def test_a_broken_picture_has_no_score(reward: MPS) -> None:
    pixels = PICTURES.clone()
    pixels[1, 0, 5, 5] = torch.nan
    assert reward(Media(pixels), prompts(*TEXTS[:3])).valid.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cross_model.layers.1.0.fn.to_out.weight": None}, r"lacks 1 \(layers.1.cross.to_out.weight\)"),
        ({"model.extra": torch.zeros(3)}, r"has 1 that do not belong to it \(clip.extra\)"),
        ({"model.logit_scale": torch.zeros(3)}, "another shape than the model's: clip.logit_scale"),
        ({"cross_model.layers.0.0.fn.to_kv.weight": None}, "no weights of MPS: it lacks layers.0.cross.to_kv.weight"),
    ],
)
def test_other_weights_are_refused(processor: Path, tmp_path: Path, change: dict, message: str) -> None:
    weights = {name: value for name, value in (made_weights() | change).items() if value is not None}
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        MPS(str(tmp_path / "weights.pth"), str(processor))


def test_bad_arguments(folder: Path, processor: Path, tmp_path: Path, reward: MPS) -> None:
    for name in ("./no/such/folder", "no-one/no-such-model"):
        with pytest.raises(ValueError, match=name) as caught:
            MPS(name, str(processor))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"threshold must be at least 0 and below 1, got 1\.0"):
        MPS(str(folder), str(processor), threshold=1.0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        MPS(str(folder), str(processor), batch_size=0)
    with pytest.raises(ValueError, match="has no tokenizer"):
        MPS(str(folder), str(folder))
    byte_tokenizer(16).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"config\.json of type 'bert', MPS needs that of a CLIP"):
        MPS(str(folder), str(tmp_path))
    with pytest.raises(ValueError, match="MPS scores pictures"):
        reward(Media(torch.rand(1, 2, 3, 32, 32)), prompts("a"))
