"""What an epoch of Flow-GRPO costs against its floor: the fewest network rows its maths need, at the price of one.

    python scripts/benchmark.py                                    # guidance 4.5, KL 0.04
    python scripts/benchmark.py --guidance-scale 1 --kl-coef 0 --json build/benchmark.json

The job: an SD3 of 2.3M random weights (4 blocks of width 128) at 128 pixels, 64 picture tokens beside 205 of text, as
77 of CLIP and 128 of T5 make (here most are the zeros of an absent T5); 8 prompts x 4 samples in batches of 8, 10 steps
of which 9 are trained, LoRA of rank 32, two optimizer steps an epoch, float32, one thread. A first epoch is not timed.

Times are CPU time, but those of phases. Each kind of call is timed alone, from Python down to the kernels, wherever a
batch of the epoch begins, so that a busy machine moves both. A call without gradient is timed at the batch's shape
and doubled, and the floor takes the cheaper row, though a rollout that is to be replayed to the last bit has to make
the calls of its replay, which cannot be doubled. The reference's calls have a price of their own: without the adapter
they are cheaper.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from flowalign.accounting import Meter, Rows
from flowalign.adapters import LoRA
from flowalign.models.sd3 import SD3
from flowalign.records import Condition, Media, Prompts
from flowalign.schedules import AllSteps
from flowalign.shapes import text_to_image
from flowalign.transitions import FlowSDE
from trainers import FlowGRPO, Sampling
from trainers.state import State

GROUPS, GROUP_SIZE, BATCH, STEPS, TRAINED = 8, 4, 8, 10, 9
SAMPLES = GROUPS * GROUP_SIZE
PROMPTS = tuple(f"{count} boxes" for count in range(GROUPS))


@dataclass(frozen=True)
class Parts:
    """A number for each part of an epoch: rows that it needs, or the price of one row in CPU seconds.

    rollout, reference: rows without gradient, of the policy and without its adapter. unconditional: the other half of a
    guided trained row. trained: a forward with gradient and its backward. decode: pictures.
    """

    rollout: float
    unconditional: float
    trained: float
    reference: float
    decode: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def times(self, other: Parts) -> Parts:
        """Part by part."""
        return Parts(*(getattr(self, field.name) * getattr(other, field.name) for field in fields(self)))


def needed(guidance_scale: float, kl_coef: float) -> Parts:
    """Rows of an epoch that the maths need."""
    guided, trained = (1 if guidance_scale == 1 else 2), SAMPLES * TRAINED
    reference = trained * guided if kl_coef else 0
    return Parts(SAMPLES * STEPS * guided, trained * (guided - 1), trained, reference, SAMPLES)


@dataclass(frozen=True)
class Prices:
    """CPU seconds of one row of each kind of call: of the batch's shape or doubled, of the policy or the reference."""

    single: float
    doubled: float
    trained: float
    reference: float
    reference_doubled: float
    decode: float


@dataclass(frozen=True)
class Epoch:
    """CPU seconds of one epoch and of its floor, with what the model's meter saw."""

    collect: float
    update: float
    floor: Parts
    prices: tuple[Prices, Prices]
    calls: dict[str, int]
    rows: Rows
    phases: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.collect + self.update

    @property
    def ratio(self) -> float:
        return self.seconds / self.floor.total

    @property
    def collect_ratio(self) -> float:
        return self.collect / (self.floor.rollout + self.floor.decode)

    @property
    def update_ratio(self) -> float:
        return self.update / (self.floor.unconditional + self.floor.trained + self.floor.reference)


def _transformer() -> SD3Transformer2DModel:
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=4, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=160, caption_projection_dim=128, pooled_projection_dim=160,
        pos_embed_max_size=16, qk_norm="rms_norm",
    )  # fmt: skip
    for parameter in transformer.parameters():  # as made, the last layers are zero and so is every gradient
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return transformer


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 32, 32), layers_per_block=1, latent_channels=16, norm_num_groups=8, sample_size=128,
        scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
        mid_block_add_attention=False,
    )  # fmt: skip


def pipeline() -> StableDiffusion3Pipeline:
    """Real classes and random weights, but for the text encoders, which are the embedded ones: an epoch calls none."""
    torch.manual_seed(0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = text_to_image().components | {"transformer": _transformer(), "vae": _vae(), "scheduler": scheduler}
    return StableDiffusion3Pipeline(**parts)


def contrast(media: Media, prompts: Prompts) -> Tensor:
    """A reward that costs nothing."""
    return media.pixels.flatten(1).std(1)


def job(model: SD3, guidance_scale: float, kl_coef: float, folder: str) -> FlowGRPO:
    """The trainer; with `step_fraction` 0.99 it trains 9 of 10 steps, as the authors' config does."""
    return FlowGRPO(
        model,
        contrast,
        PROMPTS,
        Sampling(AllSteps(FlowSDE(0.7)), GROUPS, GROUP_SIZE, BATCH, BATCH, STEPS, guidance_scale),
        kl_coef=kl_coef,
        step_fraction=0.99,
        updates_per_epoch=2,
        folder=folder,
    )


class Tally(Meter):
    """A meter that does not start again where the trainer takes from it, which it does several times an epoch."""

    def take(self) -> tuple[Counter[str], Rows, dict[str, float]]:
        return self.calls, self.rows, self.seconds


def _mean(prices: list[Prices]) -> Prices:
    return Prices(*(statistics.mean(getattr(price, field.name) for price in prices) for field in fields(Prices)))


def _clocked(call: Callable[[], Any], rows: int) -> float:
    started = time.process_time()
    call()
    return (time.process_time() - started) / rows


class Timed(SD3):
    """An SD3 that stops the clock wherever a batch begins, which is where it is encoded, and times single calls."""

    timing = False

    def start(self) -> None:
        """Time single calls from now on."""
        self.inputs = torch.randn(BATCH, *self.latent_shape), 0.5, super().encode(PROMPTS[:BATCH])
        self.prices: list[Prices] = []
        self.timing, self.paused = True, 0.0

    def encode(self, prompts: Sequence[str], negatives: Sequence[str | None] | None = None) -> Condition:
        if self.timing:
            self.pause()
        return super().encode(prompts, negatives)

    def pause(self) -> None:
        """Time each kind of call once, and add to `paused` the seconds that this took."""
        started, latents = time.process_time(), self.inputs[0]
        with self.meter.phase("timing"), torch.no_grad():
            single, doubled = _clocked(self._single, BATCH), _clocked(self._doubled, 2 * BATCH)
            decode = _clocked(lambda: self.decode(latents), BATCH)
            with self.reference():
                bare, bare_doubled = _clocked(self._single, BATCH), _clocked(self._doubled, 2 * BATCH)
            trained = _clocked(self._trained, BATCH)
        self.prices.append(Prices(single, doubled, trained, bare, bare_doubled, decode))
        self.paused += time.process_time() - started

    def _single(self) -> Tensor:
        return self.network(*self.inputs, negative=False)

    def _doubled(self) -> None:
        self.network_doubled(*self.inputs)

    @torch.enable_grad()
    def _trained(self) -> None:
        torch.autograd.grad(self._single().mean(), [*self.trainable().values()])  # leaves the gradient so far alone

    def lap(self) -> tuple[float, Prices]:
        """CPU seconds so far less the pauses', and the mean price since the last lap, with one more pause."""
        seconds = time.process_time() - self.paused
        self.pause()
        prices, self.prices = self.prices, []
        return seconds, _mean(prices)


def measure(trainer: FlowGRPO, model: Timed, number: int, rows: Parts) -> Epoch:
    """One epoch, single calls in its midst."""
    model.meter, trainer.state = Tally(), State(epoch=number)
    start, _ = model.lap()
    batch = trainer.collect(number)
    between, first = model.lap()
    trainer.update(batch)
    end, then = model.lap()
    price = Parts(
        rollout=min(first.single, first.doubled),
        unconditional=min(then.single, then.doubled),
        trained=then.trained,
        reference=min(then.reference, then.reference_doubled),
        decode=first.decode,
    )
    calls, made, phases = model.meter.take()
    return Epoch(between - start, end - between, rows.times(price), (first, then), dict(calls), made, phases)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):8.3f}  ({min(values):.3f} ... {max(values):.3f})"


def report(epochs: list[Epoch], rows: Parts) -> None:
    """Print the table: medians, and in brackets the range over epochs."""
    made = epochs[-1].rows
    print("calls an epoch       " + ", ".join(f"{kind} {count}" for kind, count in sorted(epochs[-1].calls.items())))
    forward = rows.rollout + rows.unconditional + rows.reference
    print(f"rows without gradient{made.forward:6d}, needed {forward:.0f}")
    print(f"rows with gradient   {made.gradient:6d}, needed {rows.trained:.0f}")
    for name in sorted(epochs[-1].phases):
        print(f"phase {name:15s}{_spread([epoch.phases[name] for epoch in epochs])} s of wall time")
    print(f"epoch                {_spread([epoch.seconds for epoch in epochs])} s of CPU time")
    for field in fields(Parts):
        print(f"  floor, {field.name:13s}{_spread([getattr(epoch.floor, field.name) for epoch in epochs])}")
    for field in fields(Prices):
        values = [1e3 * getattr(epoch.prices[1], field.name) for epoch in epochs]
        print(f"  {field.name:19s}{_spread(values)} ms a row")
    print(f"floor                {_spread([epoch.floor.total for epoch in epochs])}")
    print(f"ratio, collect       {_spread([epoch.collect_ratio for epoch in epochs])}")
    print(f"ratio, update        {_spread([epoch.update_ratio for epoch in epochs])}")
    print(f"ratio                {_spread([epoch.ratio for epoch in epochs])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidance-scale", type=float, default=4.5, help="1 for none")
    parser.add_argument("--kl-coef", type=float, default=0.04, help="0 leaves the reference out")
    parser.add_argument("--repeats", type=int, default=5, help="epochs that are timed")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = needed(arguments.guidance_scale, arguments.kl_coef)
    with tempfile.TemporaryDirectory() as folder:
        model = Timed(pipeline(), LoRA(rank=32, alpha=64), max_sequence_length=189, device="cpu")
        trainer = job(model, arguments.guidance_scale, arguments.kl_coef, f"{folder}/run")
        model.start()
        epochs = [measure(trainer, model, number, rows) for number in range(arguments.repeats + 1)][1:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
    print(f"guidance {arguments.guidance_scale}, KL {arguments.kl_coef}, {arguments.repeats} epochs")
    report(epochs, rows)
    print(f"peak memory          {peak:8.0f} MiB")
    if arguments.json:
        record = {"needed": asdict(rows), "peak_mib": peak, "epochs": [*map(asdict, epochs)]}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
