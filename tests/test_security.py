"""Nothing that a stranger gives runs code, reads elsewhere or asks anyone; and nothing of the user's is given away."""

from __future__ import annotations

import ast
import json
import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from flowalign import checkpoint
from flowalign.cli import main
from flowalign.media import confined, load
from flowalign.preferences import as_preferences
from flowalign.prompts import as_prompts
from rewards.mps_tower import read_module
from rewards.towers import read_weights
from scripts.audit import audit
from scripts.fuzz import attempt, film, picture, targets
from tests.jobs import job
from tests.test_imports import UNPICKLERS, imported
from tests.test_reward_remote import honest, served
from tests.test_unet import ddim, tiny_sd
from trainers import Evaluation

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path for name in ("flowalign", "rewards", "trainers", "scripts") for path in (ROOT / name).rglob("*.py")
)

# --- source

BANNED = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "torch.load", "torch.jit.load", "torch.hub.load", "torch.distributed.checkpoint.load", "runpy.run_path",
    "tempfile.mktemp", "urllib.request.urlopen",
}  # fmt: skip
NEVER = {("shell", "True"), ("trust_remote_code", "True"), ("allow_pickle", "True"), ("weights_only", "False")}
IMPORTING = {"importlib.import_module", "import_module"}  # of a name that a file does not spell out
# path, what stands there, and why it may
REASONED = {
    ("rewards/towers.py", "torch.load(weights_only=True)"): "published weights that are only to be had pickled",
    ("rewards/mps_tower.py", "torch.load(weights_only=True)"): "the same, whose classes stand for inert objects",
    ("scripts/record_rewards/aesthetic.py", "torch.load(weights_only=True)"): "the authors' file, by a developer",
    ("scripts/build_shapes/common.py", "torch.load(weights_only=True)"): "a developer's own checkpoint",
    ("scripts/record_rewards/mps.py", "torch.load"): "a file that the script itself has written a line before",
    ("scripts/record_rewards/mps.py", "weights_only=False"): "the same",
    ("flowalign/config/paths.py", "import_module"): "a config's classes: ours, or any with --allow-code",
    ("flowalign/__init__.py", "import_module"): "names of its own table",
    ("flowalign/models/memory.py", "importlib.import_module"): "names of its own table",
    ("rewards/hps.py", "importlib.import_module"): "ftfy, an extra without types",
}


def dangers(tree: ast.AST) -> Iterator[str]:
    """What may run what it reads."""
    yield from (name for name in imported(tree) if name.split(".")[0] in UNPICKLERS)
    yield from (name for name in imported(tree) if name in BANNED)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, kinds = _name(node.func), {key for key, _ in NEVER}
        given = {(one.arg, ast.unparse(one.value)) for one in node.keywords if one.arg in kinds}
        if name == "torch.load" and ("weights_only", "True") in given:
            yield "torch.load(weights_only=True)"
        elif name in BANNED | IMPORTING:
            yield name
        yield from (f"{key}={value}" for key, value in given & NEVER)


def _name(node: ast.AST) -> str:
    """A dotted name; "?" stands for what it is called on where that has none."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id if isinstance(node, ast.Name) else "?", *reversed(parts)])


def test_nothing_runs_what_it_reads_but_for_a_reason():
    found = set()
    for path in SOURCES:
        found |= {(path.relative_to(ROOT).as_posix(), one) for one in dangers(ast.parse(path.read_text()))}
    assert found - REASONED.keys() == set()
    assert REASONED.keys() - found == set(), "a reason for what is not there any more"


@pytest.mark.parametrize(
    "source",
    ["import marshal", "os.system(x)", "subprocess.run(x, shell=True)", "torch.load(p)", "from torch.hub import load",
     "torch.load(p, weights_only=False)", "A.from_pretrained(x, trust_remote_code=True)", "importlib.import_module(x)"],
)  # fmt: skip
def test_dangers_are_seen(source):
    assert source == "from torch.hub import load" or [*dangers(ast.parse(source))]


# --- hostile files


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that hostile code makes; that it would is looked at first."""
    path = tmp_path / "marker"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists(), "the payload works"
    path.unlink()
    yield path
    assert not path.exists(), "hostile code has run"


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if line.startswith("flowalign: error: ")]
    return line


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "sd"
    tiny_sd(ddim())().save_pretrained(folder)
    return folder


def evil(marker: Path) -> str:
    classes = "class Evil: ...\ndef reward(media, prompts): ...\ndef prompts(): ...\n"
    return f"from pathlib import Path\nPath({str(marker)!r}).touch()\n{classes}"


def pickled_weights(folder: Path, part: str, name: str, marker: Path) -> None:
    for file in (folder / part).glob("*.safetensors"):
        file.unlink()
    torch.save({"weight": Payload(marker)}, folder / part / name)


def own_code(folder: Path, name: str, key: str, value: Any, marker: Path) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    for place in (folder, folder / "unet"):
        (place / "evil.py").write_text(evil(marker))


PIPELINES: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "pickled network": (
        lambda folder, marker: pickled_weights(folder, "unet", "diffusion_pytorch_model.bin", marker),
        "pickled weights (*.bin) are not read",
    ),
    "pickled text encoder": (
        lambda folder, marker: pickled_weights(folder, "text_encoder", "pytorch_model.bin", marker),
        "pickled weights (*.bin) are not read",
    ),
    "pickle called safetensors": (
        lambda folder, marker: pickled_weights(folder, "vae", "diffusion_pytorch_model.safetensors", marker),
        "can be had neither as a folder nor from the hub",
    ),
    "a pipeline class of its own": (
        lambda folder, marker: own_code(folder, "model_index.json", "_class_name", ["evil", "Evil"], marker),
        "no adapter for ['evil', 'Evil']",
    ),
    "a network class of its own": (
        lambda folder, marker: own_code(folder, "model_index.json", "unet", ["evil", "Evil"], marker),
        "contains custom code",
    ),
    "a function of python's": (
        lambda folder, marker: own_code(folder, "model_index.json", "unet", ["os", "system"], marker),
        "can be had neither as a folder nor from the hub",
    ),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_hostile_pipeline(name, pipeline, marker, tmp_path, capsys):
    folder = Path(shutil.copytree(pipeline, tmp_path / "sd"))
    spoil, line = PIPELINES[name]
    spoil(folder, marker)
    assert line in refused(capsys, "sample", folder, "--prompt", "a", "--steps", 1, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["lora.bin", "lora.pt", "lora.ckpt", "lora.safetensors"])
def test_a_hostile_lora(name, pipeline, marker, tmp_path, capsys):
    torch.save({"a": Payload(marker)}, tmp_path / name)
    words = ["--prompt", "a", "--lora", tmp_path / name, "--out", tmp_path / "out"]
    assert "holds no LoRA in safetensors, and pickled ones are not read" in refused(capsys, "sample", pipeline, *words)
    assert "cannot be read as safetensors" in refused(capsys, "soup", tmp_path / name, tmp_path / name, "--out", "o")


@pytest.mark.parametrize("read", [read_weights, read_module])
@pytest.mark.parametrize("name", ["w.pt", "w.bin", "w.ckpt", "w.pth", "w.safetensors"])
def test_hostile_weights_of_a_reward(name, read, marker, tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1), "b": Payload(marker)}}, tmp_path / name)
    with pytest.raises(
        ValueError, match=r"cannot be read as (weights|a module's weights)|holds neither a module nor tensors"
    ) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert "trust" not in str(caught.value), "no advice to run it all the same"


def test_a_hostile_reward_from_the_command(marker, tmp_path, capsys):
    torch.save({"a": Payload(marker)}, tmp_path / "w.pt")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    words = ["--media", tmp_path / "a.png", "--prompt", "a", "--model", tmp_path / "w.pt", "--out", tmp_path / "out"]
    assert "it holds pickled objects that are no tensors, which are never run" in refused(
        capsys, "score", "rewards.ImageReward", *words
    )


def test_a_hostile_checkpoint_whose_hashes_agree(marker, tmp_path):
    job(tmp_path / "run", epochs=1, evaluation=Evaluation()).train(report=False)
    path = tmp_path / "run" / "checkpoints" / checkpoint.names(tmp_path / "run" / "checkpoints")[-1]
    manifest, content = json.loads((path / "manifest.json").read_text()), pickle.dumps(Payload(marker))
    for name in ("state.safetensors", "state.json"):
        before = (path / name).read_bytes()
        (path / name).write_bytes(content)
        told = {name: {"bytes": len(content), "sha256": sha256(content).hexdigest()}}
        (path / "manifest.json").write_text(json.dumps(manifest | {"files": manifest["files"] | told}))
        assert checkpoint.verify(path) is None
        with pytest.raises(ValueError, match="are none of FlowAlign's, though their hashes agree"):
            job(tmp_path / "run", epochs=2, evaluation=Evaluation()).train(resume=True)
        (path / name).write_bytes(before)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv", "p.tsv", "p.parquet", "p.pkl", "p.pt"])
def test_hostile_prompts(name, marker, tmp_path, capsys):
    (tmp_path / name).write_bytes(pickle.dumps(Payload(marker)))
    words = ["--folder", tmp_path / "run", "--prompts", tmp_path / name, "--model.pipeline", "./no-such-model"]
    assert name in refused(capsys, "train", "flow_grpo/shapes", *words)


def test_tables_of_pickled_values(marker, tmp_path):
    """Bytes are bytes; and a column whose type would be unpickled by old versions of pyarrow."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    payload = pickle.dumps(Payload(marker))
    field = pa.field(
        "prompt", pa.string(),
        metadata={b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": payload},
    )  # fmt: skip
    parquet.write_table(pa.table([pa.array(["a"])], schema=pa.schema([field])), tmp_path / "p.parquet")
    assert as_prompts(str(tmp_path / "p.parquet")).all().text == ("a",)
    parquet.write_table(pa.table({"prompt": [payload]}), tmp_path / "bytes.parquet")
    with pytest.raises(ValueError, match=r"bytes\.parquet, row 0: the prompt is no text"):
        as_prompts(str(tmp_path / "bytes.parquet")).all()


@pytest.mark.parametrize("name", ["p.parquet", "p.arrow", "p.jsonl", "p.json", "p.csv", "p.pkl"])
def test_hostile_preferences(name, marker, tmp_path):
    (tmp_path / name).write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(ValueError, match=name):
        as_preferences(str(tmp_path / name))


@pytest.mark.parametrize("command", ["train", "check", "optimize", "serve"])
def test_a_config_with_python_in_it(command, marker, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(f"trainer: !!python/object/apply:os.system ['touch {marker}']\n")
    assert "c.yaml:1: the tag tag:yaml.org,2002:python/object/apply:os.system is not read" in refused(
        capsys, command, path
    )


@pytest.mark.parametrize("command", ["sample", "report", "prefer", "soup"])
def test_a_run_folder_with_python_in_it(command, marker, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "lora").mkdir(parents=True)
    (run / "config.yaml").write_text(f"model: !!python/object/apply:os.system ['touch {marker}']\n")
    (run / "metrics.jsonl").write_bytes(pickle.dumps(Payload(marker)))
    (run / "lora" / "pytorch_lora_weights.safetensors").write_bytes(pickle.dumps(Payload(marker)))
    words = {
        "sample": ["--prompt", "a"], "report": [], "soup": [run, "--out", tmp_path / "out"],
        "prefer": ["--reward", "rewards.JPEGCompressibility", "--prompts", run / "config.yaml"],
    }[command]  # fmt: skip
    refused(capsys, command, run, *words)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/tmp/x) (w) file closefile\n%%EOF\n"


@pytest.mark.parametrize("name", ["m.png", "m.jpg", "m.webp", "m.mp4", "m.gif", "m.webm"])
@pytest.mark.parametrize("content", ["pickle", "postscript"])
def test_hostile_media(name, content, marker, tmp_path, capsys):
    (tmp_path / name).write_bytes(EPS if content == "postscript" else pickle.dumps(Payload(marker)))
    words = ["--media", tmp_path / name, "--prompt", "a", "--out", tmp_path / "out"]
    assert f"{name} cannot be read as a " in refused(capsys, "score", "rewards.JPEGCompressibility", *words)


def lists_of_others(url: str, real: Path) -> dict[str, str]:
    """What FFmpeg reads as a list of files and addresses, or as a port to listen at."""
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"
    return {
        "hls over http": hls.format(f"{url}/a.ts"),
        "hls of a file": hls.format(f"file://{real}"),
        "concat, absolute": f"ffconcat version 1.0\nfile {real}\n",
        "concat, beside": f"ffconcat version 1.0\nfile {real.name}\n",
        "concat over http": f"ffconcat version 1.0\nfile {url}/b.mp4\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    }


def test_a_video_cannot_name_other_files_or_addresses(tmp_path):
    real = tmp_path / "real.mp4"
    real.write_bytes(film("MP4"))
    assert len(load(real)[0]) == 5
    with served(honest) as (url, seen):
        for text in lists_of_others(url, real).values():
            (tmp_path / "x.mp4").write_text(text)
            for data in (None, text.encode()):
                with pytest.raises(ValueError, match="cannot be read as a video"):
                    load(tmp_path / "x.mp4", data)
    assert seen == []


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_that_decodes_to_far_more(tmp_path):
    Image.new("1", (12_000, 12_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 40_000
    with pytest.raises(ValueError, match=r"bomb\.png has 12000 x 12000 pixels; the most are 64,000,000"):
        load(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    "name",
    ["../up.png", "/etc/hostname", "a/../../up.png", "link/up.png", "a/./../../up.png", "..", "//etc/hostname",
     "link/../../up.png", "/proc/self/environ", "nul\0.png", "a\0/../../up.png"],
)  # fmt: skip
def test_files_that_data_name_stay_in_its_folder(name, tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "link").symlink_to(tmp_path)
    (tmp_path / "up.png").write_bytes(picture("PNG"))
    with pytest.raises(ValueError):
        confined(tmp_path / "data", name)
    for key, value in (("references", [name]), ("image", name), ("media", name)):
        (tmp_path / "data" / "p.jsonl").write_text(json.dumps({"prompt": "a", key: value}))
        with pytest.raises(ValueError, match=r"p\.jsonl:1: "):
            as_prompts(str(tmp_path / "data" / "p.jsonl"))


@pytest.mark.parametrize("url", ["http://169.254.169.254/a.png", "https://localhost/a.png", "file:///etc/hostname"])
def test_data_name_no_addresses(url, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a", "image": url}))
    with pytest.raises(ValueError, match=r"p\.jsonl:1: "):
        as_prompts(str(tmp_path / "p.jsonl"))


def test_a_report_of_a_stranger_s_run_holds_no_script_of_theirs(tmp_path):
    script = "<script>alert(1)</script>"
    run = tmp_path / "run"
    (run / "evaluations").mkdir(parents=True)
    rows = [
        {"step": i, "seconds": float(i), "reward": 0.1, f"reward/{script}": 0.5, "held-out": 0.1 * i} for i in (0, 1)
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (run / "config.yaml").write_text(json.dumps({"trainer": script, "epochs": 3, "reward": script}))
    (run / "evaluations" / "prompts.jsonl").write_text(json.dumps({"prompt": script}))
    for epoch in (0, 1):
        (run / "evaluations" / f"epoch-{epoch:06d}.jsonl").write_text(json.dumps({"total": epoch, "valid": True}))
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert script not in page
    assert "alert(1)" in page


# --- code of one's own


def asking(place: Path) -> dict[str, list[object]]:
    """Every command that reads a config or a class's name, with a class of the user's."""
    run, out = place / "run", place / "out"
    run.mkdir()
    (run / "config.yaml").write_text("model: {class: evil.Evil}\n")
    (run / "metrics.jsonl").write_text("")
    shutil.copytree(ROOT / "flowalign" / "shapes" / "weights" / "few-step", run / "lora", dirs_exist_ok=True)
    (place / "c.yaml").write_text("class: evil.Evil\n")
    (place / "p.txt").write_text("a\n")
    Image.new("RGB", (8, 8)).save(place / "a.png")
    named, prompts = ["--reward", "evil.Evil"], ["--prompt", "a"]
    clip = ["--reward", "{class: rewards.CLIPScore, model: shapes}"]
    return {
        "train": ["flow_grpo/shapes", "--folder", out, "--sampling.plan", "evil.Evil"],
        "train, its trainer": ["flow_grpo/shapes", "--folder", out, "--trainer", "evil.Evil"],
        "check": ["flow_grpo/shapes", "--folder", out, "--sampling.plan", "evil.Evil"],
        "sample": [run, *prompts, "--out", out],
        "sample, its prompts": ["shapes", "--prompts", "{class: evil.prompts}", "--out", out],
        "score": ["evil.Evil", "--media", place / "a.png", *prompts, "--out", out],
        "score, a formula": ["{class: evil.Evil}", "--media", place / "a.png", *prompts, "--out", out],
        "optimize": ["shapes-few-step", *prompts, *named, "--out", out],
        "prefer": ["shapes", *named, "--prompts", "{class: flowalign.shapes.train_prompts}", "--out", out],
        "eval": ["eval/shapes", "--folder", out, "--metrics.clip.class", "evil.Evil"],
        "soup": [run, run, "--sweep", "2", *named, "--prompts", place / "p.txt", "--model", "shapes", "--out", out],
        "soup, its model": [run, run, "--sweep", "2", *clip, "--prompts", place / "p.txt", "--out", out],
        "slurm": ["flow_grpo/shapes", "--time", "1:00:00", "--folder", out, "--sampling.plan", "evil.Evil"],
        "serve": ["evil.Evil"],
        "serve, a file": [place / "c.yaml"],
    }


COMMANDS = (
    "train", "train, its trainer", "check", "sample", "sample, its prompts", "score", "score, a formula", "optimize",
    "prefer", "eval", "soup", "soup, its model", "slurm", "serve", "serve, a file",
)  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_code_from_outside_runs_only_where_it_is_allowed(name, tmp_path, monkeypatch, capsys, caplog):
    marker, command = tmp_path / "marker", name.partition(",")[0]
    (tmp_path / "evil.py").write_text(evil(marker))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    words = asking(tmp_path)[name]
    assert "is code from outside flowalign, rewards and trainers; run it with --allow-code" in refused(
        capsys, command, *words
    )
    assert not marker.exists()
    assert "evil" not in sys.modules
    refused(capsys, command, *words, "--allow-code")  # it is no trainer, no reward that scores, and the like
    assert marker.exists()
    assert "code from outside flowalign: evil." in caplog.text
    assert f"({tmp_path / 'evil.py'})" in caplog.text
    sys.modules.pop("evil", None)


ASKING_FOR_IT = {
    "score": "{class: rewards.server.make_reward, named: {class: evil.Evil}, allow_code: true}",
    "serve": "{class: rewards.server.read_reward, text: evil.yaml, allow_code: true}",
    "sample": "{class: flowalign.sample.read_prompts, text: '{class: evil.prompts}', allow_code: true}",
}


@pytest.mark.parametrize("command", ASKING_FOR_IT)
def test_no_config_allows_code_itself(command, tmp_path, monkeypatch, capsys):
    """Functions of ours that ask whether code is allowed are not told so by the config that names them."""
    marker, out = tmp_path / "marker", ["--out", tmp_path / "out"]
    (tmp_path / "evil.py").write_text(evil(marker))
    (tmp_path / "evil.yaml").write_text("class: evil.Evil\n")
    (tmp_path / "c.yaml").write_text(f"reward: {ASKING_FOR_IT[command]}\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    words = {
        "score": [ASKING_FOR_IT["score"], "--media", tmp_path / "a.png", "--prompt", "a", *out],
        "serve": [tmp_path / "c.yaml"],
        "sample": ["shapes", "--prompts", ASKING_FOR_IT["sample"], *out],
    }[command]
    assert "'allow_code' is no key of a config: give --allow-code on the command line" in refused(
        capsys, command, *words
    )
    assert not marker.exists()


def test_code_is_allowed_by_no_default():
    """Whatever asks whether code is allowed has to be told so."""
    asking = 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                named = [*node.args.posonlyargs, *node.args.args]
                pairs = [*zip(named[::-1], node.args.defaults[::-1], strict=False)]
                pairs += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
                asking += any(one.arg == "allow_code" for one in (*named, *node.args.kwonlyargs))
                assert all(ast.unparse(default or ast.Constant(False)) == "False" for one, default in pairs
                           if one.arg == "allow_code"), path  # fmt: skip
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "allow_code" and node.value:
                assert ast.unparse(node.value) == "False", path
    assert asking > 10


def test_a_config_calls_nothing_for_its_effects(tmp_path, capsys):
    """A function that returns nothing is no value, not even where there may be none."""
    held = tmp_path / "config.json"
    held.write_text('{"_name_or_path": "x"}')
    named = f"{{class: flowalign.publishing.scrub, folder: {tmp_path}}}"
    said = refused(capsys, "train", "flow_grpo/shapes", "--folder", tmp_path / "run", "--model.lora", named)
    assert "flowalign.publishing.scrub returns null and is no" in said
    assert held.read_text() == '{"_name_or_path": "x"}'


# --- secrets

CANARIES = {
    "HF_TOKEN": "hf_canary0123456789", "WANDB_API_KEY": "wandbcanary0123456789", "OPENAI_API_KEY": "sk-canary0123456789"
}  # fmt: skip
TOKEN = "reward-canary-0123456789"


def test_tokens_are_written_nowhere(tmp_path, monkeypatch, capfd):
    """A run with a remote reward that needs one, from its config to its report; and one whose server refuses it."""
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "token").write_text(TOKEN)
    run = tmp_path / "run"
    short = [
        "--epochs=1", "--sampling.groups=2", "--sampling.group_size=3", "--sampling.batch_size=3", "--sampling.steps=3",
        "--prompts.count=4", "--evaluation.prompts.count=2", "--evaluation.metric=total",
    ]  # fmt: skip
    with served(honest) as (url, seen):
        reward = f"{{class: rewards.RemoteReward, url: '{url}', token_file: {tmp_path / 'token'}}}"
        assert main(["train", "flow_grpo/shapes", "--folder", str(run), *short, "--reward", reward]) == 0
    assert {one["headers"]["Authorization"] for one in seen} == {f"Bearer {TOKEN}"}
    assert main(["train", "flow_grpo/shapes", "--folder", str(run), *short, "--reward", reward, "--epochs=2"]) == 2
    said = capfd.readouterr()
    held = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert (run / "report.html").exists()
    for secret in (*CANARIES.values(), TOKEN):
        assert secret not in said.out + said.err
        assert secret.encode() not in held


# --- broken files


@pytest.mark.parametrize("name", targets())
def test_broken_files_are_read_or_refused_in_one_line(name, tmp_path):
    target, rng = targets()[name], random.Random(7)
    said = set()
    for number in range(12 if name.startswith("a.") else 20):
        (tmp_path / str(number)).mkdir()
        said.add(attempt(target, rng, tmp_path / str(number)))
    assert said <= {"read", "refused"}


# --- dependencies


def told(*vulnerabilities: dict[str, Any]) -> str:
    """A program that says what pip-audit would."""
    return f"print({json.dumps({'dependencies': [{'name': 'a', 'version': '1', 'vulns': vulnerabilities}]})!r})"


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("import sys; sys.exit('ConnectionError: api.osv.dev')", 0, "skipped: pip-audit came to no result (Connection"),
        (told(), 0, "1 packages, 0 known"),
        (told({"id": "CVE-1", "fix_versions": ["2"]}), 1, "a 1: CVE-1, mended in 2\n1 packages, 1 known"),
        (told({"id": "CVE-1", "fix_versions": []}), 0, "a 1: CVE-1, mended in no version yet"),
    ],
    ids=["no network", "clean", "mended later", "not mended"],
)
def test_an_audit_that_cannot_be_made_is_no_failure(script, code, said):
    found = audit([sys.executable, "-c", script])
    assert found[0] == code
    assert found[1].startswith(said)
    assert audit([os.devnull])[1].startswith("skipped: ")
