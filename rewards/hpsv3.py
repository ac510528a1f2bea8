"""HPSv3: a Qwen2-VL-7B tuned on which of two pictures people prefer (arXiv:2508.03789, Ma et al.)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flowalign.records import Media, Prompts, Scores
from rewards.base import Card, simple_scores
from rewards.pixels import CLIP_MEAN, CLIP_STD, normalise, pictures, resize
from rewards.qwen2vl import PICTURE, Qwen2VLScorer, embedding_rows, load_base, read_template, smart_resize
from rewards.qwen2vl_reward import Qwen2VLReward, check_settings
from rewards.towers import Dtype, read_weights, weights_file

MARK = "<|Reward|>"
FILE = "HPSv3.safetensors"
PIXELS = 256 * 28 * 28
TEMPLATE = "What was asked for: {prompt}\nHow good this picture is: <|Reward|>\n\nEND\n"


class HPSv3(Qwen2VLReward):
    """mu of a normal distribution over how much people like the picture, about -5 to 15; differentiable to the pixels.

    The head gives mu and log sigma; sigma, the distribution's deviation, is a part. A difference of mu is a log-odds of
    preference where both are sure. The authors' package returns the second output as it is; their loss takes its exp.

    Pictures are resized as PIL does, bicubic, to multiples of 28 with about 448 x 448 pixels in all. A gradient holds
    about 5 GB of activations per picture in bfloat16, beside 16 GB of weights, unless `recompute` is set.

    The published weights were not run here: what is tested is that a small network gives what the authors' way to call
    it gave with transformers 4.45.2, scores and gradients, from the 8-bit picture and the prompt on.

    Args:
        model: a folder or hub id with HPSv3.safetensors, or that file. The authors' package is under the MIT licence;
            whether its weights are too was not looked up.
        base: a folder or hub id of the model that was tuned, for its config and tokenizer.
        template: a text file with the instruction, "{prompt}" in it, and the token <|Reward|>. Published scores need
            the authors' text, INSTRUCTION and prompt_with_special_token of hpsv3/dataset/data_collator_qwen.py in
            github.com/MizzenAI/HPSv3 one after the other, letter for letter, line breaks at both ends too. Without
            one, a short text of our own is used, and scores are NOT the published ones.
        device: where the model stays; by default it follows the pictures.
        batch_size: pictures that pass through the model at once.
        dtype: of the model; the head is float32.
        min_pixels: of a picture, before rounding to multiples of 28.
        max_pixels: likewise.
        recompute: recompute activations in the backward pass, for less memory.
        offload: keeps the model on the CPU between calls, see `rewards.towers.Network`; not with `recompute`.

    Raises: ValueError where weights, config or tokenizer cannot be had or do not fit; in a score for videos.
    """

    name = "hpsv3"
    card = Card(f"MizzenAI/HPSv3, {FILE}", "MIT (the package's)", (-5.0, 15.0))

    def __init__(
        self,
        model: str = "MizzenAI/HPSv3",
        base: str = "Qwen/Qwen2-VL-7B-Instruct",
        template: str | None = None,
        device: str | None = None,
        batch_size: int = 8,
        dtype: Dtype = "bfloat16",
        min_pixels: int = PIXELS,
        max_pixels: int = PIXELS,
        recompute: bool = False,
        offload: bool = False,
    ) -> None:
        check_settings(batch_size, min_pixels, max_pixels, recompute, offload)
        text = read_template(template, TEMPLATE, (MARK,), type(self).__name__)
        super().__init__(_load(model, base, text, getattr(torch, dtype)), device, batch_size, recompute, offload)
        self.min_pixels, self.max_pixels = min_pixels, max_pixels

    def score(self, media: Media, prompts: Prompts) -> Scores:
        pixels = pictures(media, type(self).__name__)
        mu, log_sigma = self.outputs(pixels[:, None], prompts.text)[:, 0].unbind(1)
        return simple_scores(self.name, mu, {"sigma": log_sigma.exp()})

    def prepare(self, frames: Float[Tensor, "b 1 3 h w"]) -> Float[Tensor, "b 1 3 k l"]:
        size = smart_resize(frames.shape[3], frames.shape[4], self.min_pixels, self.max_pixels)
        return normalise(resize(frames[:, 0], *size), CLIP_MEAN, CLIP_STD)[:, None]


def head(width: int) -> nn.Sequential:
    """From hidden states to mu and log sigma; the authors' dropout keeps its place for the names' sake."""
    layers = (nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2))
    return nn.Sequential(*layers)


def _load(model: str, base: str, template: str, dtype: torch.dtype) -> Qwen2VLScorer:
    file = weights_file(model, FILE)
    config, tokenizer = load_base(base, "HPSv3")
    state = read_weights(file)
    config.text_config.vocab_size = embedding_rows(state)
    scorer = Qwen2VLScorer(config, head(config.text_config.hidden_size), tokenizer, (MARK,), template, PICTURE)
    scorer.load(state, str(file), dtype)
    return scorer
