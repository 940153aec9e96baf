"""Gradients of a global batch do not depend on the engine or the number of ranks, and are those of plain autograd."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.engines import KINDS, NAMES
from tests.helpers.launching import launch

RANKS = (1, 2)

NUM_LINEARS, NUM_DECODER_WEIGHTS = 21, 33
"""Of the embedded teacher: 7 in each of 3 layers; with the 4 norms of each layer."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What the program wrote on one number of ranks."""

    report: dict[str, Any]
    gradients: dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def measured(digits, one_rank_run, tmp_path_factory) -> dict[int, Measured]:
    """By number of ranks."""
    return {ranks: measure(digits.config, one_rank_run.folder, ranks, tmp_path_factory) for ranks in RANKS}


def measure(config: Path, run: Path, ranks: int, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("gradients")
    program = "tests/helpers/gradients.py"
    ended = launch(program, str(ranks), config, run, folder, ranks=ranks, folder=folder / "output")
    assert ended.code == 0, ended.stderr
    gradients = {name: load_file(folder / f"{name}.safetensors") for name in ("plain", *KINDS)}
    return Measured(json.loads((folder / "report.json").read_text()), gradients)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", KINDS)
def test_engine_is_the_one_of_its_name(measured, ranks, kind):
    distributed_type = "MULTI_CPU" if kind == "ddp" else "DEEPSPEED"

    for case in (kind, f"bfloat16 {kind}"):
        assert measured[ranks].report[case]["engine"] == [NAMES[kind], distributed_type, ranks]


def test_micro_batches_are_unequal_and_the_second_rank_is_one_short(measured):
    rows = measured[1].report["plain"]["rows"]

    assert len(rows) == len(set(rows)) == 3
    for kind in KINDS:
        assert measured[1].report[kind]["micro_batches"] == [rows]
        assert measured[2].report[kind]["micro_batches"] == [[rows[0], rows[2]], [rows[1], 0]]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_under_an_engine_is_that_of_plain_autograd_over_all_rows(measured, ranks, kind):
    expected, found = measured[1].gradients["plain"], measured[ranks].gradients[kind]

    assert set(found) == set(expected)
    assert len(found) == NUM_LINEARS
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    # float32: 1.6e-6 seen, from the order of sums; a wrong weight of one micro-batch makes 1e-2.
    assert max(errors.values()) <= 1e-5, errors
    assert min(float(gradient.norm()) for gradient in expected.values()) > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_two_ranks_is_that_of_one(measured, kind):
    one, two = measured[1].gradients[kind], measured[2].gradients[kind]

    assert set(one) == set(two)
    assert max(relative_error(two[name], one[name]) for name in one) <= 1e-5


def test_gradient_norm_is_that_of_plain_autograd_on_any_number_of_ranks(measured):
    plain = measured[1].gradients["plain"].values()
    expected = float(torch.cat([gradient.double().flatten() for gradient in plain]).norm())

    for ranks in RANKS:
        for kind in KINDS:
            assert measured[ranks].report[kind]["gradient_norm"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", KINDS)
def test_step_changes_all_linear_weights_of_the_decoder_and_nothing_else(measured, ranks, kind):
    report = measured[ranks].report[kind]

    assert len(report["weights"]) == NUM_DECODER_WEIGHTS
    assert report["changed"] == [name for name in report["weights"] if "_proj" in name]
    assert len(report["changed"]) == NUM_LINEARS
    assert report["frozen_with_gradient"] == 0
    assert report["frozen_is_unchanged"] is True
    assert report["skipped"] == 0


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", KINDS)
def test_quantizers_are_equal_on_all_ranks_before_and_after_a_step(measured, ranks, kind, one_rank_run):
    calibrated = json.loads((one_rank_run.folder / "quantize" / "done.json").read_text())["results"]

    assert measured[ranks].report[kind]["quantizers_of_ranks"] == [calibrated["quantizer_sha256"]] * (2 * ranks)


def test_heldout_evaluation_is_equal_on_one_and_two_ranks(measured):
    one, two = (measured[ranks].report["plain"]["evaluation"] for ranks in RANKS)

    assert one == two
    assert one["kl_per_token"] > 0.01
    assert one["response_tokens"] > 100


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", KINDS)
def test_masters_are_float32_and_remember_steps_that_bfloat16_rounds_away(measured, ranks, kind):
    report = measured[ranks].report[f"bfloat16 {kind}"]

    assert len(report["masters"]) == NUM_LINEARS
    assert report["weight_dtypes"] == ["torch.bfloat16"]
    assert report["master_dtypes"] == ["torch.float32"]
    assert report["weights_that_are_not_their_master"] == 0
    # One step moves a weight by at most 5e-5, half the distance to its neighbour is 1.2e-4 and more; eight reach it.
    assert report["moved"][0] == 0
    assert report["moved"][-1] > 0.05 * report["large_weights"]
