"""Two launchers on one machine, as on two: the same policy as one launcher's two processes, after a loss too."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import pytest

from tests.jobs import contents
from tests.processes import PATIENCE

RUN = [
    "flow_grpo/shapes", "--epochs=3", "--sampling.groups=4", "--sampling.group_size=4", "--sampling.batch_size=4",
    "--sampling.steps=4", "--updates_per_epoch=2", "--prompts.count=40", "--evaluation.prompts=null",
    "--checkpoints.every=1", "--checkpoints.keep=9",
]  # fmt: skip
SECONDS = 5 * PATIENCE  # for one run, the start of its processes included


def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextmanager
def launcher(folder: Path, log: Path, words: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """torchrun in a session of its own, which ends with all its processes."""
    command = [sys.executable, "-m", "torch.distributed.run", *words, "-m", "flowalign", "train", *RUN]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    with log.open("ab") as said:
        process = subprocess.Popen(
            [*command, f"--folder={folder}"], env=environ, stdout=said, stderr=said, start_new_session=True
        )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """It and the processes that it has started, which have sessions of their own: as a machine that loses its power."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    victims = [int(child) for child in listed.read_text().split()] if process.poll() is None else []
    for victim in (process.pid, *victims):
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    process.wait()


@contextmanager
def agents(folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two launchers of one process each, which meet on loopback; the first to come keeps the meeting place."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port()}", "--rdzv-id", folder.name]
    with ExitStack() as held:
        yield [
            held.enter_context(
                launcher(
                    folder,
                    folder.with_name(f"{folder.name}-{node}.log"),
                    ["--nnodes", "2", "--nproc-per-node", "1", "--local-addr", "127.0.0.1",
                     *meeting],
                )
            )
            for node in range(2)
        ]  # fmt: skip


def policy(folder: Path) -> str:
    return sha256(contents(folder / "lora" / "pytorch_lora_weights.safetensors")).hexdigest()


def saved(folder: Path) -> int:
    """Of how many optimizer steps the newest checkpoint is."""
    return max((int(path.name[5:13]) for path in (folder / "checkpoints").glob("step-*")), default=0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a launcher's processes are found by /proc")
def test_two_launchers_come_to_the_policy_of_one_after_a_loss_too(tmp_path):
    with launcher(tmp_path / "one", tmp_path / "one.log", ["--standalone", "--nproc-per-node", "2"]) as process:
        assert process.wait(SECONDS) == 0, (tmp_path / "one.log").read_text()

    with agents(tmp_path / "two") as started:
        codes = [process.wait(SECONDS) for process in started]
    assert codes == [0, 0], (tmp_path / "two-0.log").read_text()
    assert policy(tmp_path / "two") == policy(tmp_path / "one")

    with agents(tmp_path / "lost") as (first, second):
        deadline = time.monotonic() + SECONDS
        while not saved(tmp_path / "lost") and time.monotonic() < deadline:
            time.sleep(0.05)
        end(second)
        assert first.wait(SECONDS) == 1, "it does not go on without the other"
    assert 0 < saved(tmp_path / "lost") < 6, "there is something left to do"
    assert re.search(r"flowalign: error: .*has gone", (tmp_path / "lost-0.log").read_text())
    with agents(tmp_path / "lost") as started:
        codes = [process.wait(SECONDS) for process in started]
    assert codes == [0, 0], (tmp_path / "lost-0.log").read_text()
    assert "going on from" in (tmp_path / "lost-0.log").read_text() + (tmp_path / "lost-1.log").read_text()
    assert policy(tmp_path / "lost") == policy(tmp_path / "one")
