"""The API reference by subject, the index of papers, and pages made of files that lie elsewhere."""

from __future__ import annotations

import json
import re
from functools import cache

import docs_methods
import docs_rewards
from docs_sources import ARXIV, ROOT, modules
from docs_text import escaped, fenced, row, table

SUBJECTS = {  # of flowalign and trainers; what is in none of them and names a paper comes under "more"
    "plans": ("Plans and credit", (
        "flowalign.schedules", "flowalign.windows", "flowalign.trees", "flowalign.step_weights", "flowalign.advantages",
        "flowalign.credit", "trainers.resampling", "trainers.regularisers", "trainers.supervised",
        "trainers.ratio_guard",
        "trainers.active_steps", "trainers.noise_calibration",
    )),
    "core": ("Transitions and rollouts", (
        "flowalign.records", "flowalign.transitions", "flowalign.rollout", "flowalign.differentiate",
        "flowalign.objectives", "flowalign.divergences", "flowalign.guidance", "flowalign.randomness",
        "flowalign.determinism",
    )),
    "models": ("Models", (
        "flowalign.models.base", "flowalign.models.pipeline", "flowalign.models.sd3", "flowalign.models.unet",
        "flowalign.models.controlnet", "flowalign.models.flux", "flowalign.models.qwen_image",
        "flowalign.models.z_image", "flowalign.models.pixart", "flowalign.models.sana", "flowalign.models.wan",
        "flowalign.models.editing", "flowalign.models.gaussian", "flowalign.adapters",
        "flowalign.models.memory", "flowalign.sharding",
    )),
    "settings": ("Settings of a run", (
        "trainers.batch", "trainers.optim", "trainers.evaluation", "trainers.keeper", "trainers.forward_times",
        "trainers.forward_source", "trainers.noise_optim", "trainers.search_cost",
    )),
    "data": ("Prompts and preferences", (
        "flowalign.prompts", "flowalign.prompts.tables", "flowalign.preferences.sources",
        "flowalign.preferences.columns", "flowalign.preferences.latents", "flowalign.soups", "rewards.averaging",
    )),
    "shapes": ("The embedded world", (
        "flowalign.shapes.prompts", "flowalign.shapes.scenes", "flowalign.shapes.verifier",
        "flowalign.shapes.video.prompts", "flowalign.shapes.video.scenes", "flowalign.shapes.video.verifier",
    )),
}  # fmt: skip
INDEX = """# Papers

The {count} papers that the code names, with a sentence that names each, and where.

"""
BREAK = "\n\n"


@cache
def subjects() -> dict[str, tuple[str, list[str]]]:
    """Title and modules of each page of the reference."""
    known = {key: (title, [name for name in names if name in modules()]) for key, (title, names) in SUBJECTS.items()}
    placed = {name for _, names in known.values() for name in names} | set(_elsewhere())
    papers = [name for name, module in modules().items() if any(ARXIV.search(text) for text in module.docstrings())]
    return known | {"more": ("More", [name for name in papers if name not in placed])}


def _elsewhere() -> dict[str, str]:
    """The pages of the modules that stand on pages of methods or rewards."""
    places = {module.name: docs_methods.path(name) for name, module in docs_methods.methods().items()}
    places |= {module: docs_methods.path(name) for name, module in docs_methods.BESIDE.items()}
    for key, (_, own) in docs_rewards.families().items():
        places |= {module.name: f"rewards/{key}.md" for module in own}
    return places


@cache
def page_of() -> dict[str, str]:
    """The page that each documented module stands on."""
    own = {name: f"reference/{key}.md" for key, (_, names) in subjects().items() for name in names}
    return own | _elsewhere()


def pages() -> dict[str, str]:
    """All of them, by path."""
    made = {f"reference/{key}.md": _page(title, names) for key, (title, names) in subjects().items()}
    made |= {"papers.md": papers(), "notebook.md": notebook()}
    made["contributing.md"] = _copied(".github/CONTRIBUTING.md")
    made["changelog.md"] = _copied("CHANGELOG.md")
    return made


def _copied(path: str) -> str:
    return (ROOT / path).read_text()


def _page(title: str, names: list[str]) -> str:
    parts = [f"# {title}"]
    for name in names:
        parts.append(f"## {name}\n\n::: {name}\n    options:\n      heading_level: 3")
    return "\n\n".join(parts)


def sentences(text: str) -> list[str]:
    """Of a docstring; an indented line, as of an equation, is one by itself."""
    blocks = [[line.strip() for line in block.splitlines()] if block.startswith("    ") else [" ".join(block.split())]
              for block in text.split(BREAK)]  # fmt: skip
    return [said for block in blocks for line in block for said in re.split(r"(?<!eq\.)(?<!al\.)(?<=[.;]) ", line)]


def papers() -> str:
    """Every paper that a docstring names, with a sentence that names it."""
    places = page_of()
    found: dict[str, dict[str, str]] = {}
    for name, module in modules().items():
        for text in module.docstrings():
            for said in sentences(text):
                for number in ARXIV.findall(said):
                    found.setdefault(number, {}).setdefault(name, said)
    rows = []
    for number, where in sorted(found.items()):
        said = "; ".join(f"[`{name}`]({places[name]})" for name in where)
        line = min(where.values(), key=len)
        rows.append(row(f"[{number}](https://arxiv.org/abs/{number})", escaped(line), said))
    return INDEX.format(count=len(found)) + table(("arXiv", "as the code says it", "where"), rows) + "\n"


def notebook() -> str:
    """The notebook's cells as a page."""
    cells = json.loads((ROOT / ".docs/notebooks/quickstart.ipynb").read_text())["cells"]
    parts = []
    for cell in cells:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else fenced(text, "python"))
    parts.append("The notebook itself is `.docs/notebooks/quickstart.ipynb`; a test runs its cells.")
    return "\n\n".join(parts) + "\n"
