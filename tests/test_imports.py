"""What the packages promise, read from their source: arrows one way, a light core, nothing that unpickles."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("flowalign", "rewards", "trainers")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# what each package may not import; the commands, evaluation/ and comparison/ are the top and may import everything
FORBIDDEN = {"flowalign": ("rewards", "trainers"), "rewards": ("trainers",), "trainers": ()}
TOP = (
    "flowalign/cli.py",
    "flowalign/commands.py",
    "flowalign/optimize_command.py",
    "flowalign/eval_command.py",
    "flowalign/compare_command.py",
    "flowalign/soup_command.py",
    "flowalign/prefer_command.py",
    "flowalign/export_command.py",
    "flowalign/doctor_command.py",
    "flowalign/slurm_command.py",
    "flowalign/__main__.py",
    "flowalign/evaluation/",
    "flowalign/comparison/",
)
OPTIONAL = ("torchvision", "open_clip", "timm", "bitsandbytes", "torchao", "xformers", "deepspeed", "rapidocr")
OPTIONAL += ("fastapi", "starlette", "uvicorn", "httpx", "av", "ftfy", "pyarrow", "datasets", "torch_fidelity")
UNPICKLERS = ("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
UNSAFE_CALLS = (
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "torch.load",
    "eval",
    "exec",
    "compile",
    "__import__",
)


def imported(tree: ast.AST) -> Iterator[str]:
    """The dotted names of all modules imported anywhere under a node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import_time(tree: ast.Module) -> ast.Module:
    """The module without the bodies of functions and of `if TYPE_CHECKING`."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if ast.unparse(node.test).endswith("TYPE_CHECKING") else self.generic_visit(node)

    return Strip().visit(ast.parse(ast.unparse(tree)))


def weights_only(node: ast.Call) -> bool:
    """torch.load that reads tensors and nothing else: published weights are such files."""
    asked = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "weights_only"]
    return ast.unparse(node.func) == "torch.load" and asked == ["True"]


def unsafe(tree: ast.AST) -> list[str]:
    """Modules and calls that can run code out of data."""
    modules = [name for name in imported(tree) if name.split(".")[0] in UNPICKLERS]
    names = [name for name in imported(tree) if name in UNSAFE_CALLS]
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and not weights_only(node)]
    pickled = [
        keyword.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if (keyword.arg, ast.unparse(keyword.value)) in (("allow_pickle", "True"), ("weights_only", "False"))
    ]
    return modules + names + pickled + [call for call in calls if call in UNSAFE_CALLS]


def top_level(names: Iterator[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_source(path: Path) -> None:
    name, tree = path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())
    if not name.startswith(TOP):
        assert top_level(imported(tree)).isdisjoint(FORBIDDEN[name.split("/")[0]]), "arrows point one way"
        assert not any(module.startswith("flowalign.cli") for module in imported(tree)), "nothing imports the top"
    assert top_level(imported(at_import_time(tree))).isdisjoint(OPTIONAL), "optional packages load where they are used"
    assert unsafe(tree) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from dill import loads",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=safe)",
        "from yaml import unsafe_load",
        "eval(text)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_unsafe_source_is_seen(source: str) -> None:
    assert unsafe(ast.parse(source))


def test_safe_source_is_not_flagged() -> None:
    assert unsafe(ast.parse("model.eval()\nyaml.safe_load(t)\nre.compile(x)\ntorch.load(p, weights_only=True)")) == []


def test_functions_and_type_checking_do_not_count_as_import_time() -> None:
    late = "if TYPE_CHECKING:\n    import timm\ndef f():\n    import open_clip\n"
    source = "import torch\n" + late + "try:\n    import torchvision\nfinally:\n    pass"
    assert top_level(imported(at_import_time(ast.parse(source)))) == {"torch", "torchvision"}


def test_help_and_config_load_without_torch() -> None:
    code = "import sys, flowalign.cli, flowalign.config; print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_rewards_load_without_pipelines() -> None:
    """Which take seconds, in every process that scores."""
    code = "import sys, rewards; print([m for m in ('transformers', 'diffusers', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
