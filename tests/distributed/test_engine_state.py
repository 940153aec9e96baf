"""What an engine gives away is all that training needs to go on, under any other engine and number of ranks."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.engines import DTYPES, KINDS, NAMES
from tests.helpers.launching import launch

RANKS = (1, 2)
CASES = [f"{kind}-{dtype}" for kind, dtype in product(KINDS, DTYPES)]
TRAINED = [f"layers.{layer}.{part}" for layer in range(3) for part in ("weight", "bias")]
PROGRAM = "tests/helpers/engine_states.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """After all four launches: what each left."""
    folder = tmp_path_factory.mktemp("states")
    for phase in ("save", "load"):
        for ranks in RANKS:
            ended = launch(PROGRAM, phase, folder, ranks=ranks, folder=folder / "output")
            assert ended.code == 0, ended.stderr
    return folder


def report(folder: Path, phase: str, ranks: int) -> dict[str, Any]:
    return json.loads((folder / f"{phase}-{ranks}.json").read_text())


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_engine_is_the_one_of_its_name(folder, case, ranks):
    kind = case.split("-")[0]

    for phase in ("save", "load"):
        name, distributed_type, world_size = report(folder, phase, ranks)[case]["engine"]
        assert (name, world_size) == (NAMES[kind], ranks)
        assert distributed_type == ("MULTI_CPU" if kind == "ddp" else "DEEPSPEED")


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_state_before_an_update_is_the_weights_and_no_moments(folder, case, ranks):
    seen = report(folder, "save", ranks)[case]

    assert seen["names"] == TRAINED
    assert seen["fresh_is_the_start"] is True
    assert seen["fresh_moments"] == 0
    assert seen["dtypes"] == ["torch.float32"]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", KINDS)
def test_six_steps_are_those_of_plain_adamw_with_clipping(folder, kind, ranks):
    plain = load_file(folder / "plain.safetensors")
    found = load_file(folder / f"{kind}-float32-{ranks}-6.safetensors")
    seen = report(folder, "save", ranks)[f"{kind}-float32"]

    assert seen["norms"] == pytest.approx(plain.pop("norms").tolist(), rel=1e-6)
    assert min(seen["norms"]) > 0.1  # twice the norm that is clipped to
    assert set(plain) == {f"{name}/weight" for name in TRAINED}
    assert max(relative_error(found[name], plain[name]) for name in plain) <= 1e-6
    assert set(seen["counters"]) == {6}
    assert seen["skipped"] == 0


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_six_steps_are_the_same_under_all_engines(folder, dtype, ranks):
    expected = load_file(folder / f"ddp-{dtype}-1-6.safetensors")

    for kind in KINDS:
        found = load_file(folder / f"{kind}-{dtype}-{ranks}-6.safetensors")
        assert set(found) == set(expected)
        assert max(relative_error(found[key], expected[key]) for key in expected) <= 1e-5


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_state_of_any_engine_is_taken_up_to_the_bit(folder, case, ranks):
    dtype = case.split("-")[1]
    seen = report(folder, "load", ranks)[case]

    sources = {f"{kind}-{dtype}-{saved}" for kind in KINDS for saved in RANKS}
    assert set(seen["from"]) == sources
    for found in seen["from"].values():
        assert found["read_back_is_equal"] is True
        assert found["num_tensors"] == 3 * len(TRAINED)
        assert found["weights_that_are_not_their_master"] == 0
        assert set(found["counters"]) == {3}
    assert seen["untouched_is_equal"] is True
    assert seen["num_untouched"] == 3


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_from_any_state_as_if_it_had_never_stopped(folder, case, ranks):
    seen = report(folder, "load", ranks)[case]["from"]

    assert seen[f"{case}-{ranks}"]["is_equal"] is True
    errors = {source: found["error"] for source, found in seen.items()}
    assert max(errors.values()) <= 1e-6, errors


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_state_that_does_not_fit_is_refused(folder, case, ranks):
    rule = "of layers.0.weight must be torch.float32 of shape [7, 7], got "
    remedy = "; use a checkpoint of this model"

    assert report(folder, "load", ranks)[case]["refused"] == [
        f"exp_avg {rule}nothing{remedy}",
        f"weight {rule}torch.float32 of shape [48]{remedy}",
        f"weight {rule}torch.bfloat16 of shape [7, 7]{remedy}",
    ]


def test_bfloat16_masters_are_not_the_rounded_weights(folder):
    state = load_file(folder / "ddp-bfloat16-1-6.safetensors")

    master = state["layers.0.weight/weight"]
    assert int((master != master.to(torch.bfloat16).float()).sum()) > master.numel() // 2
