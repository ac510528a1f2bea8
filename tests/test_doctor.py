"""`flowalign doctor`: what it finds on this machine, and that it says so where something is wrong."""

from __future__ import annotations

import functools
import os
import re
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from flowalign import doctor
from flowalign.cli import main
from tests import processes

Usage = namedtuple("Usage", "total used free")


def test_it_prints_every_section_and_ends_well(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    assert main(["doctor", "--folder", str(tmp_path / "runs")]) == 0
    told = capsys.readouterr().out
    for heading in ("Versions", "Devices", "Attention backends", "Disk", "Processes", "Determinism on cpu"):
        assert re.search(f"^{heading}$", told, re.MULTILINE), heading
    assert "float32: bit-equal" in told
    assert "native" in told
    assert "canary" not in told
    assert not [*tmp_path.iterdir()]  # nothing stays


def test_a_disk_without_room_or_leave_to_write_is_a_finding(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(1 << 30, 1 << 30, 1 << 20))
    assert "0.00 GiB free: a run's checkpoints may not fit" in doctor.disk(tmp_path).findings[0]

    def refused(*arguments: Any, **named: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor, "TemporaryDirectory", refused)
    assert doctor.disk(tmp_path).findings[-1].endswith("cannot be written: Permission denied; choose another --folder")
    assert main(["doctor", "--folder", str(tmp_path)]) == 2
    assert "! " in capsys.readouterr().out


def test_two_locks_of_one_file_exclude_each_other(tmp_path, monkeypatch):
    assert doctor._locks(tmp_path / "lock")
    import fcntl

    monkeypatch.setattr(fcntl, "flock", lambda *arguments: None)  # a file system that grants every lock
    assert not doctor._locks(tmp_path / "lock")


def test_a_gradient_that_differs_is_told(monkeypatch):
    real, calls = doctor._gradient, [0]

    def shaken(model: Any) -> Any:
        calls[0] += 1
        return [value + 1e-6 * (calls[0] % 2) for value in real(model)]

    monkeypatch.setattr(doctor, "_gradient", shaken)
    found = doctor.determinism()
    assert all("NOT bit-equal" in line for line in found.lines)
    assert len(found.findings) == 2


def looked(folder: Path, apart: Path, rank: int) -> tuple[tuple[str, ...], list[str]]:
    place = folder if rank == 0 else apart
    return doctor.collectives(folder).lines, doctor._shared(place)


def test_processes_measure_how_they_exchange_and_see_whether_they_share_a_disk(tmp_path):
    for name in ("one", "other"):
        os.mkdir(tmp_path / name)
    same = processes.run(2, tmp_path, functools.partial(looked, tmp_path / "one", tmp_path / "one"))
    lines, findings = same[0]
    assert lines[0] == "2 processes on 1 hosts, backend gloo, cpu"
    assert re.fullmatch(r"sum of 64\.00 MiB over all: [\d.]+ ms, [\d.]+ GB/s", lines[2])
    assert findings == []
    apart = processes.run(2, tmp_path, functools.partial(looked, tmp_path / "one", tmp_path / "other"))
    assert "processes 1 do not see what the first one writes" in apart[1][1][0]


@pytest.mark.parametrize("word", ["--fodler", "now"])
def test_what_it_does_not_know_is_refused(word, capsys):
    assert main(["doctor", word]) == 2
    assert f"{word} is no option of doctor" in capsys.readouterr().err
