"""Is it the same person? Face embeddings of what is made and of a pool of reference faces, with a gradient."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowalign.records import Media, Prompts, Scores
from rewards.arcface import align, load_iresnet
from rewards.base import Card
from rewards.mtcnn import MTCNN
from rewards.pixels import finite
from rewards.subject import references_of
from rewards.towers import Dtype, PictureTower, read_weights, weights_file

_log = logging.getLogger("flowalign")

FILE = "backbone.pth"
Detector = Callable[[Tensor], Sequence[Tensor | None]]


class FaceIdentity(PictureTower):
    """Cosine of a face with a pool of reference faces, in float32, in [-1, 1]; differentiable to the pixels.

        score = mean over frames with a face of  max_j (or mean_j)  cos(e(face of the frame), e(face of reference j))

    A picture is one frame. What has no face in any frame, or no reference with a face, has no score (invalid, not 0);
    references without a face are left out of the pool. The part "frames_without_face" counts the frames that do not
    enter the mean: with videos, look at it too, because hiding the face in most frames costs no score.

    As in IPRO (arXiv:2510.14255), the pool may hold several views of the person, and the gradient reaches the pixels
    through the crop, not through where the face was found. IPRO does not publish how it pools; the maximum here asks
    for one view of the pool, the mean for their middle.

    e is ArcFace's IResNet on a face that is turned upright by five landmarks. Two pictures of a person are at about 0.3
    to 0.8, and of two persons near 0. The published weights were not run here: tested are their names and shapes at
    full size, the crop, and the detector on a photograph.

    Args:
        model: backbone.pth of arcface_torch (r18 to r200, github.com/deepinsight/insightface, model zoo), or a folder
            or hub id of it. InsightFace's code is under the MIT licence; its weights are for non-commercial research
            only. Its packs of ONNX files (buffalo_l, antelopev2) are not read.
        detector: from pictures [b, 3, h, w] in [0, 1] to the landmarks [5, 2] of one face in each, None where there is
            none: x and y, in pixels from the middle of the first one, of the left and right eye, the nose, the left and
            right corner of the mouth, left as seen in the picture. What it does is not differentiated. By default
            `rewards.mtcnn.MTCNN`, which takes the largest face, with the weights of the package facenet-pytorch (MIT).
        pool: "max" or "mean", over the reference faces.
        device: where the network stays; by default it follows the pictures.
        batch_size: frames that pass through detector and network at once.
        dtype: of the network; the rest is float32. See `rewards.towers.frozen`.
        offload: keeps the network on the CPU between calls. See `rewards.towers.Network`.

    Raises: ValueError without weights or detector, and for media without references, or with such that are no pictures.
    """

    name = "face_identity"
    card = Card(f"InsightFace arcface_torch: {FILE}", "non-commercial research only", (0.0, 0.8), "any")

    def __init__(
        self,
        model: str,
        detector: Detector | None = None,
        pool: Literal["max", "mean"] = "max",
        device: str | None = None,
        batch_size: int = 32,
        dtype: Dtype = "float32",
        offload: bool = False,
    ) -> None:
        if pool not in ("max", "mean"):
            raise ValueError(f"pool must be 'max' or 'mean', got {pool!r}")
        path = weights_file(model, FILE)
        super().__init__(load_iresnet(read_weights(path), str(path)), device, batch_size, dtype, offload)
        self.detector = MTCNN() if detector is None else detector
        self.pool = pool
        self._said = False

    def picture_features(self, pixels: Float[Tensor, "b 3 112 112"]) -> Float[Tensor, "b d"]:
        return self.model((2 * pixels - 1).to(self.dtype))

    def score(self, media: Media, prompts: Prompts) -> Scores:
        references = references_of(media, type(self).__name__)
        count, device = len(media), self.place(media)
        frames = media.pixels.flatten(0, -4)
        total, found, known = self.network.run(device, lambda: self.rate(frames, references, device))
        valid = found.any(1) & known & finite(frames).view(count, -1).all(1)
        total = total.to(frames.device).where(valid, torch.nan)
        missing = (~found).sum(1).float()
        return Scores(total, {self.name: total, "frames_without_face": missing}, total.detach().isfinite())

    def rate(
        self, frames: Float[Tensor, "n 3 h w"], references: Sequence[Tensor], device: torch.device
    ) -> tuple[Float[Tensor, " b"], Bool[Tensor, "b f"], Bool[Tensor, " b"]]:
        """Mean over frames with a face, 0 without any; which frames have one; which pools do."""
        count = len(references)
        faces, found = self.faces(frames)
        pools, known = self.pools(references, device)
        owner = torch.arange(len(frames)).div(len(frames) // count, rounding_mode="floor").to(device)[found.to(device)]
        near = self.nearness(faces, pools[owner], known[owner])
        number = torch.bincount(owner, minlength=count).clamp(min=1)
        total = near.new_zeros(count).index_add(0, owner, near) / number
        return total, found.view(count, -1), known.any(1).to(found.device)

    def faces(self, frames: Float[Tensor, "n 3 h w"]) -> tuple[Float[Tensor, "k d"], Bool[Tensor, " n"]]:
        """Unit embeddings of the faces that are found, and in which frames they are."""
        points = self.find(frames)
        found = torch.tensor([one is not None for one in points], device=frames.device)
        places = [one for one in points if one is not None]
        shown = torch.stack(places) if places else torch.zeros(0, 5, 2)
        return self.embed_media(Media(align(frames[found], shown))), found

    @torch.no_grad()
    def find(self, frames: Float[Tensor, "n 3 h w"]) -> list[Tensor | None]:
        """Landmarks of each frame; five that fall into one line of pixels are none."""
        shown = frames.detach().nan_to_num().clamp(0, 1)
        points = [one for part in shown.split(self.batch_size) for one in self.detector(part)]
        if len(points) != len(frames):
            raise ValueError(f"the detector was shown {len(frames)} pictures and told of {len(points)}")
        return [None if one is None else _spread(one) for one in points]

    @torch.no_grad()
    def pools(
        self, references: Sequence[Tensor], device: torch.device
    ) -> tuple[Float[Tensor, "b k d"], Bool[Tensor, "b k"]]:
        """Embeddings of each pool, zeros behind them, and which are some; a pool that is shared is embedded once."""
        distinct = {id(pixels): pixels for pixels in references}
        made = {key: self.faces(pixels.to(device))[0] for key, pixels in distinct.items()}
        rows = [made[id(pixels)] for pixels in references]
        if not self._said and any(not len(row) for row in rows):
            _log.warning("%s found no face in a pool of references: such samples have no score", type(self).__name__)
            self._said = True
        longest = max(1, *map(len, rows))
        known = torch.stack([torch.arange(longest, device=device) < len(row) for row in rows])
        return torch.stack([torch.cat([row, row.new_zeros(longest - len(row), row.shape[1])]) for row in rows]), known

    def nearness(
        self, faces: Float[Tensor, "n d"], pools: Float[Tensor, "n k d"], known: Bool[Tensor, "n k"]
    ) -> Float[Tensor, " n"]:
        """The maximum or mean cosine of each face with those of its pool that are known, 0 without any."""
        cosine = (faces[:, None] * pools).sum(2)
        if self.pool == "max":
            return cosine.masked_fill(~known, -torch.inf).amax(1).where(known.any(1), 0.0)
        return cosine.where(known, 0.0).sum(1) / known.sum(1).clamp(min=1)


def _spread(points: Tensor) -> Tensor | None:
    """The landmarks on the CPU, None where no crop can be made of them."""
    if points.shape != (5, 2):
        raise ValueError(f"a detector gives landmarks [5, 2], got the shape {list(points.shape)}")
    points = points.detach().cpu().double()
    return points if points.isfinite().all() and bool((points.amax(0) - points.amin(0) > 1).all()) else None
