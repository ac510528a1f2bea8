"""Published benchmarks with a score for each of their aspects: VBench, and DreamBench's subjects."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowalign.evaluation.benchmarks import Benchmark, Scored, Scorer, Set, labelled, recipe, texts
from flowalign.evaluation.published import read_json, read_text
from flowalign.media import PICTURES, REFERENCES

# what of VBench's sixteen dimensions is scored here; the others need networks that are not part of this library
VBENCH_NATIVE: dict[str, Any] = {
    "subject_consistency": {"class": "rewards.SubjectConsistency"},
    "background_consistency": {"class": "rewards.BackgroundConsistency"},
    "temporal_flickering": {"class": "rewards.TemporalFlickering"},
    "dynamic_degree": {"class": "rewards.DynamicDegree"},
}
LIVE = ("cat", "dog")  # DreamBench's classes of live subjects
PROMPT = re.compile(r"""^\s*(['"])(?P<text>.*)\1\s*\.format\(\s*unique_token\s*,\s*class_token\s*\)\s*,?\s*$""")


@dataclass(frozen=True)
class VBench(Benchmark):
    """VBench (arXiv:2311.17982): each of its dimensions on its own prompts.

    file: VBench_full_info.json of the authors' repository; 946 prompts, of which 5 videos each are drawn.
    dimensions: which of them; by default those that are scored here (`VBENCH_NATIVE`).
    rewards: what scores a dimension, by its name, in place of or beside the native ones.
    """

    file: str
    dimensions: tuple[str, ...] = tuple(VBENCH_NATIVE)
    rewards: Mapping[str, Scored] = field(default_factory=dict)
    limit: int | None = None
    kind = "video"
    samples = 5
    note = (
        "vbench: dimensions by name, on raw scales and without its weighted total; temporal_flickering without its "
        "filter for static videos; a limit is over all dimensions' prompts"
    )

    def read(self) -> Set:
        found = [(row, self._own(row)) for row in self._rows()]
        rows = [(row["prompt_en"], {"dimension": own, **_auxiliary(row)}) for row, own in found if own]
        known = {name for _, own in found for name in own}
        missing = [name for name in self.dimensions if name not in known]
        if missing:
            raise ValueError(f"{self.file} has no prompts of the dimension {missing[0]!r}")
        labels = {name: tuple(name if name in own else "" for _, own in found if own) for name in self.dimensions}
        return Set(texts(rows, self.file), labels)

    def _rows(self) -> list[dict[str, Any]]:
        told = read_json(Path(self.file))
        good = isinstance(told, list) and all(
            isinstance(row, dict) and isinstance(row.get("prompt_en"), str) and isinstance(row.get("dimension"), list)
            for row in told
        )
        if not good:
            raise ValueError(f"{self.file} is no list of prompt_en and dimension as VBench_full_info.json")
        return list(told)

    def _own(self, row: Mapping[str, Any]) -> list[str]:
        return [name for name in row["dimension"] if name in self.dimensions]

    def scorers(self) -> tuple[Scorer, ...]:
        return tuple(Scorer(name, self._reward(name), None, None, (name, name)) for name in self.dimensions)

    def _reward(self, name: str) -> Any:
        told = recipe(self.rewards[name]) if name in self.rewards else VBENCH_NATIVE.get(name)
        if told is None:
            raise ValueError(
                f"VBench's {name} is not scored here (those that are: {', '.join(VBENCH_NATIVE)}): "
                f"name what scores it under rewards: {{{name}: ...}}"
            )
        return told


def _auxiliary(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"auxiliary_info": row["auxiliary_info"]} if "auxiliary_info" in row else {}


@dataclass(frozen=True)
class DreamBench(Benchmark):
    """DreamBench (DreamBooth, arXiv:2208.12242): is it the subject (DINO, CLIP-I), and as asked for (CLIP-T)?

    folder: the authors' dataset: dataset/prompts_and_classes.txt, and a folder of pictures for each subject, here
        beside it or in it. Pictures of one subject must have one size: bring them to one first.
    token: what stands for the subject in prompts, such as "sks"; none by default, for models that see a picture of it.
        Models that start from a picture find it under "image", the first of the subject's.
    rewards: by name, in place of DINO's ViT-S/16 and CLIP's ViT-B/32.
    """

    folder: str
    token: str = ""
    rewards: Mapping[str, Scored] = field(default_factory=dict)
    limit: int | None = None
    samples = 4
    note = "dreambench: the mean over all pairs with the subject's pictures, by the published networks"

    def read(self) -> Set:
        folder = Path(self.folder).expanduser()
        file = next(
            (path for path in (folder / "prompts_and_classes.txt", folder / "dataset" / "prompts_and_classes.txt")
             if path.is_file()), None,
        )  # fmt: skip
        if file is None:
            raise ValueError(f"{self.folder} holds no prompts_and_classes.txt as DreamBooth's dataset")
        classes, objects, live = read_subjects(read_text(file), file)
        rows = [row for subject, kind in classes.items() for row in self._of(file.parent, subject, kind, objects, live)]
        prompts = texts(rows, file)
        told = {"subject": labelled(prompts, "subject"), "kind": labelled(prompts, "kind")}
        return Set(prompts, told)

    def _of(
        self, folder: Path, subject: str, kind: str, objects: list[str], live: list[str]
    ) -> list[tuple[str, dict[str, Any]]]:
        inside = sorted((folder / subject).glob("*"))
        pictures = [str(path) for path in inside if path.suffix.lower() in PICTURES]
        if not pictures:
            raise ValueError(f"{folder / subject} holds no pictures of the subject {subject!r}")
        alive = kind in LIVE
        row = {"subject": subject, "kind": "live" if alive else "object", "class": kind}
        row |= {REFERENCES: pictures, "image": pictures[0]}  # type: ignore[dict-item]
        made = [" ".join(text.format(self.token, kind).split()) for text in (live if alive else objects)]
        return [(text, dict(row)) for text in made]

    def scorers(self) -> tuple[Scorer, ...]:
        own = {
            "DINO": {"class": "rewards.DINOScore"},
            "CLIP-I": {"class": "rewards.CLIPImageScore"},
            "CLIP-T": {"class": "rewards.CLIPScore", "model": "openai/clip-vit-base-patch32"},
        }
        own |= {name: recipe(told) for name, told in self.rewards.items()}
        return tuple(Scorer(name, told) for name, told in own.items())


def read_subjects(text: str, file: Path) -> tuple[dict[str, str], list[str], list[str]]:
    """Each subject's class, then the prompts of objects and those of live subjects, with {0} and {1} in them.

    Raises: ValueError where the file has not all of them.
    """
    classes = dict[str, str]()
    sections: list[list[str]] = []
    for line in text.splitlines():
        found, cells = PROMPT.match(line), [cell.strip() for cell in line.split(",")]
        if line.replace(" ", "").startswith("prompt_list=["):
            sections.append([])
        elif found and sections:
            sections[-1].append(found["text"])
        elif not sections and len(cells) == 2 and all(cells) and cells != ["subject_name", "class"]:
            classes[cells[0]] = cells[1]
    if not classes or len(sections) != 2 or not all(sections):
        raise ValueError(
            f"{file} has not the classes and the two lists of prompts of DreamBooth's prompts_and_classes.txt"
        )
    return classes, sections[0], sections[1]
