"""Videos for a person to look at: an MP4 file, and a strip of frames where only a picture can stand."""

from __future__ import annotations

import io
import math
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import interpolate, pad

from flowalign.pictures import SMALLEST, THUMBNAIL

FRAMES = 6  # of a strip, the first and the last among them
NEEDED = "writing videos needs PyAV: pip install av"
# at a quality that is hard to tell from the frames, and without the part of x264 whose bytes differ from call to call
H264 = {"crf": "18", "preset": "veryfast", "x264-params": "mbtree=0"}
CODECS = (("libx264", H264), ("mpeg4", {"qmin": "2", "qmax": "3"}))


def check_writable() -> None:
    """Raises ValueError where MP4 files cannot be written, before anything is made."""
    _codec()


def _codec() -> tuple[str, dict[str, str]]:
    try:
        import av
    except ImportError as error:
        raise ValueError(NEEDED) from error
    for name, options in CODECS:
        if name in av.codecs_available:
            return name, options
    raise ValueError(f"this PyAV can encode neither of {', '.join(name for name, _ in CODECS)}; {NEEDED}")


def mp4(frames: UInt8[Tensor, "f 3 h w"], fps: float) -> bytes:
    """An MP4 of one video; the same frames give the same bytes. Colours are BT.709's, in 4:2:0, which browsers play.

    Frames narrower than 128 pixels are enlarged by a whole factor, without smoothing: 4:2:0 halves the colours'
    resolution.

    Raises: ValueError for an odd height or width, which H.264 does not take, and where PyAV is missing.
    """
    name, options = _codec()
    import av

    if frames.shape[-1] % 2 or frames.shape[-2] % 2:
        raise ValueError(f"an MP4 needs an even height and width, got {frames.shape[-2]} x {frames.shape[-1]}")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream(name, rate=Fraction(fps).limit_denominator(1001), options=options)
        factor = math.ceil(SMALLEST / frames.shape[-1])
        stream.height, stream.width, stream.pix_fmt = frames.shape[-2] * factor, frames.shape[-1] * factor, "yuv420p"
        context = stream.codec_context
        context.thread_count = 4  # not the machine's: the bytes depend on it
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = 1  # limited
        for frame in frames:
            large = frame.repeat_interleave(factor, 1).repeat_interleave(factor, 2).permute(1, 2, 0).contiguous()
            drawn = av.VideoFrame.from_ndarray(large.numpy(), format="rgb24")
            container.mux(stream.encode(drawn.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode())
    return buffer.getvalue()


def stills(pixels: Float[Tensor, "b *frames 3 h w"]) -> Float[Tensor, "b 3 h2 w2"]:
    """Pictures as they are; of each video some of its frames, side by side with white between them.

    Frames of a strip are enlarged by a whole factor to 128 pixels of width, or reduced to 256 pixels at most.
    """
    if pixels.ndim == 4:
        return pixels
    count = min(FRAMES, pixels.shape[1])
    chosen = pixels[:, torch.linspace(0, pixels.shape[1] - 1, count).round().long()]
    frames = _sized(chosen.flatten(0, 1).float())
    gap = max(1, frames.shape[-1] // 32)
    framed = pad(frames.unflatten(0, chosen.shape[:2]), (0, gap), value=1)
    return framed.permute(0, 2, 3, 1, 4).flatten(-2)[..., :-gap]


def _sized(frames: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h2 w2"]:
    height, width = frames.shape[-2:]
    factor = math.ceil(SMALLEST / width)
    if factor > 1:
        return frames.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    scale = min(1.0, THUMBNAIL / max(height, width))
    size = round(height * scale), round(width * scale)
    return interpolate(frames, size, mode="bilinear", antialias=True).clamp(0, 1) if scale < 1 else frames
