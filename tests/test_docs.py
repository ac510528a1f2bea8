"""The documentation: what its pages and README.md show as commands, configs or Python runs, or is parsed and checked.

A comment right before a block says what becomes of it, and a block without one fails:

    <!-- run -->, <!-- run slow -->   it runs, in the page's own folder; COMMAND: WORDS in it add options, to shorten it
    <!-- not run: WHY -->             commands, options, configs and classes in it are checked all the same
    <!-- in: CONFIG -->               keys of YAML, which have to fit into this config
    <!-- said by: FILE -->            lines that this file of ours prints

A block with a title is a file in the page's folder; YAML that names a trainer or a search is a config of its own.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign import cli
from flowalign.config import find_config, load_yaml, locate, parse, read_options
from flowalign.optimize_command import METHODS, read_search
from rewards.base import FunctionReward, as_reward
from rewards.expression import REWARDS, parse_reward

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / ".docs"
PAGES = sorted(path for path in (DOCS / "pages").glob("*.md") if not path.name.startswith("_"))
README = ROOT / "README.md"
README_MARKS = {  # by language: that page has no marks of its own
    "bash": "not run: the site's pages run the same",
    "python": "not run: the weights are gated; index.md runs the same with the embedded model",
    "yaml": "in: flow_grpo/flux.1-dev_pickscore",
}
TOOLS = ("pip", "pytest", "python", "mkdocs")
FENCE = re.compile(
    r"(?:^<!--(?P<mark>(?:(?!-->).)*)-->\n)?^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
sys.path.append(str(DOCS / "hooks"))
import docs_configs  # noqa: E402
import docs_methods  # noqa: E402
import docs_reference  # noqa: E402
import docs_rewards  # noqa: E402
from docs_sources import ARXIV, modules  # noqa: E402


@dataclass(frozen=True)
class Block:
    """A block of code. mark: what becomes of it; extra: words to add, by command."""

    where: str
    language: str
    title: str
    body: str
    mark: str
    told: str
    extra: Mapping[str, list[str]]


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in FENCE.finditer(text):
        body = found["body"]
        given = found["mark"] or (README_MARKS.get(found["language"], "") if page == README else "")
        first, *rest = given.strip().splitlines() or [""]
        mark, _, told = first.partition(":")
        extra = {name: shlex.split(words) for name, _, words in (line.partition(":") for line in rest)}
        where = f"{page.name}:{text.count(chr(10), 0, found.start()) + 1}"
        yield Block(where, found["language"], found["title"] or "", body, mark.strip(), told.strip(), extra)


def commands(body: str) -> Iterator[list[str]]:
    """The words of each command of a block."""
    for line in body.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            at = words.index("&&")
            yield words[:at]
            words = words[at + 1 :]
        if words:
            yield words


def ours(words: list[str]) -> list[str] | None:
    """What `flowalign` is given, whatever launches it; None for a command that is not ours, and exists."""
    if words[0] == "flowalign":
        return words[1:]
    if "-m" in words and words[words.index("-m") + 1] == "flowalign":
        return words[words.index("-m") + 2 :]
    assert words[0] in TOOLS, words
    files = [word for word in words if word.startswith(("scripts/", ".docs/"))]
    assert all((ROOT / file).exists() for file in files if file != ".docs/site"), files
    assert {name for word in words for name in re.findall(r"\w+", word) if "[" in word} <= extras(), words
    return None


@cache
def extras() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


class Read(BaseException):
    """Ends a command once its words are read."""


def read(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[argparse.Namespace, list[str]]:
    """What the command line makes of the words; nothing runs."""
    plain, seen = cli.Parser.parse_known_args, []

    def recording(self: Any, args: Any = None, namespace: Any = None) -> Any:
        seen.append(plain(self, args, namespace))
        return seen[-1]

    def stop() -> None:
        raise Read

    with monkeypatch.context() as patch:
        patch.setattr(cli.Parser, "parse_known_args", recording)
        patch.setattr(cli, "check_packages", stop)
        with pytest.raises(Read):
            cli.main(words)
    return seen[-1]  # type: ignore[no-any-return]


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises what the command would say of its options, config and rewards before it builds anything."""
    given, rest = read(words, monkeypatch)
    if given.command in ("train", "check", "slurm"):
        check_formula(cli.read_call(given, rest).arguments.get("reward"))
    elif given.command == "optimize" and not given.target.startswith("runs/"):
        check_formula(read_search(given, rest).arguments.get("reward"))
    elif given.command in ("sample", "prefer", "soup", "optimize"):
        known = {*signature(locate(METHODS[given.method])).parameters} if given.command == "optimize" else set()
        assert {key.split(".")[0] for key in read_options(rest)} <= {"model", *known}, rest
    elif given.command == "eval":
        read_options(rest)
    elif given.command == "score" and "." in given.reward:
        parse(locate(given.reward, given.allow_code), read_options(rest), given.allow_code)
    else:
        assert not rest, rest
    named = getattr(given, "reward", None)
    for reward in [named] if isinstance(named, str) else named or []:
        check_reward(reward)


def check_reward(text: str) -> None:
    if text.startswith("{"):
        parse(as_reward, read_options(["--reward", text]), True)
    elif "." in text and text.replace(".", "").replace("_", "").isalnum():
        locate(text, True)
    else:
        check_formula(text)


def check_formula(reward: Any) -> None:
    """Raises where text is no formula of known rewards; none of them is made."""
    if isinstance(reward, str):
        one = FunctionReward(lambda media, prompts: torch.zeros(len(media)))
        parse_reward(reward, dict.fromkeys(REWARDS, one))


def merged(under: Any, over: Any) -> Any:
    """A config with keys replaced; where both are of one class, or say none, key by key."""
    if (
        not isinstance(under, dict)
        or not isinstance(over, dict)
        or over.get("class", under.get("class")) != under.get("class")
    ):
        return over
    return under | {key: merged(under.get(key), value) for key, value in over.items()}


def check_yaml(block: Block) -> None:
    Path("block.yaml").write_text(block.body)
    config = load_yaml(Path("block.yaml"))
    if block.mark == "in":
        config = merged(load_yaml(find_config(block.told)), config)
    assert {"trainer", "search"} & set(config), f"{block.where}: no config, and no mark that says in which"
    if "trainer" in config:
        call = cli.parse_trainer(config, allow_code=True)
    else:
        call = cli.parse_named(config, "search", "trainers.ReNO", "run", allow_code=True)
    check_formula(call.arguments.get("reward"))


def said(file: str) -> Iterator[re.Pattern[str]]:
    """What a file of ours prints, as expressions: the longer literals of its strings, and anything between."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node] if isinstance(node, ast.Constant) else []
        texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
        if sum(len(text) for text in texts if isinstance(text, str)) >= 15 and all(
            isinstance(t, str | None) for t in texts
        ):
            yield re.compile(".*".join("" if text is None else re.escape(text) for text in texts))


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's files in it, from which its commands run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for block in blocks(request.getfixturevalue("page")):
        if block.title:
            (tmp_path / block.title).write_text(block.body)
    return tmp_path


def named(page: Path) -> str:
    return page.stem


@pytest.mark.parametrize("page", [*PAGES, README], ids=named)
def test_a_page_s_blocks_are_right(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        known = block.language in ("text", "json") or block.title or block.mark in ("run", "run slow")
        assert known or (block.mark and block.told), f"{block.where}: no mark before this block"
        if block.language == "bash":
            for words in filter(None, map(ours, commands(block.body))):
                check_command([*words, *block.extra.get(words[0], [])], monkeypatch)
        elif block.language == "yaml":
            check_yaml(block)
        elif block.language == "json":
            assert [json.loads(line) for line in block.body.splitlines()]
        elif block.language == "python":
            code = compile(block.body, block.where, "exec")
            if block.mark == "run":
                exec(code, names)
        elif block.mark == "said by":
            forms = [*said(block.told)]
            for line in block.body.splitlines():
                assert any(form.search(line) for form in forms), f"{block.told} does not say: {line}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(b.mark == "run slow" for b in blocks(page))], ids=named)
def test_a_page_runs(page: Path, place: Path) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if block.language == "python" and block.mark.startswith("run"):
            exec(compile(block.body, block.where, "exec"), names)
        if block.language == "bash" and block.mark.startswith("run"):
            for words in filter(None, map(ours, commands(block.body))):
                code = cli.main([*words, *block.extra.get(words[0], [])])
                assert code == 0 or words[0] == "doctor", (block.where, words)  # which judges the machine


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    cells = json.loads((DOCS / "notebooks" / "quickstart.ipynb").read_text())["cells"]
    names: dict[str, Any] = {"__name__": "notebook"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "quickstart.ipynb", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names |= {"EPOCHS": 1, "GROUPS": 4, "HELD_OUT": 9, "FOLDER": str(tmp_path / "run")}
    assert len(names["learned"].total) == 9


@cache
def generated() -> dict[str, str]:
    made = (module.pages() for module in (docs_configs, docs_methods, docs_rewards, docs_reference))
    return {path: text for pages in made for path, text in pages.items()}


def anchors(text: str) -> set[str]:
    heads = re.findall(r"^#+ (.+?)(?: \{ #([^ ]+) \})?$", text, re.MULTILINE)
    return {own or re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head.lower())).strip("-") for head, own in heads}


@pytest.mark.parametrize("page", [*PAGES, README, ROOT / ".github" / "CONTRIBUTING.md"], ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.fullmatch(r"https://[\w.-]+\.[a-z]+(/\S*)?", target):
            continue
        path, _, anchor = target.partition("#")
        there = page if not path else page.parent / path
        found = there.read_text() if there.suffix == ".md" and there.exists() else generated().get(path, "")
        assert there.exists() or path in generated(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(found), f"{page.name}: {target}"


@pytest.mark.parametrize("page", [*PAGES, README], ids=named)
def test_names_in_the_text_are_known(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    configs = {path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in ROOT.glob("configs/*/*.yaml")}
    for name in re.findall(r"`([^`\n]+)`", text):
        folder = name.split("/")[0]
        for path in re.findall(r"\b(?:flowalign|trainers|rewards)(?:\.\w+)+", name):
            assert path in modules() or locate(path), f"{page.name}: {path}"
        if folder in {one.split("/")[0] for one in configs} and re.fullmatch(r"[\w./*-]+[\w*]", name):
            assert any(fnmatch(one, name) for one in configs), f"{page.name}: {name}"
        elif re.fullmatch(r"(scripts|tests|configs|trainers|rewards|\.docs)/[\w./-]+", name) and name != ".docs/site":
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_model_of_the_docs_is_the_one_that_is_tested() -> None:
    readme = ROOT / "flowalign" / "models" / "README.md"  # whose code tests/test_new_family.py runs
    (code,) = (block.body for block in blocks(readme) if block.language == "python")
    assert code in {block.body for block in blocks(DOCS / "pages" / "add_model.md")}


def test_every_paper_has_a_page() -> None:
    places = docs_reference.page_of()
    for name, module in modules().items():
        papers = {number for text in module.docstrings() for number in ARXIV.findall(text)}
        assert not papers or places[name] in generated(), name
        assert all(f"abs/{number}" in generated()["papers.md"] for number in papers)


def test_the_site_needs_nothing_of_ours_installed() -> None:
    allowed = {*sys.stdlib_module_names, "yaml", "mkdocs", "griffe", *(path.stem for path in DOCS.glob("hooks/*.py"))}
    for path in DOCS.glob("hooks/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named = [node.module] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert {str(name).split(".")[0] for name in named} <= allowed, path


def test_all_extras_are_told() -> None:
    told = re.findall(r"^\| (`.+?) \|", (DOCS / "pages" / "install.md").read_text(), re.MULTILINE)
    assert {name for row in told for name in re.findall(r"`(\w+)`", row)} == extras()
