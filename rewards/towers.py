"""What rewards with networks share: where the network is, unit embeddings, texts embedded once, files of weights."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from flowalign.records import Media, Prompts, Scores
from rewards.base import Reward, simple_scores
from rewards.pixels import pictures

TEXTS_KEPT = 10_000  # of 1024 numbers each: 40 MB

Dtype = Literal["float32", "bfloat16", "float16"]
Result = TypeVar("Result")
_LENDING = threading.RLock()  # one offloaded network on a device at a time; a reward server's threads share networks


def frozen(model: nn.Module, dtype: Dtype = "float32") -> nn.Module:
    """The model in eval mode, without gradients to its weights, and in `dtype`.

    Weights of one number stay float32: they are scales and biases of logits, and bfloat16 has a scale of 100 as 99.

    Args:
        dtype: "float32"; "bfloat16" and "float16" halve memory and are meant for GPUs. Cosines of small random networks
            were off by up to 0.007 in bfloat16, by up to 0.001 in float16, which has gradients below 6e-8 as 0.

    Raises: ValueError for another dtype.
    """
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype must be one of {', '.join(get_args(Dtype))}, got {dtype!r}")
    scales = {name: value.detach().float().clone() for name, value in model.named_parameters() if value.numel() == 1}
    model.to(getattr(torch, dtype)).eval().requires_grad_(False)
    for name, value in scales.items():
        model.get_parameter(name).data = value
    return model


class Network(nn.Module):
    """A network and where it is: on the device of the last call, or with `offload` there only for the time of a call.

    With `offload` the weights never leave the CPU: a call works on copies of them on its device. They are freed when
    the call ends, unless it made a graph: what backward passes need of them is kept by the graph, as long as it lives.
    Each call copies the whole network; calls in threads wait for one another.
    """

    def __init__(self, model: nn.Module, offload: bool = False) -> None:
        super().__init__()
        self.model, self.offload = model, offload

    def run(self, device: torch.device, call: Callable[[], Result]) -> Result:
        """What `call` returns, made with the network on the device and without autocast; calls may be nested."""
        with torch.autocast(device.type, enabled=False):  # a bfloat16 cosine has errors as large as a group's spread
            if self.offload:
                return self.lend(device, call)
            self.model.to(device)
            return call()

    def lend(self, device: torch.device, call: Callable[[], Result]) -> Result:
        """What `call` returns, made with copies of the weights on the device; those that are there already stay."""
        with _LENDING:
            own = chain(self.named_parameters(), self.named_buffers())
            return functional_call(self, {name: value.to(device) for name, value in own}, (call,))

    def forward(self, call: Callable[[], Result]) -> Result:
        return call()


class PictureTower(Reward):
    """A reward on unit embeddings of pictures; differentiable to the pixels.

    Args:
        model: it is frozen. All but the model, as preprocessing and cosines, is computed in float32.
        device: where the model stays; by default it follows the pictures.
        batch_size: pictures that pass through the model at once.
        dtype: of the model, as in `frozen`.
        offload: keeps the model on the CPU between calls, as `Network` does.

    Raises: ValueError for a batch_size below one, and for another dtype.
    """

    differentiable = True
    model: Any

    def __init__(
        self,
        model: nn.Module,
        device: str | None = None,
        batch_size: int = 32,
        dtype: Dtype = "float32",
        offload: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model, self.dtype = frozen(model, dtype), getattr(torch, dtype)
        self.network = Network(self.model, offload)
        self.device, self.batch_size = device, batch_size

    @abstractmethod
    def picture_features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Embeddings, of any length, of pictures in [0, 1] on the model's device."""

    def place(self, media: Media) -> torch.device:
        """Where media are scored."""
        return torch.device(self.device or media.pixels.device)

    def embed_media(self, media: Media) -> Float[Tensor, "b d"]:
        """Unit embeddings of the pictures, on the device that they are scored on.

        Raises: ValueError for videos.
        """
        pixels, device = pictures(media, type(self).__name__), self.place(media)

        def embed() -> Float[Tensor, "b d"]:
            return torch.cat([self.embed_pictures(part) for part in pixels.to(device).split(self.batch_size)])

        return self.network.run(device, embed)

    def embed_pictures(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Unit embeddings of pictures on the model's device."""
        return F.normalize(self.picture_features(pixels).float(), dim=1)


class TwoTowers(PictureTower):
    """The cosine of a picture's and its prompt's embeddings; each distinct text is embedded once and kept."""

    def __init__(
        self,
        model: nn.Module,
        device: str | None = None,
        batch_size: int = 32,
        dtype: Dtype = "float32",
        offload: bool = False,
    ) -> None:
        super().__init__(model, device, batch_size, dtype, offload)
        self._embedded: dict[str, Tensor] = {}

    @abstractmethod
    def text_features(self, texts: list[str], device: torch.device) -> Float[Tensor, "b d"]:
        """Embeddings, of any length, of texts; `device` is the model's."""

    def score(self, media: Media, prompts: Prompts) -> Scores:
        return simple_scores(self.name, self.cosine(media, prompts.text))

    def cosine(self, media: Media, texts: Sequence[str]) -> Float[Tensor, " b"]:
        """The cosine of each picture with its text, in float32 on the pictures' device."""
        device = self.place(media)

        def cosine() -> Float[Tensor, " b"]:
            return (self.embed_media(media) * self.embed_texts(list(texts), device)).sum(1)

        return self.network.run(device, cosine).to(media.pixels.device)

    @torch.no_grad()
    def embed_texts(self, texts: list[str], device: torch.device) -> Float[Tensor, "b d"]:
        """Unit embeddings of texts; `device` is the model's. The least recently used are forgotten."""
        new = [text for text in dict.fromkeys(texts) if text not in self._embedded]
        if new:
            self.network.run(device, lambda: self._embed_new(new, device))
        for text in texts:
            self._embedded[text] = self._embedded.pop(text)
        found = torch.stack([self._embedded[text] for text in texts]).to(device)
        for text in [*self._embedded][: max(len(self._embedded) - TEXTS_KEPT, 0)]:
            del self._embedded[text]
        return found

    def _embed_new(self, texts: list[str], device: torch.device) -> None:
        for start in range(0, len(texts), self.batch_size):
            part = texts[start : start + self.batch_size]
            features = self.text_features(part, device).float()
            self._embedded.update(zip(part, F.normalize(features, dim=1).cpu(), strict=True))


def weights_file(model: str, file: str) -> Path:
    """`model` itself where it is a file, or else the file of that name in the folder or hub repository `model`.

    Raises: ValueError where there is none.
    """
    from huggingface_hub import hf_hub_download

    path = Path(model).expanduser()
    if path.is_file():
        return path
    if path.is_dir() or model.startswith((".", "/", "~")):
        if (path / file).is_file():
            return path / file
        raise ValueError(f"there is neither a file {model} nor {path / file}: name the weights, or a folder of {file}")
    try:
        return Path(hf_hub_download(model, file))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"the weights {file} of {model!r} cannot be had from the hub; pass the path of the file: {reason}"
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors by name of a safetensors file or a torch pickle, read without running what is pickled in it.

    Raises: ValueError for a file that is neither, or holds something else.
    """
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the readers' own kinds, which have nothing in common
        raise ValueError(f"{path} cannot be read as weights: {refusal(error)}") from error
    state = held.get("state_dict", held) if isinstance(held, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no tensors by name, neither at its top nor under 'state_dict'")
    return dict(state)


def refusal(error: Exception) -> str:
    """Why a reader of weights refuses a file, without its advice on how to run what is in it all the same."""
    reason = str(error).strip().split("\n")[0]
    if reason.startswith("Weights only load failed"):
        return "it holds pickled objects that are no tensors, which are never run"
    return reason


def check_names(source: object, found: Iterable[str], wanted: Iterable[str]) -> None:
    """That a file's weights are those that a model has.

    Raises: ValueError with the first names that are missing, and that are too many.
    """
    missing, extra = sorted({*wanted} - {*found}), sorted({*found} - {*wanted})
    told = [f"lacks {len(missing)} ({', '.join(missing[:3])})"] if missing else []
    told += [f"has {len(extra)} that do not belong to it ({', '.join(extra[:3])})"] if extra else []
    if told:
        raise ValueError(f"of the model's weights {source} {' and '.join(told)}")
