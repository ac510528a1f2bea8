"""Grounding DINO as a finder: inputs and boxes against transformers' own, on a tiny random network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
)
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

from flowalign.pictures import to_images
from flowalign.records import Media, Prompts
from rewards import GroundingDINO, Position, Resize
from rewards.finders import input_size, surest

WORDS = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 1012: ".", 1029: "?", 5: "red", 6: "circle", 7: "cup"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Grounding DINO with random weights, as the hub has one; it knows BERT's numbers of "." and "?"."""
    path = tmp_path_factory.mktemp("grounding-dino")
    tokenizer = BertTokenizer(vocab={WORDS.get(i, f"[unused{i}]"): i for i in range(1030)})
    swin = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2, "image_size": 32}
    layers = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes = {"d_model": 32, "num_queries": 6, "encoder_layers": 1, "decoder_layers": 2, "max_text_len": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = GroundingDinoConfig(
        backbone_config={"model_type": "swin", "out_indices": [2, 3, 4], **swin},
        text_config={"model_type": "bert", "vocab_size": 1030, **layers},
        **sizes,
        **heads,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = GroundingDinoForObjectDetection(config)
        for parameter in model.parameters():
            parameter.data.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (50, 50), (30, 90)])
def test_boxes_are_transformers_own(folder: Path, height: int, width: int) -> None:
    """One picture at a time through transformers' processor on PIL, and the surest of the boxes that it reads out."""
    pixels = torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(1)).mul(255).round() / 255
    names = ["Red circle", "cup.", "a red cup"]
    finder = GroundingDINO(str(folder), threshold=0.0, short_side=96, batch_size=2)
    images = GroundingDinoImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 159})
    processor = GroundingDinoProcessor(images, finder.tokenizer)
    made = finder.find(pixels, names)
    for i, image in enumerate(to_images(pixels)):
        text = names[i].lower().rstrip(".") + "."
        given = processor(images=image, text=text, return_tensors="pt")
        with torch.no_grad():
            output = finder.model(**given)
        (found,) = processor.post_process_grounded_object_detection(
            output, given.input_ids, threshold=0.0, target_sizes=[(height, width)]
        )
        expected = found["boxes"][found["scores"].argmax()]
        torch.testing.assert_close(made[i], expected, atol=1e-3, rtol=1e-4)
        assert 0 < found["scores"].max() < 1
    assert not torch.allclose(made[0], made[1], atol=0.1)  # the network looks at what it is given


def test_the_surest_box_above_the_threshold() -> None:
    logits = torch.full((2, 3, 4), -torch.inf)
    logits[0, 1, 2], logits[0, 2, 0], logits[1, 0, 0] = 2.0, 1.0, -1.0
    boxes = torch.tensor([[0.5, 0.5, 1, 1], [0.25, 0.5, 0.5, 0.2], [0.1, 0.1, 0.1, 0.1]]).repeat(2, 1, 1)
    found = surest(logits, boxes, 0.3, height=100, width=40)
    torch.testing.assert_close(found[0], torch.tensor([0.0, 40, 20, 60]))
    assert found[1].isnan().all()  # the sigmoid of -1 is 0.27


@pytest.mark.parametrize(
    ("height", "width"), [(512, 512), (480, 640), (640, 480), (500, 1500), (1333, 401), (799, 1332)]
)
def test_sizes_of_the_input(height: int, width: int) -> None:
    assert input_size(height, width, 800) == get_size_with_aspect_ratio((height, width), 800, 1333)


def test_detectors_that_are_none(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="holds a model of type 'vit'"):
        GroundingDINO(str(tmp_path))
    with pytest.raises(ValueError, match="can be had neither as a folder nor from the hub"):
        GroundingDINO(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="threshold must be in"):
        GroundingDINO(str(folder), threshold=1.0)
    with pytest.raises(ValueError, match="looks for an object by its name"):
        GroundingDINO(str(folder), short_side=96).find(torch.rand(1, 3, 32, 32), [" "])


def test_a_reward_with_the_detector(folder: Path) -> None:
    """A picture and itself: nothing has moved or grown; the network stays without gradients."""
    finder = GroundingDINO(str(folder), threshold=0.0, short_side=96)
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    given = Media(pixels, references=(pixels,)), Prompts(("",), ({"object": "cup", "factor": 1},))
    assert Position(finder)(*given).total.item() == 1
    assert Resize(finder)(*given).total.item() == pytest.approx(1)
    assert not any(parameter.requires_grad for parameter in finder.model.parameters())
