"""MTCNN: a face and its five landmarks by three small networks (arXiv:1604.02878, Zhang et al.).

The weights are those that the package facenet-pytorch brings, by its names; the package itself is not imported, because
it needs torchvision.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from rewards.pixels import to_eight_bit
from rewards.towers import check_names, read_weights

PACKAGE = "facenet-pytorch"
FILES = ("pnet.pt", "rnet.pt", "onet.pt")
CELL, STRIDE = 12, 2  # of the first network's windows, in pixels of the scaled picture
FACTOR = 0.709  # about sqrt(1/2): each scale of the pyramid has half the pixels of the one before
THRESHOLDS = (0.6, 0.7, 0.7)  # of the three networks' probabilities, as in the package
MOST = 500  # windows of one picture that the second network is shown


class MTCNN:
    """The landmarks of the largest face in each picture, None where no face is found; no gradient.

    Args:
        folder: of pnet.pt, rnet.pt and onet.pt; by default that of the package facenet-pytorch, where it is installed.
            Package and weights are under the MIT licence.
        smallest: side of the smallest face that is looked for, in pixels.

    Raises: ValueError where the weights are not there, or are others.
    """

    def __init__(self, folder: str | None = None, smallest: int = 20) -> None:
        if smallest < CELL:
            raise ValueError(f"smallest must be at least {CELL} pixels, got {smallest}")
        where = packaged_weights() if folder is None else Path(folder).expanduser()
        networks: tuple[nn.Module, ...] = (Proposals(), Refinement(), Landmarks())
        for network, file in zip(networks, FILES, strict=True):
            if not (where / file).is_file():
                raise ValueError(f"there is no {file} in {where}: name a folder of {', '.join(FILES)}")
            state = read_weights(where / file)
            check_names(where / file, state, network.state_dict())
            network.load_state_dict(state)
            network.eval().requires_grad_(False)
        self.proposals, self.refinement, self.landmarks = networks
        self.smallest = smallest

    @torch.no_grad()
    def __call__(self, pixels: Float[Tensor, "b 3 h w"]) -> list[Tensor | None]:
        for network in (self.proposals, self.refinement, self.landmarks):
            network.to(pixels.device)
        with torch.autocast(pixels.device.type, enabled=False):
            return [self.largest(picture[None]) for picture in (to_eight_bit(pixels.float()) * 255 - 127.5) / 128]

    def largest(self, picture: Float[Tensor, "1 3 h w"]) -> Float[Tensor, "5 2"] | None:
        """x and y of both eyes, the nose and both corners of the mouth, in pixels from the middle of the first one."""
        boxes = squares(self.propose(picture))[:MOST]
        for network, side, threshold in (
            (self.refinement, 24, THRESHOLDS[1]),
            (self.landmarks, 48, THRESHOLDS[2]),
        ):
            if not len(boxes):
                return None
            chance, moves, points = network(windows(picture, boxes, side))
            sure = chance > threshold
            boxes, chance, moves, points = boxes[sure], chance[sure], moves[sure], points[sure]
            places = boxes[:, None, :2] + points * sides(boxes)[:, None]
            moved = boxes + moves * sides(boxes).repeat(1, 2)
            kept = suppress(moved, chance, 0.7)
            boxes, places, moved = squares(moved[kept]), places[kept], moved[kept]
        if not len(boxes):
            return None
        return places[int(sides(moved).prod(1).argmax())]

    def propose(self, picture: Float[Tensor, "1 3 h w"]) -> Float[Tensor, "n 4"]:
        """Boxes of all scales that the first network takes for faces, surest first."""
        height, width = picture.shape[2:]
        scale, boxes, chances = CELL / self.smallest, [picture.new_zeros(0, 4)], [picture.new_zeros(0)]
        while min(height, width) * scale >= CELL:
            small = F.interpolate(picture, (int(height * scale + 1), int(width * scale + 1)), mode="area")
            chance, moves = self.proposals(small)
            y, x = (chance > THRESHOLDS[0]).nonzero(as_tuple=True)
            start = torch.stack([x, y], 1) * STRIDE / scale
            at = torch.cat([start, start + CELL / scale], 1)
            kept = suppress(at, chance[y, x], 0.5)
            boxes.append((at + moves[:, y, x].T * (CELL / scale))[kept])
            chances.append(chance[y, x][kept])
            scale *= FACTOR
        every, chance = torch.cat(boxes), torch.cat(chances)
        return every[suppress(every, chance, 0.7)]


class Proposals(nn.Module):
    """P-Net: of each window of 12 x 12, the chance of a face and how the box has to move, in its sides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 10, 3), nn.PReLU(10)
        self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, picture: Float[Tensor, "1 3 h w"]) -> tuple[Float[Tensor, "k l"], Float[Tensor, "4 k l"]]:
        x = F.max_pool2d(self.prelu1(self.conv1(picture)), 2, ceil_mode=True)
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
        return self.conv4_1(x).softmax(1)[0, 1], self.conv4_2(x)[0]


class Refinement(nn.Module):
    """R-Net: the same of windows of 24 x 24; it knows no landmarks and gives zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 28, 3), nn.PReLU(28)
        self.conv2, self.prelu2 = nn.Conv2d(28, 48, 3), nn.PReLU(48)
        self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.dense5_1, self.dense5_2 = nn.Linear(128, 2), nn.Linear(128, 4)

    def forward(self, shown: Float[Tensor, "n 3 24 24"]) -> tuple[Tensor, Tensor, Tensor]:
        x = F.max_pool2d(self.prelu1(self.conv1(shown)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu2(self.conv2(x)), 3, 2, ceil_mode=True)
        x = self.prelu4(self.dense4(_columns_first(self.prelu3(self.conv3(x)))))
        return self.dense5_1(x).softmax(1)[:, 1], self.dense5_2(x), shown.new_zeros(len(shown), 5, 2)


class Landmarks(nn.Module):
    """O-Net: the same of windows of 48 x 48, and the five landmarks in them, in sides of the window."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 32, 3), nn.PReLU(32)
        self.conv2, self.prelu2 = nn.Conv2d(32, 64, 3), nn.PReLU(64)
        self.conv3, self.prelu3 = nn.Conv2d(64, 64, 3), nn.PReLU(64)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1, self.dense6_2, self.dense6_3 = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)

    def forward(self, shown: Float[Tensor, "n 3 48 48"]) -> tuple[Tensor, Tensor, Tensor]:
        x = F.max_pool2d(self.prelu1(self.conv1(shown)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu2(self.conv2(x)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu3(self.conv3(x)), 2, ceil_mode=True)
        x = self.prelu5(self.dense5(_columns_first(self.prelu4(self.conv4(x)))))
        points = self.dense6_3(x).unflatten(1, (2, 5)).mT  # all x, then all y
        return self.dense6_1(x).softmax(1)[:, 1], self.dense6_2(x), points


def _columns_first(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    """Flat with the channel fastest and the row next, as the framework of the first weights has it."""
    return x.permute(0, 3, 2, 1).flatten(1)


def sides(boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 2"]:
    return boxes[:, 2:] - boxes[:, :2]


def squares(boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
    """Boxes around the same middles, as wide and high as the longer side."""
    middle, half = (boxes[:, 2:] + boxes[:, :2]) / 2, sides(boxes).amax(1, keepdim=True) / 2
    return torch.cat([middle - half, middle + half], 1)


def windows(picture: Float[Tensor, "1 3 h w"], boxes: Float[Tensor, "n 4"], side: int) -> Float[Tensor, "n 3 k k"]:
    """What is in the boxes as far as they lie in the picture, scaled by area."""
    height, width = picture.shape[2:]
    shown = []
    for left, top, right, bottom in boxes.round().long().tolist():
        x, y = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
        part = picture[:, :, y : max(min(bottom, height), y + 1), x : max(min(right, width), x + 1)]
        shown.append(F.interpolate(part, (side, side), mode="area"))
    return torch.cat(shown)


def suppress(boxes: Float[Tensor, "n 4"], chance: Float[Tensor, " n"], most: float) -> Int[Tensor, " k"]:
    """Surest first, all boxes whose overlap with a surer one that is kept is at most `most` of their union."""
    left, kept = chance.argsort(descending=True, stable=True).cpu(), []
    at = boxes.cpu()
    area = sides(at).clamp(min=0).prod(1)
    while len(left):
        best, left = int(left[0]), left[1:]
        kept.append(best)
        low, high = torch.maximum(at[best, :2], at[left, :2]), torch.minimum(at[best, 2:], at[left, 2:])
        shared = (high - low).clamp(min=0).prod(1)
        left = left[shared <= most * (area[best] + area[left] - shared)]
    return torch.tensor(kept, dtype=torch.long, device=boxes.device)


def packaged_weights() -> Path:
    """The folder of the weights in the package, without importing it.

    Raises: ValueError where it is not installed.
    """
    found = importlib.util.find_spec("facenet_pytorch")
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            f"finding faces needs MTCNN's weights: pip install --no-deps {PACKAGE}, name a folder of "
            f"{', '.join(FILES)}, or pass a detector of your own"
        )
    return Path(found.submodule_search_locations[0]) / "data"
