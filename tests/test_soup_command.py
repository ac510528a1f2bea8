"""`flowalign soup` on the embedded world: merges, sweeps that go on where they were stopped, and refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import randomise_policy

from flowalign import soup_sweep
from flowalign.adapters import LoRA
from flowalign.cli import main
from flowalign.config import dump_yaml
from flowalign.lora_files import read_lora
from flowalign.models import SD3, PipelineModel
from flowalign.shapes.prompts import held_out_prompts
from flowalign.soup_sweep import set_policy
from flowalign.soup_table import table, text_table
from flowalign.soups import concatenated, merge_loras
from flowalign.tracking import json_lines
from rewards import LearntReward
from tests.families import CASES, Case

PROMPTS = ["a red circle left of a blue square", "two green triangles", "a large white star"]
CONFIG = {
    "trainer": "trainers.FlowGRPO",
    "model": {"class": "flowalign.models.SD3", "pipeline": "shapes", "lora": {"rank": 4}},
    "sampling": {"steps": 2, "guidance_scale": 1.0},
}
SHAPES, JPEG = "shapes", "rewards.JPEGCompressibility"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two runs as training leaves them, of ranks 4 and 2."""
    folders = []
    for rank, scale in ((4, 0.1), (2, -0.15)):
        folder = tmp_path_factory.mktemp("run")
        model = SD3("shapes", lora=LoRA(rank=rank, alpha=2 * rank))
        randomise_policy(model, scale)
        model.save(folder / "lora")
        (folder / "config.yaml").write_text(dump_yaml(CONFIG))
        folders.append(str(folder))
    return folders


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("prompts") / "held_out.jsonl"
    held = held_out_prompts(len(PROMPTS))
    rows = [{"prompt": text} | dict(row) for text, row in zip(PROMPTS, held.metadata, strict=True)]
    file.write_bytes(json_lines(rows))
    return str(file)


def test_a_reward_with_arguments_is_swept_under_its_own_name(
    runs: list[str], prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def words(quality: int) -> list[str]:
        reward = f"{{class: rewards.JPEGCompressibility, quality: {quality}}}"
        return ["soup", *runs, "--sweep", "2", "--reward", reward, "--prompts", prompts, "--out", str(tmp_path / "out")]

    assert main(words(80)) == 0
    assert capsys.readouterr().out.startswith("w1,w2,jpeg_compressibility,jpeg_compressibility error,")
    assert main(words(90)) == 2
    assert "holds a sweep with another rewards" in capsys.readouterr().err


def sweep(runs: list[str], prompts: str, out: Path, points: int, *words: str) -> int:
    rewards = ["--reward", SHAPES, "--reward", JPEG]
    return main(["soup", *runs, "--sweep", str(points), *rewards, "--prompts", prompts, "--out", str(out), *words])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def swept(runs: list[str], prompts: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweeps") / "sweep"
    assert sweep(runs, prompts, out, 3) == 0
    return out


def test_a_merge_is_sampled_as_any_lora(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "both"
    assert main(["soup", *runs, "--weights", "0.7", "0.3", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(out)
    assert "merged 2 policies: rank 6, exact" in said.err
    told = json.loads((out / "soup.json").read_text())
    assert [one["weight"] for one in told["members"]] == [0.7, 0.3]
    words = ["sample", runs[0], "--lora", str(out), "--prompt", PROMPTS[0], "--out", str(tmp_path / "made")]
    assert main(words) == 0
    assert main(["soup", *runs, "--out", str(tmp_path / "low"), "--rank", "2"]) == 0
    assert "rank 2, relative error 0." in capsys.readouterr().err


def test_a_member_that_was_not_trained_is_told(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SD3("shapes", lora=LoRA(rank=4)).save(tmp_path / "start")
    assert main(["soup", *runs, "--out", str(tmp_path / "two")]) == 0
    assert "changes nothing" not in capsys.readouterr().err
    assert main(["soup", runs[0], str(tmp_path / "start"), "--out", str(tmp_path / "half")]) == 0
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "changes nothing" in line]
    assert f"{tmp_path / 'start'}" in told


def test_a_sweep_leaves_table_sheets_and_plot(swept: Path) -> None:
    rows = [json.loads(line) for line in (swept / "sweep.jsonl").read_text().splitlines()]
    assert [row["weights"] for row in rows] == [[1, 0], [0.5, 0.5], [0, 1]]
    names = ["0.5_0.5", "0_1", "1_0"]
    files = [f"{name}.{kind}" for name in names for kind in ("jsonl", "png")]
    assert sorted(path.name for path in (swept / "points").iterdir()) == files
    for row in rows:
        scores = [json.loads(line) for line in (swept / "points" / f"{label(row)}.jsonl").read_text().splitlines()]
        assert [score["prompt"] for score in scores] == PROMPTS
        for name in (SHAPES, JPEG):
            assert row["mean"][name] == pytest.approx(np.mean([score[name] for score in scores]))
            ends = [other["mean"][name] for other in rows if 1.0 in other["weights"]]
            assert row["chord"][name] == pytest.approx(np.dot(row["weights"], ends))
            assert row["invalid"][name] == 0
    assert len({row["mean"][JPEG] for row in rows}) == 3
    svg = (swept / "pareto.svg").read_text()
    assert svg.count("<circle") == 3
    assert svg.count('class="best"') == sum(row["non_dominated"] for row in rows)
    assert ">0.5 0.5</text>" in svg


def label(row: dict[str, list[float]]) -> str:
    return "_".join(f"{weight:g}" for weight in row["weights"])


def test_the_sweeps_pictures_are_those_of_sample_with_the_merged_lora(
    runs: list[str], prompts: str, swept: Path, tmp_path: Path
) -> None:
    assert main(["soup", *runs, "--out", str(tmp_path / "half")]) == 0
    drawn = []
    for lora, name in ((tmp_path / "half", "0.5_0.5"), (Path(runs[1]) / "lora", "0_1")):
        out = tmp_path / name
        assert main(["sample", runs[0], "--lora", str(lora), "--prompts", prompts, "--out", str(out)]) == 0
        sheet = np.asarray(Image.open(swept / "points" / f"{name}.png")).astype(int)
        alone = np.asarray(Image.open(out / "grid.png")).astype(int)
        height = min(sheet.shape[0], alone.shape[0], 130)  # the first row of pictures; captions differ
        assert np.abs(sheet[:height] - alone[:height]).max() <= 1
        drawn.append(alone[:height])
    assert np.abs(drawn[0] - drawn[1]).max() > 30


def test_a_sweep_goes_on_where_it_was_stopped(
    runs: list[str], prompts: str, swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    shutil.copytree(swept, out)
    whole = contents(out)
    (out / "points" / "0.5_0.5.jsonl").unlink()  # as where it was killed between sheet and scores
    kept = out / "points" / "1_0.jsonl"
    kept.write_text(kept.read_text().replace('"rewards.JPEGCompressibility": -', '"rewards.JPEGCompressibility": -9'))
    marked = kept.read_bytes()
    assert sweep(runs, prompts, out, 3) == 0
    assert kept.read_bytes() == marked  # it was read and not drawn again
    assert (out / "points" / "0.5_0.5.jsonl").read_bytes() == whole["points/0.5_0.5.jsonl"]
    assert (out / "sweep.jsonl").read_bytes() != whole["sweep.jsonl"]
    kept.write_bytes(whole["points/1_0.jsonl"])
    assert sweep(runs, prompts, out, 5) == 0  # a finer grid adds its points
    assert {name: value for name, value in contents(out).items() if name in whole and "points" in name} == {
        name: value for name, value in whole.items() if "points" in name
    }
    table = capsys.readouterr().out.strip().splitlines()[-6:]
    assert table[0].startswith(
        "w1,w2,shapes,shapes error,shapes over chord,shapes invalid,rewards.JPEGCompressibility,"
    )
    assert [line.split(",")[0] for line in table[1:]] == ["1", "0.75", "0.5", "0.25", "0"]
    assert {line.split(",")[4] for line in (table[1], table[-1])} == {"0"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "1"], "holds a sweep with another seed; name another folder"),
        (["--steps", "3"], "holds a sweep with another steps"),
        (["--reward", "jpeg"], "holds a sweep with another rewards"),
        (["--model.height", "32", "--model.width", "48"], "holds a sweep with another model.height, model.width"),
    ],
)
def test_a_folder_holds_one_sweep(
    words: list[str], message: str, runs: list[str], prompts: str, swept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(swept)
    assert sweep(runs, prompts, swept, 3, *words) == 2
    assert message in only_line(capsys)
    assert contents(swept) == before


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "0.5", "0.6"], "add up to 1, got 0.5 0.6"),
        (["--weights", "1"], "2 members but 1 weights"),
        (["--reward", "shapes"], "--reward is for a sweep"),
        (["--seed", "0"], "--seed is for a sweep"),
        (["--sweep", "3", "--reward", "shapes", "--prompts", "PROMPTS", "--batch-size", "0"], "must be at least 1"),
        (["--model.height", "32"], "--model.height is for a sweep"),
        (["--sweep", "3"], "needs --reward and --prompts"),
        (["--sweep", "1", "--reward", "shapes", "--prompts", "PROMPTS"], "at least 2 members and 2 points"),
        (["--sweep", "3", "--rank", "2"], "are for one soup"),
        (["--sweep", "3", "--reward", "shapes", "--reward", "shapes", "--prompts", "PROMPTS"], "given twice"),
        (["--sweep", "3", "--reward", "shapes", "--prompts", "PROMPTS", "--foo", "1"], "--foo is no option of soup"),
        (["--sweep", "3", "--reward", "group_normalise(jpeg)", "--prompts", "PROMPTS"], "on other samples"),
        (["--sweep", "3", "--reward", "running_normalise(jpeg)", "--prompts", "PROMPTS"], "on other samples"),
        (["--sweep", "3", "--reward", "nosuch", "--prompts", "PROMPTS"], "unknown reward 'nosuch'"),
        (["--sweep", "3", "--reward", "shapes", "--prompts", "PROMPTS", "--model.lora.rank", "2"], "no option of soup"),
        (["--sweep", "3", "--reward", "shapes", "--prompts", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    words: list[str],
    message: str,
    runs: list[str],
    prompts: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [prompts if word == "PROMPTS" else word for word in words]
    assert main(["soup", *runs, *given, "--out", str(tmp_path / "out")]) == 2
    assert message in only_line(capsys)
    assert not (tmp_path / "out").exists()


def test_members_without_a_run_need_a_model_and_runs_of_two_models_do_not_mix(
    runs: list[str], prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loras = [f"{run}/lora" for run in runs]
    assert sweep(loras, prompts, tmp_path / "out", 2) == 2
    assert "name their base model with --model" in only_line(capsys)
    for module, message in (("attn.to_q", "in the model: name the model that they were"), ("x", "names no module of")):
        name = f"transformer.transformer_blocks.0.{module}"
        values = {f"{name}.lora_A.weight": torch.ones(2, 40), f"{name}.lora_B.weight": torch.ones(40, 2)}
        files = [str(tmp_path / f"{module}{i}.safetensors") for i in range(2)]
        for file in files:
            save_file(values, file)
        assert sweep(files, prompts, tmp_path / "out", 2, "--model", "shapes") == 2
        assert message in only_line(capsys)
    assert not (tmp_path / "out").exists()
    other = tmp_path / "other"
    shutil.copytree(runs[1], other)
    (other / "config.yaml").write_text(dump_yaml(CONFIG | {"model": CONFIG["model"] | {"pipeline": "shapes-few-step"}}))  # type: ignore[operator]
    assert main(["soup", runs[0], str(other), "--out", str(tmp_path / "soup")]) == 2
    assert "was trained on shapes and" in only_line(capsys)
    assert main(["soup", runs[0], "--out", str(tmp_path / "soup")]) == 2
    assert "at least two members" in only_line(capsys)


def test_a_policy_is_set_whole_or_not_at_all(runs: list[str]) -> None:
    one, two = (read_lora(run) for run in runs)
    model = soup_sweep.load_model({"class": "flowalign.models.SD3", "pipeline": "shapes"}, [one, two])
    whole = concatenated([one.factors, two.factors], [0.25, 0.75])
    set_policy(model, whole)
    name = "transformer_blocks.0.attn.to_q"
    layer = model.module.get_submodule(name)
    wanted = 0.25 * one.factors[f"transformer.{name}"].delta() + 0.75 * two.factors[f"transformer.{name}"].delta()
    torch.testing.assert_close(layer.get_delta_weight("policy").double(), wanted, rtol=0, atol=1e-6)  # type: ignore[operator]
    with pytest.raises(ValueError, match="is in a member and not in the model"):
        set_policy(model, whole | {"transformer.more": whole[f"transformer.{name}"]})
    set_policy(model, {})
    assert not layer.get_delta_weight("policy").any()  # type: ignore[operator]
    narrow = {f"transformer.{name}": replace(whole[f"transformer.{name}"], up=torch.zeros(3, 6))}
    with pytest.raises(ValueError, match=r"in the members and .* in the model"):
        set_policy(model, narrow)


FAMILIES = ("sd1.5 ddim", "sdxl", "wan", "flux dev", "qwen-image", "z-image")


@pytest.mark.parametrize("case", [case for case in CASES if case.name in FAMILIES], ids=lambda case: case.name)
def test_soups_of_every_family_load_and_sweep(case: Case, tmp_path: Path) -> None:
    """Members of other ranks and layers: what the file gives on loading is what a sweep sets."""

    def adapted(lora: LoRA) -> PipelineModel:
        return case.adapt(case.make(), lora=lora, **case.options, **case.sizes[0])  # type: ignore[arg-type]

    for name, lora in (("a", LoRA(3, 5)), ("b", LoRA(2, 7, targets=case.adapt.targets[:1]))):
        model = adapted(lora)
        randomise_policy(model, 0.3)
        model.save(tmp_path / name)
    merge_loras([tmp_path / "a", tmp_path / "b"], [0.4, 0.6], tmp_path / "soup")
    loaded, swept = adapted(LoRA(start=str(tmp_path / "soup"))), adapted(LoRA(6, 6))
    members = [read_lora(tmp_path / name).factors for name in "ab"]
    set_policy(swept, concatenated(members, [0.4, 0.6]))
    told, noise, sigma = loaded.encode(["a red circle"]), torch.randn(1, *loaded.latent_shape), loaded.sigmas(4)[1]
    with torch.no_grad():
        one, other = (model.velocity(noise, sigma, told) for model in (loaded, swept))
        with loaded.reference():
            base = loaded.velocity(noise, sigma, told)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1.0, float(one.abs().max())))
    assert (one - base).abs().max() > 1e-2


def test_the_table_by_hand() -> None:
    known = {
        (1.0, 0.0): {"a": [1.0, 3.0], "b": [0.0, float("nan")]},
        (0.5, 0.5): {"a": [1.5, 1.5], "b": [1.0, 1.0]},
        (0.0, 1.0): {"a": [0.0, 0.0], "b": [1.0, 0.0]},
    }
    rows = table(known)
    assert [row.mean["a"] for row in rows] == [2.0, 1.5, 0.0]
    assert rows[0].error["a"] == pytest.approx(1.0)
    assert rows[0].invalid["b"] == 1
    assert rows[1].chord == {"a": 1.0, "b": 0.25}
    assert [row.best for row in rows] == [True, True, False]
    assert text_table(rows).splitlines()[2] == "0.5,0.5,1.5,0,0.5,0,1,0,0.75,0,yes"  # over chord: 1.5 - 1, 1 - .25
    assert np.isnan(table({(0.5, 0.5): {"a": [1.0]}})[0].chord["a"])


def test_reward_models_are_averaged(tmp_path: Path, runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    places = [str(tmp_path / name) for name in "ab"]
    for place, scale in zip(places, (4.0, 8.0), strict=True):
        LearntReward("shapes", scale=scale).save(Path(place))
    out = tmp_path / "warm"
    assert main(["soup", *places, "--out", str(out)]) == 0
    assert torch.equal(LearntReward(str(out)).head.linear, LearntReward("shapes", scale=6.0).head.linear)
    assert "averaged 2 reward models" in capsys.readouterr().err
    assert main(["soup", places[0], runs[0], "--out", str(tmp_path / "none")]) == 2
    assert "holds no learnt reward" in only_line(capsys)
    assert sweep(places, "any.txt", tmp_path / "none", 3) == 2
    assert "a member is a reward model" in only_line(capsys)
