"""What VideoReward and HPSv3 share: sizes, patches, names and shapes, against transformers old and new."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from qwen2vl_tiny import GOLDEN, SPECIAL, levels, published, save_base, shapes
from torch import nn
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

from flowalign.pictures import to_images
from rewards.pixels import CLIP_MEAN, CLIP_STD, normalise, resize
from rewards.qwen2vl import (
    Qwen2VLScorer,
    load_base,
    patchify,
    read_template,
    renamed,
    resize_frames,
    smart_resize,
    without,
)
from rewards.video_reward import MARKS


def test_patches_are_the_old_processors() -> None:
    frames = levels(1, 4, 3, 28, 56)
    assert torch.equal((patchify(frames) * 255).round().byte(), GOLDEN["video/patches"])
    first = patchify(normalise(frames, CLIP_MEAN, CLIP_STD))[0]
    torch.testing.assert_close(first, GOLDEN["video/first_patch"], rtol=0, atol=1e-6)


def test_an_odd_last_frame_is_doubled() -> None:
    frames = levels(1, 3, 3, 28, 56)
    assert torch.equal(patchify(frames), patchify(torch.cat([frames, frames[2:]])))


def test_sizes_are_qwens() -> None:
    for height, width in [(480, 832), (720, 1280), (256, 256), (300, 200), (64, 640), (1000, 30)]:
        ours = smart_resize(height, width, 100352, 200704)
        assert ours == theirs(height, width, 28, 100352, 200704)
        assert min(side % 28 == 0 for side in ours)
    assert smart_resize(480, 832, 100352, 200704) == (336, 588)
    with pytest.raises(ValueError, match="more than 200 times"):
        smart_resize(10, 2001, 784, 784)


@pytest.mark.parametrize("shape", [(28, 56), (50, 90), (84, 56)])
def test_patches_of_pictures_are_transformers(shape: tuple[int, int]) -> None:
    pixels = levels(9, 2, 3, *shape)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 200704})
    expected = processor(to_images(pixels), return_tensors="pt")["pixel_values"]
    prepared = normalise(resize(pixels, *smart_resize(*shape, 784, 200704)), CLIP_MEAN, CLIP_STD)
    torch.testing.assert_close(torch.cat([patchify(p[None]) for p in prepared]), expected, rtol=0, atol=1e-6)


def test_resize_of_frames() -> None:
    frames = levels(5, 2, 3, 40, 70).requires_grad_()
    resized, plain = resize_frames(frames, 56, 84), frames.detach().clone().requires_grad_()
    expected = F.interpolate(plain * 255, (56, 84), mode="bicubic", antialias=True) / 255
    assert (expected.amin() < 0) & (expected.amax() > 1), "so that clipping matters"
    far = (expected * 255 % 1 - 0.5).abs() > 1e-3  # from a tie
    rounded = (expected * 255).clamp(0, 255).round()
    torch.testing.assert_close((resized * 255)[far], rounded[far], rtol=0, atol=1e-4)
    weight = torch.randn(2, 3, 56, 84)
    (resized * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(frames.grad, plain.grad, rtol=0, atol=1e-5)
    pil = to_images(frames.detach())[0].resize((84, 56), Image.Resampling.BICUBIC)
    assert abs(float(resized[0].detach().mean() * 255) - float(torch.tensor(list(pil.tobytes())).float().mean())) < 0.1


@pytest.mark.parametrize(("size", "numbers"), [("2b", (1536, 8960, 12, 2)), ("7b", (3584, 18944, 28, 4))])
def test_names_and_shapes_at_full_size(tmp_path: Path, size: str, numbers: tuple[int, int, int, int]) -> None:
    """Against the names that transformers 4.45.2 has; the checkpoint has more rows than the config says."""
    rows = 151660 if size == "2b" else 151658
    config = published(*numbers, rows=151936 if size == "2b" else 152064)
    wanted = shapes(config, rows)
    lines = sorted(f"{name} {tuple(shape)}" for name, shape in wanted.items())
    assert list(hashlib.sha256("\n".join(lines).encode()).digest()) == GOLDEN[f"keys/{size}"].tolist()
    read = Qwen2VLConfig(**config)
    read.text_config.vocab_size = rows
    tokenizer = load_base(str(save_base(tmp_path)), "x")[1]
    with torch.device("meta"):
        scorer = Qwen2VLScorer(read, nn.Linear(numbers[0], 3, bias=False), tokenizer, MARKS, "", SPECIAL[-1])
        state = {name: torch.empty(shape) for name, shape in wanted.items()}
        state |= {"rm_head.weight": torch.empty(3, numbers[0]), "lm_head.weight": torch.empty(rows, numbers[0])}
    scorer.load(state, "it", torch.bfloat16)
    assert scorer.backbone.language_model.embed_tokens.weight.shape == (rows, numbers[0])
    assert scorer.rm_head.weight.dtype == torch.float32
    assert scorer.backbone.visual.merger.ln_q.weight.dtype == torch.bfloat16
    frequencies = scorer.backbone.language_model.rotary_emb.inv_freq
    assert frequencies.device.type == "cpu"
    assert frequencies[1].item() == pytest.approx(1e6 ** (-2 / 128))
    newer = {f"model.{name.replace('model.', 'language_model.', 1)}": value for name, value in state.items()
             if name.startswith(("model.", "visual."))}  # fmt: skip
    assert renamed(newer).keys() | {"rm_head.weight"} == renamed(state).keys()


def test_tokens_are_taken_out_of_texts() -> None:
    assert without("<|a<|b|>|>x", ["<|a|>", "<|b|>"]) == "x"
    assert without("a {prompt} <b>", ["<|b|>"]) == "a {prompt} <b>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<|VQ_reward|><|MQ_reward|><|TA_reward|>", "must hold each of"),
        ("{prompt}<|VQ_reward|><|TA_reward|>", "must hold each of"),
        ("{prompt}<|VQ_reward|><|VQ_reward|><|MQ_reward|><|TA_reward|>", "must hold each of"),
        ("{prompt}<|MQ_reward|><|VQ_reward|><|TA_reward|>", "in this order"),
        (None, "be read"),
    ],
)
def test_templates_that_cannot_be_used(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "it.txt").write_text(text)
    with pytest.raises(ValueError, match=f"x: the template .*it.txt .*{message}"):
        read_template(str(tmp_path / "it.txt"), "", MARKS, "x")


def test_templates_are_read_as_they_are(tmp_path: Path) -> None:
    """Spaces and line breaks too; the authors' name of the prompt is known."""
    text = "\n a  {text_prompt} <|VQ_reward|><|MQ_reward|>\n\n<|TA_reward|>\n\n"
    (tmp_path / "it.txt").write_text(text)
    assert read_template(str(tmp_path / "it.txt"), "", MARKS, "x") == text.replace("text_prompt", "prompt")
