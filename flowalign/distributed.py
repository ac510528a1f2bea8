"""A few functions over torch.distributed; on one process each is the identity.

Started by torchrun, `accelerate launch` and srun alike. A replicated LoRA needs one flat all-reduce of its gradient,
which, unlike DDP's buckets, adds in the same order at every start.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from flowalign import watchdog

MEETING = timedelta(minutes=5)
TIMEOUT = "FLOWALIGN_TIMEOUT"  # seconds that a process waits for the others, in the environment
ENGINES = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
TRANSPORTS = ("gloo/", "NCCL", "Connection closed by peer", "Connection reset by peer")  # in torch's messages
PATIENCE = 600.0  # by default: processes meet at every micro-batch, so that it is of the slowest one


class LostProcess(OSError):
    """Another process has gone; what it said is the reason."""


class Waiting(Protocol):
    """What every exchange with other processes waits for first; see `flowalign.meeting`."""

    def wait(self) -> None: ...


WAITED_FOR: list[Waiting] = []  # of the present process group, of which torch has one by default
CALLERS = [1]  # processes that make each call of a network together, in the present work; see `split_calls`


def start(environ: Mapping[str, str] = os.environ) -> None:
    """Join the other processes where a launcher started several; call it before a model is loaded.

    Under CUDA every process takes the device of its local rank.

    Raises: ValueError where the launcher's variables do not tell where to meet, or ask for an engine that is not ours.
    """
    if dist.is_initialized():
        return
    for variable, engine in ENGINES.items():
        if environ.get(variable, "").lower() in ("true", "1"):
            raise ValueError(
                f"accelerate launch was configured for {engine}, which FlowAlign does not take from it (and accelerate "
                "itself leaves out on a CPU without a word): launch with a config of plain processes, or torchrun, and "
                "set model.memory.shard (--model.memory.shard {}), which shards the network with torch's FSDP2"
            )
    rank, world, local = _places(environ)
    if world == 1:
        return
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if "SLURM_STEP_NUM_TASKS" in environ and "RANK" not in environ:
        address = address or first_host(environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
        port = port or str(20000 + int(environ.get("SLURM_JOB_ID", "0")) % 20000)
    if not address or not port:
        raise ValueError(f"{world} processes were started without MASTER_ADDR and MASTER_PORT; use torchrun")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local % torch.cuda.device_count())
    join(f"tcp://{address}:{port}", rank, world, "cpu:gloo,cuda:nccl" if cuda else "gloo")


def join(place: str, rank: int, world: int, backend: str = "gloo") -> None:
    """Meet the other processes at `tcp://host:port` or `file:///path`.

    Raises: LostProcess where they do not all come within five minutes; ValueError for a patience that is no number.
    """
    seconds = patience()
    try:
        store, _, _ = next(rendezvous(place, rank, world, timeout=MEETING))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=seconds))
    except (RuntimeError, ValueError) as error:
        raise LostProcess(f"the {world} processes did not meet at {place}: {str(error).splitlines()[0]}") from error
    watchdog.start(store, rank, world, seconds)


def patience(environ: Mapping[str, str] = os.environ) -> float:
    """Seconds that a process waits for the others. Raises: ValueError where the environment gives no such number."""
    text = environ.get(TIMEOUT, "")
    try:
        seconds = float(text or PATIENCE)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 1e6:
        raise ValueError(f"{TIMEOUT} has to be a number of seconds, at least 1, got {text!r}")
    return seconds


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts: n1 of "n1,n7", gpu03 of "gpu[03-05,11],cpu1"."""
    prefix, _, rest = nodes.partition("[")
    return prefix.split(",")[0] if "," in prefix or not rest else prefix + re.split(r"[-,\]]", rest)[0]


def _places(environ: Mapping[str, str]) -> tuple[int, int, int]:
    """Rank, number of processes and local rank, as torchrun and accelerate or srun tell them."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" not in environ and "SLURM_STEP_NUM_TASKS" in environ:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    told = [environ.get(name, default) for name, default in zip(names, "010", strict=True)]
    for name, value in zip(names, told, strict=True):
        if not value.isdigit():
            raise ValueError(f"the launcher's variable {name} is no number: {value!r}")
    return int(told[0]), int(told[1]), int(told[2])


def check_started(environ: Mapping[str, str] = os.environ) -> None:
    """Raises ValueError in one of several processes that has not joined the others: each would train on its own."""
    if _places(environ)[1] > 1 and not dist.is_initialized():
        raise ValueError("a launcher started several processes: call flowalign.distributed.start() before the model")


def finish() -> None:
    """Leave together: without a barrier a process may tear down what another still reads, which then hangs."""
    if dist.is_initialized():
        with _peers():
            dist.barrier()
        watchdog.stop()
        dist.destroy_process_group()
        WAITED_FOR.clear()
        split_calls(1)


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def groups_of(size: int) -> int:
    """Number of groups of so many processes. Raises: ValueError where they do not come out even."""
    world = world_size()
    if world % size:
        raise ValueError(
            f"memory.context_parallel: {size} processes make each call together, which does not divide the {world} "
            "processes that were started"
        )
    return world // size


def split_calls(size: int) -> None:
    """Share work out to groups of so many processes, consecutive ones, which make each call of a network together.

    Said by whatever has a network called, before it shares anything out; 1 for processes that are each on their own.
    """
    CALLERS[0] = size


def data_size() -> int:
    """Among how many work is shared out that calls a network: groups of `split_calls`, by default processes."""
    return groups_of(CALLERS[0])


def data_rank() -> int:
    """Which of these this process is in."""
    return rank() // CALLERS[0]


def is_first() -> bool:
    """Whether this process is the first of its group, which speaks for it where each has the same."""
    return rank() % CALLERS[0] == 0


def share(total: int, rank: int, world: int) -> range:
    """The contiguous part of `total` units that a rank does; shares differ by one at most and leave nothing out."""
    return range(rank * total // world, (rank + 1) * total // world)


def sum_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Sum tensors over all processes in place, as one flat all-reduce: the same order of addition at every start."""
    if world_size() == 1:
        return
    listed = list(tensors)
    flat = torch.cat([tensor.detach().flatten() for tensor in listed])
    with _peers():
        dist.all_reduce(flat)
    for tensor, part in zip(listed, flat.split([tensor.numel() for tensor in listed]), strict=True):
        tensor.copy_(part.view_as(tensor))


def counted_once(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tensors that all processes of a group have alike, made 0 in place on all but its first, to be summed over all."""
    return [one if is_first() else one.zero_() for one in tensors]


def sum_over_data(tensors: Iterable[Tensor]) -> None:
    """`sum_over_ranks` of what all processes of a group have alike, the first one's."""
    sum_over_ranks(counted_once(tensors))


def largest(values: Iterable[float]) -> list[float]:
    """The largest of each value over all processes."""
    flat = torch.tensor(list(values), dtype=torch.float64)
    if world_size() > 1:
        with _peers():
            dist.all_reduce(flat, op=dist.ReduceOp.MAX)
    return [float(value) for value in flat]


def gather_text(text: str) -> list[str]:
    """Every process's text, in the order of ranks."""
    if world_size() == 1:
        return [text]
    raw = torch.tensor(list(text.encode()), dtype=torch.uint8)
    longest = int(largest([len(raw)])[0])
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(world_size())]
    with _peers():
        dist.all_gather(lengths, torch.tensor([len(raw)]))
        if longest:
            dist.all_gather(texts, torch.cat([raw, raw.new_zeros(longest - len(raw))]))
    return [bytes(row[: int(n)].tolist()).decode() for row, n in zip(texts, lengths, strict=True)]


def agree(error: Exception | None) -> None:
    """Raise on every process what went wrong on any, so that none waits for one that has gone."""
    if world_size() == 1:
        if error is not None:
            raise error
        return
    told = gather_text("" if error is None else str(error) or type(error).__name__)
    if error is not None:
        raise error
    for number, text in enumerate(told):
        if text:
            raise LostProcess(f"process {number}: {text}")


def on_main(action: Callable[[], None]) -> None:
    """Do something on the first process only; what it raises there is raised everywhere. A barrier."""
    together(action if rank() == 0 else lambda: None)


def together(action: Callable[[], None]) -> None:
    """Do something on every process; what it raises on any is raised on all. A barrier."""
    problem: Exception | None = None
    try:
        action()
    except Exception as error:
        problem = error
    agree(problem)


@contextmanager
def telling() -> Iterator[None]:
    """While entered, what this process fails with is noted for the others, whose next exchange then says it."""
    try:
        yield
    except LostProcess:
        raise  # another one's failure, which that one has noted
    except Exception as error:
        watchdog.failed(str(error) or type(error).__name__)
        raise


@contextmanager
def _peers() -> Iterator[None]:
    """Around an exchange of this module."""
    for one in WAITED_FOR:
        one.wait()
    with answering():
        yield


@contextmanager
def answering() -> Iterator[None]:
    """Around an exchange with other processes. Raises: LostProcess where one has gone amid it."""
    try:
        with watchdog.doing(watchdog.WAITING):
            yield
    except RuntimeError as error:
        raise LostProcess(watchdog.blamed(error)) from error


@contextmanager
def exchanging() -> Iterator[None]:
    """Around work in which processes exchange weights. Raises: LostProcess where that is what has failed."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(mark in str(error) for mark in TRANSPORTS):
            raise LostProcess(watchdog.blamed(error)) from error
        raise
