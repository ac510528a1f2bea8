"""Build the embedded world's weights from nothing: autoencoder, then text-to-image base, CLIP, and the package's files.

    python scripts/build_shapes vae  --out build/shapes
    python scripts/build_shapes base --out build/shapes       # needs the autoencoder
    python scripts/build_shapes clip --out build/shapes       # independent of both
    python scripts/build_shapes export --out build/shapes     # writes flowalign/shapes/weights
    python scripts/build_shapes few_step --out build/shapes   # needs the exported base; export again after it
    python scripts/build_shapes video_vae --out build/shapes
    python scripts/build_shapes video_base --out build/shapes # needs the video autoencoder
    python scripts/build_shapes video_decoder --out build/shapes # needs the video autoencoder
    python scripts/build_shapes export_video --out build/shapes # writes flowalign/shapes/video/weights
    python scripts/build_shapes longer --out build/shapes     # a control: the base after 20 % more steps

Every stage saves its state each minute and goes on from it when started again; on two CPU cores the world of pictures
and that of videos take less than three hours each (the READMEs of the weights have the measured times).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from base import build_base, build_longer
from contrastive import build_clip
from export import export, export_video
from few_step import build_few_step
from vae import build_vae
from video_base import build_video_base
from video_vae import build_video_decoder, build_video_vae

STAGES = {
    "vae": build_vae,
    "base": build_base,
    "clip": build_clip,
    "few_step": build_few_step,
    "export": export,
    "longer": build_longer,
    "video_vae": build_video_vae,
    "video_base": build_video_base,
    "video_decoder": build_video_decoder,
    "export_video": export_video,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, default=Path("build/shapes"), help="folder for what the stages leave")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    STAGES[arguments.stage](arguments.out)
