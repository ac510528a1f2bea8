"""How well a picture follows a map of what it should show, pixel by pixel; as ControlNet++ (arXiv:2404.07987) scores.

    E = |m - c|^2 at each pixel,   m a predictor's map of the picture, c the map that was wanted;   the score is -mean E

Of classes E is the cross-entropy. A score's `maps` hold m and E, which Ctrl-U (arXiv:2410.11236) weighs by how far two
maps of one condition are apart (`Consistency.apart`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from flowalign.media import IMAGE, REAL, named_media
from flowalign.records import Maps, Media, Prompts, Scores, Size
from rewards.base import Card, Reward, simple_scores
from rewards.pixels import pictures

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601, as PIL and OpenCV turn pictures grey
SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
LEAST = 1e-6  # that a map is divided by

Map = Float[Tensor, "b c k l"]
Errors = Float[Tensor, "b k l"]


class Consistency(Reward):
    """-mean E over the pixels that count; differentiable to the pixels. See the subclasses.

    of_media: the map that is wanted is the predictor's own of each prompt's real picture ("media" in its record).
        Else it is told by the control picture ("image"), which is that map.
    """

    differentiable = True
    of_media: bool

    @abstractmethod
    def predict(self, pixels: Float[Tensor, "b 3 h w"]) -> Map:
        """The maps of pictures."""

    @abstractmethod
    def told(self, pixels: Float[Tensor, "b 3 h w"]) -> Tensor:
        """The maps that control pictures of the pictures' size tell."""

    @abstractmethod
    def seen(self, predicted: Map) -> Tensor:
        """The same, from maps that the predictor has made of real pictures."""

    @abstractmethod
    def compare(self, predicted: Map, wanted: Tensor) -> tuple[Errors, Bool[Tensor, "b k l"]]:
        """E at each pixel of the predictor's resolution, and which pixels count."""

    @abstractmethod
    def apart(self, first: Map, second: Map) -> Errors:
        """How far two maps of the same condition are apart at each pixel, at least 0: Ctrl-U's uncertainty."""

    def score(self, media: Media, prompts: Prompts) -> Scores:
        pixels = pictures(media, type(self).__name__)
        predicted = self.predict(pixels)
        with torch.no_grad():
            wanted = self._wanted(prompts, pixels)
        errors, counted = self.compare(predicted, wanted)
        known = counted.flatten(1).any(1)
        total = (-mean_counted(errors, counted)).where(known, torch.nan)
        maps = Maps(predicted, errors, counted) if torch.is_grad_enabled() else None
        return replace(simple_scores(self.name, total), maps=maps)

    def _wanted(self, prompts: Prompts, pixels: Float[Tensor, "b 3 h w"]) -> Tensor:
        size = Size(*pixels.shape[2:])
        if self.of_media:
            return of_each(
                prompts,
                REAL,
                lambda some: self.seen(self.predict(named_media(some, REAL, "real media", size).to(pixels))),
            )
        return of_each(
            prompts, IMAGE, lambda some: self.told(named_media(some, IMAGE, "control picture", size).to(pixels))
        )


def mean_counted(values: Errors, counted: Bool[Tensor, "b k l"]) -> Float[Tensor, " b"]:
    """The mean of each map over the pixels that count; 0 where none does."""
    return (values * counted).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)


def of_each(prompts: Prompts, key: str, make: Callable[[Prompts], Tensor]) -> Tensor:
    """What is made of prompts by the files that they name, once for each file."""
    names = [str(row.get(key)) for row in prompts.metadata]
    first = {name: names.index(name) for name in dict.fromkeys(names)}
    places = {name: place for place, name in enumerate(first)}
    return make(prompts.rows([*first.values()]))[[places[name] for name in names]]


class ValueConsistency(Consistency):
    """Of maps of values: E is the squared difference, and two maps are as far apart as their absolute difference."""

    def told(self, pixels: Float[Tensor, "b 3 h w"]) -> Map:
        return pixels.mean(1, keepdim=True)

    def seen(self, predicted: Map) -> Map:
        return predicted

    def compare(self, predicted: Map, wanted: Tensor) -> tuple[Errors, Bool[Tensor, "b k l"]]:
        errors = (predicted - wanted).square().mean(1)
        return errors, torch.ones_like(errors, dtype=torch.bool)

    def apart(self, first: Map, second: Map) -> Errors:
        return (first - second).abs().mean(1)


class EdgeConsistency(ValueConsistency):
    """Consistency of soft edges, without any network: Canny's (IEEE PAMI 8(6), 1986) slopes, and a sigmoid for a cut.

        m = 1 / (1 + exp(-(g - threshold) / softness)),   g = |Sobel slope of the blurred grey picture|

    g is 1 at a step from black to white that is not blurred. Lines are as wide as the slopes are: there is no thinning.

    Args:
        blur: standard deviation of the Gaussian in pixels; 0 for none.
        threshold: of g. OpenCV's 100 and 200, usual for ControlNets of edges, are .1 and .2.
        softness: of the cut; the smaller, the sharper edges are and the fewer pixels have a gradient.
        of_media: see `Consistency`. True by default: control pictures of edges are mostly another detector's.
    """

    name = "edge_consistency"
    card = Card(usual=(-0.5, 0.0), opens_files=True)

    def __init__(
        self, blur: float = 1.0, threshold: float = 0.15, softness: float = 0.03, of_media: bool = True
    ) -> None:
        if blur < 0 or not softness > 0:
            raise ValueError(f"blur must be at least 0 and softness positive, got {blur} and {softness}")
        self.blur, self.threshold, self.softness, self.of_media = blur, threshold, softness, of_media

    def predict(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
        return ((slopes(pixels.float(), self.blur) - self.threshold) / self.softness).sigmoid()


def slopes(pixels: Float[Tensor, "b 3 h w"], blur: float) -> Float[Tensor, "b 1 h w"]:
    """How steep the blurred grey picture is at each pixel, by Sobel's operator; borders go on as they are."""
    grey = (pixels * pixels.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    if blur:
        weights = gaussian(blur).to(pixels)
        reach = len(weights) // 2
        grey = F.conv2d(F.pad(grey, (reach,) * 4, "replicate"), weights.view(1, 1, 1, -1))
        grey = F.conv2d(grey, weights.view(1, 1, -1, 1))
    across = pixels.new_tensor(SOBEL) / 4  # 4 is what the plain operator makes of a step of height 1
    found = F.conv2d(F.pad(grey, (1,) * 4, "replicate"), torch.stack([across, across.T])[:, None])
    return (found.square().sum(1, keepdim=True) + LEAST**2).sqrt()


def gaussian(std: float) -> Float[Tensor, " n"]:
    """Weights of sum 1 at whole pixels, as far as three standard deviations."""
    places = torch.arange(-int(3 * std + 0.5), int(3 * std + 0.5) + 1, dtype=torch.float64)
    weights = (-places.square() / (2 * std**2)).exp()
    return weights / weights.sum()
