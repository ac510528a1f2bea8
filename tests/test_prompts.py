"""Prompt data from lists and files, and which prompts an epoch takes."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from flowalign.distributed import rank, share, world_size
from flowalign.prompts import as_prompts, epoch_prompts
from flowalign.records import Prompts


def test_prompts_come_from_lists_text_files_and_json_lines(tmp_path):
    assert as_prompts(["a", "b", "a"]).text == ("a", "b", "a")
    given = Prompts(("a",), ({"tag": 1},))
    assert as_prompts(given) is given
    (tmp_path / "p.txt").write_text("\ufeffa cat\r\n  a dog \n\n", "utf-8")
    assert as_prompts(str(tmp_path / "p.txt")).all().text == ("a cat", "a dog")
    lines = [{"prompt": "a cat", "tag": "single"}, {"prompt": "two cats", "include": [{"count": 2}]}]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    read = as_prompts(str(tmp_path / "p.jsonl")).all()
    assert read.text == ("a cat", "two cats")
    assert read.metadata == ({"tag": "single"}, {"include": [{"count": 2}]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": ', "p.jsonl:2: not JSON"),
        ('{"prompt": "a"}\n\n{"text": "b"}', 'p.jsonl:3: a line must be an object with a text under "prompt"'),
        ('["a"]', "p.jsonl:1: a line must be an object"),
        ("", "p.jsonl is empty"),
        ('{"prompt": "a"}\n{"prompt": " "}', "p.jsonl:2: the prompt is empty"),
    ],
)
def test_a_bad_file_is_named_by_line(content, message, tmp_path):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        as_prompts(str(tmp_path / "p.jsonl"))


def test_empty_prompts_of_a_text_file_are_named_by_line(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\na dog\n \n" + "\n" * 9 + "a bird\n")
    with pytest.raises(ValueError, match="has empty prompts in line 2, 4, 5, 6, 7 and 6 more; remove them"):
        as_prompts(str(tmp_path / "p.txt"))
    (tmp_path / "p.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"is not UTF-8 text \(byte 3\)"):
        as_prompts(str(tmp_path / "p.txt"))


def test_no_prompts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is empty"):
        as_prompts([])
    with pytest.raises(ValueError, match="is not a file"):
        as_prompts(str(tmp_path / "none.txt"))


def test_every_prompt_comes_once_before_any_comes_again():
    """10 prompts, 4 a time: five epochs are two passes, and the order is another one in each pass and for each seed."""
    taken = [index for epoch in range(5) for index in epoch_prompts(10, 4, epoch, seed=3)]
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))
    assert taken[:10] != taken[10:]
    assert taken != [index for epoch in range(5) for index in epoch_prompts(10, 4, epoch, seed=4)]
    assert epoch_prompts(10, 4, 3, seed=3) == taken[12:16]


def test_more_groups_than_prompts_repeat_them_evenly():
    assert set(Counter(epoch_prompts(3, 12, 0, seed=0)).values()) == {4}


def test_shares_cover_everything_once_and_differ_by_one_at_most():
    for total in (0, 1, 7, 64):
        for world in (1, 3, 8):
            parts = [share(total, r, world) for r in range(world)]
            assert [i for part in parts for i in part] == list(range(total))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_is_rank_0_of_1():
    assert (rank(), world_size()) == (0, 1)
