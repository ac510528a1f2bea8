"""What families of pipelines share about the size of what they make: their own, or the one that is asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from flowalign.models.base import Model
from flowalign.records import Size


class SizedModel(Model):
    """A model of pictures or videos whose size can be chosen. A family says which sizes it can make.

    height, width: in pixels. frames: of a video.
    """

    height: int
    width: int
    frames: int | None = None

    @abstractmethod
    def default_size(self) -> int:
        """Height and width in pixels where none are asked for."""

    @abstractmethod
    def size_unit(self) -> int:
        """Height and width must be multiples of this, in pixels."""

    @abstractmethod
    def latents_of(self, height: int, width: int) -> tuple[int, ...]:
        """The shape of one sample's latents, for media of that size in pixels."""

    def check_frames(self, frames: int) -> None:
        """Raises: ValueError for a number of frames that the model cannot make."""
        raise ValueError(f"frames is for videos, and {type(self).__name__} makes pictures")

    def set_size(self, height: int | None, width: int | None) -> None:
        """Make a size the model's own; None for the default.

        Raises: ValueError for one that is not a multiple of `size_unit`.
        """
        self.height, self.width = self._side("height", height), self._side("width", width)
        self.latent_shape = self.latents_of(self.height, self.width)
        self.check_tokens()

    def check_tokens(self) -> None:
        """Raises: ValueError for a size whose tokens a call of the network cannot take; most take any."""

    def _side(self, name: str, asked: int | None) -> int:
        size, unit = asked or self.default_size(), self.size_unit()
        if size % unit:
            raise ValueError(f"{name} must be a multiple of {unit}, got {size}")
        return size

    def media_size(self, asked: Size) -> Size:
        if asked.frames is not None:
            self.check_frames(asked.frames)
        height, width = asked.height or self.height, asked.width or self.width
        return Size(self._side("height", height), self._side("width", width), asked.frames or self.frames)

    @contextmanager
    def sized(self, size: Size) -> Iterator[None]:
        held = self.height, self.width, self.frames, self.latent_shape
        whole = self.media_size(size)
        self.height, self.width, self.frames = whole.height or 0, whole.width or 0, whole.frames
        try:
            self.latent_shape = self.latents_of(self.height, self.width)
            self.check_tokens()
            yield
        finally:
            self.height, self.width, self.frames, self.latent_shape = held
