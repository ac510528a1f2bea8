"""What a machine has and can do, measured: `flowalign doctor`. Nothing is downloaded, and nothing stays on the disk.

Each probe gives lines of a report to be pasted into an issue; what is wrong with a machine is a finding, marked with !.
Names and values of environment variables are told for those that change results, never those that hold a secret.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from flowalign import __version__
from flowalign.distributed import gather_text, largest, rank, sum_over_ranks, world_size

if TYPE_CHECKING:
    from flowalign.models.sd3 import SD3

CORE = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy", "pillow", "av")
EXTRAS = (
    "torchvision", "open_clip_torch", "xformers", "torchao", "bitsandbytes", "deepspeed", "rapidocr", "onnxruntime",
    "fastapi", "uvicorn", "ftfy", "sentencepiece", "pyarrow", "datasets", "gradio", "image-reward", "tensorboard",
    "wandb", "trackio", "swanlab",
)  # fmt: skip
VARIABLES = (
    "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "NCCL_SOCKET_IFNAME",
    "NCCL_IB_DISABLE", "GLOO_SOCKET_IFNAME", "PYTORCH_CUDA_ALLOC_CONF", "HF_HOME", "HF_HUB_OFFLINE", "SLURM_JOB_ID",
)  # fmt: skip
SIZE = 16 << 20  # bytes that the disk's probe writes
GIB = 1 << 30


@dataclass(frozen=True)
class Section:
    """A heading of the report, its lines, and what is wrong."""

    title: str
    lines: tuple[str, ...]
    findings: tuple[str, ...] = ()

    def text(self) -> str:
        """As it is printed."""
        return "\n".join([self.title, *(f"  {line}" for line in self.lines), *(f"! {one}" for one in self.findings)])


def versions() -> Section:
    """FlowAlign, python and the packages that results depend on; which extras are there."""
    found = {name: _version(name) for name in (*CORE, *EXTRAS)}
    core = "  ".join(f"{name} {found[name] or 'MISSING'}" for name in CORE)
    extras = "  ".join(f"{name} {found[name]}" for name in EXTRAS if found[name])
    missing = " ".join(name for name in EXTRAS if not found[name])
    lines = [
        f"flowalign {__version__}  python {platform.python_version()}  {platform.platform()}",
        core,
        f"extras: {extras or 'none'}",
        f"not installed: {missing or 'none'}",
    ]
    gone = [name for name in CORE if not found[name]]
    return Section("Versions", tuple(lines), (f"missing: {' '.join(gone)}; pip install -e .",) if gone else ())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def devices() -> Section:
    """CPU, memory and accelerators."""
    lines = [f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads a process, {_memory()}"]
    findings = []
    for index in range(torch.cuda.device_count()):
        known = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        lines.append(
            f"cuda:{index} {known.name}, {total / GIB:.1f} GiB ({free / GIB:.1f} free), capability {known.major}."
            f"{known.minor}, bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}"
        )
        if free < total / 2:
            findings.append(
                f"cuda:{index} has {free / GIB:.1f} of {total / GIB:.1f} GiB free: another process holds it"
            )
    if torch.cuda.is_available():
        lines.append(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    elif torch.version.cuda:
        findings.append(f"torch is built for CUDA {torch.version.cuda} and finds no device; see nvidia-smi")
    if torch.backends.mps.is_available():
        lines.append("mps (Apple) is there")
    told = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    lines.append(f"environment: {' '.join(told) or 'nothing that matters is set'}")
    return Section("Devices", tuple(lines), tuple(findings))


def _memory() -> str:
    with suppress(OSError, ValueError, AttributeError):
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.1f} GiB of memory"
    return "memory unknown"


def attention() -> Section:
    """Which of diffusers' attention backends can be had here, forward and backward."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    works, fails = [], []
    for backend in AttentionBackendName:
        if "hub" in backend.value or "sage" in backend.value or "varlen" in backend.value:
            continue  # downloaded, without a backward pass, or for ragged rows
        rows = torch.randn(1, 64, 2, 64, device=device, dtype=dtype, requires_grad=True)
        try:
            dispatch_attention_fn(rows, rows, rows, backend=backend).sum().backward()
        except Exception:  # whatever a backend that is not installed raises
            fails.append(backend.value)
        else:
            works.append(backend.value)
    return Section("Attention backends", (f"{device}: {' '.join(works)}", f"cannot be had: {' '.join(fails)}"))


def disk(folder: Path) -> Section:
    """Whether a run folder can be written as checkpoints are: whole, flushed, renamed into place, and locked."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    lines, findings = [f"{there}: {free / GIB:.1f} GiB free"], []
    if free < GIB:
        findings.append(f"{there} has {free / GIB:.2f} GiB free: a run's checkpoints may not fit")
    try:
        with TemporaryDirectory(prefix=".flowalign-doctor-", dir=there) as held:
            written = _seconds(lambda: _write(Path(held) / "part"))
            renamed = _seconds(lambda: _rename(Path(held) / "part", Path(held) / "whole"))
            lines.append(f"{SIZE >> 20} MiB written and flushed in {written:.3f} s, renamed in {renamed:.4f} s")
            if not _locks(Path(held) / "lock"):
                findings.append(f"{there} has no file locks: two runs in one folder would not be noticed")
    except OSError as error:
        findings.append(f"{there} cannot be written: {error.strerror or error}; choose another --folder")
    return Section("Disk", tuple(lines), tuple(findings))


def _write(path: Path) -> None:
    with path.open("wb") as file:
        file.write(os.urandom(SIZE))
        file.flush()
        os.fsync(file.fileno())


def _rename(path: Path, to: Path) -> None:
    path.rename(to)
    if sys.platform != "win32":  # where folders cannot be opened
        handle = os.open(to.parent, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _locks(path: Path) -> bool:
    if sys.platform == "win32":
        return True
    import fcntl

    with path.open("w") as first, path.open("w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def collectives(folder: Path) -> Section:
    """Of many processes: where they are, how fast a sum over all is, how far their clocks are apart, a shared disk."""
    if world_size() == 1:
        told = "one process; to try several: torchrun --nproc-per-node 8 -m flowalign doctor (on all nodes as a run is)"
        return Section("Processes", (told,))
    hosts = gather_text(socket.gethostname())
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    lines = [f"{world_size()} processes on {len({*hosts})} hosts, backend {dist.get_backend()}, {device.type}"]
    findings: list[str] = []
    for size in (1 << 16, 1 << 24):
        rate, small = _bandwidth(torch.ones(size, device=device))
        lines.append(f"sum of {size * 4 / (1 << 20):.2f} MiB over all: {small * 1000:.2f} ms, {rate:.2f} GB/s")
    dist.barrier()
    now = time.time()
    apart = largest([now])[0] + largest([-now])[0]
    lines.append(f"clocks: {apart:.3f} s apart")
    if apart > 2:
        findings.append(f"the hosts' clocks are {apart:.1f} s apart: logs of theirs cannot be compared")
    findings += _shared(folder)
    return Section("Processes", tuple(lines), tuple(findings))


def _bandwidth(values: Tensor, repeats: int = 5) -> tuple[float, float]:
    """GB/s as rings count them, 2 (n - 1) / n of the bytes, and seconds; the best of some."""

    def once() -> None:
        sum_over_ranks([values])
        if values.is_cuda:
            torch.cuda.synchronize()

    once()
    best = largest([-min(_seconds(once) for _ in range(repeats))])[0]
    world = world_size()
    return 2 * (world - 1) / world * values.numel() * values.element_size() / -best / 1e9, -best


def _shared(folder: Path) -> list[str]:
    """What is wrong with the folder's disk as all processes see it: what the first one writes, the others must see."""
    place = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.is_dir())
    token = place / f".flowalign-doctor-{os.environ.get('MASTER_PORT', '0')}"
    if rank() == 0:
        with suppress(OSError):
            token.touch()
    dist.barrier()
    seen = gather_text("yes" if token.exists() else "no")
    if rank() == 0:
        token.unlink(missing_ok=True)
    blind = [str(number) for number, told in enumerate(seen) if told != "yes"]
    if not blind:
        return []
    return [
        f"processes {', '.join(blind)} do not see what the first one writes in {place}: a run needs a shared folder"
    ]


def determinism() -> Section:
    """Two equal rollouts of the embedded model and two equal gradients, in float32 and bf16: equal to the last bit?"""
    from flowalign.models.sd3 import SD3

    lines, findings = [], []
    for precision in ("no", "bf16"):
        model = SD3("shapes", max_sequence_length=0, mixed_precision=precision)
        made = [_gradient(model) for _ in range(2)]
        equal = all(torch.equal(one, other) for one, other in zip(*made, strict=True))
        lines.append(f"{'float32' if precision == 'no' else precision}: {'bit-equal' if equal else 'NOT bit-equal'}")
        if not equal:
            findings.append(
                f"in {'float32' if precision == 'no' else precision} the same call gives other bits: a killed run will "
                "not come to the very same policy"
            )
    return Section(f"Determinism on {model.device.type}", tuple(lines), tuple(findings))


def _gradient(model: SD3) -> list[Tensor]:
    """A batch's pictures in three steps, and the gradient of their mean square."""
    from flowalign.randomness import key_noise
    from flowalign.rollout import rollout
    from flowalign.schedules import AllSteps
    from flowalign.transitions import FlowSDE

    prompts = ["a red circle", "two blue squares", "a star", "a green cross"]
    condition = model.encode(prompts)
    noise = torch.stack([key_noise(0, "doctor", row, shape=model.latent_shape) for row in range(len(prompts))])
    path = AllSteps(FlowSDE(0.7)).resolve(3, 0, 0)
    made = rollout(
        model, condition, noise.to(model.device), model.sigmas(3), path, step_noise=lambda step: noise.to(model.device)
    )
    velocity = model.network(made.latents, 0.5, condition)
    grads = torch.autograd.grad(velocity.square().mean(), [*model.trainable().values()])
    return [made.latents, *grads]


def sections(folder: Path) -> list[Callable[[], Section]]:
    """All probes, in the order of the report."""
    return [versions, devices, attention, lambda: disk(folder), lambda: collectives(folder), determinism]
