"""Videos of the embedded world as files, and the prompts that name them: what trainers.InstructVideo starts from.

    python scripts/render_shapes_video.py --out data/shapes_video --count 512

Leaves OUT/0000.mp4 ... and OUT/prompts.jsonl, whose records have the caption, the file ("media") and the scene that the
verifier asks for ("spec"). All meanings are those of training. The same arguments give the same files.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from flowalign.progress import Progress
from flowalign.shapes.video import captioned
from flowalign.shapes.video.scenes import KINDS
from flowalign.tracking import json_lines, write_atomically
from flowalign.videos import mp4

FPS = 8.0  # as of configs/*/shapes_video.yaml


def write_videos(out: Path, count: int, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> Path:
    """Render and write so many videos, then the prompts' file, which is returned.

    Raises: ValueError for a count below 1, and for a folder that holds other prompts already.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    prompts, made, lines = out / "prompts.jsonl", captioned(count, seed, kinds=kinds), []
    rows = zip(made.captions, made.specs, strict=True)
    for number, (caption, spec) in enumerate(rows):
        told = {"spec": spec.to_dict(), "kind": spec.kind, "unseen": spec.unseen}
        lines.append({"prompt": caption, "media": f"{number:04d}.mp4", **told})
    content = json_lines(lines)
    if prompts.exists() and prompts.read_bytes() != content:
        raise ValueError(f"{prompts} holds other prompts; name another folder, or move this one away")
    out.mkdir(parents=True, exist_ok=True)
    progress = Progress(count)
    for line, video in zip(lines, made.videos, strict=True):
        write_atomically(out / str(line["media"]), mp4(torch.from_numpy(video), FPS))
        progress.update(1, {})
    progress.close()
    write_atomically(prompts, content)
    return prompts


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/shapes_video"))
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=["move", "speed", "change"], choices=KINDS)
    arguments = parser.parse_args(argv)
    try:
        print(write_videos(arguments.out, arguments.count, arguments.seed, tuple(arguments.kinds)))
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
