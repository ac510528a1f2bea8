"""ArcFace's network and the crop that it sees, differentiable to the picture (arXiv:1801.07698, Deng et al.)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rewards.towers import check_names

SIDE = 112  # of the crop, in pixels
TEMPLATE = (  # x, y in the crop: left eye, right eye, nose, left and right corner of the mouth, as seen in the picture
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)
STAGES = (1, 2, 3, 4)
MAP = 7  # side of the last feature map, 112 / 2^4


class Block(nn.Module):
    """x + bn(conv(prelu(bn(conv(bn(x)))))), the stride in the second convolution."""

    def __init__(self, width_in: int, width: int, stride: int, downsample: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        short = (nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)) if downsample else ()
        self.downsample = nn.Sequential(*short)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d k l"]:
        made = self.conv1(self.bn1(x))
        return self.bn3(self.conv2(self.prelu(self.bn2(made)))) + self.downsample(x)


class IResNet(nn.Module):
    """The residual network of arcface_torch, by its names (github.com/deepinsight/insightface).

    blocks: of each of the four stages: (3, 4, 14, 3) is r50, (3, 13, 30, 3) is r100. widths: of the stem and of the
    stages. features: length of the embedding.
    """

    def __init__(self, blocks: tuple[int, ...], widths: tuple[int, ...], features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1, self.prelu = nn.BatchNorm2d(widths[0]), nn.PReLU(widths[0])
        stages = [
            nn.Sequential(Block(before, width, 2, True), *(Block(width, width, 1, False) for _ in range(count - 1)))
            for before, width, count in zip(widths[:-1], widths[1:], blocks, strict=True)
        ]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.bn2 = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1] * MAP * MAP, features)
        self.features = nn.BatchNorm1d(features)

    def forward(self, crops: Float[Tensor, "b 3 112 112"]) -> Float[Tensor, "b d"]:
        """Embeddings, not of unit length, of crops in [-1, 1]."""
        x = self.prelu(self.bn1(self.conv1(crops)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.features(self.fc(self.bn2(x).flatten(1)))


def load_iresnet(state: dict[str, Tensor], source: str) -> IResNet:
    """The network with exactly these weights; raises as `build_iresnet` does."""
    network = build_iresnet(state, source)
    network.load_state_dict(state)
    return network


def build_iresnet(state: dict[str, Tensor], source: str) -> IResNet:
    """A network of the sizes that the weights have, without them.

    Raises: ValueError that names weights that are missing, that do not belong, or have another shape.
    """
    told = ("conv1.weight", "fc.weight", *(f"layer{stage}.0.conv2.weight" for stage in STAGES))
    lacking = [name for name in told if name not in state]
    if lacking:
        raise ValueError(f"{source} holds no IResNet as arcface_torch saves it (backbone.pth): it lacks {lacking[0]}")
    widths = tuple(len(state[name]) for name in told if name != "fc.weight")
    blocks = tuple(len({key.split(".")[1] for key in state if key.startswith(f"layer{stage}.")}) for stage in STAGES)
    network = IResNet(blocks, widths, len(state["fc.weight"]))
    wanted = network.state_dict()
    check_names(source, state, wanted)
    wrong = sorted(name for name in wanted if state[name].shape != wanted[name].shape)
    if wrong:
        raise ValueError(f"{len(wrong)} weights of {source} have another shape than IResNet's: {', '.join(wrong[:3])}")
    return network


def align(pixels: Float[Tensor, "b 3 h w"], points: Float[Tensor, "b 5 2"]) -> Float[Tensor, "b 3 112 112"]:
    """The faces upright at the template's place, bilinear, zeros outside; differentiable to the pixels.

    The turn, scale and shift that bring the five points nearest to the template are a complex factor a and shift s,

        a = sum_j conj(z_j - mean z) (w_j - mean w) / sum_j |z_j - mean z|^2,   s = mean w - a mean z

    with points z and template w as x + iy: Umeyama's solution (IEEE PAMI 13(4), 1991) in the plane. Crop position g is
    read at (g - s) / a, as OpenCV's warpAffine does but for its rounding to 8 bit. Points get no gradient.

    Args:
        points: x and y of the landmarks of `TEMPLATE`, in pixels from the middle of the first one.
    """
    found = points.detach().double().cpu()
    template = torch.tensor(TEMPLATE, dtype=torch.float64)
    z, w = torch.view_as_complex(found.contiguous()), torch.view_as_complex(template)
    near = z - z.mean(1, keepdim=True)
    factor = (near.conj() * (w - w.mean())).sum(1) / near.abs().square().sum(1)
    shift = w.mean() - factor * z.mean(1)
    row = torch.arange(SIDE, dtype=torch.float64)
    places = torch.complex(row.expand(SIDE, SIDE), row[:, None].expand(SIDE, SIDE))
    read = torch.view_as_real((places - shift[:, None, None]) / factor[:, None, None])
    height, width = pixels.shape[2:]
    grid = 2 * read / torch.tensor([max(width - 1, 1), max(height - 1, 1)]) - 1
    return F.grid_sample(pixels, grid.to(pixels), mode="bilinear", padding_mode="zeros", align_corners=True)
