"""A run under a real Slurm of one node: warned before its time is up, and preempted: the same in the end.

    apt-get install slurm-wlm munge; python scripts/try_slurm.py --out build/slurm

Needs root, and starts its own slurmctld and slurmd, which it ends. The embedded model is trained twice by two
processes: once undisturbed under srun, and once by the script that `flowalign slurm` writes, in jobs of three minutes,
one of which has to make way for a job of higher priority. Both must leave the same policy, by SHA-256. Before that a
script's process must have the CPUs that were asked for. Takes about twenty minutes: Slurm lets a job that was put back
into the queue wait for two.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from safetensors.torch import load_file

from flowalign.slurm_command import Job, script

CONFIG = """\
ClusterName=flowalign
SlurmctldHost={host}
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=60
NodeName={host} CPUs=2 Sockets=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
RUN = [
    "flow_grpo/shapes", "--epochs", "300", "--sampling.groups", "8", "--sampling.batch_size", "8",
    "--evaluation.prompts.count", "32", "--evaluation.every", "100", "--evaluation.pictures", "4",
]  # fmt: skip
LIMIT = 60 * 60  # seconds for all


@contextmanager
def slurm(place: Path) -> Iterator[None]:
    """Slurm's daemons, while entered; its commands find them by SLURM_CONF."""
    for name in ("state", "spool"):
        (place / name).mkdir(parents=True)
    (place / "slurm.conf").write_text(CONFIG.format(host=socket.gethostname().split(".")[0], place=place))
    os.environ["SLURM_CONF"] = str(place / "slurm.conf")
    if subprocess.run(["sh", "-c", "munge -n | unmunge"], capture_output=True).returncode:
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge")
        subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True)
    daemons = [
        subprocess.Popen([name, "-D"], start_new_session=True, stderr=subprocess.DEVNULL)
        for name in ("slurmctld", "slurmd")
    ]
    try:
        for _ in range(60):
            told = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout
            if "idle" in told:
                break
            time.sleep(1)
        else:
            raise SystemExit(f"Slurm has not come up; see {place}/slurmctld.log and slurmd.log")
        yield
    finally:
        subprocess.run(["scancel", "--user", "root"])
        time.sleep(2)
        for daemon in daemons:
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()


def asked(command: list[str], place: Path) -> str:
    """What a command prints."""
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    return done.stdout.strip()


def state(job: str) -> str:
    """PENDING, RUNNING, COMPLETED ..."""
    told = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True).stdout
    return next((part.split("=")[1] for part in told.split() if part.startswith("JobState=")), "GONE")


def cpus(place: Path) -> int:
    """To which a script's process is bound that asks for two, where the cluster binds each to the cores it has."""
    file = place / "cpus.sbatch"
    job = Job("cpus", 1, 0, processes=1, cpus=2, time="2", partition=None, warning=30, extra=())
    told = f'{sys.executable} -c "import os; print(len(os.sched_getaffinity(0)))"'
    file.write_text(script(job, file, "none", told, ["export SLURM_CPU_BIND=cores"]))
    asked(["sbatch", "--wait", "--output=cpus.out", file.name], place)
    return int((place / "cpus.out").read_text())


def disturbed(place: Path) -> int:
    """Run as a job, until it is done; returns how often it was stopped."""
    written = [
        "--gpus",
        "0",
        "--processes",
        "2",
        "--cpus",
        "1",
        "--time",
        "2",
        "--warning",
        "30",
        "--out",
        "job.sbatch",
    ]
    asked([sys.executable, "-m", "flowalign", "slurm", *RUN, *written, "--folder", "disturbed"], place)
    job = asked(["sbatch", "--parsable", "--output=job.out", "job.sbatch"], place)
    intruded, deadline = False, time.monotonic() + LIMIT
    while (now := state(job)) not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
        if time.monotonic() > deadline:
            raise SystemExit(f"the job is still {now}; see {place}/job.out")
        log = (place / "job.out").read_text() if (place / "job.out").exists() else ""
        if not intruded and "SIGUSR1" in log and now == "RUNNING" and "step " in log.rpartition("REQUEUE")[2]:
            asked(["sbatch", "--partition=high", "--ntasks=2", "--output=other.out", "--wrap", "sleep 5"], place)
            intruded = True
            print("another job has come, which goes before", flush=True)
        time.sleep(2)
    log = (place / "job.out").read_text()
    print(log, flush=True)
    if now != "COMPLETED" or not intruded:
        raise SystemExit(f"the job is {now}, and {'was' if intruded else 'was not'} preempted")
    return log.count("flowalign: stopped by")


def digest(folder: Path) -> str:
    """Of the policy's tensors that a run leaves; the order of a file's metadata is anyone's."""
    (file,) = (folder / "lora").glob("*.safetensors")
    tensors = load_file(file)
    return sha256(b"".join(name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/slurm"), help="must be new")
    place = parser.parse_args().out.absolute()
    place.mkdir(parents=True)
    train = [sys.executable, "-m", "flowalign", "train", *RUN, "--folder", "whole"]
    with slurm(place / "slurm"):
        if (found := cpus(place)) != 2:
            raise SystemExit(f"a process that asks for 2 CPUs has {found}")
        asked(["srun", "--ntasks=2", "--time=60", *train], place)
        print("the undisturbed run is done", flush=True)
        stops = disturbed(place)
    same = digest(place / "whole") == digest(place / "disturbed")
    print(f"stopped {stops} times; policies {'equal' if same else 'DIFFER'}: {digest(place / 'whole')[:16]}")
    if not same or stops < 2:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
