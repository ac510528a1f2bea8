"""Prompts' embeddings on a disk: encoded once, the same to the last bit, told apart, mended, shared by processes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.cli import main
from flowalign.models import SD3, PipelineModel
from flowalign.models.embedding_store import EmbeddingStore, entries
from flowalign.records import Condition
from tests import processes
from tests.families import CASES
from tests.jobs import PREFERRED, PROMPTS, digest, job, pairs_job
from tests.tiny import tiny_sd3
from trainers import Pairs
from trainers.preflight import inspect, page
from trainers.preflight.findings import of_costs

TEXTS = ["a red circle", "two blue squares", "", "a star of eight points"]
FAMILIES = [case for case in CASES if case.name in ("sd3", "sdxl", "wan", "z-image", "pixart-alpha")]


def counted(model: PipelineModel) -> list[str]:
    """The texts that a model encodes from now on."""
    calls, encode = list[str](), model.encoded.encode

    def counting(texts: list[str]) -> Any:
        calls.extend(dict.fromkeys(texts))
        return encode(texts)

    model.encoded.encode = counting
    return calls


def kept(folder: Path, **changes: Any) -> SD3:
    return SD3(tiny_sd3(), **{"max_sequence_length": 12, "embeddings": str(folder)} | changes)


def folder_of(model: PipelineModel) -> Path:
    assert model.embeddings_folder is not None
    return model.embeddings_folder


def path_of(model: PipelineModel, text: str) -> Path:
    assert isinstance(model.encoded.store, EmbeddingStore)
    return model.encoded.store.path(text)


def assert_same(one: Condition, other: Condition) -> None:
    for field in fields(Condition):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert (a is None) == (b is None), field.name
        if a is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a, b), field.name


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
def test_a_second_start_encodes_nothing_and_has_the_same_bits(case, tmp_path) -> None:
    settings, negatives = {**case.options, **case.sizes[0]}, ["grey", None, None, "grey"]
    plain = case.adapt(case.make(), **settings)
    for turn in range(2):
        again = case.adapt(case.make(), **settings, embeddings=str(tmp_path))
        calls = counted(again)
        assert_same(again.encode(TEXTS, negatives), plain.encode(TEXTS, negatives))
        assert calls == ([*TEXTS, "grey"] if turn == 0 else [])
    again.encode(["a new one", TEXTS[0]])
    assert calls == ["a new one"]
    again.free_encoders()
    again.encoded.rows.clear()
    assert_same(again.encode(TEXTS[:2]), plain.encode(TEXTS[:2]))
    with pytest.raises(ValueError, match="'another' was not encoded before"):
        again.encode(["another"])


def test_embeddings_keep_the_dtype_that_the_encoders_give_them(tmp_path) -> None:
    made = []
    for _ in range(2):
        pipeline = tiny_sd3()
        for part in (pipeline.text_encoder, pipeline.text_encoder_2):
            part.to(torch.bfloat16)
        model = SD3(pipeline, max_sequence_length=12, embeddings=str(tmp_path))
        made.append(model.encode(TEXTS))
    assert made[1].prompt_embeds.dtype == torch.bfloat16
    assert_same(made[0], made[1])
    row = made[0].prompt_embeds[0].nbytes + made[0].pooled_prompt_embeds[0].nbytes  # type: ignore[index]
    assert row < path_of(model, TEXTS[0]).stat().st_size < row + 500


def one_weight(model: Any) -> None:
    next(model.text_encoder_2.parameters()).data.view(-1)[5].mul_(1.001)


def one_token(model: Any) -> None:
    model.tokenizer.add_tokens(["squircle"])


def half(model: Any) -> None:
    model.text_encoder.to(torch.float16)


def nothing(model: Any) -> None:
    model.tokenizer(["longer than before"], padding="max_length", max_length=17)
    model.vae.to(torch.float16)
    next(model.transformer.parameters()).data.mul_(2)


@pytest.mark.parametrize(
    ("alter", "changes", "same"),
    [
        (nothing, {}, True),
        (nothing, {"height": 16, "width": 16, "embeddings_gb": 1.0, "negative_prompt": "grey"}, True),
        (one_weight, {}, False),
        (one_token, {}, False),
        (half, {}, False),
        (nothing, {"max_sequence_length": 13}, False),
        (nothing, {"prompts_per_call": 4}, False),
        (nothing, {"mixed_precision": "bf16"}, False),
    ],
)
def test_what_makes_other_embeddings_has_another_folder(tmp_path, alter, changes, same) -> None:
    pipeline = tiny_sd3()
    alter(pipeline)
    other = SD3(pipeline, **{"max_sequence_length": 12, "embeddings": str(tmp_path)} | changes)
    assert (other.embeddings_folder == kept(tmp_path).embeddings_folder) == same


def test_cleaned_captions_are_others(tmp_path, monkeypatch) -> None:
    case = next(case for case in CASES if case.name == "pixart-alpha")
    model: Any = case.adapt(case.make(), **case.options, **case.sizes[0])
    plain = model.encoding_settings()
    model.clean_caption = True
    assert model.encoding_settings() != plain


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def of_another(path: Path) -> None:
    others = [other for other in path.parents[1].glob("??/*.safetensors") if other != path]
    path.write_bytes(others[0].read_bytes())


def text(path: Path) -> None:
    path.write_text("no tensors at all")


@pytest.mark.parametrize("damage", [cut, flip, of_another, text])
def test_a_damaged_file_is_told_and_made_again(tmp_path, capsys, damage: Callable[[Path], None]) -> None:
    made = kept(tmp_path)
    wanted, path = made.encode(TEXTS), path_of(made, TEXTS[1])
    before = path.read_bytes()
    damage(path)
    again = kept(tmp_path)
    calls = counted(again)
    assert_same(again.encode(TEXTS), wanted)
    assert calls == [TEXTS[1]]
    assert path.read_bytes() == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"flowalign: {path} ")
    assert line.endswith("; encoded again")


def test_another_store_s_file_counts_as_damaged(tmp_path, capsys) -> None:
    one, other = kept(tmp_path), kept(tmp_path, max_sequence_length=13)
    other.encode(TEXTS[:1])
    path_of(one, TEXTS[0]).parent.mkdir(parents=True, exist_ok=True)
    path_of(one, TEXTS[0]).write_bytes(path_of(other, TEXTS[0]).read_bytes())
    assert_same(one.encode(TEXTS[:1]), kept(tmp_path / "new").encode(TEXTS[:1]))
    assert "has been altered, or is another text's; encoded again" in capsys.readouterr().err


def test_where_nothing_can_be_written_is_one_line(tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"embeddings cannot be kept in .*file.*: make room there, name another folder"):
        kept(tmp_path / "file")
    model = kept(tmp_path)
    path_of(model, TEXTS[0]).parent.write_text("")  # in the way of a folder
    with pytest.raises(OSError, match=r"embeddings cannot be kept .*\(model\.embeddings, pairs\.embeddings\)"):
        model.encode(TEXTS[:1])
    assert [*folder_of(model).rglob("*.tmp")] == []
    words = ["--folder", str(tmp_path / "run"), "--model.embeddings", str(tmp_path / "file")]
    assert main(["train", "flow_grpo/shapes", *words]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert f"embeddings cannot be kept in {tmp_path / 'file'}" in line


def encoding(folder: Path, rank: int) -> list[bytes]:
    """All at once, each in an order of its own."""
    model = kept(folder)
    texts = [f"{number} boxes" for number in range(24)]
    model.encode(texts[rank:] + texts[:rank])
    return [path_of(model, text).read_bytes() for text in texts]


def test_processes_that_write_the_same_texts_at_once(tmp_path) -> None:
    (alone,) = processes.run(1, tmp_path, functools.partial(encoding, tmp_path / "one"))
    for found in processes.run(3, tmp_path, functools.partial(encoding, tmp_path / "three")):
        assert found == alone
    assert [path for path in (tmp_path / "three").rglob("*") if path.is_file() and path.suffix == ".tmp"] == []
    assert entries(next((tmp_path / "three").iterdir())) == 25  # and the negative prompt


def test_a_run_with_a_store_is_the_same_run(tmp_path) -> None:
    """Stored pairs keep their prompts' embeddings beside the latents, if they are not told not to."""
    plain = pairs_job(tmp_path / "plain", pairs=cached(tmp_path / "a", embeddings=False), epochs=1)
    plain.train()
    assert [*(tmp_path / "a").glob("embeddings-*")] == []
    for turn in range(2):
        trainer = pairs_job(tmp_path / f"run-{turn}", pairs=cached(tmp_path / "b"), epochs=1)
        calls = counted(trainer.model)  # type: ignore[arg-type]
        trainer.train()
        assert bool(calls) == (turn == 0)
        assert digest(tmp_path / f"run-{turn}") == digest(tmp_path / "plain")
    own = pairs_job(tmp_path / "own", model=kept(tmp_path / "c", max_sequence_length=0), pairs=cached(tmp_path / "b"))
    assert folder_of(own.model).parent == tmp_path / "c"  # type: ignore[arg-type]


def cached(folder: Path, **more: Any) -> Pairs:
    return Pairs(str(PREFERRED), held_out=str(PREFERRED), cache=str(folder), **more)


def test_check_tells_what_the_store_will_take(tmp_path) -> None:
    kept(tmp_path / "store", max_sequence_length=0).encode(PROMPTS)
    trainer = job(tmp_path / "run", model=kept(tmp_path / "store", max_sequence_length=0))
    calls = counted(trainer.model)  # type: ignore[arg-type]
    found = inspect(trainer, tmp_path / "check")
    assert found.space is not None
    assert found.trial is not None
    assert found.space.stored == 6 * found.trial.encoding.size  # three prompts, and three of the evaluation
    told = " ".join(page(found).split())
    folder = folder_of(trainer.model)  # type: ignore[arg-type]
    assert f"embeddings kept 31 kB in {folder}, which holds {entries(folder)} prompts now" in told
    assert {*PROMPTS} & {*calls}  # what a new prompt takes is measured though these are on the disk
    short = of_costs(trainer, replace(found.space, stored=10**9, stored_free=10**6), found.times)  # type: ignore[arg-type]
    assert [problem.text[:63] for problem in short] == [f"the prompts' embeddings take 1.0 GB in {folder}"[:63]]
    assert job(tmp_path / "run").model.embeddings_folder is None
