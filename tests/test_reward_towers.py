"""Networks in half precision, and networks that are on the device for a call only: the same for all rewards on them."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_towers import check_bfloat16, save_clip, save_siglip, save_vit
from torch import Tensor, nn

from flowalign.config import ConfigError, build
from flowalign.records import Media, Prompts
from rewards import (
    BackgroundConsistency,
    CLIPImageScore,
    CLIPScore,
    DINOScore,
    GoalBaselineCLIP,
    LearntReward,
    PickScore,
    Reward,
    SigLIPScore,
    SubjectConsistency,
)
from rewards.sets import CLIPEmbedder
from rewards.towers import Dtype, Network, frozen

TEXTS = ("a red circle", "two blue squares", "a red circle", "a cross")
PROMPTS = Prompts(TEXTS, ({},) * 4)
CPU, META = torch.device("cpu"), torch.device("meta")
ERROR = 0.02  # of a cosine, see check_bfloat16
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    makers: dict[str, Callable[[Path], Path]] = {"clip": save_clip, "siglip": save_siglip, "vit": save_vit}
    return {name: str(save(tmp_path_factory.mktemp(name))) for name, save in makers.items()}


@dataclass(frozen=True)
class Kind:
    """A reward on a tiny network, and by how much a cosine's error changes its score."""

    make: Callable[[dict[str, str], Dtype, bool], Reward]
    scale: float = 1.0
    video: bool = False


KINDS = {
    "clip": Kind(lambda at, dtype, offload: CLIPScore(at["clip"], dtype=dtype, offload=offload)),
    "pickscore": Kind(lambda at, d, offload: PickScore(at["clip"], at["clip"], dtype=d, offload=offload), 14.3),
    "goal": Kind(lambda at, dtype, offload: GoalBaselineCLIP(model=at["clip"], dtype=dtype, offload=offload), 2.0),
    "learnt": Kind(lambda at, dtype, offload: LearntReward(at["clip"], dtype=dtype, offload=offload), 10.0),
    "siglip": Kind(lambda at, dtype, offload: SigLIPScore(at["siglip"], dtype=dtype, offload=offload)),
    "clip_i": Kind(lambda at, dtype, offload: CLIPImageScore(at["clip"], dtype=dtype, offload=offload)),
    "dino": Kind(lambda at, dtype, offload: DINOScore(at["vit"], 36, 32, dtype=dtype, offload=offload)),
    "subject": Kind(lambda at, dtype, offload: SubjectConsistency(at["vit"], dtype=dtype, offload=offload), video=True),
    "background": Kind(
        lambda at, dtype, offload: BackgroundConsistency(at["clip"], dtype=dtype, offload=offload), video=True
    ),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def media(kind: Kind) -> Media:
    shape = (4, 3, 3, 40, 44) if kind.video else (4, 3, 40, 44)
    references = tuple(torch.rand(1 + i % 2, 3, 36, 48) for i in range(4))
    return Media(torch.rand(shape), 8.0 if kind.video else None, references)


def slope(reward: Reward, given: Media) -> Tensor:
    pixels = given.pixels.clone().requires_grad_()
    total = reward(Media(pixels, given.fps, given.references), PROMPTS, grad=True).total
    (first,) = torch.autograd.grad(total.sum(), pixels, retain_graph=True)
    (second,) = torch.autograd.grad(total.sum(), pixels)
    assert torch.equal(first, second)
    return first


def test_bfloat16_is_near(kind: Kind, folders: dict[str, str]) -> None:
    full, half = kind.make(folders, "float32", False), kind.make(folders, "bfloat16", False)
    check_bfloat16(full, half, media(kind), PROMPTS, ERROR * kind.scale)


def test_scales_of_logits_stay_float32(folders: dict[str, str]) -> None:
    for reward in (PickScore(folders["clip"], folders["clip"], dtype="bfloat16"), SigLIPScore(folders["siglip"])):
        numbers = {name: value for name, value in reward.model.named_parameters() if value.numel() == 1}
        assert {value.dtype for value in numbers.values()} == {torch.float32}
        assert "logit_scale" in numbers
    weights = PickScore(folders["clip"], folders["clip"], dtype="bfloat16").model.vision_model.parameters()
    assert {value.dtype for value in weights} == {torch.bfloat16}
    exact = PickScore(folders["clip"], folders["clip"]).model.logit_scale
    half = PickScore(folders["clip"], folders["clip"], dtype="bfloat16").model.logit_scale
    assert torch.equal(exact, half)
    assert not torch.equal(exact.bfloat16().float(), exact), "so that rounding it would be seen"


def test_offloaded_scores_and_gradients_are_the_same(kind: Kind, folders: dict[str, str]) -> None:
    held, offloaded = kind.make(folders, "float32", False), kind.make(folders, "float32", True)
    given = media(kind)
    assert torch.equal(offloaded(given, PROMPTS).total, held(given, PROMPTS).total)
    assert torch.equal(slope(offloaded, given), slope(held, given))
    assert torch.equal(offloaded(given, PROMPTS, chunk=3).total, held(given, PROMPTS, chunk=3).total)


def test_an_offloaded_network_is_on_the_device_for_a_call_only(folders: dict[str, str]) -> None:
    """On a device that keeps no numbers: a network that had been moved there and back would have lost its own."""
    reward = CLIPScore(folders["clip"], offload=True)
    before = {name: (value, value.clone()) for name, value in reward.model.state_dict(keep_vars=True).items()}
    pixels = torch.zeros(2, 3, 40, 44, device=META, requires_grad=True)
    seen = set()

    def embed() -> Tensor:
        seen.update(value.device for value in (*reward.model.parameters(), *reward.model.buffers()))
        weight = reward.model.visual_projection.weight
        made = reward.network.lend(META, lambda: reward.embed_pictures(pixels))
        assert reward.model.visual_projection.weight is weight, "a call in a call is lent nothing again"
        return made

    made = reward.network.lend(META, embed)
    assert made.device == META
    assert seen == {META}
    for name, value in reward.model.state_dict(keep_vars=True).items():
        assert value is before[name][0]
        assert torch.equal(value, before[name][1])
    (gradient,) = torch.autograd.grad(made.sum(), pixels)
    assert gradient.device == META


def test_a_network_comes_back_from_a_call_that_fails(folders: dict[str, str]) -> None:
    reward = CLIPScore(folders["clip"], offload=True)

    def fail() -> Tensor:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        reward.network.lend(META, fail)
    assert {value.device for value in reward.model.parameters()} == {CPU}


def test_threads_wait_for_one_another() -> None:
    network = Network(frozen(nn.Linear(4, 4)), offload=True)
    own = network.model.weight

    def call() -> set[torch.device]:
        found = {network.model.weight.device}
        time.sleep(0.005)
        return found | {network.model.weight.device}

    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(network.lend, META, call) for _ in range(24)]
        assert all(one.result() == {META} for one in calls)
    assert network.model.weight is own


def test_an_embedder_of_sets(folders: dict[str, str]) -> None:
    pixels = torch.rand(3, 3, 40, 44)
    full, half = CLIPEmbedder(folders["clip"]), CLIPEmbedder(folders["clip"], dtype="bfloat16", offload=True)
    error = (full(pixels) - half(pixels)).norm(dim=1)
    assert ((error > 0) & (error < ERROR)).all()
    same = CLIPEmbedder(folders["clip"], offload=True)
    assert torch.equal(same(pixels), full(pixels))


def test_texts_are_embedded_once(folders: dict[str, str]) -> None:
    reward = CLIPScore(folders["clip"], dtype="bfloat16", offload=True)
    given = media(KINDS["clip"])
    first = reward(given, PROMPTS).total
    assert sorted(reward._embedded) == sorted({*TEXTS})
    assert all(value.dtype == torch.float32 and value.device == CPU for value in reward._embedded.values())
    for parameter in reward.model.text_model.parameters():
        parameter.data.zero_()
    assert torch.equal(reward(given, PROMPTS).total, first)


def test_training_is_in_float32(folders: dict[str, str], tmp_path: Path) -> None:
    for reward in (LearntReward(folders["clip"], dtype="bfloat16"), LearntReward(folders["clip"], offload=True)):
        with pytest.raises(ValueError, match="a reward is trained in float32 and without offload"):
            reward.train_on(True)
        with pytest.raises(ValueError, match="a reward is saved in float32"):
            reward.save(tmp_path / "reward")
    assert not (tmp_path / "reward").exists()


def test_from_a_config(folders: dict[str, str]) -> None:
    given = {"model": folders["clip"], "processor": folders["clip"]}
    reward = build(PickScore, given | {"dtype": "bfloat16", "offload": True})
    assert reward.model.visual_projection.weight.dtype == torch.bfloat16
    assert reward.network.offload
    with pytest.raises(ConfigError, match="dtype"):
        build(PickScore, given | {"dtype": "half"})


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_on_a_gpu(kind: Kind, folders: dict[str, str], dtype: Dtype) -> None:
    """Pictures on the GPU, weights only during a call; the graph has what it needs, and frees it with itself."""
    given, reward = media(kind), kind.make(folders, dtype, True)
    there = Media(given.pixels.cuda(), given.fps, tuple(one.cuda() for one in given.references or ()))
    expected = kind.make(folders, "float32", False)
    atol = 1e-3 if dtype == "float32" else ERROR
    torch.testing.assert_close(
        reward(there, PROMPTS).total.cpu(), expected(given, PROMPTS).total, rtol=0, atol=atol * kind.scale
    )
    assert slope(reward, there).isfinite().all()
    assert {value.device for value in reward.network.parameters()} == {CPU}
