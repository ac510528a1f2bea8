"""Every shipped config is checked whole, without building anything; published numbers do not drift."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flowalign.cli import parse_trainer
from flowalign.config import arguments_of, construct, load_yaml
from flowalign.models import Flux
from flowalign.records import Media, Prompts, intervals
from flowalign.schedules import flow_match_euler, linear, shifted
from rewards import parse_reward
from rewards.base import as_reward
from rewards.expression import REWARDS
from tests.families import seeded
from tests.test_wan import small, unipc
from tests.tiny_flux import tiny_flux
from tests.tiny_wan import tiny_wan
from trainers.instruct_video import first_below

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ALL = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
OTHERS = ("reno/", "best_of_n/", "eval/")  # test_optimize_command.py and test_eval.py have those
FILES = [name for name in ALL if not name.startswith(OTHERS)]


def resolved(name: str) -> dict[str, Any]:
    """All arguments of the trainer with their defaults, as plain data."""
    return arguments_of(parse_trainer(load_yaml(CONFIGS / name)))


def wan_sigmas(name: str) -> list[float]:
    """The grid of a config's rollouts on a small Wan with the scheduler that Wan 2.1 ships for 480p."""
    settings = parse_trainer(load_yaml(CONFIGS / name)).arguments
    model = small(lambda: tiny_wan(unipc()), grid=construct(settings["model"].arguments.get("grid")))
    return model.sigmas(settings["sampling"].arguments["steps"])


@pytest.mark.parametrize(
    "name",
    ["tree_grpo/flux.1-dev_hpsv2.yaml", "flow_grpo/flux.1-dev_mixgrpo.yaml", "g2rpo/flux.1-dev_hpsv2_clip.yaml"],
)
def test_grids_on_flux_are_the_authors_of_shift_3(name: str) -> None:
    """FLUX.1 dev shifts by its tokens, 45 x 45 at 720 px; a token of the small pipeline has 4 pixels a side, not 16."""
    settings = parse_trainer(load_yaml(CONFIGS / name)).arguments
    told, pipe = settings["model"].arguments, seeded(tiny_flux)()
    assert (told["height"], told["width"]) == (720, 720)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    sigmas = Flux(pipe, height=180, width=180, grid=construct(told["grid"]), max_sequence_length=8).sigmas(20)
    assert sigmas == pytest.approx(shifted(linear(20), 3.0), abs=1e-5)


@pytest.mark.parametrize("name", FILES)
def test_a_shipped_config_resolves(name: str) -> None:
    config = load_yaml(CONFIGS / name)
    plain = resolved(name)
    assert set(config) - {"trainer"} <= set(plain)
    again = parse_trainer({"trainer": config["trainer"], **plain})  # what a run writes down is a config again
    assert arguments_of(again) == plain


def test_the_published_settings_are_shipped() -> None:
    assert {"flow_grpo/sd3.5_pickscore.yaml", "flow_grpo/sd3.5_ocr.yaml", "flow_grpo/sd3.5_geneval.yaml"} <= set(FILES)


@pytest.mark.parametrize(
    ("short", "beta", "metric"),
    [("pickscore", 0.01, "pickscore"), ("ocr", 0.04, "ocr"), ("geneval", 0.04, "geneval_correct")],
)
def test_flow_grpo_settings_are_the_published_ones(short: str, beta: float, metric: str) -> None:
    config = resolved(f"flow_grpo/sd3.5_{short}.yaml")
    assert (config["kl_coef"], config["kl"]) == (beta, "flowalign.transitions.flow_grpo_kl")
    assert (config["clip_range"], config["step_fraction"], config["updates_per_epoch"]) == (1e-4, 0.99, 2)
    by_dt = [-1 / step.dt for step in intervals(flow_match_euler(10, 3.0))[: int(10 * 0.99)]]
    assert (round(min(by_dt)), round(max(by_dt))) == (4, 25)  # times as much the exact KL is at each trained step
    assert (config["evaluation"]["steps"], config["evaluation"]["every"]) == (40, 60)
    assert config["evaluation"]["metric"] == metric
    sampling = config["sampling"]
    assert [sampling[key] for key in ("groups", "group_size", "steps", "guidance_scale")] == [48, 24, 10, 4.5]
    assert sampling["plan"]["transition"] == {"class": "flowalign.transitions.FlowSDE", "noise_level": 0.7}
    assert sampling["plan"]["last_step"] is True
    optimizer = config["optimizer"]
    assert (optimizer["learning_rate"], optimizer["weight_decay"], optimizer["betas"]) == (3e-4, 1e-4, [0.9, 0.999])
    assert (optimizer["ema_decay"], optimizer["ema_every"], optimizer["max_grad_norm"]) == (0.9, 8, 1.0)
    model = config["model"]
    assert (model["height"], model["width"], model["max_sequence_length"]) == (512, 512, 128)
    assert (model["lora"]["rank"], model["lora"]["alpha"], model["mixed_precision"]) == (32, 64, "fp16")


def test_flow_grpo_on_flux_is_the_published_one() -> None:
    config = resolved("flow_grpo/flux.1-dev_pickscore.yaml")
    assert (config["kl_coef"], config["clip_range"], config["step_fraction"]) == (0, 1e-4, 0.99)
    assert (config["updates_per_epoch"], config["evaluation"]["steps"], config["evaluation"]["every"]) == (2, 28, 30)
    sampling, model = config["sampling"], config["model"]
    assert [sampling[key] for key in ("groups", "group_size", "steps", "guidance_scale")] == [48, 24, 6, 3.5]
    assert sampling["plan"]["transition"] == {"class": "flowalign.transitions.FlowSDE", "noise_level": 0.9}
    assert (config["optimizer"]["learning_rate"], config["optimizer"]["ema_decay"]) == (3e-4, 0.9)
    assert (model["height"], model["width"], model["max_sequence_length"]) == (512, 512, 128)
    assert (model["lora"]["rank"], model["lora"]["alpha"], model["mixed_precision"]) == (64, 128, "bf16")
    assert {*Flux.targets} < {*model["lora"]["targets"]}


def test_flow_grpo_on_qwen_image_is_the_published_one() -> None:
    config = resolved("flow_grpo/qwen-image_pickscore.yaml")
    assert (config["kl_coef"], config["clip_range"], config["updates_per_epoch"]) == (0, 1e-4, 2)
    assert (config["evaluation"]["steps"], config["evaluation"]["every"]) == (50, 30)
    sampling, model, optimizer = config["sampling"], config["model"], config["optimizer"]
    assert [sampling[key] for key in ("groups", "group_size", "steps", "guidance_scale")] == [32, 16, 10, 4.0]
    assert sampling["plan"]["transition"] == {"class": "flowalign.transitions.FlowSDE", "noise_level": 1.2}
    start = random.Random(0).randint(0, 5 - 2)  # seeded anew in each of their calls: range (0, 5), a window of 2
    assert sampling["plan"]["steps"] == [start, start + 1]
    assert (optimizer["learning_rate"], optimizer["ema_decay"], optimizer["ema_every"]) == (3e-4, 0.0, 1)
    told = [model[key] for key in ("height", "width", "negative_prompt", "mixed_precision")]
    assert told == [512, 512, " ", "bf16"]
    assert (model["lora"]["rank"], model["lora"]["alpha"], len(model["lora"]["targets"])) == (64, 128, 12)


def test_dense_grpo_s_known_settings_are_the_published_ones() -> None:
    config = resolved("dense_grpo/sd3.5_pickscore.yaml")
    assert (config["kl_coef"], config["completion_steps"], config["calibration"]["amount"]) == (0.01, None, 0.01)
    assert config["kl"] == "flowalign.transitions.flow_grpo_kl"  # beta is of the code that they compare with
    assert config["epochs"] * config["updates_per_epoch"] == 4500
    sampling, model = config["sampling"], config["model"]
    assert [sampling[key] for key in ("group_size", "batch_size", "steps")] == [24, 144 // 16, 10]
    assert (config["optimizer"]["learning_rate"], config["evaluation"]["steps"]) == (3e-4, 40)
    assert (model["height"], model["width"], model["lora"]["rank"], model["lora"]["alpha"]) == (512, 512, 32, 64)
    assert config["step_rewards"] == "trainers.dense_grpo.gains"
    assert config["advantages"] == "trainers.dense_grpo.step_advantages"


def test_pickscore_is_divided_by_26() -> None:
    formula = resolved("flow_grpo/sd3.5_pickscore.yaml")["reward"]
    assert REWARDS["pickscore"] == "rewards.pickscore.PickScore"
    given = as_reward(lambda media, prompts: torch.tensor([26.0, 13.0]))
    scores = parse_reward(formula, {"pickscore": given})(Media(torch.zeros(2, 3, 8, 8)), Prompts(("a", "b"), ({}, {})))
    assert scores.total.tolist() == [1.0, 0.5]


def test_ocr_drops_what_it_cannot_read_and_the_others_stop() -> None:
    said = {name: resolved(f"flow_grpo/sd3.5_{name}.yaml")["on_invalid"] for name in ("pickscore", "ocr", "geneval")}
    assert said == {"pickscore": "stop", "ocr": "drop", "geneval": "stop"}


def test_wan_s_settings_are_the_published_ones() -> None:
    config = resolved("flow_grpo/wan2.1_ocr.yaml")
    assert (config["kl_coef"], config["clip_range"], config["step_fraction"]) == (0.004, 1e-3, 0.99)
    assert config["kl"] == "flowalign.transitions.exact_kl"  # by std_dev_t sqrt(-dt), where SD3's script has std_dev_t
    sampling, sigmas = config["sampling"], wan_sigmas("flow_grpo/wan2.1_ocr.yaml")
    table = sampling["plan"]["transition"]["table"]
    assert table == pytest.approx([sigmas[1] * sigma for sigma in sigmas[:-1]], abs=1e-4)
    assert [sampling[key] for key in ("group_size", "batch_size", "steps", "guidance_scale")] == [4, 8, 20, 4.5]
    assert config["optimizer"]["learning_rate"] == 1e-4
    model = config["model"]
    assert (model["height"], model["width"], model["frames"], model["mixed_precision"]) == (240, 416, 33, "bf16")
    assert (config["evaluation"]["steps"], config["evaluation"]["every"]) == (50, 30)
    assert config["advantages"] == "flowalign.advantages.group_advantages"


def test_aligned_prop_s_settings_are_the_published_ones() -> None:
    config = resolved("draft/sd1.5_hpsv2_alignprop.yaml")
    sampling = config["sampling"]
    assert [sampling[key] for key in ("groups", "group_size", "steps", "guidance_scale")] == [128, 1, 50, 5.0]
    plan = sampling["plan"]
    assert (plan["class"], plan["mean"], plan["std"]) == ("flowalign.gradient_plans.GaussianTruncation", 42, 5)
    assert plan["transition"] == {"class": "flowalign.transitions.DDIM", "eta": 1.0}
    assert (config["optimizer"]["learning_rate"], config["reward"]["weights"]) == (1e-3, [0.01])
    assert (config["kl_coef"], config["updates_per_epoch"], config["low_variance"]) == (0.0, 1, 0)


def test_refl_s_settings_are_the_published_ones() -> None:
    config = resolved("refl/sd1.5_imagereward.yaml")
    assert (config["margin"], config["coefficient"], config["reward"]) == (2.0, 1e-3, "imagereward")
    sampling = config["sampling"]
    assert [sampling[key] for key in ("steps", "guidance_scale")] == [40, 1.0]
    assert sampling["plan"] == {"class": "flowalign.gradient_plans.LateStep", "low": 30, "high": 39}
    assert config["epochs"] * config["updates_per_epoch"] == 100


def test_instruct_video_s_settings_are_the_published_ones() -> None:
    config = resolved("instruct_video/wan2.1_hpsv2.yaml")
    sampling, reward, model = config["sampling"], config["reward"], config["model"]
    assert sampling["plan"]["count"] == 1
    made = sampling["steps"] - first_below(shifted(linear(sampling["steps"]), 3.0), config["start"])
    assert made == 12  # on the grid of Wan's shift
    assert (sampling["groups"], sampling["batch_size"], sampling["guidance_scale"]) == (8, 2, 3.0)
    assert [reward[key] for key in ("frames", "sampling", "attenuation")] == [4, "segments", 1.0]
    assert (reward["reward"]["class"].split(".")[-1], reward["reward"]["version"]) == ("HPSv2", "2.0")
    assert (config["optimizer"]["learning_rate"], config["optimizer"]["weight_decay"]) == (1e-5, 0.0)
    assert (model["height"], model["width"], model["frames"], model["lora"]["rank"]) == (256, 256, 17, 4)
    assert config["epochs"] * config["updates_per_epoch"] == 20_000


@pytest.mark.parametrize("name", ["ipro/wan2.1_i2v_face.yaml", "ipro/wan2.1_face.yaml"])
def test_ipro_s_settings_are_the_published_ones(name: str) -> None:
    config = resolved(name)
    sampling = config["sampling"]
    assert (config["reward_coef"], config["kl_coef"]) == (0.1, 1.0)
    assert (sampling["plan"]["count"], sampling["groups"] * sampling["group_size"]) == (4, 64)
    assert config["optimizer"]["learning_rate"] == 2e-5
    assert config["epochs"] * config["updates_per_epoch"] == 100
    assert config["reward"]["pool"] == "mean"


def test_branch_grpo_s_settings_are_the_published_ones() -> None:
    config = resolved("tree_grpo/flux.1-dev_hpsv2.yaml")
    sampling, plan = config["sampling"], config["sampling"]["plan"]
    assert (plan["steps"], plan["children"], plan["between"]) == ([0, 3, 6, 9], [2] * 4, True)
    assert plan["transition"] == {"class": "flowalign.transitions.DanceSDE", "noise_level": 0.3}
    assert [sampling[key] for key in ("group_size", "steps", "guidance_scale")] == [16, 20, 3.5]
    assert (config["clip_range"], config["kl_coef"], config["epochs"] * config["updates_per_epoch"]) == (1e-3, 0, 300)
    assert (config["compare"], config["weighting"]) == ("flowalign.trees.depths", "flowalign.trees.by_edges")
    assert config["advantages"] == "flowalign.advantages.dancegrpo_advantages"
    assert (config["optimizer"]["learning_rate"], config["optimizer"]["weight_decay"]) == (1e-5, 1e-4)
    assert (config["model"]["height"], config["model"]["width"], config["reward"]) == (720, 720, "hpsv2.1")


def test_euphonium_s_settings_are_the_published_ones() -> None:
    config = resolved("euphonium/wan2.1_videoreward.yaml")
    guided, sampling = config["guided"], config["sampling"]
    assert (guided["steps"], guided["scale"], guided["times_dt"]) == ([12, 13, 14, 15], 0.01, True)
    level = sampling["plan"]["transition"]["noise_level"]
    assert guided["scale"] == pytest.approx(level**2 / (2 * 3.125))  # their beta
    assert [sampling[key] for key in ("group_size", "steps")] == [8, 16]
    assert sampling["plan"]["shared_noise"] is True
    assert (config["outcome_coef"], config["process_coef"], config["clip_range"]) == (1, 1, 1e-4)
    assert (config["optimizer"]["learning_rate"], config["epochs"]) == (1e-6, 501)
    sigmas = wan_sigmas("euphonium/wan2.1_videoreward.yaml")
    assert sigmas == pytest.approx(shifted(linear(16), 5.0), abs=1e-5)
    assert sigmas[12:16] == pytest.approx([0.625, 0.5357, 0.4167, 0.25], abs=1e-4)  # where guidance is


def test_rewards_by_an_instruction_name_the_file_that_published_scores_need() -> None:
    """Without one HPSv3 and VideoReward score by a text of our own."""
    flash, euphonium = resolved("flow_grpo/wan2.1_flash.yaml"), resolved("euphonium/wan2.1_videoreward.yaml")
    assert flash["reward"]["reward"]["class"] == "rewards.HPSv3"
    assert flash["reward"]["reward"]["template"] == "data/hpsv3_prompt.txt"
    assert euphonium["reward"]["class"] == "rewards.VideoReward"
    assert euphonium["reward"]["template"] == "data/euphonium/videoreward_prompt.txt"


def test_flow_dpo_s_settings_are_those_of_flow_grpo_s_code() -> None:
    config = resolved("flow_dpo/sd3.5_pickscore.yaml")
    assert (config["beta"], config["weighting"], config["reduce"]) == (
        100,
        "trainers.flow_dpo.constant",
        "flowalign.transitions.mean_of_elements",
    )
    times = {"class": "trainers.LogitNormalTimes", "mean": 0.0, "std": 1.0, "draws": int(40 * 0.99)}
    assert config["times"] == times
    assert (config["refresh"], config["sample_reference"]) == (40, True)
    assert config["pairing"] == "flowalign.advantages.best_and_worst"
    sampling = config["sampling"]
    assert [sampling[key] for key in ("group_size", "steps", "guidance_scale")] == [24, 40, 4.5]
    assert sampling["plan"]["transition"] == {"class": "flowalign.transitions.FlowSDE", "noise_level": 0.7}
    assert (config["optimizer"]["learning_rate"], config["optimizer"]["ema_decay"]) == (3e-4, 0.9)
    assert (config["guidance_scale"], config["evaluation"]["steps"], config["evaluation"]["every"]) == (1.0, 40, 60)
