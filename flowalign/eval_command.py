"""`flowalign eval`: which model, LoRA or inference method is better, on which benchmark, and is it real?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowalign.cli import add_command, say
from flowalign.config import ConfigError, construct, find_config, load_yaml, override, parse, parse_yaml, read_options

EVAL = """Compare models, LoRAs and inference methods on benchmarks, from the same noises.

Give a sweep file, or the name of a shipped one; its keys are those of flowalign.evaluation.Sweep:

  flowalign eval eval/shapes
  flowalign eval my_sweep.yaml --seeds "[0, 1, 2]" --folder runs/eval_mine

or what is to be compared: run folders (each with the policy it kept, and the model without it), pipelines, embedded
models, LoRAs that are tried on the first of them:

  flowalign eval runs/flow_grpo_shapes runs/draft_shapes --benchmark shapes
  flowalign eval shapes --lora a/lora --lora b/lora --benchmark shapes
      --reward "{class: rewards.CLIPScore, model: shapes}"
  flowalign eval runs/flow_grpo_sd3.5 --benchmark geneval=evaluation_metadata.jsonl --reward pickscore --reward hpsv2.1

Benchmarks: shapes and shapes-video come with the package; of geneval, drawbench, partiprompts, ocr, pickapic and vbench
name the authors' file, of t2i-compbench, hpdv2 and dreambench the folder, as NAME=PATH; any other NAME=FILE is a file
of prompts. Other options are the sweep's own keys, at any depth.

What is drawn and scored is kept by content: the same command goes on where it was stopped, and after a change only what
has changed is made again. Several processes (torchrun, accelerate launch or srun, as for train) share the work.
"""

HOME = "flowalign.evaluation."
SHIPPED = {"shapes": "Shapes", "shapes-video": "ShapesVideo"}
# by name: the class, and its argument that says where the authors' files are
PUBLISHED = {
    "geneval": ("GenEval", "file"),
    "t2i-compbench": ("T2ICompBench", "folder"),
    "drawbench": ("DrawBench", "file"),
    "partiprompts": ("PartiPrompts", "file"),
    "ocr": ("TextRendering", "prompts"),
    "hpdv2": ("HPDv2", "folder"),
    "pickapic": ("PickAPic", "prompts"),
    "dreambench": ("DreamBench", "folder"),
    "vbench": ("VBench", "file"),
}
SHORT = ("benchmark", "reward", "lora", "steps", "guidance_scale", "no_base")


def add_eval(commands: Any) -> None:
    """flowalign eval SWEEP | TARGET ..."""
    parser = add_command(commands, "eval", "compare models, LoRAs and methods on benchmarks", EVAL)
    parser.usage = (
        "flowalign eval [-h] SWEEP [--key value ...]\n"
        "       flowalign eval TARGET [TARGET ...] --benchmark NAME[=PATH] [--reward R] [--lora PATH] [options] "
        "[--key value ...]"
    )
    parser.add_argument("targets", nargs="+", metavar="SWEEP | TARGET", help="a sweep file, or what is compared")
    parser.add_argument("--benchmark", action="append", metavar="NAME[=PATH]", help="may be given more than once")
    parser.add_argument("--reward", action="append", metavar="R", help="a dotted path, a formula, or {class: ...}")
    parser.add_argument("--lora", action="append", metavar="PATH", help="tried on the one target, beside none")
    parser.add_argument("--steps", type=int, help="a run's own by default, otherwise 28")
    parser.add_argument("--guidance-scale", type=float, help="a run's own by default, otherwise 4.5; 1 for none")
    told = "leave out what runs' models were before training"
    parser.add_argument("--no-base", action="store_const", const=True, help=told)
    parser.add_argument("--allow-code", action="store_true", help="let the sweep name classes outside flowalign")
    parser.set_defaults(run=evaluate)


def evaluate(arguments: argparse.Namespace, words: list[str]) -> None:
    """Check everything, then run the sweep or go on with it, and print its tables."""
    if arguments.allow_code and "" not in sys.path:
        sys.path.append(str(Path.cwd()))  # at the end: the user's modules are found, and hide none of ours
    config, where = read_sweep(arguments, words)
    from flowalign import distributed
    from flowalign.config import arguments_of
    from flowalign.evaluation import Sweep, plan
    from flowalign.evaluation import evaluate as run
    from flowalign.interrupt import Stopped

    try:
        call = parse(Sweep, config, arguments.allow_code)
        planned = plan(construct(call), arguments.allow_code)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    _check_folder(planned.folder)
    distributed.start()
    try:
        with distributed.telling():
            done = run(planned, arguments_of(call))
    except Stopped:
        distributed.finish()
        raise
    distributed.finish()
    if done is not None:
        print(done.table)
        say(f"tables, results.json and all media are in {done.folder}")


def _check_folder(folder: Path) -> None:
    from flowalign.evaluation.running import check_results

    check_results(folder)


def read_sweep(arguments: argparse.Namespace, words: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The sweep as plain data, its options put in, and where it is from."""
    options = read_options(words)
    path = sweep_file(arguments.targets)
    if path is None:
        return override(short(arguments), options), "eval"
    given = [name for name in SHORT if getattr(arguments, name) is not None]
    if given:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} is for targets; {path} is a sweep, which has keys of its own"
        )
    return override(load_yaml(path), options), f"{path}{' (with options)' if options else ''}"


def sweep_file(targets: Sequence[str]) -> Path | None:
    """The sweep that is named; None for targets. Raises: ConfigError for a file that is not there, and for several."""
    named = [
        one for one in targets if one.endswith((".yaml", ".yml")) or one.removeprefix("configs/").startswith("eval/")
    ]
    if not named:
        return None
    if len(targets) > 1:
        raise ConfigError(f"{named[0]} is a sweep: give it alone")
    return find_config(named[0])


def short(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sweep that targets and short options describe."""
    if not arguments.benchmark:
        raise ConfigError("eval needs --benchmark NAME, or a sweep file (*.yaml) in place of targets")
    rewards = [_reward(text) for text in arguments.reward or ()]
    return {
        "models": _models(arguments),
        "benchmarks": _named([_benchmark(text) for text in arguments.benchmark], "--benchmark"),
        "metrics": _named(rewards, "--reward"),
    }


def _named(pairs: Sequence[tuple[str, Any]], what: str) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"{what}: two are called {twice[0]!r}; a sweep file gives them names of their own")
    return dict(pairs)


def _models(arguments: argparse.Namespace) -> dict[str, Any]:
    told = {name: getattr(arguments, name) for name in ("steps", "guidance_scale")}
    own = {name: value for name, value in told.items() if value is not None}
    runs = [target for target in arguments.targets if (Path(target) / "config.yaml").is_file()]
    pairs = [(_name(target), {"target": target, **own}) for target in arguments.targets]
    if arguments.lora:
        if len(pairs) > 1:
            raise ConfigError("--lora is tried on one target; a sweep file names the LoRAs of each")
        loras = _named([(_name(path), path) for path in arguments.lora], "--lora")
        return {pairs[0][0]: {**pairs[0][1], "loras": {"base": None, **loras}}}
    bases = {} if arguments.no_base else _bases(runs)
    before = [(name, {"target": run, "base": True, **own}) for name, run in bases.items()]
    return _named(before + pairs, "targets")


def _bases(runs: Sequence[str]) -> dict[str, str]:
    """A run for each of the runs' models, by the name of what it was before training."""
    found: dict[str, str] = {}
    for run in runs:
        model = load_yaml(Path(run) / "config.yaml").get("model")
        pipeline = str(model.get("pipeline")) if isinstance(model, Mapping) else run
        found.setdefault(pipeline, run)
    return (
        {"base": next(iter(found.values()))} if len(found) == 1 else {f"{_name(k)} base": v for k, v in found.items()}
    )


def _name(path: str) -> str:
    """What a run's folder, a LoRA's, or a pipeline is called."""
    parts = [part for part in Path(path).with_suffix("").parts if part not in ("/", "lora")]
    return parts[-1] if parts else path


def _benchmark(text: str) -> tuple[str, Any]:
    name, equals, path = text.partition("=")
    if text.lstrip().startswith("{"):
        told = parse_yaml(text, "--benchmark")
        return str(told.get("class", "benchmark")).split(".")[-1], told
    if not equals:
        if name in SHIPPED:
            return name, {"class": HOME + SHIPPED[name]}
        shipped = f"{', '.join(SHIPPED)} come with the package"
        if name in PUBLISHED:
            raise ConfigError(f"--benchmark {name} needs its authors' {PUBLISHED[name][1]}: {name}=PATH; {shipped}")
        raise ConfigError(f"--benchmark: there is no {name!r}; {shipped}, {', '.join(PUBLISHED)} take NAME=PATH")
    if name in SHIPPED:
        raise ConfigError(f"--benchmark {name} comes with the package: leave ={path} out")
    kind, argument = PUBLISHED.get(name, ("PromptBenchmark", "prompts"))
    return name, {"class": HOME + kind, argument: path}


def _reward(text: str) -> tuple[str, Any]:
    if not text.lstrip().startswith("{"):
        return text.split(".")[-1] if text.startswith("rewards.") else text, text
    told = parse_yaml(text, "--reward")
    if not isinstance(told, dict) or not isinstance(told.get("class"), str):
        raise ConfigError(f"--reward {text}: expected {{class: dotted.path, ...}}")
    return told["class"].split(".")[-1], told
