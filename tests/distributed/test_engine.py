"""A loss or gradient that is no number on one rank ends training on every rank, and nothing is updated by it."""

import json
from typing import Any

import pytest

from tests.helpers.launching import launch

ERRORS = {
    "loss": "the loss of every rank must be finite, got nan or inf; lower train.learning_rate",
    "gradient": "the gradient must be finite, got nan or inf; lower train.learning_rate",
    "infinite gradient": "the gradient must be finite, got nan or inf; lower train.learning_rate",
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("nonfinite")
    program = "tests/helpers/nonfinite.py"
    ended = launch(program, folder / "report.json", ranks=2, folder=folder / "output")
    assert ended.code == 0, ended.stderr
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("fault", ERRORS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_no_number_on_one_rank_is_an_error_on_all_and_updates_nothing(seen, stage, dtype, fault):
    case = seen[f"zero{stage} {dtype} {fault}"]

    assert case["engine"] == ["DEEPSPEED", stage, 2]
    assert case["moved_by_the_good_step"] == 2
    assert 0 < case["gradient_norm"] < 100
    assert case["told"] == [[ERRORS[fault], True]] * 2
    assert case["moved_by_the_bad_step"] == 0
