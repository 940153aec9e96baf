"""A loss or gradient that is no number on one rank is left out on every rank, and no host waits to learn of it."""

import json
from itertools import product
from typing import Any

import pytest

from tests.helpers.engines import DTYPES, KINDS, NAMES
from tests.helpers.launching import launch

CASES = [f"{kind} {dtype}" for kind, dtype in product(KINDS, DTYPES)]

# Losses of the two ranks, and whether the gradient's norm is a number.
FAULTS = {
    "loss": ([True, False], False),
    "gradient": ([True, True], False),
    "infinite gradient": ([True, True], False),
    "loss alone": ([True, False], True),
}

NUM_TRAINED, NUM_WEIGHTS = 6, 8
"""Parameters that are trained, and all."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("nonfinite")
    program = "tests/helpers/nonfinite.py"
    ended = launch(program, folder / "report.json", ranks=2, folder=folder / "output")
    assert ended.code == 0, ended.stderr
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_engine_is_the_one_of_its_name(seen, case):
    kind = case.split()[0]

    assert seen[case]["engine"] == [NAMES[kind], "MULTI_CPU" if kind == "ddp" else "DEEPSPEED", 2]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("case", CASES)
def test_what_is_no_number_on_one_rank_updates_nothing_on_any(seen, case, fault):
    found = seen[case]["faults"][fault]
    losses_are_finite, norm_is_finite = FAULTS[fault]

    assert found["losses_are_finite"] == losses_are_finite
    assert found["norm_is_finite"] == [norm_is_finite] * 2
    assert found["moved"] == [0, 0]
    assert found["skipped"] == [1, 1]


@pytest.mark.parametrize("case", CASES)
def test_good_step_after_bad_ones_is_the_one_without_them_to_the_bit(seen, case):
    found = seen[case]

    assert 0 < found["good_norm"] < 100
    assert found["num_tensors"] == 3 * NUM_TRAINED + 1 + NUM_WEIGHTS
    # Masters, moments, counters and weights; in bfloat16 some weights may be rounded to what they were.
    assert found["moved_by_the_good_step"] >= 3 * NUM_TRAINED + 1
    assert found["unlike_its_twin"] == [0, 0]


@pytest.mark.parametrize("case", CASES)
def test_host_does_not_wait_for_the_device_in_a_step(seen, case):
    # ZeRO-3 looks at a constant that is on the host already.
    expected = {"_local_scalar_dense": 1} if case.startswith("zero3") else {}

    assert seen[case]["operators"] > 100
    assert seen[case]["waits"] == expected
