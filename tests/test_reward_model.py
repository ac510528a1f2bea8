"""Training a reward: the losses by hand, calibration by hand, what is saved, and that preferences are learnt."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowalign.randomness import key_generator
from flowalign.records import Media, Prompts
from flowalign.shapes.scenes import Group, Spec, caption, corrupt, random_spec, render
from rewards.clip import CLIPScore
from rewards.preference import LearntReward, Pair, PreferenceHead, load_pairs
from trainers.reward_model import (
    FIRST,
    SECOND,
    TIE,
    RewardFit,
    agreement,
    bradley_terry_loss,
    calibration_error,
    fit,
    outcomes,
    rao_kupper_log_probs,
    rao_kupper_loss,
)

SIZES = ("there is a small red circle", "there is a large red circle")


def test_bradley_terry_by_hand() -> None:
    win, lose = torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0.0, 0.0, 1.0])
    loss = bradley_terry_loss(win, lose)
    expected = [math.log(1 + math.exp(-1)), math.log(2), math.log(1 + math.exp(2))]
    assert loss.tolist() == pytest.approx(expected)
    assert bradley_terry_loss(win, lose, margin=1.0)[0].item() == pytest.approx(math.log(2))
    probability = (-bradley_terry_loss(win, lose)).exp() + (-bradley_terry_loss(lose, win)).exp()
    torch.testing.assert_close(probability, torch.ones(3))


def test_rao_kupper_by_hand() -> None:
    """theta = 2, e^a = 3, e^b = 1: 3/5, 1/7 and 3 * 3 / (5 * 7)."""
    a, b, log_theta = torch.tensor([3.0]).log(), torch.zeros(1), torch.tensor(2.0).log()
    probabilities = [value.exp().item() for value in rao_kupper_log_probs(a, b, log_theta)]
    assert probabilities == pytest.approx([3 / 5, 9 / 35, 1 / 7])
    for label, expected in zip((FIRST, TIE, SECOND), probabilities, strict=True):
        loss = rao_kupper_loss(a, b, torch.tensor([label]), log_theta)
        assert loss.item() == pytest.approx(-math.log(expected))


def test_rao_kupper_of_equals_at_videoalign_s_theta() -> None:
    """theta = 5 and no difference: 1/6 to win or lose, 2/3 to tie."""
    a, log_theta = torch.zeros(1), torch.tensor(5.0).log()
    losses = [rao_kupper_loss(a, a, torch.tensor([label]), log_theta).item() for label in (FIRST, TIE, SECOND)]
    assert losses == pytest.approx([1.7918, 0.4055, 1.7918], abs=1e-4)


def test_rao_kupper_sums_to_one_and_is_symmetric() -> None:
    a, b, log_theta = torch.randn(50).double() * 3, torch.randn(50).double() * 3, torch.tensor(0.4).double()
    win, tie, lose = rao_kupper_log_probs(a, b, log_theta)
    torch.testing.assert_close(win.exp() + tie.exp() + lose.exp(), torch.ones(50).double())
    swapped = rao_kupper_log_probs(b, a, log_theta)
    torch.testing.assert_close(torch.stack(swapped), torch.stack((lose, tie, win)))


def test_rao_kupper_without_ties_is_bradley_terry() -> None:
    a = torch.randn(20, requires_grad=True)
    b, label = torch.randn(20), torch.tensor([FIRST, SECOND] * 10)
    loss = rao_kupper_loss(a, b, label, torch.zeros(()))
    won = label == FIRST
    torch.testing.assert_close(loss, bradley_terry_loss(a.where(won, b), b.where(won, a)))
    loss.sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()
    assert (a.grad[won] < 0).all()
    assert (a.grad[~won] > 0).all()


def test_agreement_and_calibration_by_hand() -> None:
    difference = torch.tensor([0.85, 0.85, 0.25, 0.25, 0.5]).logit()
    won = torch.tensor([True, False, False, False, True])
    assert agreement(difference, won) == pytest.approx((1 + 0 + 1 + 1 + 0.5) / 5)
    expected = (2 * abs(0.85 - 0.5) + 2 * abs(0.25 - 0.0) + abs(0.5 - 1)) / 5
    assert calibration_error(difference, won) == pytest.approx(expected)
    certain = torch.tensor([1e4, -1e4])
    assert calibration_error(certain, torch.tensor([True, False])) == 0
    assert calibration_error(certain, torch.tensor([False, True])) == 1


def test_the_untrained_reward_is_scaled_clip() -> None:
    media = Media(torch.rand(2, 3, 32, 32))
    asked = Prompts(SIZES, ({}, {}))
    cosine = CLIPScore("shapes")(media, asked).total
    for hidden in (0, 7):
        scores = LearntReward("shapes", hidden, scale=4.0)(media, asked)
        torch.testing.assert_close(scores.total, 4 * cosine, rtol=0, atol=1e-5)
        assert [*scores.parts] == ["learnt"]


def drawn(count: int, seed: int, kinds: tuple[str, ...], ties: bool = False) -> list[Pair]:
    """Pairs of a right picture and one of the corrupted meaning, in either order; or of two right ones, as ties."""
    rng, pairs = key_generator(seed, "test_pairs"), []
    for i in range(count):
        spec = random_spec(rng, kinds)
        tie = ties and i % 3 == 0
        made = [torch.from_numpy(render(s, rng)) / 255 for s in (spec, spec if tie else corrupt(spec, rng))]
        swap = bool(rng.integers(2))
        label = "tie" if tie else "second" if swap else "first"
        pairs.append(Pair(caption(spec, rng), *(made[::-1] if swap else made), label))  # type: ignore[arg-type]
    return pairs


def sized(count: int, seed: int) -> list[Pair]:
    """Two right pictures, in either order; the judge prefers large shapes, of which the prompt says nothing."""
    rng, pairs = key_generator(seed, "sized_pairs"), []
    for _ in range(count):
        spec = random_spec(rng, ("single",))
        meant = [replace(spec, groups=(replace(spec.groups[0], size=size),)) for size in ("large", "small")]
        large, small = (torch.from_numpy(render(one, rng)) / 255 for one in meant)
        swap = bool(rng.integers(2))
        first, second = (small, large) if swap else (large, small)
        pairs.append(Pair(caption(spec, rng), first, second, "second" if swap else "first"))
    return pairs


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("hidden", [0, 16])
def test_a_head_learns_preferences(hidden: int, seed: int) -> None:
    """Zero-shot CLIP prefers small shapes (0.10 to 0.15 agree); seen after training: 1.00 on each seed."""
    learnt(LearntReward("shapes", hidden), 96, seed, RewardFit(20, 32, 0.1 if hidden == 0 else 0.02, 0.0, full=False))


def test_all_of_the_model_learns_preferences() -> None:
    """Seen: 1.00 on each of seeds 0, 1, 2."""
    learnt(LearntReward("shapes"), 64, 0, RewardFit(3, 16, 5e-4, 0.0))


def learnt(reward: LearntReward, count: int, seed: int, settings: RewardFit) -> None:
    report = fit(reward, sized(count, seed), sized(60, seed + 50), settings)
    assert report.before < 0.3
    assert report.after > 0.9
    assert report.calibration < 0.15
    assert report.losses[-1] < report.losses[0]
    assert (report.pairs, report.log_theta) == (60, 0.0)
    assert not any(p.requires_grad for p in [*reward.model.parameters(), *reward.head.parameters()])


def test_only_the_head_changes_unless_all_is_tuned() -> None:
    pairs, reward = drawn(8, 0, ("single",)), LearntReward("shapes")
    before = {name: value.clone() for name, value in reward.model.state_dict().items()}
    fit(reward, pairs, pairs, RewardFit(1, 4, 0.01, full=False))
    assert all(torch.equal(value, before[name]) for name, value in reward.model.state_dict().items())
    fit(reward, pairs, pairs, RewardFit(1, 4, 1e-3, full=True))
    changed = {name for name, value in reward.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"visual_projection.weight", "text_projection.weight"} <= changed
    assert "logit_scale" not in changed


def test_theta_is_learnt_from_ties() -> None:
    some, none = drawn(48, 3, ("single",), ties=True), drawn(48, 3, ("single",))
    settings = RewardFit(20, 16, 0.02, full=False)
    report = fit(LearntReward("shapes"), some, some, settings)
    assert report.pairs == 32
    assert report.after > 0.9
    assert report.log_theta > 0.1
    assert fit(LearntReward("shapes"), none, none, settings).log_theta == 0


def test_training_is_repeated_by_its_seed_and_augmented_by_it() -> None:
    pairs = drawn(12, 0, ("single",))

    def mirrored(pair: Pair, rng: np.random.Generator) -> Pair:
        return replace(pair, first=pair.first.flip(2), second=pair.second.flip(2)) if rng.integers(2) else pair

    def losses(seed: int, augment: bool) -> tuple[float, ...]:
        settings = RewardFit(1, 4, 1e-3, seed=seed)
        return fit(LearntReward("shapes"), pairs, pairs, settings, mirrored if augment else None).losses

    assert losses(0, False) == losses(0, False) != losses(1, False)
    assert losses(0, True) == losses(0, True) != losses(0, False)
    with pytest.raises(ValueError, match="augment needs full"):
        fit(LearntReward("shapes"), pairs, pairs, RewardFit(full=False), mirrored)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    pairs, reward = drawn(8, 0, ("single",)), LearntReward("shapes", hidden=3)
    fit(reward, pairs, pairs, RewardFit(2, 4, 1e-3))
    reward.save(tmp_path / "reward")
    expected, won = outcomes(reward, pairs)
    found, _ = outcomes(LearntReward(str(tmp_path / "reward")), pairs)
    assert torch.equal(found, expected)
    assert not torch.allclose(outcomes(LearntReward("shapes"), pairs)[0], expected, atol=1e-3)
    assert won.tolist() == [pair.label == "first" for pair in pairs]
    with pytest.raises(ValueError, match="is in use"):
        reward.save(tmp_path / "reward")


def test_loading_is_strict(tmp_path: Path) -> None:
    folder = tmp_path / "reward"
    LearntReward("shapes").save(folder)
    weights, settings = folder / "reward.safetensors", folder / "reward.json"
    kept, text = load_file(weights), settings.read_text()
    save_file({name: value for name, value in kept.items() if name != "linear"}, weights)
    with pytest.raises(ValueError, match=r"lacks 1 \(linear\)"):
        LearntReward(str(folder))
    save_file(kept | {"linear": torch.zeros(5)}, weights)
    with pytest.raises(ValueError, match=r"linear in .* is \[5\], not \[288\]"):
        LearntReward(str(folder))
    save_file(kept, weights)
    for content, message in (
        ('{"width": 95, "hidden": 0}', "takes 95 numbers, the model's embeddings have 96"),
        ('{"width": 96, "hidden": true}', "as whole numbers"),
        ("[]", "is not a JSON object"),
        ("{", "is not JSON"),
    ):
        settings.write_text(content)
        with pytest.raises(ValueError, match=message):
            LearntReward(str(folder))
    settings.write_text(text)
    weights.unlink()
    with pytest.raises(ValueError, match=r"has no reward\.safetensors"):
        LearntReward(str(folder))
    settings.unlink()
    save_file(kept, weights)
    with pytest.raises(ValueError, match=r"reward\.json must give"):
        LearntReward(str(folder))


def filled(hidden: int) -> LearntReward:
    """A reward whose head has weights everywhere, and whose hidden units count."""
    reward = LearntReward("shapes", hidden)
    for parameter in reward.head.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return reward


def test_a_score_does_not_depend_on_its_batch() -> None:
    reward, pixels = filled(5), torch.rand(7, 3, 32, 32)
    asked = Prompts((SIZES * 4)[:7], ({},) * 7)
    together = reward(Media(pixels), asked).total
    order = [4, 0, 6, 1, 5, 3, 2]
    alone = torch.cat([reward(Media(pixels[i : i + 1]), asked.rows([i])).total for i in order])
    torch.testing.assert_close(alone, together[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(reward(Media(pixels), asked, chunk=3).total, together, rtol=0, atol=1e-5)
    assert together.std() > 0.01


def test_gradient_against_finite_differences() -> None:
    """In float64 behind the resize, whose rounding has no derivative: the network, the unit embedding and the head."""
    reward = filled(5)
    network, head = reward.model.double(), reward.head.double()
    texts = torch.nn.functional.normalize(torch.randn(1, 96).double(), dim=1)

    def score(inputs: Tensor) -> Tensor:
        image = network.get_image_features(pixel_values=inputs).pooler_output
        return head(torch.nn.functional.normalize(image, dim=1), texts).sum()

    inputs = torch.randn(1, 3, 32, 32).double().requires_grad_()
    (gradient,) = torch.autograd.grad(score(inputs), inputs)
    for _ in range(8):
        step = torch.randn_like(inputs) * 1e-4
        slope = (score(inputs + step) - score(inputs - step)).item() / 2
        assert (gradient * step).sum().item() == pytest.approx(slope, rel=1e-3)


def test_gradient_reaches_the_pixels() -> None:
    pixels = torch.rand(2, 3, 32, 32, requires_grad=True)
    filled(0)(Media(pixels), Prompts(SIZES, ({}, {})), grad=True).total.sum().backward()
    assert pixels.grad is not None
    assert (pixels.grad.flatten(1).norm(dim=1) > 0).all()


def test_preference_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    spec = Spec("single", (Group("red", "circle"),))
    made = [render(spec, rng) for _ in range(2)]
    for name, picture in zip("ab", made, strict=True):
        Image.fromarray(picture.transpose(1, 2, 0)).save(tmp_path / "data" / "pictures" / f"{name}.png")
    Image.fromarray(made[0].transpose(1, 2, 0)).save(tmp_path / "outside.png")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "outside.png")
    file = tmp_path / "data" / "pairs.jsonl"
    row = {"prompt": "a red circle", "first": "pictures/a.png", "second": "pictures/b.png", "label": "second"}
    file.write_text(json.dumps(row) + "\n\n")
    (pair,) = load_pairs(file)
    assert (pair.prompt, pair.label) == ("a red circle", "second")
    assert torch.equal(torch.stack([pair.first, pair.second]) * 255, torch.from_numpy(np.stack(made)).float())
    for change, message in (
        ({"first": "../outside.png"}, "lies outside"),
        ({"first": str(tmp_path / "outside.png")}, "lies outside"),
        ({"second": "link.png"}, "lies outside"),
        ({"first": "pictures/none.png"}, "cannot be read as a picture"),
        ({"label": "third"}, "'first', 'second' or 'tie', got 'third'"),
        ({"prompt": 1}, "as text"),
        ({"more": "x"}, "and nothing else"),
    ):
        file.write_text(json.dumps(row) + "\n" + json.dumps(row | change))
        with pytest.raises(ValueError, match=message) as caught:
            load_pairs(file)
        assert "pairs.jsonl:2" in str(caught.value)


def test_wrong_settings() -> None:
    pairs = drawn(2, 0, ("single",))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        RewardFit(batch_size=0)
    with pytest.raises(ValueError, match="hidden must not be below 0"):
        PreferenceHead(4, hidden=-1)
    with pytest.raises(ValueError, match="0 pairs to train on"):
        fit(LearntReward("shapes"), [], pairs, RewardFit())
    with pytest.raises(ValueError, match="0 decided held-out ones"):
        fit(LearntReward("shapes"), pairs, [replace(pairs[0], label="tie")], RewardFit())
    broken = [replace(pairs[0], first=torch.full((3, 32, 32), torch.nan))]
    with pytest.raises(ValueError, match="the loss is nan"):
        fit(LearntReward("shapes"), broken, pairs, RewardFit(1))
