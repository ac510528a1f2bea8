"""Optical flow by RAFT's large network (arXiv:2003.12039, Teed and Deng), from the authors' weights or torchvision's.

The authors' code is under the BSD 3-Clause licence, and so is torchvision's; neither names a licence of the weights.
All were trained on FlyingChairs and FlyingThings3D, whose makers give them for research, some then on Sintel and KITTI.
Modules have torchvision's names; the authors' are translated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rewards.towers import check_names, read_weights, weights_file

FILE = "raft-things.pth"  # the authors' name of the weights that VBench takes
LEVELS, RADIUS = 4, 4  # of the correlations: resolutions, and how far around a place they are looked up
HIDDEN = 128  # channels of the state that is updated; as many are context
SHRINK = 8  # pixels a side to a vector of the flow that is updated
SMALLEST = SHRINK * 2 ** (LEVELS - 1)  # side of a picture whose coarsest correlations are one number

# from the authors' names to torchvision's, one after the other
RENAMED = (
    (r"^module\.", ""),
    (r"^fnet\.", "feature_encoder."),
    (r"^cnet\.", "context_encoder."),
    (r"^(\w+_encoder)\.conv1\.", r"\1.convnormrelu.0."),
    (r"^(\w+_encoder)\.norm1\.", r"\1.convnormrelu.1."),
    (r"^(\w+_encoder)\.conv2\.", r"\1.conv."),
    (r"\.(layer\d\.\d)\.conv(\d)\.", r".\1.convnormrelu\2.0."),
    (r"\.(layer\d\.\d)\.norm3\.", r".\1.downsample.1."),  # one layer that they hold under two names
    (r"\.(layer\d\.\d)\.norm(\d)\.", r".\1.convnormrelu\2.1."),
    (r"^update_block\.encoder\.convc(\d)\.", r"update_block.motion_encoder.convcorr\1.0."),
    (r"^update_block\.encoder\.convf(\d)\.", r"update_block.motion_encoder.convflow\1.0."),
    (r"^update_block\.encoder\.conv\.", "update_block.motion_encoder.conv.0."),
    (r"^update_block\.gru\.conv([zrq])(\d)\.", r"update_block.recurrent_block.convgru\2.conv\1."),
    (r"^update_block\.mask\.0\.", "mask_predictor.convrelu.0."),
    (r"^update_block\.mask\.2\.", "mask_predictor.conv."),
)


class RAFT(nn.Module):
    """Where each pixel of a picture has gone in the next one.

        f_0 = 0,   s_{k+1}, d_k = update(s_k, context, C(x + f_k), f_k),   f_{k+1} = f_k + d_k

    with one vector f for 8 x 8 pixels, and C the correlations of features around the place x + f_k in the next picture.
    The last flow is brought to all pixels. The gradient is whole; the authors, for training, cut it at each f_k.
    """

    def __init__(self) -> None:
        super().__init__()
        self.feature_encoder, self.context_encoder = Encoder(nn.InstanceNorm2d), Encoder(nn.BatchNorm2d)
        self.update_block, self.mask_predictor = UpdateBlock(), MaskPredictor()

    def forward(
        self, first: Float[Tensor, "n 3 h w"], second: Float[Tensor, "n 3 h w"], updates: int = 20
    ) -> Float[Tensor, "n 2 h w"]:
        """Flow in pixels, to the right and downwards, from pictures in [0, 1]; differentiable.

        Raises: ValueError for sides that are not multiples of 8, or below 64 (the originals give nan below 128).
        """
        size = first.shape[2:]
        if min(size) < SMALLEST or any(side % SHRINK for side in size):
            raise ValueError(f"RAFT takes sides of at least {SMALLEST} in multiples of {SHRINK}, got {list(size)}")
        start, end = self.feature_encoder(torch.cat([first, second]) * 2 - 1).chunk(2)
        levels = correlations(start, end)
        state, context = self.context_encoder(first * 2 - 1).split(HIDDEN, 1)
        state, context = state.tanh(), context.relu()
        rows, columns = (torch.arange(side, device=first.device) for side in start.shape[2:])
        here = torch.stack(torch.meshgrid(columns, rows, indexing="xy")).to(first).expand(len(first), -1, -1, -1)
        flow = torch.zeros_like(here)
        for _ in range(updates):
            state, change = self.update_block(state, context, lookup(levels, here + flow), flow)
            flow = flow + change
        return upsample(flow, self.mask_predictor(state))


def correlations(first: Float[Tensor, "n c h w"], second: Float[Tensor, "n c h w"]) -> list[Tensor]:
    """first(x) . second(y) / sqrt(c) of all places x and y, each [n*h*w, 1, k, l]; y at 4 resolutions, each half."""
    count, channels, height, width = first.shape
    volume = first.flatten(2).mT @ second.flatten(2) / math.sqrt(channels)
    levels = [volume.view(count * height * width, 1, height, width)]
    for _ in range(LEVELS - 1):
        levels.append(F.avg_pool2d(levels[-1], 2))
    return levels


def lookup(levels: list[Tensor], places: Float[Tensor, "n 2 h w"]) -> Float[Tensor, "n d h w"]:
    """Correlations at whole steps of up to 4 around each place, interpolated, 0 beyond the picture.

    81 numbers per level, over the steps to the right and, for each of them, downwards.
    """
    count, _, height, width = places.shape
    steps = torch.arange(-RADIUS, RADIUS + 1).to(places)
    window = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), 2)
    centers, found = places.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2), []
    for k, level in enumerate(levels):
        size = places.new_tensor([level.shape[3], level.shape[2]])
        grid = (2 * (centers / 2**k + window) + 1) / size - 1  # a side of one is no division by 0
        found.append(F.grid_sample(level, grid, align_corners=False).flatten(1))
    return torch.cat(found, 1).view(count, height, width, -1).permute(0, 3, 1, 2)


def upsample(flow: Float[Tensor, "n 2 h w"], mask: Float[Tensor, "n m h w"]) -> Float[Tensor, "n 2 8*h 8*w"]:
    """At each of 8 x 8 pixels a convex combination of 8 times the 9 vectors around; those beyond the edge are 0.

    Args:
        mask: logits of the 9 vectors, row by row, at each of the 64 pixels; m = 9 * 64.
    """
    count, _, height, width = flow.shape
    weights = mask.view(count, 1, 9, SHRINK, SHRINK, height, width).softmax(2)
    around = F.unfold(SHRINK * flow, 3, padding=1).view(count, 2, 9, 1, 1, height, width)
    fine = (weights * around).sum(2).permute(0, 1, 4, 2, 5, 3)
    return fine.reshape(count, 2, SHRINK * height, SHRINK * width)


def pad(pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 k l"]:
    """To multiples of 8 on all sides by the edges' own colours; of an odd number the larger half is at the end."""
    down, right = (-side % SHRINK for side in pixels.shape[2:])
    return F.pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2), mode="replicate")


class Encoder(nn.Module):
    """256 features for 8 x 8 pixels."""

    def __init__(self, norm: type[nn.InstanceNorm2d] | type[nn.BatchNorm2d]) -> None:
        super().__init__()
        self.convnormrelu = nn.Sequential(_conv(3, 64, 7, 7, 2), norm(64), nn.ReLU())
        self.layer1 = nn.Sequential(Residual(64, 64, 1, norm), Residual(64, 64, 1, norm))
        self.layer2 = nn.Sequential(Residual(64, 96, 2, norm), Residual(96, 96, 1, norm))
        self.layer3 = nn.Sequential(Residual(96, 128, 2, norm), Residual(128, 128, 1, norm))
        self.conv = _conv(128, 2 * HIDDEN, 1, 1)

    def forward(self, pictures: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c h//8 w//8"]:
        return self.conv(self.layer3(self.layer2(self.layer1(self.convnormrelu(pictures)))))


class Residual(nn.Module):
    """Two convolutions beside the input, or one of its own where it is made smaller."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, norm: type[nn.InstanceNorm2d] | type[nn.BatchNorm2d]
    ) -> None:
        super().__init__()
        self.convnormrelu1 = nn.Sequential(_conv(inputs, outputs, 3, 3, stride), norm(outputs), nn.ReLU())
        self.convnormrelu2 = nn.Sequential(_conv(outputs, outputs, 3, 3), norm(outputs), nn.ReLU())
        shrunk = nn.Sequential(_conv(inputs, outputs, 1, 1, stride), norm(outputs))
        self.downsample = nn.Identity() if stride == 1 else shrunk

    def forward(self, x: Float[Tensor, "n a h w"]) -> Float[Tensor, "n b k l"]:
        return F.relu(self.downsample(x) + self.convnormrelu2(self.convnormrelu1(x)))


class UpdateBlock(nn.Module):
    """The next state, and how the flow changes."""

    def __init__(self) -> None:
        super().__init__()
        self.motion_encoder, self.recurrent_block = MotionEncoder(), RecurrentBlock()
        self.flow_head = FlowHead()

    def forward(
        self, state: Float[Tensor, "n c h w"], context: Float[Tensor, "n c h w"], found: Float[Tensor, "n d h w"],
        flow: Float[Tensor, "n 2 h w"],
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n 2 h w"]]:  # fmt: skip
        state = self.recurrent_block(state, torch.cat([context, self.motion_encoder(flow, found)], 1))
        return state, self.flow_head(state)


class MotionEncoder(nn.Module):
    """128 channels of the correlations and the flow, the last two of which are the flow itself."""

    def __init__(self) -> None:
        super().__init__()
        self.convcorr1 = nn.Sequential(_conv(LEVELS * (2 * RADIUS + 1) ** 2, 256, 1, 1), nn.ReLU())
        self.convcorr2 = nn.Sequential(_conv(256, 192, 3, 3), nn.ReLU())
        self.convflow1 = nn.Sequential(_conv(2, 128, 7, 7), nn.ReLU())
        self.convflow2 = nn.Sequential(_conv(128, 64, 3, 3), nn.ReLU())
        self.conv = nn.Sequential(_conv(192 + 64, 128 - 2, 3, 3), nn.ReLU())

    def forward(self, flow: Float[Tensor, "n 2 h w"], found: Float[Tensor, "n d h w"]) -> Float[Tensor, "n 128 h w"]:
        both = torch.cat([self.convcorr2(self.convcorr1(found)), self.convflow2(self.convflow1(flow))], 1)
        return torch.cat([self.conv(both), flow], 1)


class RecurrentBlock(nn.Module):
    """A gated recurrent unit along rows, then one along columns."""

    def __init__(self) -> None:
        super().__init__()
        self.convgru1, self.convgru2 = ConvGRU(1, 5), ConvGRU(5, 1)

    def forward(self, state: Float[Tensor, "n c h w"], x: Float[Tensor, "n d h w"]) -> Float[Tensor, "n c h w"]:
        return self.convgru2(self.convgru1(state, x), x)


class ConvGRU(nn.Module):
    """s' = (1 - z) s + z q, with gates z and r of (s, x) and q = tanh of (r s, x)."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.convz, self.convr, self.convq = (_conv(3 * HIDDEN, HIDDEN, height, width) for _ in "zrq")

    def forward(self, state: Float[Tensor, "n c h w"], x: Float[Tensor, "n d h w"]) -> Float[Tensor, "n c h w"]:
        both = torch.cat([state, x], 1)
        z, r = self.convz(both).sigmoid(), self.convr(both).sigmoid()
        return (1 - z) * state + z * self.convq(torch.cat([r * state, x], 1)).tanh()


class FlowHead(nn.Module):
    """The change of the flow that a state says."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv(HIDDEN, 256, 3, 3), _conv(256, 2, 3, 3)

    def forward(self, state: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 2 h w"]:
        return self.conv2(F.relu(self.conv1(state)))


class MaskPredictor(nn.Module):
    """The logits of `upsample`, a quarter of what the network gives (in training that was to balance gradients)."""

    def __init__(self) -> None:
        super().__init__()
        self.convrelu = nn.Sequential(_conv(HIDDEN, 256, 3, 3), nn.ReLU())
        self.conv = _conv(256, 9 * SHRINK**2, 1, 1)

    def forward(self, state: Float[Tensor, "n c h w"]) -> Float[Tensor, "n m h w"]:
        return 0.25 * self.conv(self.convrelu(state))


def _conv(inputs: int, outputs: int, height: int, width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, (height, width), stride, (height // 2, width // 2))


def load_raft(model: str) -> RAFT:
    """The network with the weights of a file, frozen, in float32.

    Args:
        model: a file of the authors' large network (raft-things.pth and its kin) or of torchvision's (raft_large_*.pth,
            as a pickle or as safetensors), or a folder or hub id that has raft-things.pth.

    Raises: ValueError where there is none, or it holds another network.
    """
    state, network = renamed(read_weights(weights_file(model, FILE))), RAFT()
    wanted = {name: value for name, value in network.state_dict().items() if not _counts(name)}
    check_names(model, state, wanted)
    wrong = sorted(name for name in wanted if state[name].shape != wanted[name].shape)
    if wrong:
        raise ValueError(f"of the model's weights {model} has other shapes than RAFT's large network: {wrong[:3]}")
    network.load_state_dict(state, strict=False)
    return network.float().eval().requires_grad_(False)


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names above, without counters of training's batches.

    Raises: ValueError where a layer that has two names has two values.
    """
    made: dict[str, Tensor] = {}
    for name, value in state.items():
        known = name
        for pattern, put in RENAMED:
            known = re.sub(pattern, put, known)
        if known in made and not torch.equal(made[known], value):
            raise ValueError(f"of the model's weights {name} is another than {known}, and both are of one layer")
        if not _counts(name):
            made[known] = value
    return made


def _counts(name: str) -> bool:
    return name.endswith("num_batches_tracked")
