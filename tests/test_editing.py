"""Editing by a partial start: our rollout is diffusers' img2img pipeline's, and everything else goes on as before."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flowalign.cli import main as run_command
from flowalign.interrupt import Stopped
from flowalign.media import inline, load_named, shown
from flowalign.models import SD3, PipelineModel
from flowalign.models.editing import steps_in_all, steps_made
from flowalign.models.gaussian import GaussianModel
from flowalign.models.loading import settings_of
from flowalign.pictures import to_bytes
from flowalign.prompts import as_prompts
from flowalign.records import Media, Prompts, Scores, intervals
from flowalign.rollout import Policy, replay, rollout
from flowalign.sample import pictures
from flowalign.schedules import AllSteps, Window, linear, shifted
from flowalign.schedules import Path as Steps
from flowalign.shapes.edits import held_out_edits, train_edits
from flowalign.shapes.prompts import held_out
from flowalign.shapes.scenes import Placed, Spec, apart, draw, related
from flowalign.shapes.verifier import detect
from flowalign.transitions import ODE, DanceSDE, FlowSDE
from flowalign.windows import Jump, ShortTail
from rewards import ObjectEdit, ShapesFinder, ShapesVerifier
from tests import processes
from tests.families import CASES, Case
from tests.interrupted import assert_close
from tests.jobs import digest, instruct_video_job, job, redness, rows
from tests.test_conformance import assert_same
from tests.tiny import randomise_policy, tiny_sd3
from trainers import ActiveSteps, Checkpoints, Evaluation, Optimizer, Sampling, Talk2Move
from trainers.active_steps import ActiveCollection, started_at
from trainers.preflight import inspect

TEXTS = ["a red circle", "two blue squares"]
IMG2IMG = {
    "sd3": "StableDiffusion3Img2ImgPipeline",
    "flux dev": "FluxImg2ImgPipeline",
    "qwen-image": "QwenImageImg2ImgPipeline",
    "z-image": "ZImageImg2ImgPipeline",
}
EDITED = [case for case in CASES if case.name in IMG2IMG]


def picture(number: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (3, height, width), dtype=np.uint8)


def pictured(texts: list[str] = TEXTS) -> Prompts:
    """Each with a picture of its own, in its record."""
    return Prompts(tuple(texts), tuple({"media": inline(picture(i))} for i in range(len(texts))))


def certain(pipe: Any) -> Any:
    """The VAE's distribution made a point: pipelines draw from it, and we take its mean."""
    vae = pipe.vae
    last = getattr(vae, "quant_conv", None) or vae.encoder.conv_out
    half = len(last.weight) // 2
    last.weight.data[half:], last.bias.data[half:] = 0.0, -1e4
    return pipe


def img2img(case: Case) -> Any:
    whole: Any = certain(case.make())
    pipe = getattr(diffusers, IMG2IMG[case.name])(**whole.components)
    if case.name == "qwen-image":  # its tiny template is no part of the pipeline
        pipe.prompt_template_encode = whole.prompt_template_encode
        pipe.prompt_template_encode_start_idx = whole.prompt_template_encode_start_idx
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edited(case: Case, model: PipelineModel, steps: int, noise: Tensor, guidance: float) -> Tensor:
    path = Steps((ODE(),) * steps)
    return rollout(model, model.condition(pictured()), noise, model.sigmas(steps), path, Policy(guidance)).latents


@pytest.mark.parametrize("strength", [0.3, 0.8])
@pytest.mark.parametrize("case", EDITED, ids=lambda case: case.name)
def test_an_ode_rollout_is_the_img2img_pipeline_s(case: Case, strength: float) -> None:
    """From its noise: it draws the VAE's first, and then the rollout's, from one generator."""
    asked, guidance = 10, case.guided
    model = case.adapt(certain(case.make()), **case.options, height=32, width=32, strength=strength)  # type: ignore
    generator = torch.Generator().manual_seed(7)
    shape = (2, *model.latent_shape)
    torch.randn(shape, generator=generator)
    noise = torch.randn(shape, generator=generator)
    made = steps_made(asked, strength)
    assert steps_in_all(made, strength) == asked
    ours = edited(case, model, made, noise, guidance)
    pipe = img2img(case)
    theirs = pipe(
        [*TEXTS], image=torch.stack([torch.from_numpy(picture(i)) / 255 for i in range(2)]), strength=strength,
        num_inference_steps=asked, generator=torch.Generator().manual_seed(7), output_type="latent",
        height=32, width=32, **{case.scale_name: case.scale(guidance)}, **case.options, **case.calls,
    )[0]  # fmt: skip
    assert len(pipe.scheduler.timesteps) == asked
    begun = pipe.scheduler.sigmas[asked - made :]
    torch.testing.assert_close(torch.tensor(model.sigmas(made)), begun.float(), atol=1e-6, rtol=0)
    assert (ours - model.condition(pictured()).source).abs().max() > 0.1
    assert_same(case, case.packed(model, ours), theirs)


def test_steps_that_are_made_and_steps_of_the_grid() -> None:
    for strength in (0.05, 0.29, 0.5, 0.6, 0.75, 1.0):
        for made in range(1, 40):
            whole = steps_in_all(made, strength)
            assert steps_made(whole, strength) == made < steps_made(whole + 1, strength)
    for steps in range(1, 60):  # any grid of the pipeline's has a strength that gives it
        assert all(steps_in_all(made, (made - 1e-6) / steps) == steps for made in range(1, steps + 1))


def model_of(strength: float | None = 0.6, **more: Any) -> SD3:
    return SD3(tiny_sd3(), max_sequence_length=0, grid=linear, strength=strength, **more)


def test_at_strength_1_a_rollout_is_the_one_from_noise_bit_for_bit() -> None:
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    path, edit, plain = Steps((ODE(),) * 5), model_of(1.0), model_of(None)
    assert edit.sigmas(5) == plain.sigmas(5)
    ours = rollout(edit, edit.condition(pictured()), noise, edit.sigmas(5), path).latents
    assert torch.equal(ours, rollout(plain, plain.condition(pictured()), noise, plain.sigmas(5), path).latents)


def test_a_rollout_starts_between_its_own_picture_and_its_noise() -> None:
    model, prompts = model_of(), pictured()
    sigmas = model.sigmas(3)
    assert sigmas[0] == pytest.approx(shifted([0.6], 3.0)[0])
    condition = model.condition(prompts).rows(torch.tensor([1, 0, 0]))
    noise = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    made = rollout(model, condition, noise, sigmas, Steps((ODE(),) * 3), keep_path=True)
    shown = torch.stack([torch.from_numpy(picture(i)) / 255 for i in (1, 0, 0)])
    sources = model.encode_media(shown)
    torch.testing.assert_close(made.path[0], (1 - sigmas[0]) * sources + sigmas[0] * noise, atol=1e-5, rtol=1e-5)


def test_a_picture_is_encoded_once_whatever_shares_its_call() -> None:
    model, prompts, seen = model_of(), pictured(["a", "b", "c"]), list[int]()
    encode = model.encode_media
    model.encode_media = lambda pixels: seen.append(len(pixels)) or encode(pixels)  # type: ignore
    both = model.condition(prompts.rows([0, 1, 0, 0])).source
    again = model.condition(prompts.rows([2, 1])).source
    assert both is not None
    assert again is not None
    assert torch.equal(both[1], again[1])
    assert torch.equal(both[0], both[3])
    assert seen == [1, 1, 1]


def test_ratios_of_an_edit_are_exactly_1() -> None:
    """Its replay knows no picture: where a step starts from is stored."""
    model, prompts = model_of(), pictured()
    randomise_policy(model)
    path, policy, drawn = AllSteps(FlowSDE(0.7)).resolve(3, 0, 0), Policy(2.0), torch.randn(2, 4, 4, 4)
    made = rollout(model, model.condition(prompts), drawn, model.sigmas(3), path, policy, lambda step: drawn)
    for step in made.steps:
        again = replay(model, step, path.transitions[step.interval.index], model.encode(prompts.text), policy)
        assert torch.equal(again.log_probs, step.log_probs)


def test_what_cannot_be_edited_is_refused() -> None:
    model = model_of()
    with pytest.raises(ValueError, match=r'prompt 1 \(\'b\'\) names no picture, .* "media", a file, .* \(1 of the 2'):
        model.check_prompts(Prompts(("a", "b"), (pictured().metadata[0], {})))
    with pytest.raises(ValueError, match=r"/nowhere.png, which prompt 'a' starts from, is not a file"):
        model.condition(Prompts(("a",), ({"media": "/nowhere.png"},)))
    with pytest.raises(ValueError, match=r"clip.mp4, .* is a video"):
        model.check_prompts(Prompts(("a",), ({"media": "clip.mp4"},)))
    with pytest.raises(ValueError, match=r"data:image/png;base64,.*is not base64"):
        model.condition(Prompts(("a",), ({"media": "data:image/png;base64,!"},)))
    with pytest.raises(ValueError, match="no picture to start from"):
        rollout(model, model.encode(["a"]), torch.zeros(1, 4, 4, 4), model.sigmas(2), Steps((ODE(),) * 2))
    for strength in (0.0, 1.2):
        with pytest.raises(ValueError, match=rf"strength must lie in \(0, 1\], got {strength}"):
            model_of(strength)
    case = next(case for case in CASES if case.name == "sd1.5 ddim")
    with pytest.raises(ValueError, match=r"strength is for families .* StableDiffusion is none of them"):
        case.adapt(case.make(), strength=0.5)  # type: ignore[arg-type]
    own = {"model": model, "prompts": pictured()}
    with pytest.raises(ValueError, match=r"InstructVideo starts from real media by itself.*leave model.strength 0.6"):
        instruct_video_job(Path("unused"), **own | {"evaluation": Evaluation()})
    with pytest.raises(ValueError, match="names no picture"):
        job(Path("unused"), model=model, evaluation=Evaluation())
    with pytest.raises(ValueError, match="names no picture"):
        job(Path("unused"), **own)


def test_a_picture_in_a_record_is_read_as_its_file_would_be(tmp_path: Path) -> None:
    Image.fromarray(picture(3).transpose(1, 2, 0)).save(tmp_path / "a.png")
    text, metadata = "a red circle", {"media": inline(picture(3)), "references": [inline(picture(3)), "a.png"]}
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": text} | metadata))
    (row,) = as_prompts(str(tmp_path / "data.jsonl")).all().metadata
    assert row["media"] == metadata["media"]
    pixels = [load_named(name)[0] for name in (row["media"], *row["references"])]
    assert all(torch.equal(one, torch.from_numpy(picture(3)) / 255) for one in pixels)


def test_sample_edits_the_pictures_that_a_file_names(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "data.jsonl").write_text(
        "\n".join(json.dumps({"prompt": t} | m) for t, m in zip(TEXTS, pictured().metadata, strict=True))
    )
    words = ["sample", "shapes", "--model.strength", "0.5", "--model.grid", "flowalign.schedules.linear"]
    words += ["--steps", "2", "--guidance-scale", "1", "--out", str(tmp_path / "out")]
    assert run_command([*words, "--prompt", "a star"]) != 0
    assert "prompt 0 ('a star') names no picture" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run_command([*words, "--prompts", str(tmp_path / "data.jsonl")]) == 0
    model = SD3("shapes", **settings_of("shapes") | {"grid": linear, "strength": 0.5})
    made = torch.cat([*pictures(model, pictured(), 2, 1.0)])
    for i, pixels in enumerate(made):
        assert torch.equal(load_named(str(tmp_path / "out" / f"{i:04d}.png"))[0], to_bytes(pixels) / 255)


# The embedded task


def test_edits_are_drawn_alike_each_time_and_their_captions_are_split() -> None:
    train, held = train_edits(80), held_out_edits(40)
    assert train == train_edits(80)
    assert train_edits(40, seed=3).text != train.text[:40]
    for prompts, wanted in ((train, False), (held, True)):
        assert {held_out(Spec.from_dict(row["spec"])) for row in prompts.metadata} == {wanted}
        kinds = [row["edit"] for row in prompts.metadata]
        assert 0.35 < kinds.count("move") / len(kinds) < 0.65
        assert len({row["media"] for row in prompts.metadata}) == len(prompts)
    assert {row["edit"] for row in train_edits(30, kinds=("move",)).metadata} == {"move"}
    assert any(row["unseen"] for row in held.metadata)
    with pytest.raises(ValueError, match="kinds of edits are move, resize, got 'turn'"):
        train_edits(3, kinds=("turn",))


def judged(pixels: Tensor, prompts: Prompts) -> Scores:
    return ObjectEdit(ShapesFinder(), 0.2)(shown(pixels, prompts), prompts)


def done(row: dict[str, Any], before: Tensor) -> Tensor:
    """The picture after the edit, drawn from what is seen before it."""
    rng = np.random.default_rng(0)
    seen = {f"{one.color} {one.shape}": one for one in detect(before[None])[0]}
    things = {name: Placed(one.color, one.shape, one.x, one.y, one.extent / 2) for name, one in seen.items()}
    item = things.pop(row["object"])
    if row["edit"] == "resize":
        return torch.from_numpy(draw([replace(item, radius=item.radius * row["factor"])])) / 255
    (anchor,) = things.values()
    while True:
        x, y = rng.uniform(item.radius, 32 - item.radius, 2).tolist()
        moved = replace(item, x=x, y=y)
        if apart([moved, anchor]) and related(moved, anchor, row["spec"]["relation"]):
            return torch.from_numpy(draw([moved, anchor])) / 255


def test_the_reward_tells_a_done_edit_from_none_and_from_a_wrong_one() -> None:
    prompts = train_edits(48, seed=5)
    before = torch.stack([load_named(row["media"])[0] for row in prompts.metadata])
    after = torch.stack([done(row, one) for row, one in zip(prompts.metadata, before, strict=True)])
    moves = torch.tensor([row["edit"] == "move" for row in prompts.metadata])
    nothing, all_of_it = judged(before, prompts), judged(after, prompts)
    assert nothing.valid.all()
    torch.testing.assert_close(nothing.total[moves], torch.full_like(nothing.total[moves], 0.2))
    resizes = nothing.parts["resize"][~moves]
    torch.testing.assert_close(resizes, torch.full_like(resizes, 2 / 3))  # 1 - 2 (5/3 - 1) / 4
    assert all_of_it.total[moves].min() > 0.35
    assert all_of_it.total[moves].mean() > 0.6
    assert (all_of_it.total[~moves] > 0.8).float().mean() > 0.9  # the finder may miss one
    strict = ShapesVerifier()
    assert strict(shown(before, prompts), prompts).parts["strict"].sum() == 0
    assert strict(shown(after, prompts), prompts).parts["strict"].mean() > 0.9
    other = {"left": "right", "right": "left", "up": "down", "down": "up"}
    turned = [
        row | {"direction": " ".join(other[w] for w in row.get("direction", "").split())} for row in prompts.metadata
    ]
    of_moves = moves.nonzero().flatten().tolist()
    wrong = judged(after[moves], Prompts(prompts.text, tuple(turned)).rows(of_moves))
    torch.testing.assert_close(wrong.total, 0.2 * wrong.parts["position"])
    assert (wrong.parts["translation"] < 0).all()
    empty = judged(torch.full_like(after, 0.5), prompts)
    assert empty.total.abs().max() == 0
    assert empty.parts["found"].sum() == 0


def test_an_edit_s_record_says_one_thing() -> None:
    prompts = train_edits(2, seed=5)
    pixels = torch.zeros(2, 3, 32, 32)
    for changes in ({"factor": 2, "direction": "left"}, {"factor": None, "direction": None}):
        bad = Prompts(prompts.text, tuple(row | changes for row in prompts.metadata))
        with pytest.raises(ValueError, match='must name either "direction" or "factor"'):
            judged(pixels, bad)


# Active steps


def level(media: Media, prompts: Prompts) -> Tensor:
    return media.pixels[:, 0, 0, 0]


def measured(folder: Path) -> Any:
    return json.loads((folder / "steps.json").read_text())


def exploring(folder: Path, plan: Any, **changes: Any) -> Talk2Move:
    """On the closed form, where the reward is the sample itself."""
    sampling = Sampling(plan, 2, 16, 64, 64, 10, 1.0)
    settings: dict[str, Any] = {"updates_per_epoch": 1, "epochs": 1, "folder": str(folder)}
    return Talk2Move(GaussianModel(), level, ["x", "y"], sampling, **settings | changes)


def test_the_spread_of_each_start_is_the_closed_form_s_and_the_largest_is_taken(tmp_path: Path) -> None:
    """One noisy step and a jump: std(x_0) = std_k |1 - sigma A|, A the slope of the velocity where the step ends."""
    rule = DanceSDE(0.8)
    run = exploring(tmp_path / "run", Jump(Window(rule, 3, 1, shared_noise=True)), active=ActiveSteps(3, 7, groups=64))
    run.train(report=False)
    told, expected = measured(tmp_path / "run"), dict[int, float]()
    for interval in intervals(run.sigmas)[3:7]:
        _, std = rule(torch.zeros(1, 1), torch.zeros(1, 1), interval)
        s = interval.sigma_next
        expected[interval.index] = std * abs(1 - s * (2 * s - 1) / ((1 - s) ** 2 + s**2))
    mean_of_stds = math.sqrt(2 / 15) * math.gamma(8) / math.gamma(7.5)  # of 16 normal numbers, whose own std is 1
    assert [row["start"] for row in told["starts"]] == [3, 4, 5, 6]
    for row in told["starts"]:
        assert row["spread"] == pytest.approx(mean_of_stds * expected[row["start"]], rel=0.1)
        assert row["error"] == pytest.approx(row["spread"] * 0.18 / 8, rel=0.4)  # a std of 16 varies by 18 %, of 64
    assert told["chosen"] == max(expected, key=lambda start: expected[start]) == 6
    assert run.collection.path(0).stochastic == (6,)
    assert run.state.noise["rounds"] == told["starts"]


def test_what_is_measured_moves_no_other_plan(tmp_path: Path) -> None:
    window = Window(FlowSDE(0.7), 0, 4, shared_noise=True)
    assert exploring(tmp_path, Jump(window)).active == ActiveSteps(high=5)
    assert started_at(ShortTail(window, 2), 3) == ShortTail(replace(window, start=3), 2)
    with pytest.raises(ValueError, match=r"active moves the start of .*Window.* is AllSteps: take a Window, or set"):
        exploring(tmp_path, AllSteps(FlowSDE(0.7)))
    with pytest.raises(ValueError, match=r"a window of 4 steps in the steps 0 to 3 .* there must be two at least"):
        exploring(tmp_path, Jump(window), active=ActiveSteps(high=4))
    plain = exploring(tmp_path / "run", AllSteps(FlowSDE(0.7)), active=None)
    plain.train(report=False)
    assert not (tmp_path / "run" / "steps.json").exists()


def edit_job(folder: Path, **changes: Any) -> Talk2Move:
    """Edits on the tiny SD3: three starts of a window of two among four steps, and a jump."""
    prompts = train_edits(3, seed=2)
    settings: dict[str, Any] = {
        "model": model_of(),
        "reward": redness,
        "prompts": prompts,
        "sampling": Sampling(
            Jump(Window(FlowSDE(0.7), 1, 2, shared_noise=True)), groups=3, group_size=4, batch_size=2, rows_per_call=4,
            steps=4, guidance_scale=2.0,
        ),
        "active": ActiveSteps(groups=2),
        "optimizer": Optimizer(3e-4),
        "evaluation": Evaluation(held_out_edits(3, seed=2), every=1, pictures=2),
        "checkpoints": Checkpoints(every=1, minutes=0),
        "epochs": 1,
        "seed": 5,
        "folder": str(folder),
    }  # fmt: skip
    return Talk2Move(**settings | changes)


def test_a_training_of_edits_that_is_stopped_while_it_measures_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    edit_job(tmp_path / "whole").train(report=False)
    (row,) = [row for row in rows(tmp_path / "whole") if "reward" in row]
    assert row["ratio_max"] == 0
    assert row["rows/forward"] == 4 / 3 * row["floor/forward"]  # three groups in micro-batches of two
    assert {row["step"] for row in rows(tmp_path / "whole") if "held-out" in row} == {0, 1}
    assert (tmp_path / "whole" / "samples" / "before_after.png").is_file()
    begin, seen = ActiveCollection.begin, list[int | None]()

    def stopping(self: ActiveCollection, *arguments: Any) -> Any:
        seen.append(self.start)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return begin(self, *arguments)

    monkeypatch.setattr(ActiveCollection, "begin", stopping)
    with pytest.raises(Stopped, match="calibration-000002"):
        edit_job(tmp_path / "run").train(report=False)
    monkeypatch.undo()
    assert not (tmp_path / "run" / "steps.json").exists()
    edit_job(tmp_path / "run").train(report=False, resume=True)
    assert measured(tmp_path / "run") == measured(tmp_path / "whole")
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def _train(folder: Path, rank: int = 0) -> None:
    edit_job(folder, evaluation=Evaluation()).train(report=False)


def test_what_two_processes_measure_and_train_is_what_one_does(tmp_path: Path) -> None:
    for world in (1, 2):
        processes.run(world, tmp_path, partial(_train, tmp_path / str(world)))
    assert measured(tmp_path / "1") == measured(tmp_path / "2")
    assert_close(tmp_path / "1", tmp_path / "2")


def test_a_check_of_edits_finds_nothing_wrong(tmp_path: Path) -> None:
    found = inspect(edit_job(tmp_path / "run"), tmp_path / "check")
    assert not found.errors
    assert found.trial is not None
    assert found.trial.learning.off == 0
