"""Networks in shards over processes: the same runs as whole ones, whatever each process has to do."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from flowalign import checkpoint, distributed
from flowalign.adapters import LoRA
from flowalign.interrupt import Stopped
from flowalign.meeting import meeting
from flowalign.models.memory import Memory
from flowalign.models.sd3 import SD3
from flowalign.models.unet import StableDiffusion, StableDiffusionXL
from flowalign.models.wan import Wan
from flowalign.sample import Request, save_pictures
from flowalign.schedules import AllSteps
from flowalign.sharding import Shard, blocks, shard
from flowalign.shards import Stored, own_rows, whole_tensor
from flowalign.transitions import FlowSDE
from flowalign.whole import Full
from tests import processes
from tests.families import CASES, Case
from tests.jobs import BY_GRADIENT, JOBS, PROMPTS, contents, digest, rows
from tests.test_resume import dying
from tests.tiny import randomise_policy, tiny_sd3
from trainers import Evaluation, FlowGRPO, Optimizer, Sampling
from trainers.base import Trainer

LINE, GRID = Shard(), Shard(group=2)
GENTLE = Optimizer(3e-4, ema_decay=0.5, ema_every=1)  # AdamW moves what has no gradient by up to its learning rate
# five micro-batches, of which the last has one row: two processes have two and three, four have one or two
UNEVEN = Sampling(AllSteps(FlowSDE(0.7)), 3, 3, batch_size=2, rows_per_call=2, steps=3, guidance_scale=1.0)
# nothing is clipped, which would hide a wrong factor; a large eps, so that AdamW does not blow up what is near 0
PLAIN = Optimizer(3e-4, eps=1e-4, max_grad_norm=1e9, ema_decay=0.5, ema_every=1)
SHORT = {"epochs": 1, "updates_per_epoch": 1, "optimizer": PLAIN, "evaluation": Evaluation()}


def sd3(how: Shard | None, lora: LoRA | Full | None = LoRA(), **settings: Any) -> SD3:
    return SD3(tiny_sd3(), lora, max_sequence_length=0, memory=Memory(shard=how), **settings)


def made(folder: Path, how: Shard | None, kind: str = "flow_grpo", full: bool = False, **changes: Any) -> Trainer:
    settings = {name: changes.pop(name) for name in ("mixed_precision", "gradient_checkpointing") if name in changes}
    if kind in BY_GRADIENT:
        changes = {"recompute": False, **changes}
    return JOBS[kind](folder, model=sd3(how, None if full else LoRA(), **settings), **changes)


def train(folder: Path, how: Shard | None, rank: int = 0, **changes: Any) -> None:
    made(folder, how, **changes).train(resume=True, report=False)


def both(world: int, how: Shard, place: Path, **changes: Any) -> tuple[dict[str, str], dict[str, str]]:
    """What a run comes to on so many processes, whole on each and in shards."""
    for folder, chosen in (("whole", None), ("shards", how)):
        processes.run(world, place, functools.partial(train, place / folder, chosen, **changes))
    return digest(place / "whole"), digest(place / "shards")


def test_a_frozen_network_in_shards_changes_no_bit(tmp_path):
    """Of policy, moments, average, rollouts and metrics: a micro-batch more on one of two processes."""
    changes = {"epochs": 1, "updates_per_epoch": 1, "evaluation": Evaluation(), "sampling": UNEVEN}
    for folder, how in (("whole", None), ("shards", LINE)):
        processes.run(2, tmp_path, functools.partial(train, tmp_path / folder, how, **changes))
    one, other = tmp_path / "whole", tmp_path / "shards"
    assert [*hashes(one)] == [*hashes(other)]
    assert hashes(one) == hashes(other)
    assert rows(one) == rows(other)


def hashes(folder: Path) -> dict[str, str]:
    """Of the tensors of a run's newest checkpoint, and of its policy."""
    path = folder / "checkpoints" / checkpoint.names(folder / "checkpoints")[-1]
    files = sorted([*path.rglob("*.safetensors"), *(folder / "transformer").glob("*"), *path.glob("shards*")])
    held = {file: contents(file) if "lora" in file.name else file.read_bytes() for file in files}
    return {file.name: sha256(content).hexdigest() for file, content in held.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flow_grpo", "draft"])
def test_half_precision_in_shards_changes_no_bit(kind, tmp_path):
    whole, shards = both(2, LINE, tmp_path, kind=kind, epochs=1, mixed_precision="bf16", gradient_checkpointing=True)
    assert shards == whole


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in JOBS if kind != "flow_grpo"])
def test_no_kind_of_trainer_knows_of_shards(kind, tmp_path):
    whole, shards = both(3, LINE, tmp_path, kind=kind)
    assert shards == whole


@pytest.mark.slow
@pytest.mark.parametrize(("world", "how"), [(3, LINE), (4, LINE), (4, GRID), (6, LINE), (6, GRID)])
def test_processes_with_little_or_nothing_to_do_join_in(world, how, tmp_path):
    """Five micro-batches in two optimizer steps: of six processes one has none."""
    whole, shards = both(world, how, tmp_path, sampling=UNEVEN, epochs=2)
    assert shards == whole


@pytest.mark.slow
def test_a_video_model_in_shards_changes_no_bit(tmp_path):
    def work(folder: Path, how: Shard | None, rank: int) -> None:
        model = Wan("shapes-video", LoRA(rank=2), memory=Memory(shard=how), max_sequence_length=20, height=32, width=32,
                    frames=9, fps=8)  # fmt: skip
        sampling = Sampling(AllSteps(FlowSDE(0.7)), 3, 2, batch_size=2, rows_per_call=2, steps=2, guidance_scale=2.0)
        reward: Callable[..., Tensor] = lambda media, prompts: media.pixels[:, 0, 0].mean((1, 2))  # noqa: E731
        FlowGRPO(model, reward, PROMPTS, sampling, epochs=1, folder=str(folder)).train(report=False)

    for folder, how in (("whole", None), ("shards", LINE)):
        processes.run(2, tmp_path, functools.partial(work, tmp_path / folder, how))
    one, other = (
        contents(tmp_path / name / "lora" / "pytorch_lora_weights.safetensors") for name in ("whole", "shards")
    )
    assert one == other


def held(how: Shard, full: bool, rank: int) -> list[int]:
    model = sd3(how, None if full else LoRA())
    model.keep(True, False, dict)
    sharded = [value for value in model.module.parameters() if whole_tensor(value) is not value]
    kept = [] if model.kept is None else [*model.kept.parameters()]
    own = [sum(own_rows(value).numel() for value in part) for part in (sharded, kept)]
    return [*own, sum(value.numel() for value in sharded), sum(p.numel() for p in model.module.parameters())]


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_each_process_holds_its_part_of_the_weights_alone(full, tmp_path):
    policy = 0 if full else sum(value.numel() for value in sd3(None).trainable().values())
    found = processes.run(2, tmp_path, functools.partial(held, LINE, full))
    for own, kept, sharded, every in found:
        assert sharded == every - policy > 70_000
        assert abs(own - sharded / 2) < 0.01 * sharded  # rows are not cut
        assert kept == (own if full else 0)
    assert sum(own for own, *_ in found) == found[0][2]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "how", "share"), [(3, LINE, 1 / 3), (4, LINE, 1 / 4), (4, GRID, 1 / 2)])
def test_more_processes_hold_less(world, how, share, tmp_path):
    for own, kept, sharded, _ in processes.run(world, tmp_path, functools.partial(held, how, True)):
        assert own == kept
        assert abs(own / sharded - share) < 0.03


def first_step(folder: Path, how: Shard | None, rank: int = 0, **changes: Any) -> tuple[list[Any], list[Any]]:
    """The gradient of the first optimizer step, and the policy after it."""
    trainer, seen = made(folder, how, **changes), list[Any]()
    values = [*trainer.model.trainable().values()]

    def look(*_: Any) -> None:
        seen.extend(whole_tensor(value.grad).numpy().copy() for value in values if value.grad is not None)

    trainer.optimizer.adamw.register_step_pre_hook(look)
    trainer.train(report=False)
    assert len(seen) == len(values)
    return seen, [whole_tensor(value).detach().numpy() for value in values]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """What one process comes to."""

    @functools.cache
    def of(full: bool, kind: str) -> Any:
        folder = tmp_path_factory.mktemp("alone")
        work = functools.partial(first_step, folder / "run", None, full=full, kind=kind, **settings(kind))
        return processes.run(1, folder, work)[0]

    return of


def settings(kind: str) -> dict[str, Any]:
    return SHORT | ({"sampling": replace(UNEVEN, guidance_scale=2.0)} if kind == "flow_grpo" else {})


def assert_gradient(world: int, how: Shard | None, full: bool, kind: str, place: Path, alone: Any) -> None:
    gradient, policy = alone(full, kind)
    start = [value.detach().numpy() for value in sd3(None, None if full else LoRA()).trainable().values()]
    size = max(np.abs(one).max() for one in gradient)
    moved = max(np.abs(a - b).max() for a, b in zip(policy, start, strict=True))
    assert size > 1e-3
    assert moved > 1e-4
    work = functools.partial(first_step, place / "run", how, full=full, kind=kind, **settings(kind))
    for found, end in processes.run(world, place, work):
        assert max(np.abs(a - b).max() for a, b in zip(found, gradient, strict=True)) <= 1e-6
        assert max(np.abs(a - b).max() for a, b in zip(end, policy, strict=True)) <= 1e-6


def test_the_gradient_is_that_of_one_process(tmp_path, alone):
    """Of all weights, in shards on two processes."""
    assert_gradient(2, LINE, True, "flow_grpo", tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "how"), [(2, None), (3, None), (2, LINE), (3, LINE), (4, LINE), (4, GRID), (6, LINE)]
)
@pytest.mark.parametrize(("full", "kind"), [(False, "flow_grpo"), (True, "flow_grpo"), (True, "draft"), (True, "dpo")])
def test_the_gradient_is_that_of_one_process_however_many_there_are(world, how, full, kind, tmp_path, alone):
    assert_gradient(world, how, full, kind, tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nft", "rwr", "dpo", "credit", "draft", "euphonium", "tree"])
def test_full_fine_tuning_in_shards_comes_to_the_same_weights(kind, tmp_path):
    """Of three epochs, with references and older policies, which processes come to at times of their own."""
    changes = {"kind": kind, "full": True, "optimizer": PLAIN, "evaluation": Evaluation()}
    for folder, world, how in (("alone", 1, None), ("shards", 2, LINE)):
        go_on(tmp_path / folder, world, how, **changes)
    mine, theirs = record_of(tmp_path / "shards"), record_of(tmp_path / "alone")
    for name in ("policy", "average", "older"):
        assert mine[name].keys() == theirs[name].keys()
        gaps = [(read(mine[name][key]) - read(value)).abs().max() for key, value in theirs[name].items()]
        assert max(gaps, default=0.0) <= 1e-6


def told(folder: Path, how: Shard | None, rank: int, **changes: Any) -> str:
    try:
        train(folder, how, **changes)
    except Stopped as stop:
        return str(stop)
    return "not stopped"


SMALL = {"full": True, "optimizer": GENTLE, "evaluation": Evaluation(), "epochs": 2, "sampling": UNEVEN}


def stop(folder: Path, world: int, how: Shard | None, place: str, turn: int, **changes: Any) -> None:
    """Have one of several processes asked to stop, as it comes to a place for the n-th time."""
    work = dying(functools.partial(told, folder, how, **changes), place, turn, world - 1, signal.SIGTERM)
    assert all("stopped by SIGTERM" in message for message in processes.run(world, folder.parent, work))


def go_on(folder: Path, world: int, how: Shard | None, **changes: Any) -> None:
    processes.run(world, folder.parent, functools.partial(train, folder, how, **changes))


def assert_resumed(world: int, how: Shard, place: Path, at: tuple[str, int], **changes: Any) -> None:
    stop(place / "run", world, how, *at, **changes)
    go_on(place / "run", world, how, **changes)
    go_on(place / "unbroken", world, how, **changes)
    assert hashes(place / "run") == hashes(place / "unbroken")
    assert rows(place / "run") == rows(place / "unbroken")


def test_a_run_in_shards_that_is_stopped_goes_on_to_the_same_bits(tmp_path):
    """Full fine-tuning on two processes, amid the second optimizer step of an epoch."""
    assert_resumed(2, LINE, tmp_path, ("update", 4), **SMALL | {"epochs": 1})
    assert "step-00000001" in (tmp_path / "run" / "events.jsonl").read_text()
    files = {file.name for file in (tmp_path / "run" / "checkpoints" / "step-00000002").iterdir()}
    assert {"shards-0.safetensors", "shards-1.safetensors", "shards-0.json", "shards-1.json", "transformer"} <= files
    assert_loads(tmp_path / "run" / "transformer", tmp_path / "run")


def record_of(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint says that all processes share."""
    return checkpoint.load(folder / "checkpoints" / checkpoint.names(folder / "checkpoints")[-1])[0]


def assert_loads(folder: Path, run: Path) -> None:
    """The average of the policy, as diffusers itself reads it."""
    network = SD3Transformer2DModel.from_pretrained(folder)
    average = {name: read(value) for name, value in record_of(run)["average"].items()}
    found = dict(network.named_parameters())
    assert found.keys() == average.keys()
    assert all(torch.equal(found[name], value) for name, value in average.items())
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "SD3Transformer2DModel"


@pytest.mark.slow
@pytest.mark.parametrize(("world", "how"), [(2, LINE), (3, LINE), (4, GRID)])
@pytest.mark.parametrize(
    ("kind", "at", "full"),
    [
        ("flow_grpo", ("rollout", 2), True), ("flow_grpo", ("rollout", 2), False), ("flow_grpo", ("update", 4), True),
        ("flow_grpo", ("update", 4), False), ("nft", ("rollout", 2), True), ("nft", ("forward step", 3), True),
        ("dpo", ("forward step", 2), False), ("draft", ("path", 3), True), ("draft", ("step", 1), True),
    ],
)  # fmt: skip
def test_a_stop_anywhere_in_shards_changes_no_bit(kind, at, full, world, how, tmp_path):
    """At the edge of an optimizer step, and amid an epoch's rollouts or a step."""
    changes = {name: value for name, value in SMALL.items() if name != "sampling" or kind == "flow_grpo"}
    assert_resumed(world, how, tmp_path, at, **changes | {"kind": kind, "full": full})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, LINE), (3, LINE)), ((3, LINE), (2, LINE)), ((4, GRID), (2, LINE)), ((2, LINE), (4, GRID)),
        ((2, LINE), (1, LINE)), ((1, None), (2, LINE)), ((2, None), (3, LINE)), ((3, LINE), (2, None)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["flow_grpo", "nft"])
def test_a_run_goes_on_with_other_shards(kind, before, after, tmp_path):
    """Another number of processes, groups, or whole: the same to 1e-6, of weights, average and moments."""
    changes = {name: value for name, value in SMALL.items() if name != "sampling" or kind == "flow_grpo"}
    changes |= {"kind": kind, "optimizer": PLAIN}
    stop(tmp_path / "run", *before, "update" if kind == "flow_grpo" else "forward", 3, **changes)
    go_on(tmp_path / "run", *after, **changes)
    go_on(tmp_path / "alone", 1, None, **changes)
    mine, theirs = record_of(tmp_path / "run"), record_of(tmp_path / "alone")
    for kind in ("policy", "average", "older"):
        assert mine[kind].keys() == theirs[kind].keys()
        for name, value in theirs[kind].items():
            torch.testing.assert_close(read(mine[kind][name]), read(value), atol=1e-6, rtol=0)
    for name, moments in theirs["moments"].items():
        for key, value in moments.items():
            torch.testing.assert_close(read(mine["moments"][name][key]), read(value), atol=1e-5, rtol=1e-4)


def read(value: Any) -> Tensor:
    return value.read(range(value.shape[0])) if isinstance(value, Stored) else value


class Block(nn.Module):
    """A layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x).tanh()


class Network(nn.Module):
    """Two layers, gathered one after the other."""

    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor]:
        return (self.second(self.first(x)) * scale,)


def uneven(turns: list[list[str]], rank: int) -> dict[str, list[float]]:
    """Losses of each process's own calls, as `turns` has them."""
    network = Network()
    shard(network, LINE, torch.device("cpu"))
    at = torch.full((2, 3), 0.1 * (rank + 1))
    for turn in turns[rank]:
        if turn == "look":
            with torch.no_grad():
                network(at)
        elif turn == "learn":
            meeting().backward(network(at, scale=2.0)[0].square().sum())
        elif turn == "chain":
            meeting().backward(network(network(at)[0])[0].square().sum())
        elif turn == "slope":
            x = at.clone().requires_grad_()
            assert meeting().slope(network(x)[0].sum(), x).abs().sum() > 0
        elif turn == "sum":
            distributed.largest([rank])
    distributed.largest([rank])
    return {name: whole_tensor(value.grad).flatten().tolist() for name, value in network.named_parameters()}


def expected(turns: list[list[str]]) -> dict[str, list[float]]:
    network = Network()
    for rank, mine in enumerate(turns):
        at = torch.full((2, 3), 0.1 * (rank + 1))
        for turn in mine:
            if turn == "learn":
                network(at, scale=2.0)[0].square().sum().backward()
            elif turn == "chain":
                network(network(at)[0])[0].square().sum().backward()
    return {name: value.grad.flatten().tolist() for name, value in network.named_parameters() if value.grad is not None}


@pytest.mark.parametrize(
    "turns",
    [
        [["learn"], []],
        [["look", "learn", "look", "learn", "learn"], ["learn", "look"]],
        [["sum"], ["chain", "learn", "sum", "look"]],
        [[], ["look"], ["slope", "sum", "chain"], ["sum", "learn"]],
        [["slope", "look", "sum", "look", "learn"], ["look", "sum"], ["slope", "slope", "sum", "chain"]],
    ],
)  # fmt: skip
def test_processes_call_as_often_as_they_like(turns, tmp_path):
    """Gradients are the sums of what the processes have learned, and no process waits for ever."""
    most = max(mine.count("sum") for mine in turns)  # each process comes to as many exchanges
    turns = [[*mine, *["sum"] * (most - mine.count("sum"))] for mine in turns]
    wanted = expected(turns)
    for found in processes.run(len(turns), tmp_path, functools.partial(uneven, turns)):
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-6)


def test_blocks_are_those_that_stay_together():
    model = sd3(None)
    assert [type(one).__name__ for one in blocks(model.module)] == ["JointTransformerBlock"] * 2
    assert blocks(nn.Linear(2, 2)) == []


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"shard": Shard(), "quantize": "int8"}, r"memory\.shard does not go with memory\.quantize: int8"),
        ({"shard": Shard(), "layerwise_casting": True}, r"memory\.shard does not go with memory\.layerwise_casting"),
        ({"shard": Shard(), "offload": "group"}, r"memory\.shard does not go with memory\.offload: group"),
        ({"shard": Shard(encoders=True), "offload": "encoders"}, "does not go with memory.offload: encoders"),
    ],
)
def test_what_does_not_go_with_shards_is_refused(settings, line):
    with pytest.raises(ValueError, match=line):
        Memory(**settings)


def test_settings_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="group must be at least 2, got 1"):
        Shard(group=1)
    with pytest.raises(ValueError, match=r"compile does not go with memory\.shard"):
        sd3(LINE, compile=True)
    with pytest.raises(ValueError, match=r"lora: null trains all .* does not go with memory\.quantize: int8"):
        SD3(tiny_sd3(), None, memory=Memory(quantize="int8"), gradient_checkpointing=True)
    with pytest.raises(ValueError, match=r"no config\.json: Full\.start is a folder"):
        sd3(None, Full(str(tmp_path)))

    def work(rank: int) -> list[str]:
        found = []
        for how, changes in ((Shard(group=2), {}), (LINE, {"kind": "draft", "recompute": True})):
            try:
                made(tmp_path / "run", how, **changes)
            except ValueError as error:
                found.append(str(error))
        return found

    for uneven, recompute in processes.run(3, tmp_path, work):
        assert "memory.shard.group 2 does not divide the 3 processes" in uneven
        assert "set recompute: false" in recompute


@pytest.mark.parametrize(
    ("variable", "engine"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_engines_that_accelerate_would_leave_out_in_silence_are_refused(variable, engine):
    with pytest.raises(ValueError, match=rf"configured for {engine}, .* set model\.memory\.shard"):
        distributed.start({variable: "true"})
    distributed.start({variable: "false"})


def learned(case: Case, how: Shard | None, full: bool, calls: int) -> tuple[Any, ...]:
    """A velocity of a family's tiny model, and the gradient of so many calls of it."""
    options: dict[str, Any] = {"gradient_checkpointing": True, **case.options, **case.sizes[0]}
    model = case.adapt(case.make(), lora=None if full else LoRA(rank=2), memory=Memory(shard=how), **options)
    if not full:
        randomise_policy(model)
    told = model.encode(["a cat", "two dogs"])
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        seen = model.velocity(latents, 0.5, told, case.guided)
    for number in range(calls):
        model.backward(model.velocity_split(latents * (1 + number), 0.5, told, case.guided).square().mean())
    distributed.largest([0.0])
    return seen, {name: value.grad for name, value in model.trainable().items() if value.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_family_can_be_in_shards(case, full, tmp_path):
    """The first of two processes makes two calls with gradient, the other one; of a LoRA each has its own gradient.

    Velocities are equal to the last bit. So are gradients, but where a tensor goes to several blocks, as UNets have it:
    each block adds up its own part of that tensor's gradient first. Tiny random UNets blow such rounding up.
    """

    def work(rank: int) -> float:
        calls = 2 - rank
        seen, mine = learned(case, LINE, full, calls)
        alone, one = learned(case, None, full, calls)
        assert torch.equal(seen, alone)
        assert mine.keys() >= one.keys()  # of what has no gradient there may be zeros
        held = [*one.values()]
        if full:
            distributed.sum_over_ranks(held)
        gaps = [(whole_tensor(mine[name]) - value).abs().max() for name, value in zip(one, held, strict=True)]
        return float(max(gaps) / max(value.abs().max() for value in held))

    limit = 1e-4 if case.adapt in (StableDiffusion, StableDiffusionXL) else 1e-6
    assert all(gap <= limit for gap in processes.run(2, tmp_path, work))


@pytest.mark.slow
def test_text_encoders_in_shards_encode_what_each_process_asks_for(tmp_path):
    """Three prompts on the first process, none on the second, which has encoded nothing before, one on the third."""

    def work(rank: int) -> list[Any]:
        model = sd3(Shard(encoders=True))
        encoder = model.pipeline.text_encoder
        texts = [PROMPTS, [], PROMPTS[1:2]][rank]
        told = model.encode(texts).prompt_embeds.numpy() if texts else None
        distributed.largest([0.0])
        return [
            told,
            sum(own_rows(value).numel() for value in encoder.parameters()),
            sum(map(Tensor.numel, encoder.parameters())),
        ]

    wanted = sd3(None).encode(PROMPTS).prompt_embeds.numpy()
    found = processes.run(3, tmp_path, work)
    assert np.array_equal(found[0][0], wanted)
    assert np.array_equal(found[2][0], wanted[1:2])
    assert all(own < 0.4 * every for _, own, every in found)


@pytest.mark.slow
def test_pictures_of_a_network_in_shards_are_those_of_one_that_is_whole(tmp_path):
    """After full fine-tuning, by the command; three pictures in two calls, on one, two and three processes."""
    run = tmp_path / "run"
    model = SD3("shapes", None, max_sequence_length=0)
    randomise_policy(model, 0.01)
    model.save(run / "transformer")
    (run / "config.yaml").write_text("model: {class: flowalign.models.SD3, pipeline: shapes, lora: null}\n")

    def work(out: Path, base: bool, rank: int) -> None:
        options = {"model.memory": {"shard": {}}}
        save_pictures(
            Request(str(run), tuple(PROMPTS), None, None, base, 2, 2.0, 0, 2, out, options, False)
        )  # fmt: skip

    for world in (1, 2, 3):
        processes.run(world, tmp_path, functools.partial(work, tmp_path / str(world), False))
    processes.run(1, tmp_path, functools.partial(work, tmp_path / "base", True))
    names = sorted(file.name for file in (tmp_path / "1").iterdir())
    assert names == ["0000.png", "0001.png", "0002.png", "grid.png"]
    for name in names:
        wanted = (tmp_path / "1" / name).read_bytes()
        assert [(tmp_path / str(world) / name).read_bytes() for world in (2, 3)] == [wanted] * 2
        assert (tmp_path / "base" / name).read_bytes() != wanted


def test_full_fine_tuning_keeps_its_start_and_goes_on_from_what_it_leaves(tmp_path):
    model = sd3(None, None)
    model.keep(True, False, dict)
    latents, told = torch.randn(2, *model.latent_shape), model.encode(PROMPTS[:2])
    before = model.velocity(latents, 0.5, told)
    randomise_policy(model)
    after = model.velocity(latents, 0.5, told)
    assert (after - before).abs().max() > 1e-3
    with model.reference(), torch.no_grad():
        assert torch.equal(model.velocity(latents, 0.5, told), before)
    model.save(tmp_path / "transformer")
    again = sd3(None, Full(str(tmp_path / "transformer")))
    assert torch.equal(again.velocity(latents, 0.5, again.encode(PROMPTS[:2])), after)
    assert all(value.requires_grad for value in again.trainable().values())
