"""What a check tells of trainers by a reward's gradient: rows, memory, and files that their prompts have to name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from flowalign.cli import main
from flowalign.gradient_plans import LastSteps, LateStep
from flowalign.memory_estimate import Peak
from flowalign.models.sd3 import SD3
from flowalign.records import Media, Prompts
from rewards import CLIPScore, FaceIdentity
from rewards.base import FunctionReward
from tests.jobs import BY_GRADIENT, JOBS, PICTURED, PROMPTS, instruct_video_job, ipro_job, redness, rows
from tests.test_reward_face import MarkedFaces, weights
from tests.tiny import tiny_sd3
from trainers import IPRO, Evaluation, InstructVideo, ReFL, Sampling
from trainers.batch import parts_of
from trainers.path_steps import PathSteps
from trainers.preflight import Preflight, inspect, page
from trainers.preflight.geometry import floor_rows, geometry, looked_at, spent_rows
from trainers.preflight.memory import Passing, _most_rows, present
from trainers.reward_gradient import RewardGradientTrainer
from trainers.watch import Watch

__all__ = ["weights"]  # a fixture: of a tiny ArcFace


def sampled(plan: Any, steps: int = 5) -> Sampling:
    return Sampling(plan, groups=3, group_size=2, batch_size=2, rows_per_call=2, steps=steps, guidance_scale=2.0)


def problems(found: Preflight) -> list[str]:
    return [f"{one.kind}: {one.text}" for one in found.problems]


@pytest.mark.parametrize("kind", BY_GRADIENT[2:])
def test_counted_rows_are_those_of_the_run(kind, tmp_path):
    made = JOBS[kind](tmp_path / "run", evaluation=Evaluation(), epochs=1)
    cut, (epoch,) = geometry(made), looked_at(made)
    made.train(report=False)
    (row,) = rows(tmp_path / "run")
    spent, floor = spent_rows(made, epoch, cut), floor_rows(made, epoch)
    assert (spent.forward, spent.gradient) == (row["rows/forward"], row["rows/gradient"])
    assert (floor.forward, floor.gradient) == (row["floor/forward"], row["floor/gradient"])


def test_of_a_part_of_the_chain_only_the_steps_that_are_made_are_told(tmp_path):
    made = instruct_video_job(tmp_path / "run", evaluation=Evaluation())
    found = inspect(made, tmp_path / "out")
    assert [step.interval.index for step in found.steps] == [1, 2]
    assert [step.trained for step in found.steps] == [0, 1]
    assert found.steps[1].leverage == pytest.approx(0.6)
    told = " ".join(page(found).split())
    assert "the first 1 of 3 steps are not made: the chain starts from real media, noised to sigma 0.8571" in told
    assert found.rows[0][1].forward == 6 * 2  # six samples, one step without gradient, guidance
    assert found.rows[0][1].gradient == 6 * 2


def test_a_tiny_last_step_is_told_of_a_part_of_the_chain_too(tmp_path):
    (remark,) = instruct_video_job(tmp_path, model=SD3(tiny_sd3(), max_sequence_length=0)).remarks()
    assert "it is tiny (0.0089 to 0.0000)" in remark  # its own grid's
    assert instruct_video_job(tmp_path).remarks() == ()


KEPT: dict[str, Callable[[dict[str, Any]], RewardGradientTrainer]] = {
    "calls of the policy and the reference": lambda given: IPRO(
        **given, sampling=sampled(LastSteps(3)), recompute=False
    ),
    "a part of the chain": lambda given: InstructVideo(**given, sampling=sampled(LastSteps(1)), recompute=False),
    "beside the reward": lambda given: ReFL(
        **given, sampling=sampled(LateStep(2, 4)), recompute=False, margin=99.0, pretraining=1.0
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_the_memory_of_a_micro_batch_is_never_more_than_predicted_and_little_less(name, tmp_path):
    given: dict[str, Any] = {"model": SD3(tiny_sd3(), max_sequence_length=0), "prompts": PICTURED}
    made = KEPT[name](given | {"reward": FunctionReward(redness, differentiable=True), "folder": str(tmp_path)})
    steps = PathSteps(made, made.collection.epoch(0), None)
    first = steps.micro_batches(parts_of(6, 1, made.seed, 0)[0])[0]

    def work() -> None:
        steps.micro_batch(first, 0, 2, Watch(made.watched(), 1.0, made.model.device))
        made.optimizer.discard()

    work()  # prompts are encoded
    with Peak() as measured:
        work()
    passing = Passing(made, made.model, _most_rows(made, geometry(made)))
    predicted = made.preflight().learning_bytes(present(made, made.model), passing)
    assert measured.most <= predicted <= 1.2 * measured.most


def test_what_a_reward_keeps_of_texts_is_not_spoilt_by_the_prediction(tmp_path):
    """CLIP embeds each text once: what it keeps of a run on fakes has no numbers."""
    changes: dict[str, Any] = {"evaluation": Evaluation(), "epochs": 1}
    found = inspect(ipro_job(tmp_path / "run", reward=CLIPScore("shapes"), **changes), tmp_path / "out")
    assert found.errors == 0
    assert found.memory is not None
    assert found.memory.with_reward
    assert found.trial is not None
    assert found.trial.learning.grad_norm > 0


def looking(media: Media, prompts: Prompts) -> Tensor:
    """As OnFrames with a seed, or a detector: the numbers themselves decide what is looked at."""
    channel = int(media.pixels.detach().sum().item() > 0)
    return media.pixels[:, channel].mean((1, 2))


def test_a_reward_that_looks_at_numbers_leaves_the_rest_of_the_prediction(tmp_path):
    made = instruct_video_job(tmp_path / "run", reward=FunctionReward(looking, differentiable=True))
    found = inspect(made, tmp_path / "out")
    assert found.errors == 0
    assert found.memory is not None
    assert not found.memory.with_reward
    assert found.memory.needs.learning > 0
    assert "activations are without those of looking, which cannot be predicted" in page(found)


def change_record(**record: Any) -> Prompts:
    """The second prompt's record, changed."""
    return Prompts(PICTURED.text, (PICTURED.metadata[0], record, PICTURED.metadata[2]))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (change_record(), r"prompt 'a blue square' names no real media: .* \(1 of the 3 prompts looked at name none\)"),
        (change_record(media="none.png"), "none.png, the real media of prompt 'a blue square', is not a file"),
    ],
)
def test_real_media_that_are_missing_are_told_before_anything_is_done(prompts, message, tmp_path):
    with pytest.raises(ValueError, match=message) as told:
        instruct_video_job(tmp_path / "run", prompts=prompts)
    assert "\n" not in str(told.value)
    assert instruct_video_job(tmp_path / "run")
    refl: dict[str, Any] = {"model": SD3(tiny_sd3(), max_sequence_length=0), "reward": FunctionReward(redness, True)}
    ReFL(**refl, prompts=prompts)
    with pytest.raises(ValueError, match=message):
        ReFL(**refl, prompts=prompts, pretraining=1.0)


def test_real_media_of_another_kind_are_told(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"clip\.mp4, .* 'a blue square', is a video, and the model makes pictures"):
        instruct_video_job(tmp_path / "run", prompts=change_record(media=str(tmp_path / "clip.mp4")))


CONFIG = """
trainer: trainers.InstructVideo
model: {class: flowalign.models.SD3, pipeline: shapes, max_sequence_length: 0}
reward: {class: rewards.CLIPScore, model: shapes}
"""


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "prompt 'two stars' names no real media"),
        ({"media": "none.png"}, "prompts.jsonl:2: the reference .*none.png is not a file"),
    ],
)
def test_the_command_tells_it_in_one_line(record, message, tmp_path, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    held = [{"prompt": "a red circle", "media": "0.png"}, {"prompt": "two stars"} | record]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, held)))
    (tmp_path / "config.yaml").write_text(f"{CONFIG}prompts: {tmp_path}/prompts.jsonl\nfolder: {tmp_path}/run\n")
    assert main(["check", str(tmp_path / "config.yaml")]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("flowalign: error: ")
    assert re.search(message, last)
    assert not (tmp_path / "run").exists()


def faces(folder: Path, seen: bool = True) -> list[str]:
    """Two pictures of a pool; of a black first pixel the detector says that there is no face."""
    files = []
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        picture = torch.rand(3, 40, 40, generator=generator) * (0.0 if not seen else 1.0)
        files.append(str(folder / f"face-{number}.png"))
        Image.fromarray((255 * picture).byte().permute(1, 2, 0).numpy()).save(files[-1])
    return files


def ipro(folder: Path, model: Path, *pools: list[str] | None) -> IPRO:
    records = tuple({} if pool is None else {"references": pool} for pool in pools)
    reward = FaceIdentity(str(model), MarkedFaces(), pool="mean")
    changes: dict[str, Any] = {"evaluation": Evaluation(), "epochs": 1, "reward": reward}
    return ipro_job(folder / "run", prompts=Prompts(tuple(PROMPTS), records), **changes)


def test_a_check_of_ipro_with_a_pool_of_faces(weights, tmp_path):
    pool = faces(tmp_path)
    found = inspect(ipro(tmp_path, weights, pool, pool, pool[:1]), tmp_path / "out")
    assert found.errors == 0
    assert found.trial is not None
    assert found.trial.learning.grad_norm > 0
    assert found.trial.rollouts.scores.total.abs().max() <= 1
    assert "face_identity" in page(found)


def test_pools_that_are_missing_are_told(weights, tmp_path):
    pool = faces(tmp_path)
    with pytest.raises(ValueError, match="prompt 'a blue square' has no \"references\", and 2 of the 3 prompts"):
        ipro(tmp_path, weights, pool, None, pool)
    with pytest.raises(ValueError, match=r"none\.png, a reference of prompt 'two stars', is not a file"):
        ipro(tmp_path, weights, pool, pool, [*pool, "none.png"])
    with pytest.raises(ValueError, match='there are none: name their files as "references" in each prompt\'s record'):
        ipro(tmp_path, weights, None, None, None).preflight().roll_out()


def test_a_pool_without_a_face_gives_no_score(weights, tmp_path):
    pool = faces(tmp_path, seen=False)
    assert not ipro(tmp_path, weights, pool, pool, pool).preflight().roll_out().scores.valid.any()
