"""Broken files of every kind that users give and are given, through what reads them in a run.

    python -m scripts.fuzz --count 20000

Each file is a good one with bits flipped, bytes cut, doubled or put in, and numbers made huge. A reader may read it, or
say in one line what is wrong (ValueError or OSError); anything else that comes out is printed with the file, which is
left in --out, and the exit status is 1. So it is where memory has grown by more than 2 GB.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from tqdm import tqdm

from flowalign import checkpoint
from flowalign.cli import parse_trainer
from flowalign.config import config_root, dump_yaml, load_yaml
from flowalign.lora_files import Factors, lora_bytes, read_lora
from flowalign.media import load
from flowalign.pictures import to_images
from flowalign.preferences import as_preferences
from flowalign.prompts import as_prompts
from flowalign.report.reading import read_run
from flowalign.videos import mp4
from rewards.payload import Request, decode_request, encode_request
from rewards.towers import read_weights

MOST_GROWTH = 2e9  # bytes; a picture of 64 megapixels, the largest that is read, takes 1e9 on its way
TOKENS = (
    b"NaN", b"1e999", b"-1", b"99999999999999999999", b"[", b"]", b"{", b"}", b'"', b"'", b":", b"\\ud800", b"\xff",
    b"\0", b"null", b"true", b"\n", b"\r", b"- ", b"!!python/object/apply:os.system [true]", b"&a ", b"*a", b"[" * 3000,
    b"../../../etc/passwd", b"http://169.254.169.254/",
)  # fmt: skip
NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


@dataclass(frozen=True)
class Target:
    """Good files by their names, of which one is broken, and what reads the folder that they are in."""

    files: Mapping[str, bytes]
    read: Callable[[Path], Any]


def broken(raw: bytes, rng: random.Random) -> bytes:
    """The file with one to four things wrong."""
    held = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(held) + 1), rng.randint(1, 40)
        match rng.randrange(7):
            case 0 if at < len(held):
                held[at] ^= 1 << rng.randrange(8)
            case 1:
                del held[at : at + length]
            case 2:
                held[at:at] = held[at : at + length]
            case 3:
                held[at:at] = rng.choice(TOKENS)
            case 4:
                held[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(NUMBERS))
            case 5:
                held[at : at + 8] = struct.pack("<Q", rng.choice((*NUMBERS, 2**40, 2**63, 2**64 - 1)))
            case 6:
                del held[at:]
    return bytes(held)


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def film(kind: str) -> bytes:
    frames = torch.randint(0, 255, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if kind == "MP4":
        return mp4(frames, 8.0)
    buffer, images = io.BytesIO(), to_images(frames / 255)
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=125)
    return buffer.getvalue()


def torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"a": torch.rand(3, 4), "b": torch.rand(5)}}, buffer)
    return buffer.getvalue()


def lora() -> bytes:
    named = {f"transformer.{name}": Factors(torch.rand(2, 6), torch.rand(5, 2)) for name in ("a.to_q", "b.to_k")}
    return lora_bytes(named, {"note": "x"})


def checkpoint_files() -> dict[str, bytes]:
    """A checkpoint whose hashes are made to agree again, so that what is in it is read."""
    with tempfile.TemporaryDirectory() as folder:
        tree = {"epoch": 3, "history": [{"held-out": 0.5}], "policy": {"a": torch.rand(3), "b": torch.rand(2, 2)}}
        path = checkpoint.save(Path(folder), "step-1", tree, {"buffer": {}}, lambda _: None, lambda: {"step-1"})
        return {file.name: file.read_bytes() for file in path.iterdir()}


def read_checkpoint(folder: Path) -> None:
    if checkpoint.verify(folder) is None or (folder / "state.json").exists():
        checkpoint.load(folder)


def run_files() -> dict[str, bytes]:
    """A run folder for `flowalign report`."""
    rows = [{"step": i, "seconds": float(i), "reward": 0.1 * i, "held-out": 0.2, "time/rollout": 0.5} for i in range(4)]
    scores = [{"total": 0.5, "valid": True}, {"total": None, "valid": False}]
    lines = {"metrics.jsonl": rows, "evaluations/epoch-000000.jsonl": scores,
             "evaluations/prompts.jsonl": [{"prompt": "a"}, {"prompt": "b"}]}  # fmt: skip
    told = {name: "".join(json.dumps(row) + "\n" for row in held).encode() for name, held in lines.items()}
    return told | {"config.yaml": dump_yaml({"trainer": "trainers.FlowGRPO", "epochs": 3}).encode(),
                   "environment.json": b'{"torch": "2"}'}  # fmt: skip


def requests() -> bytes:
    from flowalign.records import Media, Prompts

    return encode_request(Request(Media(torch.rand(2, 3, 4, 4)), Prompts(("a", "b"), ({"x": 1}, {})), "me"))


def one(name: str, raw: bytes, read: Callable[[Path], Any]) -> Target:
    return Target({name: raw}, lambda folder: read(folder / name))


def targets() -> dict[str, Target]:
    """All readers, by name."""
    config = (config_root() / "flow_grpo" / "shapes.yaml").read_bytes()
    rows = [{"prompt": "a red cat", "tags": ["a", 1], "seed": 3}, {"prompt": "b", "height": 64, "width": 32}]
    jsonl = "\n".join(json.dumps(row) for row in rows).encode()
    csv = b'prompt,count,tags\r\n"a ""red"" cat",3,"[1, 2]"\r\nb,,\r\n'
    pairs = [{"prompt": "a", "first": "a.png", "second": "b.png", "label": "first", "scores": [0.1, 0.2]}] * 3
    pictures = {"a.png": picture("PNG"), "b.png": picture("PNG")}
    told = {"pairs.jsonl": "\n".join(json.dumps(row) for row in pairs).encode(), **pictures}
    found = {
        "yaml": one("a.yaml", config, load_yaml),
        "config": one("a.yaml", config, lambda path: parse_trainer(load_yaml(path))),
        "prompts.txt": one(
            "p.txt", b"a cat\ntwo dogs\nein gr\xc3\xbcner Hund\n", lambda path: as_prompts(str(path)).all()
        ),
        "prompts.jsonl": one("p.jsonl", jsonl, lambda path: as_prompts(str(path)).all()),
        "prompts.csv": one("p.csv", csv, lambda path: as_prompts(str(path)).all()),
        "preferences": Target(told, read_pairs),
        "lora": one("a.safetensors", lora(), read_lora),
        "safetensors": one("a.safetensors", save({"a": torch.rand(3, 4), "b": torch.rand(5)}), read_weights),
        "torch": one("a.pt", torch_file(), read_weights),
        "checkpoint": Target(checkpoint_files(), read_checkpoint),
        "run": Target(run_files(), read_run),
        "request": one("body", requests(), lambda path: decode_request(path.read_bytes())),
    }
    kinds = {"a.png": "PNG", "a.jpg": "JPEG", "a.webp": "WEBP", "a.bmp": "BMP"}
    found |= {name: one(name, picture(kind), load) for name, kind in kinds.items()}
    return found | {name: one(name, film(kind), load) for name, kind in {"a.mp4": "MP4", "a.gif": "GIF"}.items()}


def read_prompts(path: Path) -> None:
    as_prompts(str(path)).all()


def read_pairs(folder: Path) -> None:
    held = as_preferences(str(folder / "pairs.jsonl"))
    held.rows(range(len(held)))


def attempt(target: Target, rng: random.Random, folder: Path) -> str:
    """Break one of the files and read them; "read", "refused", or what else has come out."""
    name = rng.choice(sorted(target.files))
    for other, raw in target.files.items():
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_bytes(broken(raw, rng) if other == name else raw)
    try:
        target.read(folder)
    except (ValueError, OSError) as error:
        return "refused" if "\n" not in str(error).strip() else f"several lines: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "read"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="a reader's name; may be given more than once")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    rng, counts, held = random.Random(asked.seed), Counter[tuple[str, str]](), targets()
    names = asked.only or sorted(held)
    before, started, bad = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic(), 0
    for number in tqdm(range(asked.count), disable=not sys.stderr.isatty()):
        name = names[number % len(names)]
        with tempfile.TemporaryDirectory() as place:
            said = attempt(held[name], rng, Path(place))
            counts[name, said if said in ("read", "refused") else "BAD"] += 1
            if said not in ("read", "refused"):
                bad += 1
                (asked.out / f"{number}-{name}").mkdir(parents=True, exist_ok=True)
                for file in held[name].files:
                    (asked.out / f"{number}-{name}" / Path(file).name).write_bytes((Path(place) / file).read_bytes())
                print(f"{number} {name}: {said[:200]!r}", flush=True)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    for (name, said), count in sorted(counts.items()):
        print(f"{name:15} {said:8} {count}")
    print(f"{asked.count} files, {bad} bad, {time.monotonic() - started:.0f} s, memory grew by {grown / 1e6:.0f} MB")
    return 1 if bad or grown > MOST_GROWTH else 0


if __name__ == "__main__":
    sys.exit(main())
