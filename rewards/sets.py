"""Rewards of sets: what each sample adds to a statistic of all that are scored together.

    score_i = value(S) - value(S without i)

where value is higher for better sets: the Vendi score, or minus the distance to a set of reference pictures. Such
leave-one-out credits let a method that needs one number per sample use a statistic of many (as in DRAGON,
arXiv:2504.15217). They are exact, from one decomposition of the set and a rank-one change for each sample. All is
computed in float64 on the CPU; "<name>/set" is a part with the whole set's value.

A sample whose embedding is not finite has no score and is left out of the set; neither has any where the set would be
too small without one of its samples.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from flowalign.media import load
from flowalign.records import Media, Prompts, Scores
from rewards.base import Card, Reward, simple_scores
from rewards.clip import CLIPScore
from rewards.pixels import finite, pictures
from rewards.towers import Dtype

Embedder: TypeAlias = Callable[[Tensor], Tensor]
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
MATRIX_NUMBERS = 1 << 22  # in the matrices that are held at once: 32 MB
CMMD_SCALE = 1000.0  # of the distance, so that people can read it: CMMD's own


class CLIPEmbedder:
    """Unit embeddings [b, d] of pictures [b, 3, h, w] by a CLIP model; differentiable.

    Args:
        model: a folder or hub id of a transformers CLIPModel with its tokenizer, or "shapes", the embedded one.
            openai/clip-vit-large-patch14-336 is CMMD's; OpenAI's weights are under the MIT licence.
        device: where the model stays; by default it follows the pictures.
        dtype: of the model; the rest is float32. See `rewards.towers.frozen`.
        offload: keeps the model on the CPU between calls. See `rewards.towers.Network`.

    Raises: ValueError as `CLIPScore` does.
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14-336",
        device: str | None = None,
        dtype: Dtype = "float32",
        offload: bool = False,
    ) -> None:
        self.clip, self.device = CLIPScore(model, dtype=dtype, offload=offload), device

    def __call__(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        device = torch.device(self.device or pixels.device)
        made = self.clip.network.run(device, lambda: self.clip.embed_pictures(pixels.to(device)))
        return made.to(pixels.device)


class LeaveOneOut(Reward):
    """value(S) - value(S without i) for each sample; a subclass says what the value of a set is.

    Args:
        embedder: pictures [b, 3, h, w] in [0, 1] to embeddings [b, d], each picture on its own.
        batch_size: pictures that the embedder is given at once.
    """

    least = 2  # samples in the smallest set from which one can be left out
    card = Card(scope="set")

    def __init__(self, embedder: Embedder, batch_size: int = 32) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.embedder, self.batch_size = embedder, batch_size

    @abstractmethod
    def value(self, features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        """Of a set; higher is better."""

    @abstractmethod
    def without_each(self, features: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """The value of the set without its first feature, without its second, and so on."""

    def score(self, media: Media, prompts: Prompts) -> Scores:
        features = embeddings(self.embedder, media, self.name, self.batch_size).cpu().double()
        known = finite(media.pixels).cpu() & features.detach().isfinite().all(1)
        total, whole = features.new_full((2, len(features)), torch.nan)
        if known.sum() >= self.least:
            value = self.value(features[known])
            total = total.index_put((known,), value - self.without_each(features[known]))
            whole = value.expand(len(features))
        device = media.pixels.device
        return simple_scores(self.name, total.to(device), {f"{self.name}/set": whole.float().to(device)})


class VendiScore(LeaveOneOut):
    """What each picture adds to the Vendi score of all (arXiv:2210.02410, definition 3.1).

        value = exp(-sum_k l_k log l_k),  l the eigenvalues of K / n,  K_ij = cos(e_i, e_j)

    the effective number of different pictures: n for orthogonal embeddings, 1 for n copies of one. A copy of a picture
    that is there already adds less than a new one. Not differentiable here.
    """

    name = "vendi"
    card = Card(usual=(-1.0, 1.0), scope="set")

    def value(self, features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        return _effective(torch.linalg.svdvals(F.normalize(features, dim=1)).square() / len(features))

    def without_each(self, features: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        left, scale, _ = torch.linalg.svd(F.normalize(features, dim=1), full_matrices=False)
        return _effective(downdated(scale.square(), left * scale) / (len(features) - 1))


class ReferenceSet(LeaveOneOut):
    """`LeaveOneOut` of minus a distance to a set of reference pictures.

    Args:
        embedder: as above.
        reference: pictures [m, 3, h, w] in [0, 1], at least 2, or the folder that they are in. They are embedded once.
        batch_size: as above.

    Raises: ValueError for a folder without pictures, and for fewer than 2.
    """

    def __init__(self, embedder: Embedder, reference: Tensor | Path, batch_size: int = 32) -> None:
        super().__init__(embedder, batch_size)
        shown = reference.split(batch_size) if isinstance(reference, Tensor) else folder_pictures(reference)
        with torch.no_grad():
            self.target = torch.cat([embedder(part).cpu() for part in shown]).double()
        if len(self.target) < 2 or not self.target.isfinite().all():
            raise ValueError(f"{self.name} needs at least 2 reference pictures, all finite, got {len(self.target)}")

    def value(self, features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        return -self.distance(features)

    @abstractmethod
    def distance(self, features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        """Of a set to the references."""


class FrechetDistance(ReferenceSet):
    """What each picture adds to minus the Frechet distance to reference pictures (FID's, arXiv:1706.08500, equation 6).

        distance = |m - m_r|^2 + tr(C + C_r - 2 (C C_r)^(1/2))

    m, C: mean and covariance (over n - 1) of the embeddings. It is FID itself with FID's embedder, an Inception
    network, which is not part of this library. Like FID it is too large for few pictures, and so it grows when any one
    is left out: contributions are comparable within a set, their level means nothing. They are good to about 1e-8 of
    the sets' spread. Not differentiable here.
    """

    name = "frechet"
    least = 3
    card = Card(usual=(-0.1, 0.1), scope="set")

    def __init__(self, embedder: Embedder, reference: Tensor | Path, batch_size: int = 32) -> None:
        super().__init__(embedder, reference, batch_size)
        centred = (self.target - self.target.mean(0)) / (len(self.target) - 1) ** 0.5
        _, scale, axes = torch.linalg.svd(centred, full_matrices=False)
        self.root, self._spread = axes.mT * scale, scale.square().sum()  # root root^T is C_r

    def distance(self, features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        shift, crossed = self._against(features)
        own = (features - features.mean(0)).square().sum() / (len(features) - 1)
        roots = torch.linalg.svdvals(crossed).sum() / (len(features) - 1) ** 0.5
        return shift.square().sum() + own + self._spread - 2 * roots

    def without_each(self, features: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        count, (shift, crossed) = len(features), self._against(features)
        away = features - features.mean(0)
        means = (shift - away / (count - 1)).square().sum(1)
        grown = count / (count - 1)  # without x the scatter is less by grown (x - m)(x - m)^T
        own = (away.square().sum() - grown * away.square().sum(1)) / (count - 2)
        left, scale, _ = torch.linalg.svd(crossed, full_matrices=False)
        roots = downdated(scale.square(), grown**0.5 * left * scale).sqrt().sum(1) / (count - 2) ** 0.5
        return -(means + own + self._spread - 2 * roots)

    def _against(self, features: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, "n r"]]:
        """m - m_r, and centred features times a root of C_r.

        The squares of the latter's singular values, over n - 1, are the eigenvalues of C C_r.
        """
        mean = features.mean(0)
        return mean - self.target.mean(0), (features - mean) @ self.root


class MMD(ReferenceSet):
    """What each picture adds to minus the squared maximum mean discrepancy to reference pictures.

        distance = 1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)),  k(x, y) = exp(-|x - y|^2 / (2 sigma^2))

    Means run over all pairs, those of a picture with itself too: the biased estimate, as in CMMD (arXiv:2401.09603) and
    its authors' code, whose sigma and factor these are; its embeddings are unit vectors of CLIP ViT-L/14 at 336 pixels.
    Unlike the Frechet distance it takes no embedding for Gaussian, and needs fewer pictures. Differentiable.

    Args:
        embedder: as above.
        reference: as above.
        sigma: above 0, in units of the embeddings.
        batch_size: as above.
    """

    name = "mmd"
    differentiable = True
    card = Card(usual=(-10.0, 10.0), scope="set")

    def __init__(self, embedder: Embedder, reference: Tensor | Path, sigma: float = 10.0, batch_size: int = 32) -> None:
        if not sigma > 0:
            raise ValueError(f"sigma must be above 0, got {sigma}")
        super().__init__(embedder, reference, batch_size)
        self.sigma = float(sigma)
        self._among_references = self._kernel(self.target, self.target).mean()

    def distance(self, features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
        within, across = self._kernel(features, features).mean(), self._kernel(features, self.target).mean()
        return CMMD_SCALE * (within + self._among_references - 2 * across)

    def without_each(self, features: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        rest, own = len(features) - 1, self._kernel(features, features)
        within = (own.sum() - 2 * own.sum(1) + own.diag()) / rest**2
        toward = self._kernel(features, self.target).mean(1)
        across = (toward.sum() - toward) / rest
        return -CMMD_SCALE * (within + self._among_references - 2 * across)

    def _kernel(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
        squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
        return torch.exp(squares / (-2 * self.sigma**2))


def embeddings(embedder: Embedder, media: Media, name: str, batch_size: int) -> Float[Tensor, "b d"]:
    """The embedder's vectors of pictures, at most `batch_size` at once.

    Raises: ValueError for videos, and for an embedder that returns something else.
    """
    parts = []
    for part in pictures(media, name).split(batch_size):
        made = embedder(part)
        if made.ndim != 2 or len(made) != len(part):
            raise ValueError(
                f"{name} needs an embedding [b, d] of each of {len(part)} pictures, got {list(made.shape)}"
            )
        parts.append(made.float() if made.dtype in (torch.bfloat16, torch.float16) else made)
    return torch.cat(parts)


def folder_pictures(folder: Path) -> Iterator[Float[Tensor, "1 3 h w"]]:
    """The PNG, JPEG and WebP files of a folder in the order of their names, each of its own size, in [0, 1].

    Raises: ValueError where there are none.
    """
    found = sorted(file for file in folder.expanduser().glob("*") if file.suffix.lower() in PICTURES)
    if not found:
        raise ValueError(f"{folder} is no folder with pictures ({', '.join(PICTURES)})")
    for file in found:
        yield load(file)[0][None]


def downdated(values: Float[Tensor, " r"], rows: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
    """Eigenvalues of diag(values) - z z^T for each row z, ascending, where that is positive semidefinite.

    By LAPACK, r^3 for each row. The secular equation needs r^2, but with bisection, which is safe with equal values,
    it took ten times as long at r = 96.
    """
    parts = rows.split(max(1, MATRIX_NUMBERS // len(values) ** 2))
    left = [torch.linalg.eigvalsh(values.diag() - part[:, :, None] * part[:, None]) for part in parts]
    return torch.cat(left).clamp(min=0)


def _effective(shares: Float[Tensor, "*n r"]) -> Float[Tensor, "*n"]:
    """exp of the entropy of shares that sum to 1: how many equal ones would have it."""
    return torch.special.entr(shares).sum(-1).exp()
