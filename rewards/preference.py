"""A reward learnt from preferences: a CLIPModel, tuned or not, with a small head on its two unit embeddings.

`trainers.reward_model.fit` trains it; this file holds the reward, its files, and the pairs that it is trained on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from flowalign.preferences import Preference, Preferences, open_pair
from flowalign.randomness import key_noise
from flowalign.records import Media, Prompts, Scores
from flowalign.tracking import json_lines, write_atomically
from rewards.base import Card, simple_scores
from rewards.clip import CLIPTowers, load_clip, preprocessing
from rewards.towers import Dtype, check_names, read_weights

SETTINGS, WEIGHTS = "reward.json", "reward.safetensors"
Label = Literal["first", "second", "tie"]


@dataclass(frozen=True)
class Pair:
    """Two pictures in [0, 1] for one prompt, and which of them is preferred."""

    prompt: str
    first: Float[Tensor, "3 h w"]
    second: Float[Tensor, "3 h w"]
    label: Label


class PreferenceHead(nn.Module):
    """w . f + v . gelu(W f + b) with f = [sqrt(d) u, sqrt(d) t, d u t], of unit embeddings u and t of d numbers.

    Without hidden units it is linear. It starts as scale * cos(u, t): w = scale / d on the products, and v = 0. No
    constant is added: preferences do not tell one.

    Args:
        width: d. hidden: rows of W. scale: what the cosine is multiplied with at the start, above zero.
    """

    def __init__(self, width: int, hidden: int = 0, scale: float = 10.0) -> None:
        super().__init__()
        if hidden < 0 or scale <= 0:
            raise ValueError(f"hidden must not be below 0 and scale must be above it, got {hidden} and {scale}")
        self.width, self.hidden = width, hidden
        start = torch.cat([torch.zeros(2 * width), torch.full((width,), scale / width)])
        self.linear = nn.Parameter(start)
        self.inner = nn.Parameter(key_noise(0, "preference_head", shape=(hidden, 3 * width)) / (3 * width) ** 0.5)
        self.bias, self.outer = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.zeros(hidden))

    def forward(self, images: Float[Tensor, "b d"], texts: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
        root = self.width**0.5
        features = torch.cat([root * images, root * texts, self.width * images * texts], 1)
        return features @ self.linear + F.gelu(features @ self.inner.T + self.bias) @ self.outer


class LearntReward(CLIPTowers):
    """`PreferenceHead` of a CLIPModel's embeddings of picture and prompt; differentiable to the pixels.

    A difference of one is odds of e to one that the picture is preferred. With no hidden units and all of the model
    tuned this is PickScore's kind of reward (arXiv:2305.01569), with a weight per number of the embeddings.

    Args:
        model: a folder that `save` wrote, or a folder or hub id of a CLIPModel, or "shapes", to start training from.
            A trained reward's licence is that of its model, and of the preferences.
        hidden: units of the head, 0 for a linear one. It and `scale` count only where training starts.
        scale: the untrained reward is scale * cos(picture, prompt).
        device: where the model stays; by default it follows the pictures.
        batch_size: pictures, or prompts, that pass through the model at once.
        dtype: of the model; the rest is float32. See `rewards.towers.frozen`. Another one is not for training.
        offload: keeps the model on the CPU between calls. See `rewards.towers.Network`. Not for training either.

    Raises: ValueError as `CLIPScore` does, and for a head that does not belong to the model.
    """

    name = "learnt"
    card = Card("what was trained: a folder", "that of its CLIPModel and of its preferences")

    def __init__(
        self,
        model: str,
        hidden: int = 0,
        scale: float = 10.0,
        device: str | None = None,
        batch_size: int = 32,
        dtype: Dtype = "float32",
        offload: bool = False,
    ) -> None:
        loaded, tokenizer, self.config = load_clip(model, model)
        prepare = preprocessing(model, self.config, int(loaded.config.vision_config.image_size))
        super().__init__(loaded, tokenizer, prepare, device, batch_size, dtype, offload)
        width, folder = int(loaded.config.projection_dim), Path(model).expanduser()
        saved = (folder / SETTINGS).is_file() or (folder / WEIGHTS).is_file()
        self.head = load_head(folder, width) if saved else PreferenceHead(width, hidden, scale)
        self.head.requires_grad_(False)

    def score(self, media: Media, prompts: Prompts) -> Scores:
        device = self.place(media)

        def rate() -> Float[Tensor, " b"]:
            return self.judge(self.embed_media(media), self.embed_texts(list(prompts.text), device))

        return simple_scores(self.name, self.network.run(device, rate).to(media.pixels.device))

    def judge(self, images: Float[Tensor, "b d"], texts: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
        """Scores of unit embeddings, in float32, on their device."""
        with torch.autocast(images.device.type, enabled=False):
            return self.head.to(images.device)(images, texts)

    def live_texts(self, texts: list[str], device: torch.device) -> Float[Tensor, "b d"]:
        """Unit embeddings of texts as the weights are now, with their graph: for training, none is kept."""
        with torch.autocast(device.type, enabled=False):
            return F.normalize(self.text_features(texts, device).float(), dim=1)

    def train_on(self, full: bool) -> dict[str, nn.Parameter]:
        """From now on the weights of the head, and if `full` those of the model, carry gradients; these are they.

        Raises: ValueError for a reward in another dtype than float32, and for an offloaded one.
        """
        self._check_whole("trained")
        self.head.requires_grad_(True)
        self.model.requires_grad_(full)
        if full:
            self.model.logit_scale.requires_grad_(False)  # the head has one of its own
        both = {"head": self.head, "model": self.model}
        named = {f"{part}.{name}": value for part, module in both.items() for name, value in module.named_parameters()}
        return {name: value for name, value in named.items() if value.requires_grad and value.numel()}

    def freeze(self) -> None:
        """Training is over: no weight carries a gradient, and texts are embedded anew."""
        self.head.requires_grad_(False)
        self.model.requires_grad_(False)
        self._embedded.clear()

    def save(self, folder: Path) -> None:
        """Write model, tokenizer and head, as safetensors and JSON, for `LearntReward(folder)`.

        Raises: ValueError for a folder that holds something, and as `train_on` does.
        """
        from safetensors.torch import save

        self._check_whole("saved")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is in use; save the reward into another folder")
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.config:
            write_atomically(folder / "preprocessor_config.json", json.dumps(self.config).encode())
        state = {name: value.contiguous().cpu() for name, value in self.head.state_dict().items()}
        write_atomically(folder / WEIGHTS, save(state))
        settings = {"width": self.head.width, "hidden": self.head.hidden}
        write_atomically(folder / SETTINGS, json_lines([settings]))

    def _check_whole(self, what: str) -> None:
        if self.dtype != torch.float32 or self.network.offload:
            raise ValueError(f"a reward is {what} in float32 and without offload: load it with neither")


def load_head(folder: Path, width: int) -> PreferenceHead:
    """The head that `LearntReward.save` wrote, for embeddings of `width` numbers.

    Raises: ValueError where a file or a weight is missing, too many, or of another size.
    """
    settings = _record(folder / SETTINGS, (folder / SETTINGS).read_text()) if (folder / SETTINGS).is_file() else {}
    if {name for name, value in settings.items() if type(value) is int} != {"width", "hidden"}:
        raise ValueError(f"{folder / SETTINGS} must give 'width' and 'hidden' as whole numbers, and nothing else")
    if settings["width"] != width:
        raise ValueError(f"the head in {folder} takes {settings['width']} numbers, the model's embeddings have {width}")
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}, the weights of its head")
    head, state = PreferenceHead(width, settings["hidden"]), read_weights(folder / WEIGHTS)
    wanted = head.state_dict()
    check_names(folder / WEIGHTS, state, wanted)
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            raise ValueError(f"{name} in {folder / WEIGHTS} is {[*value.shape]}, not {[*wanted[name].shape]}")
    head.load_state_dict(state)
    return head


def load_pairs(path: Path) -> list[Pair]:
    """The pairs of a JSON Lines file of {"prompt", "first", "second", "label"}, or of anything that holds such pairs.

    first, second: picture files, relative to the file's folder and inside it. label: "first", "second" or "tie".
    Other formats, and what `flowalign prefer` writes, are read as `flowalign.preferences.Preferences` says. Scores,
    margins and weights are not looked at.

    Raises: ValueError with the line's number for a line that is none of these, and for a file outside the folder.
    """
    known = Preferences(str(path))
    return [_pair(known.rows([i])[0]) for i in range(len(known))]


def _pair(told: Preference) -> Pair:
    where, label = told.where, told.label
    if label == "invalid":
        raise ValueError(f"{where}: a label is 'first', 'second' or 'tie', got 'invalid'")
    media = open_pair(told)
    if media.first.ndim != 3:
        raise ValueError(f"{where}: {told.first.path} is a video; preferences are between pictures")
    return Pair(told.prompt, media.first, media.second, label)


def _record(place: object, text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place} is not a JSON object")
    return row
