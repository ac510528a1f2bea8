"""The Inception network of FID, by the package torch-fidelity: an embedder for `rewards.FrechetDistance`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.pictures import to_bytes

NEEDED = (
    "FID needs the extra, and torchvision with it: pip install 'flowalign-diffusion[fid]'; rewards.MMD with "
    "rewards.CLIPEmbedder (CMMD) needs neither"
)


class InceptionFeatures:
    """The 2048 features of FID's own Inception network [b, 2048] of pictures [b, 3, h, w]; not differentiable.

    {class: rewards.FrechetDistance, embedder: flowalign.evaluation.InceptionFeatures, reference: folder} is FID:
    pictures in 8 bits, resized to 299 x 299 as TensorFlow 1 did. It takes 10,000 pictures or more to mean something.

    Args:
        weights: weights-inception-2015-12-05-6726825d.pth of torch-fidelity's releases; None to have them downloaded.
        device: where the network stays; by default it follows the pictures.

    Raises: ValueError without the package, and where the weights cannot be had.
    """

    def __init__(self, weights: str | None = None, device: str | None = None) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ValueError(f"{NEEDED} ({error})") from error
        if weights is not None and not Path(weights).expanduser().is_file():
            raise ValueError(f"{weights} is not a file: name the weights of torch-fidelity's Inception network")
        path = None if weights is None else str(Path(weights).expanduser())
        try:
            made: Any = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], path)
        except Exception as error:  # whatever a download or a reader raises
            raise ValueError(f"FID's Inception network cannot be had: {error}; name its file with weights") from error
        self.network, self.device = made.eval(), device

    @torch.no_grad()
    def __call__(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 2048"]:
        device = torch.device(self.device or pixels.device)
        features: Tensor = self.network.to(device)(to_bytes(pixels).to(device))[0]
        return features.to(pixels.device)
