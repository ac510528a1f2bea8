"""Calls that several processes make together, each on some of the tokens: the same runs as calls of one process."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowalign import checkpoint, distributed
from flowalign.adapters import LoRA
from flowalign.config import ConfigError
from flowalign.context_parallel import ContextParallel
from flowalign.evaluation.benchmarks import ShapesVideo
from flowalign.evaluation.sweep import Entrant, Sweep, plan
from flowalign.interrupt import Stopped
from flowalign.memory_estimate import Saved
from flowalign.models.flux import Flux
from flowalign.models.memory import Memory
from flowalign.models.qwen_image import QwenImage
from flowalign.models.sd3 import SD3
from flowalign.models.wan import Wan
from flowalign.records import Media, Prompts, Size
from flowalign.sample import Request, config_of, save_pictures
from flowalign.sharding import Shard
from flowalign.shards import whole_tensor
from rewards.base import FunctionReward
from tests import processes
from tests.families import CASES, Case, seeded
from tests.interrupted import dying
from tests.jobs import JOBS, contents, rows
from tests.test_sharding import PLAIN, UNEVEN, read, record_of
from tests.tiny import randomise_policy, tiny_sd3
from tests.tiny_flux import tiny_flux
from tests.tiny_qwen_image import tiny_qwen_image
from tests.tiny_wan import tiny_wan, wan_transformer
from trainers import Evaluation
from trainers.base import Trainer

PAIR = ContextParallel(ulysses=2)
TOLD = Prompts(("a red circle", "two stars"), ({}, {}))
CUT = [case for case in CASES if case.adapt in (Wan, Flux, QwenImage)]
SMALL = {"max_sequence_length": 12, "height": 32, "width": 32, "frames": 5}  # eight tokens
Seen = tuple[np.ndarray, np.ndarray, list[np.ndarray], list[np.ndarray]]


def run(world: int, work: Callable[[int], Any]) -> list[Any]:
    """What each of so many processes returns."""
    with TemporaryDirectory() as place:
        return processes.run(world, Path(place), work, seconds=300)


def two_calls(case: Case, how: ContextParallel | None, full: bool, options: dict[str, Any], rank: int = 0) -> Seen:
    """A velocity through two calls, the slope where the first began, and the policy's gradient: own, and summed."""
    memory = Memory(context_parallel=how, shard=options.pop("shard", None))
    model = case.adapt(case.make(), None if full else LoRA(rank=4), memory=memory, **case.options, **options)
    if not full:
        randomise_policy(model)
    noise = torch.Generator().manual_seed(0)
    start = torch.randn(2, *model.latent_shape, generator=noise).requires_grad_()
    told = model.condition(TOLD)
    middle = start - 0.3 * model.velocity(start, 0.7, told, 2.0)
    made = model.velocity(middle, 0.4, told)
    model.backward((made * torch.randn(made.shape, generator=noise)).mean())
    assert start.grad is not None
    own = [torch.zeros_like(one) if one.grad is None else one.grad for one in model.trainable().values()]
    summed = [one.clone() for one in own]
    distributed.sum_over_ranks(summed)
    return made.detach().numpy(), start.grad.numpy(), [one.numpy() for one in own], [one.numpy() for one in summed]


def furthest(ones: list[np.ndarray], others: list[np.ndarray]) -> float:
    return max(float(np.abs(one - other).max()) for one, other in zip(ones, others, strict=True))


def assert_same(case: Case, place: Path, full: bool = False, how: ContextParallel = PAIR, **options: Any) -> None:
    alone = run(1, functools.partial(two_calls, case, None, full, dict(options)))[0]
    velocity, slope, gradient, _ = alone
    assert np.abs(slope).max() > 1e-4
    assert furthest(gradient, [0 * one for one in gradient]) > 1e-2
    work = functools.partial(two_calls, case, how, full, dict(options))
    for seen, at, own, summed in run(how.size, work):
        assert np.abs(seen - velocity).max() <= 1e-5
        assert np.abs(at - slope).max() <= 1e-6  # whole on each process
        assert furthest(summed, gradient) <= 1e-6
        assert furthest(own, gradient) > 1e-3  # neither whole on a process
        assert furthest([one / how.size for one in summed], gradient) > 1e-3  # nor the mean


def test_calls_made_together_have_one_process_s_gradient(tmp_path):
    """Through two calls one after another: of the policy the sum, of what they were given whole."""
    assert_same(CUT[0], tmp_path, **CUT[0].sizes[0])


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("case", CUT, ids=lambda case: case.name)
def test_every_family_that_diffusers_cuts(case, full, tmp_path):
    """At another size, with activations made anew in the backward pass; of FLUX and Qwen-Image prompts are cut too."""
    assert_same(case, tmp_path, full, gradient_checkpointing=True, **case.sizes[1])


@pytest.mark.slow
def test_four_processes_make_a_call_of_four_heads(tmp_path):
    case = Case("wan", seeded(lambda: tiny_wan(transformer=wan_transformer(num_attention_heads=4))), Wan)
    assert_same(case, tmp_path, how=ContextParallel(ulysses=4), **SMALL)


def glow(media: Media, prompts: Prompts) -> Tensor:
    """One channel of a patch of the first frame, another for other prompts."""
    wanted = [len(text) % 3 for text in prompts.text]
    return 30 * torch.stack([media.pixels[i, 0, channel, 8:12, 8:12].mean() for i, channel in enumerate(wanted)])


def made(folder: Path, how: ContextParallel | None, kind: str = "flow_grpo", **changes: Any) -> Trainer:
    """A run of videos of two micro-batches and more, whose update nothing clips."""
    shards, lora = changes.pop("shard", None), changes.pop("lora", LoRA())
    model = Wan(seeded(tiny_wan)(), lora, memory=Memory(context_parallel=how, shard=shards), **SMALL)
    own = {"optimizer": PLAIN, "reward": FunctionReward(glow, differentiable=True)}
    return JOBS[kind](folder, model=model, **own | changes)


def train(folder: Path, how: ContextParallel | None, rank: int = 0, **changes: Any) -> list[np.ndarray]:
    """Returns the gradient of the first optimizer step."""
    trainer, seen = made(folder, how, **changes), list[np.ndarray]()
    values = [*trainer.model.trainable().values()]

    def look(*_: Any) -> None:
        if not seen:
            seen.extend(whole_tensor(value.grad).numpy().copy() for value in values if value.grad is not None)

    trainer.optimizer.adamw.register_step_pre_hook(look)
    trainer.train(resume=True, report=False)
    return seen


def assert_runs_are_one(place: Path, groups: int = 1, against: int = 1, **changes: Any) -> None:
    """The same gradient, policy and average to 1e-6, as many calls counted, and the same evaluations.

    groups: of two processes. against: so many processes, each on its own.
    """
    one = run(against, functools.partial(train, place / "alone", None, **changes))[0]
    for other in run(2 * groups, functools.partial(train, place / "together", PAIR, **changes)):
        assert furthest(other, one) <= 1e-6
    assert furthest(one, [0 * value for value in one]) > 1e-4
    assert_same_record(place / "together", place / "alone")
    for name in ("rows/forward", "rows/gradient", "floor/forward", "floor/gradient"):
        found, wanted = ([row[name] for row in rows(place / run) if name in row] for run in ("together", "alone"))
        assert found == wanted
    mine, theirs = (pictures_of(place / run) for run in ("together", "alone"))
    assert mine.keys() == theirs.keys()
    for name, line in theirs.items():
        assert mine[name] == pytest.approx(line, rel=1e-4, abs=1e-4)


def assert_same_record(one: Path, other: Path) -> None:
    mine, theirs = record_of(one), record_of(other)
    for kind in ("policy", "average", "older"):
        assert mine[kind].keys() == theirs[kind].keys()
        for name, value in theirs[kind].items():
            torch.testing.assert_close(read(mine[kind][name]), read(value), atol=1e-6, rtol=0)


def pictures_of(folder: Path) -> dict[str, list[float]]:
    """An evaluation's scores, by its file."""
    files = sorted((folder / "evaluations").glob("epoch-*.jsonl"))
    return {file.name: [json.loads(line)["total"] for line in file.read_text().splitlines()] for file in files}


SHORT = {"epochs": 1, "sampling": replace(UNEVEN, guidance_scale=2.0), "kl_coef": 0.1}


def test_a_run_of_calls_made_together_is_that_of_one_process(tmp_path):
    """Flow-GRPO on five micro-batches in two optimizer steps, with a reference, evaluated before and after."""
    assert_runs_are_one(tmp_path, **SHORT)
    names = {file.name for file in (tmp_path / "together" / "checkpoints").rglob("*.safetensors")}
    assert "pytorch_lora_weights.safetensors" in names


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoRA(), None], ids=["lora", "full"])
def test_two_groups_of_two_come_to_the_same_as_one_process(lora, tmp_path):
    assert_runs_are_one(tmp_path, 2, **SHORT, lora=lora)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense_grpo", "draft", "refl", "dpo", "nft", "rwr", "tree"])
def test_no_kind_of_trainer_counts_a_group_twice(kind, tmp_path):
    """Two groups of two are as two processes, whatever a trainer exchanges: how calls are padded depends on these."""
    assert_runs_are_one(tmp_path, 2, against=2, kind=kind, epochs=2)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoRA(), None], ids=["lora", "full"])
@pytest.mark.parametrize("world", [2, 4])
def test_shards_of_networks_whose_calls_are_made_together(world, lora, tmp_path):
    """Each group joins in the calls of the others."""
    changes = SHORT | {"lora": lora}
    for folder, count, how, shards in (("alone", 1, None, None), ("together", world, PAIR, Shard())):
        run(count, functools.partial(train, tmp_path / folder, how, shard=shards, **changes))
    assert_same_record(tmp_path / "together", tmp_path / "alone")


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_other_processes(tmp_path):
    """Stopped amid a rollout by four processes in two groups; one process goes on, and two that make calls together."""
    for folder, world, how in (("one", 1, None), ("pair", 2, PAIR)):
        work = functools.partial(train, tmp_path / folder, PAIR, **SHORT)
        assert_stopped(tmp_path / folder, work, 4, ("rollout", 2))
        own = checkpoint.load(newest(tmp_path / folder))[1]
        assert [len(one["buffer"]) > 0 for one in own] == [True, False, True, False]
        run(world, functools.partial(train, tmp_path / folder, how, **SHORT))
    run(1, functools.partial(train, tmp_path / "alone", None, **SHORT))
    for folder in ("one", "pair"):
        assert_same_record(tmp_path / folder, tmp_path / "alone")
        for name in ("rows/forward", "rows/gradient"):
            found, wanted = ([row[name] for row in rows(tmp_path / run) if name in row] for run in (folder, "alone"))
            assert found == wanted


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    """Amid the rollouts of an epoch."""
    changes = SHORT | {"evaluation": Evaluation(), "updates_per_epoch": 1}
    work = functools.partial(train, tmp_path / "run", PAIR, **changes)
    assert_stopped(tmp_path / "run", work, 2, ("rollout", 3))
    run(2, work)
    run(2, functools.partial(train, tmp_path / "unbroken", PAIR, **changes))
    one, other = (contents(tmp_path / run / "lora" / WEIGHTS) for run in ("run", "unbroken"))
    assert one == other
    assert rows(tmp_path / "run") == rows(tmp_path / "unbroken")


WEIGHTS = "pytorch_lora_weights.safetensors"


def newest(folder: Path) -> Path:
    return folder / "checkpoints" / checkpoint.names(folder / "checkpoints")[-1]


def stopping(work: Callable[[int], Any], rank: int) -> str:
    try:
        work(rank)
    except Stopped as stop:
        return str(stop)
    return "not stopped"


def assert_stopped(folder: Path, work: Callable[[int], Any], world: int, at: tuple[str, int]) -> None:
    """The last of the processes is asked to stop as it comes to a place for the n-th time."""
    told = run(world, dying(functools.partial(stopping, work), *at, world - 1, signal.SIGTERM))
    assert all("stopped by SIGTERM" in line for line in told)


def sampled(out: Path, options: dict[str, Any], rank: int) -> None:
    asked = {"model.lora": None, "model.height": 32, "model.width": 32, "model.frames": 9, **options}
    save_pictures(
        Request("shapes-video", tuple(TOLD.text), None, None, True, 2, 2.0, 3, 1, out, asked, False)
    )  # fmt: skip


@pytest.mark.slow
def test_videos_are_sampled_together(tmp_path):
    for folder, world, options in (("alone", 1, {}), ("together", 2, {"model.memory.context_parallel.ulysses": 2})):
        run(world, functools.partial(sampled, tmp_path / folder, options))
    one, other = (
        {file.name: file.read_bytes() for file in (tmp_path / run).iterdir()} for run in ("alone", "together")
    )
    assert one == other
    assert len(one) == 5  # two strips, two videos and a sheet


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "needs ulysses or ring of at least 2 processes, got ulysses 1 and ring 1"),
        ({"ulysses": 0, "ring": 2}, "got ulysses 0 and ring 2"),
    ],
)
def test_a_call_of_one_process_is_not_made_together(settings, line):
    with pytest.raises(ValueError, match=line):
        ContextParallel(**settings)


def wan(how: ContextParallel = PAIR, memory: dict[str, Any] | None = None, **changes: Any) -> Wan:
    held = Memory(context_parallel=how, **memory or {})
    return Wan(tiny_wan(), memory=held, **SMALL | changes)


def four_heads(**changes: Any) -> Wan:
    heads = tiny_wan(transformer=wan_transformer(num_attention_heads=4))
    return Wan(heads, memory=Memory(context_parallel=ContextParallel(4)), **SMALL | changes)


@pytest.mark.parametrize(
    ("build", "line"),
    [
        (
            lambda: SD3(tiny_sd3(), memory=Memory(context_parallel=PAIR)),
            "no plan of how to cut the sequences of a SD3T",
        ),
        (lambda: wan(ContextParallel(3)), "ulysses 3 does not divide the 2 attention heads of this WanTransformer3D"),
        (lambda: four_heads(height=48, width=16), "videos of 5 x 48 x 16 are 6 tokens, .* cut into 4 equal parts"),
        (lambda: wan(compile=True), "compile does not go with memory.context_parallel"),
        (lambda: wan(memory={"attention": "_native_math"}), "memory.attention _native_math cannot exchange tokens"),
        (lambda: wan(ContextParallel(ring=2)), "ring is for CUDA and a backend .*; got native on cpu: take ulysses"),
        (lambda: wan(ContextParallel(ring=2), {"attention": "_native_flash"}), "got _native_flash on cpu"),
        (
            lambda: ContextParallel(ring=2).check_network(tiny_qwen_image().transformer),
            "a QwenImageTransformer2DModel is told by a mask .* take memory.context_parallel.ulysses",
        ),
    ],
)
def test_what_cannot_be_made_together_is_refused(build, line):
    """On one process too, as `flowalign check` is."""
    with pytest.raises(ValueError, match=line) as error:
        build()
    assert "\n" not in str(error.value)


def test_a_size_that_does_not_come_out_even_is_refused_before_it_is_made():
    """And so is a prompt's length, where prompts are cut too; the model's own size stays."""
    model = wan(ContextParallel(ulysses=2))
    with pytest.raises(ValueError, match="1 x 48 x 16 are 3 tokens"), model.sized(Size(48, 16, 1)):
        raise AssertionError("a call would be made")
    assert (model.height, model.width, model.frames, model.latent_shape) == (32, 32, 5, (4, 2, 4, 4))
    with pytest.raises(ValueError, match="prompts of this max_sequence_length are 23 tokens"):
        Flux(tiny_flux(), max_sequence_length=23, memory=Memory(context_parallel=PAIR))


def test_processes_that_do_not_come_out_even_are_refused(tmp_path):
    def work(rank: int) -> str:
        try:
            wan()
        except ValueError as error:
            return str(error)
        return "built"

    for line in run(3, work):
        assert "2 processes make each call together, which does not divide the 3 processes" in line


def saved(how: ContextParallel | None, rank: int = 0) -> int:
    """Bytes that are held for the backward pass of a call."""
    model = Wan(seeded(tiny_wan)(), LoRA(), memory=Memory(context_parallel=how), **SMALL | {"height": 512, "width": 64})
    held = Saved(model.module)
    with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda value: value):
        model.velocity(torch.zeros(2, *model.latent_shape), 0.7, model.condition(TOLD))
    return held.bytes


def test_a_process_holds_the_activations_of_its_own_tokens():
    """The halves that `flowalign check` counts on, but for what is not cut, such as what prompts come to."""
    (alone,) = run(1, functools.partial(saved, None))
    for each in run(2, functools.partial(saved, PAIR)):
        assert each / alone == pytest.approx(0.5, abs=0.02)


def test_a_sweep_draws_on_each_process_for_itself(tmp_path):
    asked = {"class": "flowalign.models.Wan", "memory": {"context_parallel": {"ulysses": 2}}}
    told = Request("shapes-video", (), None, None, True, None, None, 0, 1, tmp_path, {}, False)
    assert "memory" not in config_of(told)["model"]
    (tmp_path / "config.yaml").write_text(json.dumps({"model": {"pipeline": "shapes-video", **asked}}))
    run = Request(str(tmp_path), (), None, None, True, None, None, 0, 1, tmp_path, {}, False)
    assert config_of(run)["model"]["memory"] == {}
    model = Entrant("shapes-video", model={"memory": {"context_parallel": {"ulysses": 2}}})
    with pytest.raises(ConfigError, match=r"models\.own: memory\.context_parallel: a sweep's processes each draw"):
        plan(Sweep({"own": model}, {"own": ShapesVideo(count=2)}, folder=str(tmp_path)))
