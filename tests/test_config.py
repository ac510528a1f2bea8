"""Configs: YAML as written, typed objects out of it, and every mistake refused in one line that says where and how."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest

from flowalign.config import (
    ConfigError,
    build,
    config_root,
    dump_yaml,
    find_config,
    load_yaml,
    locate,
    override,
    parse_yaml,
    read_options,
    resolve,
)


class Rule(Protocol):
    def __call__(self, x: float) -> float: ...


@dataclass(frozen=True)
class Scale:
    factor: float = 2.0

    def __call__(self, x: float) -> float:
        return self.factor * x


@dataclass(frozen=True)
class Adapter:
    rank: int
    alpha: float = 64.0
    targets: tuple[str, ...] = ("q", "k")


class Model(ABC):
    @abstractmethod
    def name(self) -> str: ...


class Tiny(Model):
    def __init__(self, width: int = 8) -> None:
        if width < 1:
            raise ValueError(f"width is at least 1, got {width}")
        self.width = width

    def name(self) -> str:
        return f"tiny-{self.width}"


def load_tiny(width: int = 5) -> Tiny:
    return Tiny(width)


def untyped(width=5):  # type: ignore[no-untyped-def]
    return Tiny(width)


def negate(x: float) -> float:
    return -x


class Words:
    def __init__(self, text: Sequence[str] = ("a",)) -> None:
        self.text = list(text)


@dataclass(frozen=True)
class Trainer:
    model: Model
    rate: float = 1e-4
    rule: Rule | None = None
    rules: Sequence[Rule] = ()
    score: Rule | Callable[..., Any] = negate
    prompts: Words | Sequence[str] | str = "a red circle"
    adapter: Adapter | None = None
    precision: Literal["no", "bf16"] = "no"
    folder: Path = Path("runs/x")
    clip: float | None = None
    steps: tuple[int, int] = (0, 1)
    limits: dict[str, float] | None = None
    notes: Any = None
    chunk: int | Literal["auto"] = "auto"
    kind: type[Model] = Tiny
    on: bool = True
    default: Rule = Scale(3.0)


HERE = __name__
MODEL = {"model": f"{HERE}.Tiny"}


def make(**config: Any) -> Any:
    return build(Trainer, MODEL | config, allow_code=True)


def test_scalars_keep_their_type() -> None:
    made = make(rate=1, clip=0.5, precision="bf16", folder="a/b", steps=[3, 4], limits={"x": 2}, on=False, chunk=7)
    assert (made.rate, type(made.rate)) == (1.0, float)
    assert (made.clip, made.precision, made.folder, made.steps) == (0.5, "bf16", Path("a/b"), (3, 4))
    assert (made.limits, made.on, made.chunk, make(chunk="auto").chunk) == ({"x": 2.0}, False, 7, "auto")
    assert make(clip=None).clip is None
    assert make(notes={"a": [1, {"class": "x"}]}).notes == {"a": [1, {"class": "x"}]}


def test_a_class_by_path_or_by_mapping() -> None:
    assert make().model.name() == "tiny-8"
    assert make(model={"class": f"{HERE}.Tiny", "width": 3}).model.name() == "tiny-3"
    assert make(rule={"class": f"{HERE}.Scale", "factor": 5}).rule(2.0) == 10.0
    assert make(rules=[f"{HERE}.Scale", {"class": f"{HERE}.Scale", "factor": 4}]).rules[1](1.0) == 4.0
    assert make(kind=f"{HERE}.Tiny").kind is Tiny


def test_a_function_is_taken_as_it_is_or_called() -> None:
    assert make(rule=f"{HERE}.negate").rule is negate
    assert make(score=f"{HERE}.negate").score is negate
    assert make(model=f"{HERE}.load_tiny").model.name() == "tiny-5"
    assert make(model={"class": f"{HERE}.load_tiny", "width": 6}).model.name() == "tiny-6"


def test_a_dataclass_is_its_fields() -> None:
    assert make(adapter={"rank": 4}).adapter == Adapter(4)
    assert make(adapter={"class": f"{HERE}.Adapter", "rank": 4, "targets": ["v"]}).adapter == Adapter(4, 64.0, ("v",))


def test_a_string_where_text_is_taken_too() -> None:
    """A dotted path only if it leads into one of the three packages; all else is text."""
    assert make(prompts="a red circle").prompts == "a red circle"
    assert make(prompts="my.prompts.txt").prompts == "my.prompts.txt"
    assert make(prompts="./rewards.txt").prompts == "./rewards.txt"
    assert make(prompts=["a", "b"]).prompts == ["a", "b"]
    assert make(prompts={"class": f"{HERE}.Words", "text": ["x"]}).prompts.text == ["x"]
    with pytest.raises(ConfigError, match="prompts: no 'txt' in rewards"):
        make(prompts="rewards.txt")
    with pytest.raises(ConfigError, match=r"prompts: flowalign.records.Interval is no Words \| Sequence\[str\] \| str"):
        make(prompts={"class": "flowalign.records.Interval", "index": 0})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rat": 1.0}, "unknown key 'rat' in Trainer; did you mean 'rate'?"),
        ({"adapter": {"rnak": 1}}, "adapter: unknown key 'rnak' in Adapter; did you mean 'rank'?"),
        ({"rule": {"class": f"{HERE}.Scale", "zzz": 1}}, "rule: unknown key 'zzz' in Scale; its keys are factor"),
        ({"adapter": {}}, "adapter: Adapter needs 'rank'"),
        ({"rate": "fast"}, "rate: expected float, got 'fast'"),
        ({"rate": True}, "rate: expected float, got true"),
        ({"rate": None}, "rate: expected float, got null"),
        ({"rate": float("nan")}, "rate: expected a finite number, got nan"),
        ({"clip": float("inf")}, "clip: expected a finite number, got inf"),
        ({"clip": "x"}, "clip: expected float | null, got 'x'"),
        ({"notes": [0.0, float("inf")]}, "notes[1]: expected a finite number, got inf"),
        ({"adapter": {"rank": 1.0}}, "adapter.rank: expected int, got 1.0"),
        ({"adapter": {"rank": True}}, "adapter.rank: expected int, got true"),
        ({"adapter": {"rank": 1, "targets": "q"}}, "adapter.targets: expected tuple[str, ...], got 'q'"),
        ({"adapter": {"rank": 1, "targets": [1]}}, "adapter.targets[0]: expected str, got 1; put it in quotes"),
        ({"adapter": 3}, "adapter: expected Adapter | null, got 3"),
        ({"precision": "fp8"}, "precision: expected no | bf16, got 'fp8'"),
        ({"precision": False}, "precision: expected no | bf16, got false"),
        ({"on": "yes"}, "on: expected bool, got 'yes'"),
        ({"on": 1}, "on: expected bool, got 1"),
        ({"folder": 3}, "folder: expected Path, got 3"),
        ({"steps": [1, 2, 3]}, "steps: expected 2 values, got 3"),
        ({"limits": {"x": "y"}}, "limits.x: expected float, got 'y'"),
        ({"chunk": "all"}, "chunk: expected int | auto, got 'all'"),
        ({"prompts": 3}, "prompts: expected Words | Sequence[str] | str, got 3"),
        ({"prompts": {"text": []}}, "prompts: expected Words | Sequence[str] | str, got a mapping without 'class"),
        ({"model": {"width": 3}}, "model: expected Model: name it with 'class: dotted.path'"),
        ({"model": 3}, "model: expected Model as a dotted path or as 'class: dotted.path', got 3"),
        ({"model": {"class": 3}}, "model: expected a dotted path after 'class', got 3"),
        ({"model": "no path"}, "model: expected a dotted path such as rewards.ShapesVerifier, got 'no path'"),
        ({"model": f"{HERE}.Tiney"}, f"model: no 'Tiney' in {HERE}; did you mean 'Tiny'?"),
        ({"model": "no_such_package.Tiny"}, "model: python finds no package 'no_such_package'"),
        ({"model": f"{HERE}.Scale"}, f"model: {HERE}.Scale is no Model"),
        ({"model": f"{HERE}.negate"}, f"model: {HERE}.negate returns float and is no Model"),
        ({"model": f"{HERE}.untyped"}, f"model: {HERE}.untyped returns object and is no Model"),
        ({"model": f"{HERE}.Model"}, f"model: {HERE}.Model is abstract"),
        ({"model": f"{HERE}.HERE"}, f"model: {HERE}.HERE is a str, not a class or a function"),
        ({"kind": f"{HERE}.Scale"}, f"kind: {HERE}.Scale is no type"),
        ({"rule": f"{HERE}.Tiny"}, f"rule: {HERE}.Tiny is no Rule | null"),
        ({"rules": f"{HERE}.Scale"}, "rules: expected Sequence"),
        ({"model": {"class": f"{HERE}.Tiny", "width": 0}}, f"{HERE}.Tiny: width is at least 1, got 0"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_wrong_value_is_refused_in_one_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**config)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_all_missing_keys_are_named() -> None:
    def target(model: Model, rank: int, rate: float = 1.0) -> None: ...

    with pytest.raises(ConfigError, match="target needs 'model', 'rank'"):
        build(target, {"rate": 2.0})


def test_nothing_is_constructed_before_all_is_checked() -> None:
    made: list[int] = []

    class Costly:
        def __init__(self) -> None:
            made.append(1)

    def target(first: Costly, second: int) -> None: ...

    globals()["Costly"], Costly.__qualname__ = Costly, "Costly"
    target.__annotations__["first"] = Costly
    with pytest.raises(ConfigError, match="second"):
        build(target, {"first": f"{HERE}.Costly", "second": "x"}, allow_code=True)
    assert made == []


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        f"{HERE}.Tiny",
        "flowalign.config.files.yaml.load",
        "flowalign.tracking.os.system",
        "flowalign.config.files._Loader",
        "flowalign.config.files.Path",
        "flowalign.tracking.Tensor",
        "builtins.eval",
        "rewards",
        "rewards.__builtins__",
        "flowalign..records",
        "",
    ],
)
def test_only_our_own_code_without_permission(path: str) -> None:
    with pytest.raises(ConfigError):
        locate(path)


def test_foreign_code_is_told_with_its_file(caplog: pytest.LogCaptureFixture) -> None:
    assert locate(f"{HERE}.Tiny", allow_code=True) is Tiny
    assert locate("functools.reduce", allow_code=True) is functools.reduce
    assert f"{HERE}.Tiny ({__file__})" in caplog.text
    caplog.clear()
    locate("flowalign.records.Prompts", allow_code=True)
    assert caplog.text == ""


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_extra.py").write_text("import no_such_extra\nclass Reward: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"needs_extra.Reward needs the package no_such_extra"):
        locate("needs_extra.Reward", allow_code=True)


def test_resolved_has_every_default_and_trains_the_same_again(tmp_path: Path) -> None:
    config = MODEL | {
        "rate": 3,
        "rule": f"{HERE}.negate",
        "rules": [f"{HERE}.Scale"],
        "adapter": {"rank": 2},
        "prompts": "1e-4",
        "precision": "no",
    }
    resolved = resolve(Trainer, config, allow_code=True)
    assert resolved["model"] == {"class": f"{HERE}.Tiny", "width": 8}
    assert resolved["rules"] == [{"class": f"{HERE}.Scale", "factor": 2.0}]
    assert resolved["adapter"] == {"class": f"{HERE}.Adapter", "rank": 2, "alpha": 64.0, "targets": ["q", "k"]}
    assert (resolved["rule"], resolved["folder"], resolved["steps"], resolved["clip"]) == (
        f"{HERE}.negate",
        "runs/x",
        [0, 1],
        None,
    )
    (tmp_path / "config.yaml").write_text(dump_yaml(resolved))
    again = load_yaml(tmp_path / "config.yaml")
    assert again == resolved
    assert resolve(Trainer, again, allow_code=True) == resolved
    made = build(Trainer, again, allow_code=True)
    assert (made.rate, made.rules, made.adapter, made.prompts) == (3.0, [Scale()], Adapter(2), "1e-4")


def test_a_default_of_our_own_is_written_with_its_class() -> None:
    from flowalign.records import Interval, intervals

    @dataclass
    class Target:
        step: Interval = Interval(0, 1.0, 0.5, 0.5)
        how: Callable[..., Any] = intervals
        own: Callable[..., Any] = negate
        made: list[int] = field(default_factory=lambda: [1, 2])

    Target.__annotations__.update(step=Interval, how=Callable[..., Any], own=Callable[..., Any], made=list[int])
    resolved = resolve(Target, {})
    assert resolved["step"]["class"] == "flowalign.records.Interval"
    assert resolved["step"]["sigma_next"] == 0.5
    assert resolved["how"] == "flowalign.records.intervals"
    assert resolved["made"] == [1, 2]
    assert "own" not in resolved, "a path outside the packages could not be read back"
    assert build(Target, resolved).step == Interval(0, 1.0, 0.5, 0.5)
    assert resolve(Target, resolved) == resolved


def test_scalars_are_read_as_yaml_1_2() -> None:
    text = "{a: 1e-4, b: no, c: 010, d: 1:30, e: true, f: -2, g: .5, h: 2024-01-01, i: null, j: '1', k: 1., l: 1_0}"
    assert parse_yaml(text, "x") == {
        "a": 1e-4,
        "b": "no",
        "c": 10,
        "d": "1:30",
        "e": True,
        "f": -2,
        "g": 0.5,
        "h": "2024-01-01",
        "i": None,
        "j": "1",
        "k": 1.0,
        "l": "1_0",
    }


@pytest.mark.parametrize(
    "value", ["1e-4", "no", "1", "true", "null", "", "~", ".inf", "a: b", "- a", "é\n#", "0x1", "'"]
)
def test_every_string_survives_a_dump(value: str) -> None:
    assert parse_yaml(dump_yaml({"key": value, "list": [value]}), "x") == {"key": value, "list": [value]}


@pytest.mark.parametrize("value", [1e-4, 1e-05, 1.0, 123456789.125, 1e22, -0.1, 5, -3, True, None])
def test_every_number_survives_a_dump(value: float) -> None:
    found = parse_yaml(dump_yaml({"key": value}), "x")["key"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", ":3: the key 'a' is there twice"),
        ("a:\n  b: 1\n  b: 2\n", ":3: the key 'b' is there twice"),
        ("a: !!python/object/apply:os.system [true]\n", ":1: the tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("a: &x [1]\nb: *x\n", ":1: anchors and aliases are not read"),
        ("1: a\n", ":1: the key '1' is no string"),
        ("? [a]\n: b\n", ":1: the key"),
        ("a: [1, 2\n", ":2: "),
        ("a: 1\n b: 2\n", ":2: "),
        ("a: 1\n---\nb: 2\n", ": but found another document"),
        ("- a\n", ": expected 'key: value' lines, got list"),
        ("", ": expected 'key: value' lines, got nothing"),
        ("a: " + "[" * 500 + "]" * 500, ":1: nested deeper than 40 levels"),
        ("a: " + "9" * 5000, ": "),
        ("a: \x00", ": "),
        ("#" + "x" * 1_000_001, ": larger than 1000000 bytes"),
    ],
    ids=lambda text: text[:24],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_yaml(tmp_path / "x.yaml")


def test_a_path_comes_before_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("a: 1")
    assert find_config("mine.yaml") == Path("mine.yaml")


def test_shipped_configs_are_found_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = sorted(config_root().rglob("*.yaml"))
    if not shipped:
        pytest.skip("no config is shipped yet")
    name = shipped[0].relative_to(config_root()).with_suffix("").as_posix()
    for spelling in (name, f"{name}.yaml", f"configs/{name}", f"configs/{name}.yaml", f"./configs/{name}.yaml"):
        assert find_config(spelling) == shipped[0]
    with pytest.raises(ConfigError, match=f"did you mean .*'{name}'"):
        find_config(name[:-1])
    with pytest.raises(ConfigError, match="no shipped config"):
        find_config("../pyproject")


def test_options_are_read_as_yaml_is() -> None:
    words = [
        "--rate",
        "1e-4",
        "--a.b=3",
        "--text",
        "a: b # c",
        "--list",
        "[1, x]",
        "--none",
        "null",
        "--n",
        "-1",
        "--q='1'",
    ]
    assert read_options(words) == {
        "rate": 1e-4,
        "a.b": 3,
        "text": "a: b # c",
        "list": [1, "x"],
        "none": None,
        "n": -1,
        "q": "1",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate"], "--rate needs a value"),
        (["--rate", "--x", "1"], "--rate needs a value"),
        (["rate", "1"], "expected --key value, got 'rate'"),
        (["--rate", "1", "--rate=2"], "--rate is given twice"),
        (["--", "1"], "expected --key value, got '--'"),
        (["--a..b", "1"], "expected --key value"),
        (["--list", "[1"], "--list:1: "),
    ],
)
def test_bad_options_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_options(words)
    assert str(caught.value).startswith(message)


def test_options_go_in_at_any_depth_and_leave_the_file_alone() -> None:
    config = {"a": {"b": 1, "c": 2}, "reward": "rewards.Clip", "list": [{"w": 1}, "x"]}
    options = {"a.b": 5, "new.key": 6, "reward.scale": 7, "list.0.w": 8, "top": 9}
    assert override(config, options) == {
        "a": {"b": 5, "c": 2},
        "reward": {"class": "rewards.Clip", "scale": 7},
        "list": [{"w": 8}, "x"],
        "new": {"key": 6},
        "top": 9,
    }
    assert config == {"a": {"b": 1, "c": 2}, "reward": "rewards.Clip", "list": [{"w": 1}, "x"]}
    for key in ("a.b.c", "list.5", "list.x"):
        with pytest.raises(ConfigError, match=f"--{key}"):
            override(config, {key: 1})
