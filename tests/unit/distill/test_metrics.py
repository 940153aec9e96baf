"""``metrics.jsonl`` after interruptions: one line a step, in order."""

import json
from pathlib import Path
from typing import Any

import pytest

from qad_dist.distill.metrics import MetricsFile


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with values of the steps 0, 10, 20 and 30, two lines for step 20."""
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, resumed_step=0)
    for step in (0, 10, 20, 30):
        metrics.write(step, {"kl": step / 100})
        if step == 20:
            metrics.write(step, {"heldout_kl_per_token": 0.5})
    return path


def test_lines_hold_step_and_values_in_the_order_written(path: Path) -> None:
    assert lines_of(path) == [
        {"step": 0, "kl": 0.0},
        {"step": 10, "kl": 0.1},
        {"step": 20, "kl": 0.2},
        {"step": 20, "heldout_kl_per_token": 0.5},
        {"step": 30, "kl": 0.3},
    ]


def test_resume_forgets_what_came_after_its_checkpoint_and_goes_on(path: Path) -> None:
    metrics = MetricsFile(path, resumed_step=20)
    metrics.write(30, {"kl": 0.33})

    assert [(line["step"], line.get("kl")) for line in lines_of(path)] == [
        (0, 0.0),
        (10, 0.1),
        (20, 0.2),
        (20, None),
        (30, 0.33),
    ]


def test_new_start_forgets_everything(path: Path) -> None:
    MetricsFile(path, resumed_step=0).write(0, {"kl": 1.0})

    assert lines_of(path) == [{"step": 0, "kl": 1.0}]


@pytest.mark.parametrize("cut", ['{"step": 20, "kl"', '{"step": 20, "kl": 0.25}'])
def test_line_that_a_kill_cut_off_is_dropped(path: Path, cut: str) -> None:
    """Without its newline a line may lack its end, even where it reads as JSON."""
    with path.open("a") as file:
        file.write(cut)

    MetricsFile(path, resumed_step=20).write(25, {"kl": 0.2})

    assert [line["step"] for line in lines_of(path)] == [0, 10, 20, 20, 25]
    assert 0.25 not in [line.get("kl") for line in lines_of(path)]


def test_folder_is_made_when_missing(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "new" / "metrics.jsonl", resumed_step=5).write(6, {"kl": 1.0})

    assert lines_of(tmp_path / "new" / "metrics.jsonl") == [{"step": 6, "kl": 1.0}]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_value_that_json_does_not_know_is_refused_and_leaves_the_file_as_it_was(path: Path, value: float) -> None:
    before = path.read_bytes()

    with pytest.raises(ValueError, match="not JSON compliant"):
        MetricsFile(path, resumed_step=30).write(40, {"gradient_norm": value})

    assert path.read_bytes() == before
