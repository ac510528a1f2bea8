"""The JSON in which media and prompts go to a reward server, and scores come back; pictures as PNG or raw, no pickle.

The request is that of Flow-Factory's /compute, {"prompt": [text], "image": [png] or "video": [[png]],
"condition_images": [[png]]} with base64, and adds "tensor": {"shape", "dtype", "data"} in place of image and video,
"metadata", "groups", "fps" and "id". The answer is its {"rewards": [number]}, and adds "parts", "valid", "id" and the
reward's "scope"; a number that could not be had is null.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from flowalign.media import FILES
from flowalign.pictures import to_bytes
from flowalign.records import Media, Prompts, Scores
from rewards.card import SCOPES

MAX_SAMPLES = 4096
MAX_TEXT = 100_000  # characters of a prompt
MAX_PICTURE = 64_000_000  # pixels of one picture: a PNG of some kilobytes can hold billions
MAX_PIXELS = 128_000_000  # of all pictures of a request: 1.5 GB in float32
MODES = ("RGB", "RGBA", "L", "LA", "P", "1")
TYPES = {"float32": "<f4", "float16": "<f2", "uint8": "|u1"}
MAX_PARTS, MAX_NAME = 256, 120


class Malformed(ValueError):
    """A request that cannot be read; the message says what is wrong and nothing of the server."""


@dataclass(frozen=True)
class Request:
    """What a request asks to be scored, and the id that its answer repeats."""

    media: Media
    prompts: Prompts
    id: str = ""


def png(picture: UInt8[Tensor, "3 h w"]) -> bytes:
    """A picture as a PNG file, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy())).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def encode_request(request: Request, exact: bool = False) -> bytes:
    """The body of a request: pictures rounded to 8 bits as PNG, or float32 as it is if `exact`.

    Raises: ValueError where a prompt's metadata cannot be written as JSON.
    """
    media, prompts = request.media, request.prompts
    body: dict[str, Any] = {"id": request.id, "prompt": list(prompts.text)}
    if exact:
        pixels = media.pixels.detach().float().cpu().contiguous()
        body["tensor"] = {"shape": list(pixels.shape), "dtype": "float32", "data": _text(pixels.numpy().tobytes())}
    elif media.is_video:
        body["video"] = [[_text(png(frame)) for frame in video] for video in to_bytes(media.pixels)]
    else:
        body["image"] = [_text(png(picture)) for picture in to_bytes(media.pixels)]
    if media.references is not None:
        body["condition_images"] = [[_text(png(one)) for one in to_bytes(held)] for held in media.references]
    if media.fps is not None:
        body["fps"] = media.fps
    if prompts.groups is not None:
        body["groups"] = list(prompts.groups)
    if any(prompts.metadata):
        body["metadata"] = list(prompts.metadata)
    try:
        return json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"the prompts' metadata cannot be sent as JSON: {error}") from error


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def decode_request(raw: bytes) -> Request:
    """Media and prompts out of a body. Raises: Malformed."""
    try:
        body = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise Malformed("the body is no JSON in UTF-8") from error
    if not isinstance(body, dict):
        raise Malformed("the body must be an object")
    prompts = _prompts(body)
    given = [key for key in ("image", "video", "tensor") if body.get(key)]
    if len(given) != 1:
        raise Malformed("give exactly one of image, video and tensor")
    readers: dict[str, Callable[[Any], Tensor]] = {"image": _pictures, "video": _videos, "tensor": _tensor}
    pixels = readers[given[0]](body[given[0]])
    if len(pixels) != len(prompts):
        raise Malformed(f"{len(pixels)} media but {len(prompts)} prompts")
    fps, name = body.get("fps"), body.get("id") or ""
    if fps is not None and not (type(fps) in (int, float) and 0 < fps <= 1000):
        raise Malformed("fps must be a number up to 1000")
    if not isinstance(name, str) or len(name) > 64:
        raise Malformed("id must be a text of at most 64 characters")
    beside = body.get("condition_videos")
    if beside and (not isinstance(beside, list) or any(beside)):
        raise Malformed("condition_videos are not taken: no reward here compares with videos that are sent along")
    references = _references(body.get("condition_images"), len(prompts))
    return Request(Media(pixels, None if fps is None else float(fps), references), prompts, name)


def _prompts(body: dict[str, Any]) -> Prompts:
    texts = _list(body.get("prompt"), "prompt", MAX_SAMPLES)
    if not texts or not all(isinstance(text, str) and len(text) <= MAX_TEXT and _encodes(text) for text in texts):
        raise Malformed(f"prompt must be a list of texts of at most {MAX_TEXT} characters")
    metadata = body.get("metadata") or [{} for _ in texts]
    if not isinstance(metadata, list) or not all(isinstance(one, dict) for one in metadata):
        raise Malformed("metadata must be a list of objects")
    named = [key for key in FILES if any(key in one for one in metadata)]
    if named:
        raise Malformed(f'metadata may not hold "{named[0]}": no files are opened for clients; send condition_images')
    groups = body.get("groups")
    if groups is not None and not (isinstance(groups, list) and all(_is_index(one) for one in groups)):
        raise Malformed("groups must be a list of whole numbers")
    if len(metadata) != len(texts) or (groups is not None and len(groups) != len(texts)):
        raise Malformed(f"metadata and groups must have an entry for each of {len(texts)} prompts")
    return Prompts(tuple(texts), tuple(metadata), None if groups is None else tuple(groups))


def _encodes(text: str) -> bool:
    try:
        return bool(text.encode()) or text == ""
    except UnicodeEncodeError:  # half of a surrogate pair, which tokenizers fail on
        return False


def _is_index(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _list(value: Any, name: str, longest: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > longest:
        raise Malformed(f"{name} must be a list of at most {longest}")
    return value


def _pictures(files: Any, shape: tuple[int, int] | None = None, count: int | None = None) -> Float[Tensor, "b 3 h w"]:
    """Pictures of one size from base64 PNGs; `count`: how many of that size there will be in all."""
    made: list[np.ndarray] = []
    for file in _list(files, "pictures", MAX_SAMPLES):
        made.append(_picture(file, shape, count or len(files)))
        shape = made[0].shape[:2]
    if not made:
        raise Malformed("there is no picture")
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float() / 255


def _picture(file: Any, shape: tuple[int, int] | None, count: int) -> np.ndarray:
    """One PNG [h, w, 3]; its size is looked at before its pixels are unpacked."""
    try:
        image = Image.open(io.BytesIO(_bytes(file)), formats=["PNG"])
        width, height = image.size
    except Malformed:
        raise
    except Exception as error:  # whatever Pillow raises on a broken file
        raise Malformed("a picture is no PNG") from error
    if width * height > MAX_PICTURE or width * height * count > MAX_PIXELS:
        raise Malformed(f"pictures of {width} x {height} are too large for {count} of them")
    if shape is not None and shape != (height, width):
        raise Malformed("the pictures of a request must all have one size")
    if image.mode not in MODES:
        raise Malformed("a PNG must have 8 bits a channel")
    try:
        return np.asarray(image.convert("RGB"))
    except Exception as error:
        raise Malformed("a PNG is broken") from error


def _bytes(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True) if isinstance(text, str) else _no_base64()
    except ValueError as error:
        raise Malformed("pictures must be base64") from error


def _no_base64() -> bytes:
    raise ValueError


def _videos(videos: Any) -> Float[Tensor, "b f 3 h w"]:
    made: list[Tensor] = []
    lengths = {len(_list(video, "a video", MAX_SAMPLES)) for video in _list(videos, "video", MAX_SAMPLES)}
    if len(lengths) != 1:
        raise Malformed("the videos of a request must all have the same number of frames")
    count = len(videos) * lengths.pop()
    for video in videos:
        shape = (made[0].shape[2], made[0].shape[3]) if made else None
        made.append(_pictures(video, shape, count))
    return torch.stack(made)


def _tensor(given: Any) -> Float[Tensor, "b *frames 3 h w"]:
    shape = given.get("shape") if isinstance(given, dict) else None
    if not isinstance(shape, list) or len(shape) not in (4, 5) or not all(_is_index(n) and n > 0 for n in shape):
        raise Malformed("tensor needs a shape [b, 3, h, w] or [b, f, 3, h, w]")
    kind = given.get("dtype")
    if not isinstance(kind, str) or kind not in TYPES or shape[-3] != 3 or shape[0] > MAX_SAMPLES:
        raise Malformed(f"tensor needs 3 channels and one of the dtypes {', '.join(TYPES)}")
    raw = _bytes(given.get("data"))
    if math.prod(shape) * np.dtype(TYPES[kind]).itemsize != len(raw):
        raise Malformed("the tensor's data are not as many as its shape says")
    values = torch.from_numpy(np.frombuffer(raw, TYPES[kind]).astype(np.float32).reshape(shape))
    return values / 255 if kind == "uint8" else values


def _references(given: Any, count: int) -> tuple[Tensor, ...] | None:
    if not given:
        return None
    if len(_list(given, "condition_images", MAX_SAMPLES)) != count:
        raise Malformed(f"condition_images must have an entry for each of {count} prompts")
    total = sum(len(_list(held, "condition_images", MAX_SAMPLES)) for held in given)
    return tuple(_pictures(held, None, total) if held else torch.zeros(0, 3, 1, 1) for held in given)


def encode_scores(scores: Scores, name: str, scope: str) -> bytes:
    """The body of an answer, with the scope of the reward's card; what is not valid or not finite is null."""
    total, valid = scores.total.detach().float(), scores.valid & scores.total.detach().isfinite()
    answer = {
        "id": name,
        "scope": scope,
        "rewards": _numbers(total.where(valid, torch.nan)),
        "valid": valid.tolist(),
        "parts": {part: _numbers(values.detach().float()) for part, values in scores.parts.items()},
    }
    return json.dumps(answer, allow_nan=False).encode()


def _numbers(values: Float[Tensor, " b"]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def decode_scores(answer: Any, count: int, name: str, id: str, scope: str, hide: Callable[[str], str]) -> Scores:
    """Scores out of an answer to a request with this id, whose samples were chosen for rewards of this scope.

    Args:
        hide: takes out of a quoted text what must not be shown.

    Raises: ValueError that says what is wrong with it.
    """
    if not isinstance(answer, dict) or not isinstance(answer.get("rewards"), list):
        raise ValueError('its answer has no list "rewards"; is it a reward server?')
    if answer.get("id", id) != id:
        raise ValueError("its answer is that to another request")
    served = answer.get("scope", scope)
    if served in SCOPES and SCOPES.index(served) > SCOPES.index(scope):
        raise ValueError(
            f"its reward scores a whole {served}: give scope: {served}, so that samples are not torn apart"
        )
    total = _read(answer["rewards"], count, "rewards", hide)
    valid = answer.get("valid", [True] * count)
    if not isinstance(valid, list) or len(valid) != count or not all(isinstance(one, bool) for one in valid):
        raise ValueError(f'"valid" must be {count} times true or false')
    parts = answer.get("parts") or {}
    if not isinstance(parts, dict) or len(parts) > MAX_PARTS:
        raise ValueError(f'"parts" must be an object of at most {MAX_PARTS}')
    if not all(part.isprintable() and len(part) <= MAX_NAME for part in parts):
        raise ValueError(f'names in "parts" must be printable, of at most {MAX_NAME} characters')
    told = {part: f"values of the part {hide(repr(part))}" for part in parts}
    read = {part: _read(values, count, told[part], hide) for part, values in parts.items()}
    finite = torch.tensor(valid, dtype=torch.bool) & total.isfinite()
    return Scores(total, read | {name: total}, finite)


def _read(values: Any, count: int, what: str, hide: Callable[[str], str]) -> Float[Tensor, " n"]:
    if not isinstance(values, list) or len(values) != count:
        got = len(values) if isinstance(values, list) else "no"
        raise ValueError(f"{got} {what} for {count} prompts")
    return torch.tensor([_number(value, what, hide) for value in values], dtype=torch.float32)


def _number(value: Any, what: str, hide: Callable[[str], str]) -> float:
    """A number that float32 holds, nan for null."""
    if value is None:
        return math.nan
    if type(value) not in (int, float) or not abs(value) <= 3.4e38:
        raise ValueError(f"among the {what} is {hide(repr(value)):.40}, which is no finite number; a failure is null")
    return float(value)
