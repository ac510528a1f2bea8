"""Published benchmarks: their own files and categories, and what here scores them.

No list of prompts is shipped, as most licences do not allow that: `file` and `folder` are where you have put the
authors' files, and what may also be a dataset of the hub takes {class: flowalign.prompts.HubPrompts, dataset: ...}.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowalign.evaluation.benchmarks import Benchmark, Labels, Scored, Scorer, Set, labelled, recipe, texts
from flowalign.prompts import PromptData, as_prompts
from rewards.ocr import target_text

GENEVAL_TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


@dataclass(frozen=True)
class GenEval(Benchmark):
    """GenEval (arXiv:2310.11513): the mean over its six tasks of the share of pictures that are right.

    file: evaluation_metadata.jsonl of the authors' repository (553 prompts; the paper draws 4 pictures of each).
    reward: `rewards.GenEval` by default, and its verdict "geneval_correct"; a server of the original through
        {class: rewards.RemoteReward, url: ...} with `part`.
    """

    file: str
    reward: Scored = None
    part: str | None = "geneval_correct"
    limit: int | None = None
    samples = 4
    note = (
        "geneval: a detector of the same architecture with its authors' own weights in transformers, not mmdetection's "
        "checkpoint, so numbers are close to published ones and not the same; a server of the original gives those"
    )

    def read(self) -> Set:
        rows = json_rows(Path(self.file), "prompt")
        for text, row in rows:
            if row.get("tag") not in GENEVAL_TASKS or not isinstance(row.get("include"), list):
                raise ValueError(
                    f"{self.file}: {text!r} has no tag and include as in GenEval's evaluation_metadata.jsonl"
                )
        prompts = texts(rows, self.file)
        return Set(prompts, {"task": labelled(prompts, "tag")})

    def scorers(self) -> tuple[Scorer, ...]:
        return (Scorer("overall", recipe(self.reward) or {"class": "rewards.GenEval"}, self.part, "task"),)


@dataclass(frozen=True)
class T2ICompBench(Benchmark):
    """T2I-CompBench (arXiv:2307.06350): prompts of attributes, relations and compositions, a file for each category.

    folder: examples/dataset of the authors' repository, of which the *_val.txt are read (color, shape, texture,
        spatial, non_spatial, complex; also 3d_spatial and numeracy of T2I-CompBench++), one prompt a line.
    reward: what scores them. The authors take BLIP-VQA, UniDet and CLIP by category; none of these is here, and
        `rewards.VQAScore` asks about the whole prompt in their place. The number is the mean over categories.
    """

    folder: str
    reward: Scored = None
    part: str | None = None
    limit: int | None = None
    samples = 10
    note = "t2i-compbench: scored by the rewards named here, not by its authors' BLIP-VQA, UniDet and CLIP"

    def read(self) -> Set:
        files = sorted(Path(self.folder).expanduser().glob("*_val.txt"))
        if not files:
            raise ValueError(f"{self.folder} holds no *_val.txt as in T2I-CompBench's examples/dataset")
        return by_file([(file, lines(file)) for file in files], "category", "_val")

    def scorers(self) -> tuple[Scorer, ...]:
        return own_scorers(self.reward, self.part, "category")


@dataclass(frozen=True)
class DrawBench(Benchmark):
    """DrawBench (Imagen, arXiv:2205.11487): 200 prompts in 11 categories.

    file: the authors' sheet as .csv or .tsv with a header: a column Prompts (or prompt), and Category.
    reward: what scores them; the authors ask people, so that any reward is a stand-in.
    """

    file: str
    reward: Scored = None
    part: str | None = None
    limit: int | None = None
    note = "drawbench: its authors ask people; the rewards here stand in for them"

    def read(self) -> Set:
        return of_sheet(Path(self.file), ("Prompts", "Prompt"), ("Category",))

    def scorers(self) -> tuple[Scorer, ...]:
        return own_scorers(self.reward, self.part)


@dataclass(frozen=True)
class PartiPrompts(Benchmark):
    """PartiPrompts (arXiv:2206.10789): 1,632 prompts with a category and a challenge each.

    file: PartiPrompts.tsv of the authors' repository (Prompt, Category, Challenge, Note).
    reward: what scores them; the authors ask people, so that any reward is a stand-in.
    """

    file: str
    reward: Scored = None
    part: str | None = None
    limit: int | None = None
    note = "partiprompts: its authors ask people; the rewards here stand in for them"

    def read(self) -> Set:
        return of_sheet(Path(self.file), ("Prompt",), ("Category", "Challenge"))

    def scorers(self) -> tuple[Scorer, ...]:
        return own_scorers(self.reward, self.part)


@dataclass(frozen=True)
class TextRendering(Benchmark):
    """Text rendering as Flow-GRPO measures it (arXiv:2505.05470): how much of the quoted text can be read.

    prompts: dataset/ocr/test.txt of the authors' repository, or any in which double quotes enclose the text.
    reward: `rewards.OCR` by default.
    """

    prompts: PromptData
    reward: Scored = None
    limit: int | None = None
    note = "ocr: read by RapidOCR, where Flow-GRPO reads by PaddleOCR 2.9.1: alike on text that both read well"

    def read(self) -> Set:
        prompts = as_prompts(self.prompts).all()
        long = tuple("up to 10" if len(target_text(prompts, i)) <= 10 else "over 10" for i in range(len(prompts)))
        return Set(prompts, {"letters": long})

    def scorers(self) -> tuple[Scorer, ...]:
        return (Scorer("text", recipe(self.reward) or {"class": "rewards.OCR"}),)


@dataclass(frozen=True)
class HPDv2(Benchmark):
    """HPDv2's benchmark (arXiv:2306.09341): prompts of four styles, scored by the preference model of the same work.

    folder: benchmark/ of zhwang/HPDv2 on the hub: anime.json, concept-art.json, paintings.json, photo.json, each a
        list of 800 prompts. The number is the mean over styles; multiply by 100 to compare with its leaderboard.
    reward: `rewards.HPSv2` by default, version 2.1.
    """

    folder: str
    reward: Scored = None
    part: str | None = None
    limit: int | None = None
    note = "hpdv2: the mean cosine; the leaderboard shows 100 times that, by version 2.0 or 2.1, which do not compare"

    def read(self) -> Set:
        files = sorted(Path(self.folder).expanduser().glob("*.json"))
        if not files:
            raise ValueError(f"{self.folder} holds no anime.json, concept-art.json ... as in HPDv2's benchmark")
        return by_file([(file, json_texts(file)) for file in files], "style", "")

    def scorers(self) -> tuple[Scorer, ...]:
        return (Scorer("hps", recipe(self.reward) or {"class": "rewards.HPSv2"}, self.part, "style"),)


@dataclass(frozen=True)
class PickAPic(Benchmark):
    """Prompts of Pick-a-Pic (arXiv:2305.01569), scored by the preference model of the same work.

    prompts: a file, or its captions on the hub: {class: flowalign.prompts.HubPrompts, dataset:
        yuvalkirstain/pickapic_v1_no_images, split: test_unique, column: caption}. Those that stand there twice are
        taken once.
    reward: `rewards.PickScore` by default.
    """

    prompts: PromptData
    reward: Scored = None
    limit: int | None = None
    note = "pick-a-pic: prompts that people wrote, unfiltered; some are not safe for work"

    def read(self) -> Set:
        found, first = as_prompts(self.prompts).all(), dict[str, int]()
        for i, text in enumerate(found.text):
            first.setdefault(text, i)
        return Set(found.rows([*first.values()]), {})

    def scorers(self) -> tuple[Scorer, ...]:
        return (Scorer("pickscore", recipe(self.reward) or {"class": "rewards.PickScore"}),)


def own_scorers(reward: Any, part: str | None, per: str | None = None) -> tuple[Scorer, ...]:
    """The one scorer of a reward that the user names; none without."""
    return () if reward is None else (Scorer(part or "score", recipe(reward), part, per),)


def lines(file: Path) -> list[str]:
    """Of a text file, without blank ones."""
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


def read_text(file: Path) -> str:
    """Raises: ValueError for a file that is not there, or is no UTF-8 text."""
    try:
        return file.expanduser().read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise ValueError(f"{file} is not there; a benchmark's file is where you have put its authors' one") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start})") from error


def read_json(file: Path) -> Any:
    """Raises: ValueError as `read_text`, and for what is no JSON."""
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: not JSON ({error.msg})") from error


def json_texts(file: Path) -> list[str]:
    """A JSON list of prompts. Raises: ValueError for anything else."""
    told = read_json(file)
    if not isinstance(told, list) or not all(isinstance(text, str) for text in told):
        raise ValueError(f"{file} is no JSON list of prompts")
    return told


def json_rows(file: Path, key: str) -> list[tuple[str, dict[str, Any]]]:
    """Objects, one a line, each a prompt and the rest of it. Raises: ValueError for one without."""
    found = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number}: not JSON ({error.msg})") from error
        if not isinstance(row, dict) or not isinstance(row.get(key), str):
            raise ValueError(f'{file}:{number}: a line must be an object with a text under "{key}"')
        found.append((row.pop(key), row))
    return found


def by_file(files: Sequence[tuple[Path, list[str]]], breakdown: str, ending: str) -> Set:
    """The prompts of several files, whose names are their categories."""
    rows = [(text, {breakdown: file.stem.removesuffix(ending)}) for file, told in files for text in told]
    prompts = texts(rows, files[0][0].parent)
    return Set(prompts, {breakdown: labelled(prompts, breakdown)})


def of_sheet(file: Path, columns: Sequence[str], categories: Sequence[str]) -> Set:
    """The prompts of a .csv or .tsv with a header, whatever its case; blank rows are passed over.

    Raises: ValueError where a column is missing, or a cell of it empty.
    """
    table = csv.reader(io.StringIO(read_text(file)), delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
    rows = [row for row in table if any(cell.strip() for cell in row)]
    header = [name.strip().lower() for name in rows[0]] if rows else []
    column = next((header.index(name.lower()) for name in columns if name.lower() in header), None)
    missing = [name for name in categories if name.lower() not in header]
    if column is None or missing:
        wanted = " and ".join([columns[0], *categories])
        raise ValueError(
            f"{file}:1: it needs columns {wanted}; its header is {', '.join(rows[0]) if rows else 'empty'}"
        )
    places = {name: header.index(name.lower()) for name in categories}
    for number, row in enumerate(rows[1:], 2):
        if len(row) < len(header) and len(row) <= max(column, *places.values()):
            raise ValueError(f"{file}: row {number} has {len(row)} cells, the header has {len(header)}")
    found = [(row[column].strip(), {name: row[at].strip() for name, at in places.items()}) for row in rows[1:]]
    prompts = texts(found, file)
    labels: dict[str, Labels] = {name: labelled(prompts, name) for name in places}
    return Set(prompts, labels)
