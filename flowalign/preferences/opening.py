"""The media of a pair as tensors, after a look at whether they can be compared."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from flowalign.media import load
from flowalign.preferences.records import Chosen, Medium, Preference, PreferenceSet
from flowalign.preferences.sources import LeftOut, OnBad
from flowalign.progress import Progress

Pixels = Float[Tensor, "*frames 3 h w"]


@dataclass(frozen=True)
class PairMedia:
    """Two pictures, or two videos with their frames per second, in [0, 1]."""

    first: Pixels
    second: Pixels
    fps: float | None


def open_pair(preference: Preference) -> PairMedia:
    """The media of a pair.

    Raises: ValueError that names file and row, where one is missing, cannot be read or is too large (a decompression
    bomb), where both are the same, and where they differ in kind, size, number of frames or frames per second.
    """
    try:
        return _open(preference.first, preference.second)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(preference.where) else f"{preference.where}: {text}") from error


def _open(first: Medium, second: Medium) -> PairMedia:
    if first.path == second.path:
        raise ValueError(f"the two media of a pair are the same file, {first.path}")
    data = first.read(), second.read()
    if data[0] == data[1]:
        raise ValueError(f"the two media of a pair are the same to the last byte: {first.path} and {second.path}")
    (one, fps), (other, fps_too) = load(first.path, data[0]), load(second.path, data[1])
    if one.ndim != other.ndim:
        raise ValueError(f"{first.path} and {second.path} are a picture and a video; a pair has two of a kind")
    if one.shape != other.shape:
        raise ValueError(f"{first.path} is {_told(one)}, {second.path} is {_told(other)}; a pair has one size")
    if fps != fps_too:
        raise ValueError(f"{first.path} has {fps:g} frames a second, {second.path} {fps_too:g}; a pair has one rate")
    return PairMedia(one, other, fps)


def _told(pixels: Pixels) -> str:
    frames = f" of {len(pixels)} frames" if pixels.ndim == 4 else ""
    return f"{pixels.shape[-1]} x {pixels.shape[-2]}{frames}"


def readable(preferences: PreferenceSet, on_bad: OnBad = "stop") -> PreferenceSet:
    """Those whose media can be opened, all of them read from end to end: hours for a large set.

    Raises: ValueError for the first that cannot, or where none can be skipped to.
    """
    good, left_out, progress = list[int](), LeftOut(), Progress(len(preferences))
    for number in range(len(preferences)):
        try:
            open_pair(preferences.rows([number])[0])
            good.append(number)
        except ValueError as error:
            if on_bad == "stop":
                raise
            left_out.add(str(error))
        progress.update(1, {})
    progress.close()
    left_out.tell(len(preferences), "preferences")
    if not good:
        raise ValueError("no preference has media that can be opened")
    return preferences if len(good) == len(preferences) else Chosen(preferences, good)
