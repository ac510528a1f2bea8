"""Files of pictures and videos as tensors, and what a reward is shown of a batch."""

from __future__ import annotations

import os
from base64 import b64decode, b64encode
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from flowalign.fitting import fitted
from flowalign.records import Media, Prompts, Size

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEOS = (".mp4", ".webm", ".mov", ".avi", ".mkv", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # Pillow hands others to programs outside, as EPS to Ghostscript
# what a video may be inside, whatever its name: FFmpeg also reads lists of other files, and listens at ports if told to
CONTAINERS = {"format_whitelist": "mov,mp4,matroska,webm,avi,gif", "protocol_whitelist": "file"}
MOST_PIXELS = 64_000_000  # of one picture: more is a decompression bomb, or a mistake
MOST_FRAMES = 1_000_000_000  # pixels of all frames of a video
REFERENCES = "references"  # the key of a prompt's metadata that names the pictures its media should be like
IMAGE = "image"  # that of the picture that a video starts from, or a ControlNet looks at
REAL = "media"  # that of a real picture or video of the prompt
FILES = (IMAGE, REFERENCES, REAL)  # all keys whose files are opened by name: what strangers put there is checked
INLINE = "data:image/"  # how a picture begins that stands in a record itself, as a data URI (RFC 2397)
KEPT = 256  # sets of references that are kept in memory


def load(path: Path, data: bytes | None = None) -> tuple[Float[Tensor, "*frames 3 h w"], float | None]:
    """A picture, or a video's frames and its frames per second, in [0, 1].

    data: the file's bytes where they are known, or stand elsewhere; then `path` is only what it is called.

    Raises: ValueError for a file that cannot be read, or is too large.
    """
    if path.suffix.lower() in VIDEOS:
        return _video(path, data)
    try:
        with Image.open(path if data is None else BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{path} has {image.width} x {image.height} pixels; the most are {MOST_PIXELS:,}")
            pixels = np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255, None


def is_inline(name: str) -> bool:
    """Whether what stands for a file's name is a picture itself, such as "data:image/png;base64,iVBORw0KG..."."""
    return name.startswith(INLINE)


def inline(pixels: UInt8[np.ndarray, "3 h w"]) -> str:
    """A picture in 8 bits as a PNG that stands in a record, wherever the record goes; `load_named` gives it again."""
    buffer = BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, "PNG")
    return f"{INLINE}png;base64,{b64encode(buffer.getvalue()).decode()}"


def load_named(name: str) -> tuple[Float[Tensor, "*frames 3 h w"], float | None]:
    """`load` of a file, or of a picture that stands in the record itself. Raises: ValueError as `load` does."""
    if not is_inline(name):
        return load(Path(name))
    kind, mark, data = name[len(INLINE) :].partition(";base64,")
    try:
        content = b64decode(data, validate=True)
    except ValueError as error:
        raise ValueError(f"the picture {called(name)} is not base64: {error}") from error
    if not mark or not content:
        raise ValueError(f"the picture {called(name)} has no content: it must be {INLINE}png;base64, and its bytes")
    return load(Path(f"data.{kind}"), content)


def called(name: str) -> str:
    """A file's name as it is told in messages: of a picture that stands in the record, how it begins."""
    return f"{name[:40]}..." if is_inline(name) else name


def _video(path: Path, data: bytes | None) -> tuple[Float[Tensor, "f 3 h w"], float | None]:
    try:
        import av
    except ImportError as error:
        raise ValueError(f"{path}: videos need PyAV: pip install av") from error
    try:
        with av.open(str(path) if data is None else BytesIO(data), "r", options=CONTAINERS) as container:
            stream = container.streams.video[0]
            rate = stream.average_rate
            frames, most = list[Tensor](), MOST_FRAMES // max(stream.width * stream.height, 1)
            for frame in container.decode(stream):
                if len(frames) == most:
                    raise ValueError(f"{path} has more than {most} frames of {stream.width} x {stream.height} pixels")
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
    except (av.error.FFmpegError, IndexError, AttributeError, OSError) as error:  # of no known codec it has no width
        raise ValueError(f"{path} cannot be read as a video: {error}") from error
    if not frames or rate is None:
        raise ValueError(f"{path} has no frames, or does not say how many a second")
    return torch.stack(frames).permute(0, 3, 1, 2).float() / 255, float(rate)


def confined(root: Path, name: str) -> Path:
    """The file of that name in a folder or below it; links are followed before it is checked where it lies.

    Raises: ValueError for one outside, and for what is no name.
    """
    try:
        file = Path(os.path.realpath(root / name))  # of links in a circle too, which are no file then
    except ValueError as error:  # a NUL, or half a character
        raise ValueError(f"{name!r:.80} is no file's name: {error}") from error
    if not file.is_relative_to(root.resolve()):
        raise ValueError(f"{name} lies outside {root.resolve()}, where the files that a data file names must be")
    return file


def shown(pixels: Float[Tensor, "b *frames 3 h w"], prompts: Prompts, fps: float | None = None) -> Media:
    """What a reward sees of a batch: its media, with the pictures that the prompts' "references" name, if they do.

    Raises: ValueError where some prompts have references and others have none, and as `load_references` does.
    """
    named = [row.get(REFERENCES) for row in prompts.metadata]
    if not any(named):
        return Media(pixels, fps)
    if not all(named):
        without = named.index(next(name for name in named if not name))
        raise ValueError(f"prompt {prompts.text[without]!r} has no references, others of its batch have some")
    return Media(pixels, fps, tuple(load_references(tuple(names)) for names in named if names))


@lru_cache(maxsize=KEPT)
def load_references(files: tuple[str, ...]) -> Float[Tensor, "k 3 h w"]:
    """Pictures in [0, 1] from their files; the same files give the same tensor while they are kept.

    Raises: ValueError for a file that is no picture, and for pictures of different sizes.
    """
    pictures = [load_named(file)[0] for file in files]
    for file, picture in zip(files, pictures, strict=True):
        if picture.ndim != 3:
            raise ValueError(f"{called(file)} is a video; references are pictures")
        if picture.shape != pictures[0].shape:
            sizes = " and ".join(f"{one.shape[2]} x {one.shape[1]}" for one in (pictures[0], picture))
            names = f"{called(files[0])} and {called(file)}"
            raise ValueError(f"references of one prompt must have one size: {names} have {sizes}")
    return torch.stack(pictures)


def real_media(prompts: Prompts, size: Size) -> Float[Tensor, "b *frames 3 h w"]:
    """The real pictures or videos that prompts name as "media"; see `named_media`."""
    return named_media(prompts, REAL, "real media", size)


def named_media(prompts: Prompts, key: str, what: str, size: Size) -> Float[Tensor, "b *frames 3 h w"]:
    """The pictures or videos that prompts name, at a size, `fitted` to it: the middle of each.

    Of a longer video as many frames as the size has, evenly spread.

    Args:
        key: of the prompts' records. what: it is called where it is missing.

    Raises: ValueError for a prompt that names none, for a picture where a video is meant or the reverse, and for a
    video of fewer frames.
    """
    told = zip(prompts.text, prompts.metadata, strict=True)
    return torch.stack([_at_size(_name(text, row, key, what), size) for text, row in told])


def _name(text: str, row: Mapping[str, Any], key: str, what: str) -> str:
    name = row.get(key)
    if not isinstance(name, str):
        raise ValueError(f'prompt {text!r} names no {what}: give its record the key "{key}", a file')
    return name


@lru_cache(maxsize=KEPT)
def _at_size(name: str, size: Size) -> Float[Tensor, "*frames 3 h w"]:
    pixels, _ = load_named(name)
    try:
        return fitted(pixels, size)
    except ValueError as error:
        raise ValueError(f"{called(name)}: {error}") from error
