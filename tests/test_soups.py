"""Soups against peft's own deltas, plain diffusers, dense matrices and closed forms."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import randomise_policy, tiny_sd3
from torch import nn

from flowalign.adapters import LoRA
from flowalign.lora_files import Factors, read_lora
from flowalign.models.gaussian import GaussianModel
from flowalign.models.sd3 import SD3
from flowalign.randomness import key_noise
from flowalign.records import Media, Prompts
from flowalign.report.pareto import Point, non_dominated, pareto_svg
from flowalign.rollout import Policy, rollout
from flowalign.schedules import Path as Steps
from flowalign.soups import average, check_weights, concatenated, merge_loras, simplex_grid, truncated
from flowalign.transitions import ODE
from rewards import LearntReward
from rewards.averaging import average_rewards, distance

FILE = "pytorch_lora_weights.safetensors"
SOME = ("attn.to_q", "attn.to_out.0", "ff.net.2")
LAYER = "transformer.transformer_blocks.0.attn.to_q"


def policy(folder: Path, lora: LoRA, scale: float = 0.2) -> Path:
    model = SD3(tiny_sd3(), lora=lora)
    randomise_policy(model, scale)
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three policies: two of one shape, and one of another rank, alpha and other layers."""
    top = tmp_path_factory.mktemp("members")
    one = policy(top / "one", LoRA(rank=4, alpha=8))
    two = policy(top / "two", LoRA(rank=4, alpha=8), scale=-0.3)
    values, settings = stored(two)
    save_file({k: v + 0.1 * torch.randn_like(v) for k, v in values.items()}, two / FILE, settings)
    return [one, two, policy(top / "other", LoRA(rank=3, alpha=5, targets=SOME))]


def stored(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(folder / FILE, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def by_peft(folder: Path) -> dict[str, torch.Tensor]:
    """The deltas of a LoRA that plain diffusers has loaded, by peft's own account."""
    pipe = tiny_sd3()
    pipe.load_lora_weights(str(folder), adapter_name="a")
    return peft_deltas(pipe.transformer, "a", "transformer.")


def peft_deltas(network: nn.Module, adapter: str, prefix: str) -> dict[str, torch.Tensor]:
    found = {name: layer for name, layer in network.named_modules() if isinstance(layer, LoraLayer)}
    return {f"{prefix}{name}": layer.get_delta_weight(adapter).detach() for name, layer in found.items()}


def summed(folders: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for name, value in by_peft(folder).items():
            total[name] = total.get(name, torch.zeros(())) + weight * value.double()
    return total


def assert_deltas(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), wanted[name].double(), rtol=0, atol=atol)


@pytest.mark.parametrize("chosen", [0, 2])
def test_a_weight_of_one_returns_the_file_bit_for_bit(members: list[Path], chosen: int, tmp_path: Path) -> None:
    weights = [float(i == chosen) for i in range(3)]
    made = merge_loras(members, weights, tmp_path / "out")
    assert (made.folder / FILE).read_bytes() == (members[chosen] / FILE).read_bytes()
    assert made.error == 0
    told = json.loads((made.folder / "soup.json").read_text())["members"]
    assert [one["weight"] for one in told] == weights
    assert told[chosen]["sha256"] == read_lora(members[chosen]).digest
    assert merge_loras(members, weights, tmp_path / "wide", rank=9).error == 0
    assert (tmp_path / "wide" / FILE).read_bytes() == (members[chosen] / FILE).read_bytes()


def test_the_merge_is_the_weighted_sum_of_the_deltas_and_loads_in_plain_diffusers(
    members: list[Path], tmp_path: Path
) -> None:
    weights = [0.5, 0.2, 0.3]
    made = merge_loras(members, weights, tmp_path / "new" / "soup")
    assert made.ranks == (3, 11)  # a layer of the third alone, and one of all
    assert_deltas(by_peft(made.folder), summed(members, weights))
    model = SD3(tiny_sd3(), lora=LoRA(start=str(made.folder)))  # and as a start to go on training from
    model.save(tmp_path / "again")
    assert_deltas(by_peft(tmp_path / "again"), summed(members, weights))
    assert sorted(path.name for path in made.folder.parent.iterdir()) == ["soup"]


def test_pictures_are_those_of_a_network_with_the_sum_in_its_weights(members: list[Path], tmp_path: Path) -> None:
    weights = [0.6, 0.0, 0.4]
    merge_loras(members, weights, tmp_path / "soup")
    merged, dense, base = tiny_sd3(), tiny_sd3(), tiny_sd3()
    merged.load_lora_weights(str(tmp_path / "soup"))
    with torch.no_grad():
        for name, value in summed(members, weights).items():
            dense.transformer.get_submodule(name.removeprefix("transformer.")).weight += value.float()
    latents = torch.randn(1, 4, 4, 4)
    asked = {"num_inference_steps": 3, "guidance_scale": 2.0, "height": 32, "width": 32, "output_type": "pt"}
    drawn = [pipe("a fox", latents=latents, **asked).images for pipe in (merged, dense, base)]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=2e-5)
    assert (drawn[0] - drawn[2]).abs().max() > 1e-2


def test_the_average_of_the_factors_is_another_matrix(members: list[Path]) -> None:
    one, two = (read_lora(member).factors for member in members[:2])
    right = {name: f.delta() for name, f in concatenated([one, two], [0.5, 0.5]).items()}
    wrong = {
        name: Factors((f.down + two[name].down) / 2, (f.up + two[name].up) / 2, f.scale) for name, f in one.items()
    }
    apart = [(wrong[name].delta() - value).norm() / value.norm() for name, value in right.items()]
    assert min(apart) > 0.3


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_svd_of_factors_is_the_svd_of_the_matrix(kernel: tuple[int, ...]) -> None:
    made = Factors(torch.randn(6, 8, *kernel), torch.randn(10, 6, *(1 for _ in kernel)), 0.7)
    dense = made.delta().flatten(1)
    values = torch.linalg.svdvals(dense)
    whole = truncated(made, 6)
    torch.testing.assert_close(whole.factors.delta(), made.delta(), rtol=0, atol=1e-5)
    assert whole.lost == 0
    cut = truncated(made, 2)
    assert cut.factors.rank == 2
    assert cut.factors.shape == made.shape
    assert cut.lost == pytest.approx(values[2:].square().sum().item(), rel=1e-9)
    error = (cut.factors.delta().flatten(1) - dense).square().sum().item()
    assert error == pytest.approx(cut.lost, rel=1e-5)
    thin = Factors(torch.randn(9, 4), torch.randn(5, 9))  # more rank than the matrix has
    torch.testing.assert_close(truncated(thin, 9).factors.delta(), thin.delta(), rtol=0, atol=1e-5)


def test_a_convolutions_delta_is_its_two_convolutions() -> None:
    made, pixels = Factors(torch.randn(2, 3, 3, 3), torch.randn(5, 2, 1, 1), 1.5), torch.randn(1, 3, 8, 8).double()
    twice = 1.5 * F.conv2d(F.conv2d(pixels, made.down.double(), padding=1), made.up.double())
    torch.testing.assert_close(F.conv2d(pixels, made.delta(), padding=1), twice)


def test_a_lower_rank_says_its_error_and_keeps_smaller_layers_as_they_are(members: list[Path], tmp_path: Path) -> None:
    weights = [0.5, 0.2, 0.3]
    made = merge_loras(members, weights, tmp_path / "out", rank=4)
    assert made.ranks == (3, 4)
    wanted, found = summed(members, weights), by_peft(made.folder)
    lost = math.sqrt(sum((found[name] - value).square().sum().item() for name, value in wanted.items()))
    total = math.sqrt(sum(value.square().sum().item() for value in wanted.values()))
    assert made.error == pytest.approx(lost / total, rel=1e-4)
    assert 0.05 < made.error < 0.9
    assert merge_loras(members, weights, tmp_path / "whole", rank=11).error == 0


def test_extrapolation_only_where_asked(members: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--any-weights"):
        merge_loras(members[:2], [1.5, -0.5], tmp_path / "out")
    made = merge_loras(members[:2], [1.5, -0.5], tmp_path / "out", any_weights=True)
    assert_deltas(by_peft(made.folder), summed(members[:2], [1.5, -0.5]))


@pytest.mark.parametrize("rooted", [False, True])
def test_pefts_own_files_with_ranks_and_alphas_of_layers(rooted: bool, members: list[Path], tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=rooted, target_modules=[*SOME], init_lora_weights=False,
        rank_pattern={"transformer_blocks.0.attn.to_q": 2, "ff.net.2": 3}, alpha_pattern={"attn.to_q": 5},
    )  # fmt: skip
    wrapped = get_peft_model(tiny_sd3().transformer, config)
    wrapped.save_pretrained(tmp_path / "peft")
    wanted = peft_deltas(wrapped.base_model.model, "default", "transformer.")
    factors = read_lora(tmp_path / "peft").factors
    assert {one.rank for one in factors.values()} == {2, 3, 4}
    assert_deltas({name: one.delta() for name, one in factors.items()}, wanted)
    one_hot = merge_loras([tmp_path / "peft", members[0]], [1, 0], tmp_path / "out")  # in diffusers' layout
    assert_deltas(by_peft(one_hot.folder), wanted)


def test_plain_files_without_settings_have_alphas_or_a_scale_of_one(tmp_path: Path) -> None:
    down, up = torch.randn(2, 32), torch.randn(32, 2).bfloat16()
    weights = {f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up}
    save_file(weights, tmp_path / "plain.safetensors")
    (plain,) = read_lora(tmp_path / "plain.safetensors").factors.values()
    assert plain.scale == 1
    save_file(weights | {f"{LAYER}.alpha": torch.tensor(8.0)}, tmp_path / "alpha.safetensors")
    (alpha,) = read_lora(tmp_path / "alpha.safetensors").factors.values()
    torch.testing.assert_close(alpha.delta(), 4 * up.double() @ down.double())


def written(folder: Path, down: torch.Tensor, up: torch.Tensor, module: str = LAYER, extra: str = "") -> Path:
    folder.mkdir()
    values = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    save_file(values | ({extra: torch.ones(3)} if extra else {}), folder / FILE)
    return folder


def test_members_that_do_not_go_together_are_refused_and_nothing_is_written(
    members: list[Path], tmp_path: Path
) -> None:
    a, b = torch.randn(2, 32), torch.randn(32, 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_lora_weights.bin").touch()
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    refused = {
        "to_q is .32, 32. in .*different base models": written(tmp_path / "wide", torch.randn(2, 40), b),
        "numbers that are not finite": written(tmp_path / "nan", a * torch.nan, b),
        "LoRA of a text encoder": written(tmp_path / "text", a, b, "text_encoder.layers.0.q_proj"),
        "of the transformer and .* of the unet": written(tmp_path / "unet", a, b, "unet.mid_block.proj"),
        "which are no factors": written(tmp_path / "odd", a, torch.randn(32, 3)),
        "magnitude": written(tmp_path / "dora", a, b, extra=f"{LAYER}.lora_magnitude_vector"),
        "only one of lora_A and lora_B": written(tmp_path / "half", a, b, extra="transformer.x.lora_A.weight"),
        "does not exist": tmp_path / "nowhere",
        "holds no LoRA weights, no file": tmp_path / "empty",
        "is pickled": tmp_path / "pickled",
        "cannot be read as safetensors": tmp_path / "broken.safetensors",
    }
    before = sorted(tmp_path.iterdir())
    for message, path in refused.items():
        with pytest.raises(ValueError, match=message):
            merge_loras([members[0], path], [0.5, 0.5], tmp_path / "out")
    with pytest.raises(ValueError, match="is in use"):
        merge_loras(members, [0.5, 0.5, 0], members[0])
    with pytest.raises(ValueError, match="rank must be at least 1"):
        merge_loras(members, [0.5, 0.5, 0], tmp_path / "out", rank=0)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.6], "add up to 1, got 0.5 0.6"),
        ([1.2, -0.2], "at least 0"),
        ([1.0], "2 members but 1 weights"),
        ([math.nan, 1.0], "finite"),
    ],
)
def test_weights_off_the_simplex(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_weights(weights, 2)


def test_weights_written_with_six_digits_and_the_grid() -> None:
    assert check_weights([0.333333, 0.333333, 0.333334], 3)
    assert simplex_grid(2, 5) == [(1, 0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0, 1)]
    triangle = simplex_grid(3, 5)
    assert len(triangle) == len({*triangle}) == 15
    assert all(check_weights(point, 3) for point in triangle)
    with pytest.raises(ValueError, match="at least 2 members and 2 points"):
        simplex_grid(2, 1)


def test_the_average_of_plain_parameters() -> None:
    one, two = ({"a": torch.randn(3), "n": torch.tensor(2)} for _ in range(2))
    assert torch.equal(average([one, two], [0.0, 1.0])["a"], two["a"])
    torch.testing.assert_close(average([one, two], [0.25, 0.75])["a"], 0.25 * one["a"] + 0.75 * two["a"])
    for other in ({"a": torch.randn(3)}, {"a": torch.randn(4), "n": torch.tensor(2)}, two | {"n": torch.tensor(3)}):
        with pytest.raises(ValueError, match="members 1 and 2 differ in"):
            average([one, other], [0.5, 0.5])


SHIFT = 0.8


def gaussian(bias: torch.Tensor) -> GaussianModel:
    """In two dimensions, with a bias of its own in each."""
    model = GaussianModel(mean=0.3, variance=0.5, dims=2)
    model.bias = nn.Parameter(bias)
    return model


def trained(dim: int) -> torch.Tensor:
    """The bias that makes the flow that of N(m + SHIFT e, s2), the optimum of reward x_dim with a KL penalty.

    v is linear in m with the slope -(A (1 - s) + 1), where A is v's slope in x.
    """
    model = GaussianModel(mean=0.3, variance=0.5, dims=2)
    bias = torch.zeros(len(model.grid), 2)
    for k, s in enumerate(model.grid):
        slope = (s - (1 - s) * model.variance) / ((1 - s) ** 2 * model.variance + s**2)
        bias[k, dim] = -(slope * (1 - s) + 1) * SHIFT
    return bias


def drawn(bias: torch.Tensor) -> torch.Tensor:
    model = gaussian(bias)
    noise = torch.stack([key_noise(0, "soup_test", i, shape=(2,)) for i in range(256)])
    path = Steps((ODE(),) * (len(model.grid) - 1))
    return rollout(model, model.encode([""] * 256), noise, model.grid, path, Policy()).latents.detach()


def test_half_a_soup_of_two_gaussian_policies_has_half_of_each_shift() -> None:
    base, one, two = drawn(torch.zeros_like(trained(0))), drawn(trained(0)), drawn(trained(1))
    torch.testing.assert_close((one - base).mean(0), torch.tensor([SHIFT, 0.0]), rtol=0, atol=0.02)
    states = [dict(gaussian(trained(dim)).trainable()) for dim in (0, 1)]
    half = drawn(average(states, [0.5, 0.5])["bias"])
    torch.testing.assert_close(half - base, (one - base) / 2 + (two - base) / 2, rtol=0, atol=1e-5)
    torch.testing.assert_close((half - base).mean(0), torch.full((2,), SHIFT / 2), rtol=0, atol=0.02)


def test_the_front_of_a_concave_example_is_above_its_chord() -> None:
    goal = 0.3 + SHIFT
    states = [dict(gaussian(trained(dim)).trainable()) for dim in (0, 1)]
    rows = []
    for weights in simplex_grid(2, 5):
        made = drawn(average(states, weights)["bias"])
        rows.append((-(made - goal).square()).mean(0))  # concave in each policy's shift
    for weights, row in zip(simplex_grid(2, 5), rows, strict=True):
        lead = row - (weights[0] * rows[0] + weights[1] * rows[-1])
        torch.testing.assert_close(lead, torch.full((2,), weights[0] * weights[1] * SHIFT**2), rtol=0, atol=0.02)
    assert non_dominated([row.tolist() for row in rows]) == [True] * 5


def test_non_dominated_by_hand_and_the_plot_marks_them() -> None:
    rows = [(0.0, 3.0), (1.0, 2.0), (0.5, 1.5), (3.0, 0.0), (math.nan, 9.0), (1.0, 2.0)]
    assert non_dominated(rows) == [True, True, False, True, False, True]
    marked = zip(rows, non_dominated(rows), strict=True)
    points = [Point(*row, f"p{i} <", best, i in (0, 3)) for i, (row, best) in enumerate(marked)]
    svg = pareto_svg(points, "clip", "a & b", "t")
    assert svg.count('class="best"') == 4
    assert svg.count('class="other"') == 1
    assert svg.count('class="chord"') == 1
    assert "p2 &lt;" in svg
    assert "a &amp; b" in svg
    with pytest.raises(ValueError, match="nothing to plot"):
        pareto_svg([Point(math.nan, 1, "x", False)], "a", "b", "t")


def test_labels_of_points_that_lie_together_can_be_read() -> None:
    near = [(0.40, 8.1), (0.443, 7.8), (0.475, 7.8), (0.493, 7.7), (0.449, 7.8), (0.60, 205.0), (0.41, 208.0)]
    points = [Point(x, y, f"a policy {i}", True) for i, (y, x) in enumerate(near)]
    for log_x in (False, True):
        svg = pareto_svg(points, "forwards", "accuracy", "t", log_x)
        found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(start|end)">a policy', svg)
        assert len(found) == len(points)
        wide = 60  # of ten letters, at least
        boxes = [(float(x) - wide * (side == "end"), float(y)) for x, y, side in found]
        for i, (x, y) in enumerate(boxes):
            assert 0 <= x <= 520 - wide
            assert all(abs(x - left) >= wide or abs(y - line) >= 10 for left, line in boxes[:i])


def test_an_axis_of_powers_of_ten() -> None:
    svg = pareto_svg([Point(2.6, 1, "a", True), Point(208, 2, "b", True)], "forwards", "accuracy", "t", log_x=True)
    dots = [float(x) for x in re.findall(r'<circle class="best" cx="([\d.]+)"', svg)]
    at = {label: float(x) for x, label in re.findall(r'<text x="([\d.]+)" y="363.0" class="" .*?>(10+)<', svg)}
    decade = at["100"] - at["10"]
    assert dots[1] - dots[0] == pytest.approx(math.log10(208 / 2.6) * decade, abs=0.2)


def learnt(folder: Path, scale: float, full: float = 0.0, hidden: int = 0) -> Path:
    reward = LearntReward("shapes", hidden)
    reward.head.linear.data += scale * torch.randn_like(reward.head.linear)
    for parameter in reward.model.parameters():
        parameter.data += full * parameter.abs().mean() * torch.randn_like(parameter)
    reward.save(folder)
    return folder


def test_warm_averages_heads_and_models(tmp_path: Path) -> None:
    places = [learnt(tmp_path / "a", 0.1), learnt(tmp_path / "b", 0.3)]
    media, asked = Media(torch.rand(3, 3, 32, 32)), Prompts(("a red circle", "two squares", "a star"), ({},) * 3)
    average_rewards(places, [0.25, 0.75], tmp_path / "warm")
    totals = [LearntReward(str(place))(media, asked).total for place in (*places, tmp_path / "warm")]
    torch.testing.assert_close(totals[2], 0.25 * totals[0] + 0.75 * totals[1])  # a linear head: exactly the ensemble
    assert (totals[0] - totals[1]).abs().max() > 0.05
    tuned = [learnt(tmp_path / "c", 0.1, 0.02), learnt(tmp_path / "d", 0.1, 0.02)]
    made = average_rewards(tuned, [0.5, 0.5], tmp_path / "both").model.state_dict()
    one, two = (LearntReward(str(place)).model.state_dict() for place in tuned)
    for name, value in made.items():
        torch.testing.assert_close(value, ((one[name].double() + two[name]) / 2).to(value.dtype))
    assert 0 < distance(one, two) < 0.1


def test_warm_refuses_other_backbones_and_heads(tmp_path: Path, members: list[Path]) -> None:
    one = learnt(tmp_path / "one", 0.1)
    far, wide = learnt(tmp_path / "far", 0.1, full=2.0), learnt(tmp_path / "wide", 0.1, hidden=2)
    for other, message in ((far, "not trained from the same"), (wide, "different heads"), (members[0], "no reward")):
        with pytest.raises(ValueError, match=message):
            average_rewards([one, other], [0.5, 0.5], tmp_path / "out")
    assert not (tmp_path / "out").exists()
