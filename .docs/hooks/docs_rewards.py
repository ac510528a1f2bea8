"""Pages of rewards by what they look at, and of the licences of their weights."""

from __future__ import annotations

import ast
from functools import cache
from typing import Any

from docs_sources import Module, exports, lineage, literal, modules, signature
from docs_text import escaped, fenced, prose, row, table

FAMILIES = {  # modules that tell rewards, in order; what is in none of them comes under "more"
    "text": ("Text and picture", "clip siglip openclip goal pickscore hps hpsv3 mps image_reward"),
    "looks": ("Picture alone", "aesthetic colourfulness jpeg"),
    "asked": ("What was asked for", "geneval ocr ctc consistency pixelwise move object_edit finders"),
    "references": ("Like a reference", "subject face mtcnn"),
    "videos": ("Videos", "frames video_reward temporal dynamics"),
    "sets": ("Groups and sets", "groups sets"),
    "judges": ("Judges", "judge judges vision_reward chat local_vlm"),
    "combining": ("Combining and shaping", "base algebra shaping expression terms"),
    "elsewhere": ("In another place", "remote process placed"),
    "own": ("Your own", "preference averaging"),
    "embedded": ("The embedded world", "shapes shapes_video"),
}
LICENCES = """# Licences of weights

FlowAlign is Apache-2.0, and so are the models that come with it. Weights that a reward downloads have a licence of
their own, which may forbid commercial use or oblige you to publish, and what is trained with such a reward may fall
under it. This is what each reward's card says; read the licence itself before you ship.

"""
FIELDS = ("weights", "licence", "usual", "modality", "scope")
HEADS = ("reward", "weights", "licence of the weights", "usual range", "looks at", "gradient")


@cache
def families() -> dict[str, tuple[str, list[Module]]]:
    """Title and modules of each page."""
    known = {key: (title, names.split()) for key, (title, names) in FAMILIES.items()}
    listed = {name for _, names in known.values() for name in names}
    exported = dict.fromkeys(where.split(".")[1] for where in exports("rewards").values())
    more = [name for name in exported if name not in listed]
    pages = {**known, **({"more": ("More", more)} if more else {})}
    have = {key: [modules()[f"rewards.{name}"] for name in names if f"rewards.{name}" in modules()]
            for key, (_, names) in pages.items()}  # fmt: skip
    return {key: (title, have[key]) for key, (title, _) in pages.items()}


def pages() -> dict[str, str]:
    """All of them, by path."""
    made = {"rewards/licences.md": _licences()}
    for key, (title, own) in families().items():
        made[f"rewards/{key}.md"] = f"# {title}\n\n" + "\n\n".join(_module(module) for module in own)
    return made


def card(module: Module, node: ast.ClassDef) -> dict[str, Any]:
    """What a class's own `Card(...)` says; {} where there is none."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name) and inner.func.id == "Card":
            names = module.constants
            told = dict(zip(FIELDS, (literal(one, names) for one in inner.args), strict=False))
            return told | {word.arg: literal(word.value, names) for word in inner.keywords if word.arg}
    return {}


def differentiable(module: Module, node: ast.ClassDef) -> bool:
    """Whether its docstring, or that of a class of its file above it, says that there is a gradient."""
    if any(
        "differentiable = True" in ast.unparse(one) for one in node.body if isinstance(one, ast.Assign | ast.AnnAssign)
    ):
        return True
    told = ast.get_docstring(node) or ""
    return "ifferentiable" in told and "ot differentiable" not in told


def rewards_of(module: Module) -> list[ast.ClassDef]:
    """The rewards of a file that the package hands out."""
    found = exports("rewards")
    return [node for name, node in module.classes.items() if found.get(name) == module.name]


def is_reward(name: str) -> bool:
    return "Reward" in lineage(name, "rewards")


def _module(module: Module) -> str:
    first, *rest = module.doc.split("\n\n")
    parts = [f"## {module.name}\n\n**{escaped(' '.join(first.split()))}**", prose("\n\n".join(rest))]
    own = rewards_of(module)
    rows = [_row(module, node) for node in own if is_reward(node.name)]
    parts += [table(HEADS, rows)] if rows else []
    for node in own:
        made = signature(node)
        parts.append(f"### {node.name}\n\n" + (fenced(made, "python") if made else ""))
        parts.append(_reference(f"{module.name}.{node.name}"))
    return "\n\n".join(part for part in parts if part)


def _row(module: Module, node: ast.ClassDef) -> str:
    told = card(module, node)
    usual = told.get("usual")
    return row(
        f"`{node.name}`",
        escaped(str(told.get("weights", "see below") or "see below")),
        escaped(str(told.get("licence", "see below") or "see below")),
        f"{usual[0]:g} to {usual[1]:g}" if usual else "see below",
        {"video": "videos", "any": "pictures, videos"}.get(str(told.get("modality")), "pictures"),
        "yes" if differentiable(module, node) else "no",
    )


def _licences() -> str:
    rows = []
    for key, (_, own) in families().items():
        for module, node in ((one, node) for one in own for node in rewards_of(one)):
            told = card(module, node)
            if "weights" in told:
                licence = escaped(str(told.get("licence") or "see its page"))
                rows.append(row(f"[`{node.name}`]({key}.md)", escaped(str(told["weights"] or "see its page")), licence))
    return LICENCES + table(("reward", "weights", "licence"), rows) + "\n"


def _reference(target: str) -> str:
    options = ("show_root_heading: false", "show_signature: false", "members: false", "heading_level: 4")
    return f"::: {target}\n    options:\n" + "\n".join(f"      {one}" for one in options)
