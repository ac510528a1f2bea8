"""A sweep: models, LoRAs and ways to draw from them, on benchmarks, from the same noises. What is asked, checked."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from flowalign.config import Call, ConfigError, Elsewhere, Recipe, override, parse
from flowalign.evaluation.benchmarks import Benchmark, Scored, Set, recipe
from flowalign.evaluation.methods import Method, read_method
from flowalign.models import Model
from flowalign.records import Prompts, Size
from flowalign.sample import Request, config_of, steps_and_guidance
from rewards.sets import Embedder, ReferenceSet
from trainers.search_cost import Prices

Embedding = Annotated[Any, Elsewhere(Embedder)]
Distance = Annotated[Any, Elsewhere(ReferenceSet)]


@dataclass(frozen=True)
class Entrant:
    """A model of a sweep, with the LoRAs that are tried on it.

    target: as `flowalign sample` takes it: a run folder (its model and the policy it kept), a pipeline's folder or hub
        id, or an embedded model: shapes, shapes-few-step, shapes-video.
    lora: a folder or file of LoRA weights in place of a run's own. base: a run's model without its LoRA.
    loras: several by name, an arm each; null for none.
    model: arguments of the model. steps, guidance_scale: in place of a run's own, or of 28 and 4.5.
    methods, benchmarks: those of the sweep that it takes part in; all by default.
    """

    target: str
    lora: str | None = None
    base: bool = False
    loras: Mapping[str, str | None] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    guidance_scale: float | None = None
    methods: tuple[str, ...] | None = None
    benchmarks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if sum((self.lora is not None, self.base, bool(self.loras))) > 1:
            raise ValueError(f"{self.target}: lora, loras and base exclude each other")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"{self.target}: steps must be at least 1, got {self.steps}")


@dataclass(frozen=True)
class Sweep:
    """What `flowalign eval` runs: every model and LoRA by every method, on every benchmark, from every seed.

    models: by name; a text is the target of an `Entrant`. Of two LoRAs or methods or more, arms are called
        "model/lora" and "model/method".
    methods: by name, see `flowalign.evaluation.methods.read_method`; the plain ODE by default.
    benchmarks: by name. metrics: rewards by name, of all media that they can look at, beside the benchmarks' own.
    judges: rewards that compare the samples of a group, as `rewards.PairJudge` does: each arm against the baseline.
    embedders: networks that the diversity of a prompt's pictures is measured by, beside their pixels.
    distances: to sets of reference pictures: {class: rewards.MMD, embedder: rewards.CLIPEmbedder, reference: folder}
        is CMMD.
    seeds: of the noise: a prompt's noise is a function of its place in the benchmark and of these, for all arms.
    baseline: arms that others are held against: on each benchmark the first of these that takes part, or of all arms.
    at_equal_compute: every arm gets the compute of the dearest one, or `budget`, in forwards of one network row for a
        picture: the ODE in steps, searches in tries. prices: of decode and reward in that unit; None to measure them.
    batch_size: media that are drawn, and scored, at once.
    folder: of the results. cache: of what is drawn and scored; in the folder by default, and may be shared by sweeps.
    """

    models: Mapping[str, Entrant | str]
    benchmarks: Mapping[str, Benchmark]
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    metrics: Mapping[str, Scored] = field(default_factory=dict)
    judges: Mapping[str, Scored] = field(default_factory=dict)
    embedders: Mapping[str, Embedding] = field(default_factory=dict)
    distances: Mapping[str, Distance] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    baseline: tuple[str, ...] = ()
    at_equal_compute: bool = False
    budget: float | None = None
    prices: Prices | None = None
    batch_size: int = 16
    folder: str = "runs/eval"
    cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("models", "benchmarks", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: a sweep needs one at least")
        if len({*self.seeds}) < len(self.seeds):
            raise ValueError(f"seeds are there twice: {list(self.seeds)}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.budget is not None and not (self.at_equal_compute and 0 < self.budget < math.inf):
            raise ValueError("budget is positive, and goes with at_equal_compute: true")


@dataclass(frozen=True)
class Arm:
    """A model, with a LoRA or without, and a method.

    config: the model's parsed config. benchmarks: by name. model_name, lora, method_name: what its name is made of.
    """

    name: str
    config: Call
    method: Method
    benchmarks: tuple[str, ...]
    model_name: str
    lora: str | None
    method_name: str


@dataclass(frozen=True)
class Plan:
    """A sweep with its arms and prompts, all of it checked; nothing is loaded.

    baselines: of each benchmark, the name of an arm. recipes: whether configs may name classes of others.
    """

    sweep: Sweep
    arms: tuple[Arm, ...]
    sets: Mapping[str, Set]
    baselines: Mapping[str, str]
    allow_code: bool

    @property
    def folder(self) -> Path:
        """Of the results."""
        return Path(self.sweep.folder)

    @property
    def cache(self) -> Path:
        """Of what is drawn and scored."""
        return Path(self.sweep.cache) if self.sweep.cache else self.folder / "cells"

    def arms_of(self, benchmark: str) -> tuple[Arm, ...]:
        """Those that take part in a benchmark."""
        return tuple(arm for arm in self.arms if benchmark in arm.benchmarks)


def plan(sweep: Sweep, allow_code: bool = False) -> Plan:
    """The arms and prompts of a sweep. Raises: ValueError, in one line, for what is wrong with any."""
    methods = {name: read_method(told, name, allow_code) for name, told in (sweep.methods or {"ode": {}}).items()}
    arms = [arm for name, told in sweep.models.items() for arm in _arms(sweep, name, told, methods, allow_code)]
    twice = [arm.name for i, arm in enumerate(arms) if arm.name in [other.name for other in arms[:i]]]
    if twice:
        raise ValueError(f"two arms are called {twice[0]!r}: give models and LoRAs names that tell them apart")
    unknown = [name for name in sweep.baseline if name not in [arm.name for arm in arms]]
    if unknown:
        raise ValueError(
            f"baseline: there is no arm {unknown[0]!r}; the arms are {', '.join(arm.name for arm in arms)}"
        )
    sets = {name: _loaded(name, benchmark) for name, benchmark in sweep.benchmarks.items()}
    baselines = {}
    for name in sets:
        taking = [arm.name for arm in arms if name in arm.benchmarks]
        if not taking:
            raise ValueError(f"benchmarks.{name}: no model takes part in it")
        baselines[name] = next((arm for arm in sweep.baseline if arm in taking), taking[0])
    for name, benchmark in sweep.benchmarks.items():
        if not benchmark.scorers() and not sweep.metrics:
            raise ValueError(f"benchmarks.{name} has no reward: name one with reward, or some under metrics")
    return Plan(sweep, tuple(arms), sets, baselines, allow_code)


def _loaded(name: str, benchmark: Benchmark) -> Set:
    try:
        return benchmark.load()
    except (ValueError, OSError) as error:
        raise ValueError(f"benchmarks.{name}: {error}") from error


def _arms(sweep: Sweep, name: str, told: Entrant | str, methods: Mapping[str, Method], allow_code: bool) -> list[Arm]:
    entrant = Entrant(told) if isinstance(told, str) else told
    for what, chosen, known in (
        ("methods", entrant.methods, methods),
        ("benchmarks", entrant.benchmarks, sweep.benchmarks),
    ):
        missing = [one for one in chosen or () if one not in known]
        if missing:
            raise ConfigError(f"models.{name}.{what}: there is no {missing[0]!r}; there are {', '.join(known)}")
    own = {one: methods[one] for one in entrant.methods or methods}
    benchmarks = tuple(entrant.benchmarks or sweep.benchmarks)
    loras = dict(entrant.loras) or {"": entrant.lora}
    found = []
    for lora_name, lora in loras.items():
        config, call, steps, scale = _model(entrant, name, lora, allow_code)
        for benchmark in benchmarks:
            _check_kind(name, call, benchmark, sweep.benchmarks[benchmark])
        for method_name, method in own.items():
            parts = (name, lora_name, method_name if len(own) > 1 else "")
            start = (config["model"].get("lora") or {}).get("start")
            found.append(
                Arm("/".join(filter(None, parts)), call, method.settled(steps, scale), benchmarks, name, start,
                    method_name)
            )  # fmt: skip
    return found


def _model(entrant: Entrant, name: str, lora: str | None, allow_code: bool) -> tuple[dict[str, Any], Call, int, float]:
    """The resolved config of a model, parsed, and the steps and guidance that it is sampled with by default."""
    base = entrant.base or (bool(entrant.loras) and lora is None)
    request = Request(
        entrant.target, (), None, lora, base, entrant.steps, entrant.guidance_scale, 0, 1, Path(), {}, allow_code
    )
    try:
        config = config_of(request)
        if base:
            config["model"].pop("lora", None)
        config = override(config, {f"model.{key}": value for key, value in entrant.model.items()})
        if (config["model"].get("memory") or {}).get("context_parallel"):
            raise ValueError("memory.context_parallel: a sweep's processes each draw for themselves; leave it out")
        call = parse(_itself, {"model": config["model"]}, allow_code).arguments["model"]
        return config, call, *steps_and_guidance(request, config)
    except (ValueError, OSError) as error:
        raise ConfigError(f"models.{name}: {error}") from error


def _itself(model: Model) -> Model:
    return model


def _check_kind(name: str, call: Call, benchmark: str, told: Benchmark) -> None:
    """Raises: ConfigError where a model's pipeline makes the other kind of media.

    Adapters of videos take the frames per second.
    """
    if "fps" not in inspect.signature(call.target).parameters and told.kind == "video":
        raise ConfigError(_wrong_kind(name, "pictures", benchmark, "videos"))
    if "fps" in inspect.signature(call.target).parameters and told.kind == "image":
        raise ConfigError(_wrong_kind(name, "videos", benchmark, "pictures"))


def _wrong_kind(name: str, made: str, benchmark: str, wanted: str) -> str:
    return (
        f"models.{name} makes {made}, and the benchmark {benchmark} is of {wanted}: name the benchmarks that it takes "
        f"part in, as in models.{name}.benchmarks: [...]"
    )


def chunks(prompts: Prompts, size: int) -> list[tuple[int, ...]]:
    """The rows of calls: prompts of one size of media together, at most `size` of them, in order."""
    sizes = [Size.of(row) for row in prompts.metadata]
    found = []
    for one in dict.fromkeys(sizes):
        rows = [i for i, other in enumerate(sizes) if other == one]
        found += [tuple(rows[start : start + size]) for start in range(0, len(rows), size)]
    return found


def configs(told: Mapping[str, Any]) -> dict[str, Any]:
    """Plain configs by name, of what is made when it is needed."""
    return {name: recipe(value) if isinstance(value, Recipe) else value for name, value in told.items()}
