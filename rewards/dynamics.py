"""How much a video moves by its optical flow: VBench's dynamic degree (arXiv:2311.17982), and a smooth form of it.

It is the other side of the rewards of steadiness; rewards/temporal.py says why none of these is used without one of
motion, and has a measure of motion without a network. Alone, motion rewards cameras that shake and scenes that flicker.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flowalign.records import Media, Prompts, Scores
from rewards.base import Card, Reward, simple_scores
from rewards.frames import videos
from rewards.pixels import to_eight_bit
from rewards.raft import load_raft, pad
from rewards.temporal import TOP

FPS = 8.0  # at which pairs of frames are compared
MOTION = 6.0 / 256  # pixels of flow from frame to frame that count as motion, by the shorter side
NEEDED = 4 / 16  # pairs that have to move, by the number of frames


class DynamicDegree(Reward):
    """1 where a video moves and 0 where it does not, as VBench has it; the parts say how much.

        yes if at least round(4 n / 16) of the n - 1 pairs of frames have r_t > 1
        r_t = mean of the largest 5 % of |flow from frame t to t + 1|, by 6 min(h, w) / 256 pixels

    Frames are every k-th, k = round(fps / 8) and at least 1: 6 to 12 of them per second, or all of a slower video,
    whose flow per pair is larger for it. The flow is RAFT's after 20 updates, of frames in 8 bits, with the edges that
    pad them to multiples of 8. Halves are rounded to even. VBench takes any video of two frames to move, since 0 pairs
    have to; here it is at least one.

    Parts: moving_pairs, the share of pairs with r_t > 1, and relative_flow, the mean of r_t. Groups whose videos all
    have the same verdict say nothing to a trainer: `FlowDynamics` is smooth.

    The published weights were not run here: what is tested is that the flow is that of the authors' code and of
    torchvision's on drawn weights, under the names that both publish.

    Args:
        model: the file raft-things.pth of github.com/princeton-vl/RAFT (download_models.sh), which VBench takes, or a
            folder or hub id that has it; or one of torchvision's files, of which
            download.pytorch.org/models/raft_large_C_T_V1-22a6c225.pth has the same weights. For the licence see
            rewards/raft.py.
        device: where the model stays; by default it follows the videos.
        batch_size: pairs of frames that pass through the model at once.
        updates: of the flow, 20 in VBench.

    Raises: ValueError where the weights are not there or are something else; in a score for pictures, for videos that
        do not say their frames per second or have less than two frames at that rate, and for sides below 57 pixels.
    """

    name = "dynamic_degree"
    card = Card("github.com/princeton-vl/RAFT raft-things.pth", "none named (code: BSD-3-Clause)", (0.0, 1.0), "video")

    def __init__(self, model: str, device: str | None = None, batch_size: int = 4, updates: int = 20) -> None:
        if batch_size < 1 or updates < 1:
            raise ValueError(f"batch_size and updates must be at least 1, got {batch_size} and {updates}")
        self.model, self.device, self.batch_size, self.updates = load_raft(model), device, batch_size, updates

    def score(self, media: Media, prompts: Prompts) -> Scores:
        frames = self._frames(media)
        device = torch.device(self.device or frames.device)
        self.model.to(device)
        pairs = [part.flatten(0, 1).split(self.batch_size) for part in (frames[:, :-1], frames[:, 1:])]
        with torch.autocast(device.type, enabled=False):
            fast = torch.cat([self._recomputed(*pair).to(frames.device) for pair in zip(*pairs, strict=True)])
        relative = fast.view(len(frames), -1) / (MOTION * min(frames.shape[3:]))
        known = torch.isfinite(relative.detach()).all(1)
        parts = {"moving_pairs": (relative > 1).float().mean(1), "relative_flow": relative.mean(1)}
        parts = {name: part.where(known, torch.nan) for name, part in parts.items()}
        return simple_scores(self.name, self.total(relative).where(known, torch.nan), parts)

    def total(self, relative: Float[Tensor, "b t"]) -> Float[Tensor, " b"]:
        """Of videos whose pairs of frames have this flow, by the flow that counts as motion."""
        return dynamic(relative)

    def speed(self, first: Float[Tensor, "n 3 h w"], second: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
        """The mean length of the largest 5 % of flows of each pair, in pixels."""
        return strongest(self.model(pad(first), pad(second), self.updates))

    def _recomputed(self, first: Float[Tensor, "n 3 h w"], second: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
        """`speed` on the model's device, of frames in 8 bits; a gradient runs it again rather than keep it."""
        device = next(self.model.parameters()).device
        pair = [to_eight_bit(frames.to(device).float()) for frames in (first, second)]
        return checkpoint(self.speed, *pair, use_reentrant=False)

    def _frames(self, media: Media) -> Float[Tensor, "b n 3 h w"]:
        kind = type(self).__name__
        pixels = videos(media, kind)
        if media.fps is None:
            raise ValueError(
                f"{kind} has to know how fast a video plays: give its frames per second, Media(pixels, fps=8.0)"
            )
        step = stride(media.fps)
        taken = pixels[:, ::step]
        if taken.shape[1] < 2:
            raise ValueError(
                f"{kind} compares frames about 1/{FPS:g} s apart: it needs at least 2, and videos of {pixels.shape[1]} "
                f"frames at {media.fps:g} per second have {taken.shape[1]}"
            )
        return taken


class FlowDynamics(DynamicDegree):
    """How much a video moves, from 0 for a still one towards 1: mean over pairs of r_t / (r_t + 1); differentiable.

    r_t is `DynamicDegree`'s, so that a pair counts one half where VBench takes it to move; its parts are these too. The
    form is that of `FrameDynamics`, with flow in place of changed pixels. The gradient passes through RAFT and all of
    its updates, and through the rounding to 8 bits as if it were not there. Activations, about 10 kB per pixel, are
    computed again for one batch of pairs at a time: a pair of 480 x 832 takes 4 GB.
    """

    name = "flow_dynamics"
    differentiable = True
    card = Card("github.com/princeton-vl/RAFT raft-things.pth", "none named (code: BSD-3-Clause)", (0.0, 0.9), "video")

    def total(self, relative: Float[Tensor, "b t"]) -> Float[Tensor, " b"]:
        return (relative / (relative + 1)).mean(1)


def stride(fps: float) -> int:
    """How many frames apart those are that are compared.

    Raises: ValueError for frames per second that are not positive and finite.
    """
    if not 0 < fps < math.inf:
        raise ValueError(f"frames per second must be positive and finite, got {fps}")
    return max(1, round(fps / FPS))


def strongest(flow: Float[Tensor, "n 2 h w"]) -> Float[Tensor, " n"]:
    """Mean length of the 5 % longest vectors, their number rounded down; the gradient at one of length 0 is 0."""
    lengths = torch.linalg.vector_norm(flow, dim=1).flatten(1)
    return lengths.topk(max(1, int(TOP * lengths.shape[1])), dim=1).values.mean(1)


def dynamic(relative: Float[Tensor, "b t"]) -> Float[Tensor, " b"]:
    """1 where enough of the pairs of t + 1 frames have more than 1, else 0."""
    needed = max(1, round(NEEDED * (relative.shape[1] + 1)))
    return ((relative > 1).sum(1) >= needed).float()
