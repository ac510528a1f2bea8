"""What FLUX, Qwen-Image and Z-Image share: tokens of 2 x 2 latents, and sigmas shifted by how many they are."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from flowalign.models.base import Latents
from flowalign.models.pipeline import PipelineModel
from flowalign.schedules import linear


class PatchModel(PipelineModel):
    """A pipeline whose network sees latents as tokens, one for 2 x 2 of them; arguments are `PipelineModel`'s.

    By default the pipeline samples on 1, 1 - 1/n ... 1/n, which a scheduler that says use_dynamic_shifting shifts:

        sigma -> e^mu sigma / (1 + (e^mu - 1) sigma),   mu linear in the number of a picture's tokens

    Our latents stay [c, h, w], as the VAE has them and noise is drawn for them. Some pipelines pack them into
    [tokens, 4 c] before they sample, which changes the order of elements alone: steps, and sums and means over
    elements, are the same.
    """

    def prepare(self) -> None:
        self.grid = self.grid or linear

    def default_size(self) -> int:
        return int(self.pipeline.default_sample_size * self.pipeline.vae_scale_factor)

    def size_unit(self) -> int:
        return int(self.pipeline.vae_scale_factor * 2)

    def latents_of(self, height: int, width: int) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        return self.pipeline.transformer.config.in_channels // 4, height // factor, width // factor

    def sequences(self) -> dict[str, int]:
        _, rows, columns = self.latent_shape
        tokens = {f"pictures of {self.height} x {self.width}": rows * columns // 4}
        return tokens | {"prompts of this max_sequence_length": self.max_sequence_length}

    def resolution_shift(self) -> float:
        """mu, on the line through the scheduler's base and max (image_seq_len, shift); it may lie beyond them."""
        told = self.pipeline.scheduler.config
        fewest, most = told.get("base_image_seq_len", 256), told.get("max_image_seq_len", 4096)
        low, high = told.get("base_shift", 0.5), told.get("max_shift", 1.15)
        _, rows, columns = self.latent_shape
        return float(low + (high - low) * (rows * columns // 4 - fewest) / (most - fewest))

    def pack(self, latents: Latents) -> Float[Tensor, "b tokens d"]:
        """Latents as tokens, in the pipeline's order."""
        packed: Tensor = self.pipeline._pack_latents(latents, *latents.shape)
        return packed

    def unpack(self, tokens: Float[Tensor, "b tokens d"], like: Latents) -> Latents:
        """What `pack` made tokens of, latents of that shape."""
        factor = self.pipeline.vae_scale_factor
        latents: Tensor = self.pipeline._unpack_latents(tokens, like.shape[2] * factor, like.shape[3] * factor, factor)
        return latents.reshape(like.shape)
