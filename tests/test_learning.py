"""What the project exists for: the reward goes up, on prompts that were held out."""

from __future__ import annotations

import json

import pytest

from flowalign.cli import main


@pytest.mark.slow
def test_thirty_epochs_of_the_quick_start_teach_something(tmp_path):
    """A fifth of the quick start. In 25 epochs seeds 0 and 1 gained .068 and .047 in clauses, .061 and .051 strict."""
    words = ["--epochs", "30", "--evaluation.every", "30", "--folder", str(tmp_path / "run")]
    assert main(["train", "flow_grpo/shapes", *words]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    before, after = [line for line in lines if "held-out" in line]
    assert after["held-out/clauses"] - before["held-out/clauses"] >= 0.02
    assert after["held-out/strict"] - before["held-out/strict"] >= 0.0
