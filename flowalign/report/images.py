"""Pictures of a run as data: URIs, small enough that a page with all of them opens on a phone."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from PIL import Image

from flowalign.media import MOST_PIXELS
from flowalign.report.comparing import Changed, Comparison
from flowalign.report.reading import RunRecord

WIDEST = 256  # pixels of a single picture
LARGEST = 40_000  # bytes of a single picture; a larger one becomes a JPEG
WIDEST_SHEET = 1100
LARGEST_SHEET = 300_000
SHEETS = 24
QUALITIES = (85, 70, 50, 30)
WIDEST_STRIP = 1600  # of a video's frames
LARGEST_FILM = 150_000  # bytes of an MP4; of a larger one its strip is shown
FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg"}


@dataclass(frozen=True)
class Embedded:
    """A picture inside the page; `small` ones are enlarged without smoothing.

    film: the URI of the MP4 whose frames the picture is a strip of, if it can be embedded.
    """

    uri: str
    width: int
    height: int
    film: str = ""

    @property
    def strip(self) -> bool:
        """Whether it has a video's frames side by side."""
        return self.width > 3 * self.height

    @property
    def small(self) -> bool:
        """Whether its pixels are meant to be seen."""
        return self.width <= WIDEST // 2


@dataclass(frozen=True)
class Pair:
    """A prompt with its pictures before and after; None where a picture was not kept."""

    changed: Changed
    before: Embedded | None
    after: Embedded | None

    @property
    def wide(self) -> bool:
        """Whether a strip is shown, for want of its film."""
        return any(one is not None and one.strip and not one.film for one in (self.before, self.after))


@dataclass(frozen=True)
class Sheet:
    """The contact sheet of one evaluation."""

    epoch: int
    score: float
    picture: Embedded


def embed(content: bytes, widest: int, largest: int) -> Embedded:
    """A picture file as it is, or made smaller where it is wider or has more bytes than that.

    Raises: OSError where it is no picture.
    """
    with _opened(content) as picture:
        picture.load()
        if max(picture.size) <= widest and len(content) <= largest and picture.format in FORMATS:
            return _embedded(content, FORMATS[picture.format], picture.size)
        smaller = picture.convert("RGB")
    smaller.thumbnail((widest, 4 * widest))
    for quality in QUALITIES:
        buffer = io.BytesIO()
        smaller.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= largest:
            break
    return _embedded(buffer.getvalue(), "image/jpeg", smaller.size)


def _opened(content: bytes) -> Image.Image:
    """Raises: OSError where it is no picture of ours, or decodes to more than one of ours would."""
    try:
        picture = Image.open(io.BytesIO(content), formats=[*FORMATS])
    except Image.DecompressionBombError as error:
        raise OSError(str(error)) from error
    if picture.width * picture.height > MOST_PIXELS:
        raise OSError(f"{picture.width} x {picture.height} pixels")
    return picture


def _embedded(content: bytes, kind: str, size: tuple[int, int]) -> Embedded:
    return Embedded(f"data:{kind};base64,{base64.b64encode(content).decode()}", *size)


def pairs(run: RunRecord, comparison: Comparison, chosen: tuple[Changed, ...]) -> tuple[Pair, ...]:
    """The chosen prompts with their pictures."""
    index = tuple(one.index for one in chosen)
    before = from_zip(run.zip_of(comparison.before_epoch), index)
    after = from_zip(run.zip_of(comparison.after_epoch), index)
    return tuple(Pair(one, before.get(one.index), after.get(one.index)) for one in chosen)


def from_zip(path: Path, index: tuple[int, ...]) -> dict[int, Embedded]:
    """An evaluation's pictures of these prompts, as far as they are there; none of a zip that was cut short."""
    try:
        with ZipFile(path) as archive:
            names = archive.namelist()
            members = {Path(name).stem: name for name in names if not name.endswith(".mp4")}
            kept = {i: members[f"{i:05d}"] for i in index if f"{i:05d}" in members}
            films = {i: archive.getinfo(f"{i:05d}.mp4") for i in kept if f"{i:05d}.mp4" in names}
            small = {i: archive.read(film) for i, film in films.items() if film.file_size <= LARGEST_FILM}
            fit = {i: name for i, name in kept.items() if archive.getinfo(name).file_size <= MOST_PIXELS}
            return {i: _shown(archive.read(name), small.get(i)) for i, name in fit.items()}
    except (OSError, BadZipFile):
        return {}


def _shown(content: bytes, film: bytes | None) -> Embedded:
    """A picture, or a strip with its film."""
    with _opened(content) as picture:
        strip = picture.width > 3 * picture.height
    if not strip:
        return embed(content, WIDEST, LARGEST)
    uri = "" if film is None else f"data:video/mp4;base64,{base64.b64encode(film).decode()}"
    return replace(embed(content, WIDEST_STRIP, 2 * LARGEST), film=uri)


def sheets(run: RunRecord) -> tuple[Sheet, ...]:
    """The contact sheets of evaluations evenly chosen over the run, the first and the last among them."""
    last = len(run.sheets) - 1
    chosen = range(last + 1) if last < SHEETS else (round(i * last / (SHEETS - 1)) for i in range(SHEETS))
    scores = {row.step: row.get("held-out") for row in run.evaluations}
    found = []
    for epoch, path in (run.sheets[i] for i in chosen):
        picture = _readable(path)
        if picture is not None:
            found.append(Sheet(epoch, scores.get(epoch, float("nan")), picture))
    return tuple(found)


def _readable(path: Path) -> Embedded | None:
    try:
        return embed(path.read_bytes(), WIDEST_SHEET, LARGEST_SHEET)
    except OSError:  # cut short, or no picture: the others still tell the story
        return None
