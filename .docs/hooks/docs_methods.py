"""A page for each method, out of its module's docstring, its class and its configs."""

from __future__ import annotations

from functools import cache

from docs_configs import link, summary
from docs_sources import Config, Module, configs, exports, lineage, modules, signature
from docs_text import escaped, fenced, prose, row, table

KINDS = (  # in the order of the list, by what a class descends from; the first that is met
    ("GRPOGuard", "policy gradients"),
    ("PolicyTrainer", "policy gradients"),
    ("ForwardAdvantageTrainer", "policy gradients of the forward process"),
    ("RewardGradientTrainer", "the reward's own gradient"),
    ("PairTrainer", "preferences"),
    ("RegressionTrainer", "regression on weighted samples"),
    ("Search", "at inference time"),
)
NEEDS = {
    "policy gradients": (
        "Stochastic steps: `sampling.plan` says which steps have noise; what is learned from is their density.",
        "Any reward, with or without a gradient; groups of samples of each prompt.",
    ),
    "policy gradients of the forward process": (
        "No stochastic steps and no stored path: clean samples, drawn by the ODE and noised anew.",
        "Any reward, with or without a gradient; groups of samples of each prompt.",
    ),
    "the reward's own gradient": (
        "A differentiable reward: `check` says so at once where it is not.",
        "Memory for the steps with gradient, the decoder and the reward; no stochastic steps.",
    ),
    "preferences": (
        "Pairs: stored ones, or those that a reward makes of the policy's own samples. No stochastic steps.",
        "With stored pairs no reward at all; a reward still tells whether samples get better.",
    ),
    "regression on weighted samples": (
        "No stochastic steps: clean samples, noised anew.",
        "Any reward, with or without a gradient.",
    ),
    "at inference time": ("No training: no weight is changed.",),
    "rewards from preferences": ("Preferences: pairs of pictures with a label.",),
}
INTRO = """# Methods

Each page opens with the paper and its equation, as the code does. All share models, rewards and prompts;
[Choosing a method](../choosing.md) says which to try first.
"""
INSIDE = """## Inside other methods

Many papers change a plan, an advantage or a regulariser, and not the loop: sliding windows (MixGRPO), a step for each
prompt (Flash-GRPO), short tails, GDPO, weights of steps. They are options of the classes above: see
[Plans and credit](../reference/plans.md) and the [papers](../papers.md).
"""
BESIDE = {"RewardModel": "trainers.reward_model"}  # modules whose maths a method runs
LEVELS = "*Run here*: on the embedded models. *Resolved*: see [Configs](../configs/index.md) for what that says."
GRADIENT = "A differentiable reward: the start noise follows its gradient."


@cache
def methods() -> dict[str, Module]:
    """The classes that a config may name as what it runs, with their modules."""
    named = {config.named for config in configs()}
    found = exports("trainers")
    wanted = {name for name in found if named & {name} or {"Trainer", "Search"} & set(lineage(name, "trainers"))}
    return {name: modules()[found[name]] for name in found if name in wanted}


def kind(name: str) -> str:
    """The family that a method belongs to."""
    above = lineage(name, "trainers")
    return next((told for ancestor, told in KINDS if ancestor in above), "rewards from preferences")


def path(name: str) -> str:
    return f"methods/{methods()[name].name.rsplit('.', 1)[1]}.md"


def pages() -> dict[str, str]:
    """All of them, by path."""
    return {"methods/index.md": _index()} | {path(name): _page(name, module) for name, module in methods().items()}


def _index() -> str:
    parts = [INTRO]
    for told in dict.fromkeys([*(name for _, name in KINDS), "rewards from preferences"]):
        own = {name: module for name, module in methods().items() if kind(name) == told}
        rows = [row(f"[`{name}`]({path(name).split('/')[1]})", escaped(_line(one))) for name, one in own.items()]
        if own:
            parts.append(f"## {told.capitalize()}\n\n{table(('class', 'what it does'), rows)}\n")
    parts.append(INSIDE)
    return "\n".join(parts)


def _line(module: Module) -> str:
    return module.doc.split("\n\n")[0].replace("\n", " ")


def _page(name: str, module: Module) -> str:
    first, *rest = module.doc.split("\n\n")
    node = module.classes[name]
    made = signature(node)
    parts = [
        f"# {name}\n\n**{escaped(' '.join(first.split()))}**",
        prose("\n\n".join(rest)),
        "## What it needs\n\n" + "\n".join(f"- {told}" for told in _needs(name, module)),
        _beside(name),
        _configs(name),
        "## Arguments\n\n" + (fenced(made, "python") if made else ""),
        _reference(f"{module.name}.{name}"),
    ]
    return "\n\n".join(part for part in parts if part)


def _beside(name: str) -> str:
    """The docstring of the module that holds a method's maths, where that is another one."""
    if name not in BESIDE:
        return ""
    first, *rest = modules()[BESIDE[name]].doc.split("\n\n")
    return f"## {BESIDE[name]}\n\n{escaped(first)}\n\n" + prose("\n\n".join(rest))


def _needs(name: str, module: Module) -> tuple[str, ...]:
    """What its family needs, and a search's own gradient."""
    node = module.classes[name]
    told = [one for one in node.body if "needs_gradient = True" in _source(module, one)]
    return (*NEEDS[kind(name)], *([GRADIENT] if told else []))


def _source(module: Module, node: object) -> str:
    lines = module.path.read_text().splitlines()
    return "\n".join(lines[node.lineno - 1 : node.end_lineno])  # type: ignore[attr-defined]


def _configs(name: str) -> str:
    own = [config for config in configs() if config.named == name]
    if not own:
        return ""
    rows = [row(link(config, "../"), summary(config), config.level) for config in own]
    shown = next((config for config in own if config.embedded), own[0])
    command = "optimize" if "search" in shown.data else "train"
    told = f"## Configs\n\n{LEVELS}\n\n{table(('config', 'what it is', 'level'), rows)}\n\n"
    return told + f"```bash\nflowalign {command} {shown.name}\n```\n\n" + _folded(shown)


def _folded(config: Config) -> str:
    body = fenced(config.text, "yaml")
    return f'??? example "{config.name}.yaml"\n\n' + "\n".join(f"    {line}" for line in body.splitlines())


def _reference(target: str) -> str:
    options = ("show_signature: false", "show_source: true", "members: [loss]", "heading_level: 3")
    return f"::: {target}\n    options:\n" + "\n".join(f"      {one}" for one in options)
