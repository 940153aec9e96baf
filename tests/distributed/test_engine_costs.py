"""What an engine holds on a rank and sends in a step is what its formulas say."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from qad_dist.runtime.engine.memory import memory_formula
from qad_dist.runtime.engine.traffic import expected_traffic
from tests.helpers.engines import DTYPES, KINDS, NAMES
from tests.helpers.held import NUM_LAYERS, WIDTH
from tests.helpers.launching import launch

RANKS = (1, 2)
CASES = [f"{kind}-{dtype}" for kind, dtype in product((*KINDS, "zero3 let go"), DTYPES)]
NUM_TRAINED = NUM_LAYERS * (WIDTH * WIDTH + WIDTH)
NUM_PERSISTENT = NUM_LAYERS * WIDTH + 2 * WIDTH
"""Biases, and the frozen norm."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[int, dict[str, Any]]:
    """By number of ranks."""
    folder = tmp_path_factory.mktemp("held")
    return {ranks: held(folder, ranks) for ranks in RANKS}


def held(folder: Path, ranks: int) -> dict[str, Any]:
    ended = launch("tests/helpers/held.py", folder, ranks=ranks, folder=folder / "output")
    assert ended.code == 0, ended.stderr
    return json.loads((folder / f"held-{ranks}.json").read_text())


def parts(case: str) -> tuple[str, torch.dtype]:
    kind, dtype = case.split("-")
    return NAMES[kind.split()[0]], getattr(torch, dtype)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_memory_of_every_rank_is_that_of_the_formula(seen, case, ranks):
    found, (sharding, dtype) = seen[ranks][case], parts(case)
    formula = memory_formula(
        num_trained=NUM_TRAINED, num_frozen=2 * WIDTH, sharding=sharding, world_size=ranks, dtype=dtype
    )

    assert found["engine"] == [sharding, ranks]
    assert found["counts"] == {"trained": NUM_TRAINED, "frozen": 2 * WIDTH}
    assert len(found["memory"]) == ranks
    for memory in found["memory"]:
        for kind, num_bytes in formula._asdict().items():
            # Under ZeRO-3 biases are whole beside their parts: 3 % of the weights of two ranks.
            assert memory[kind] == pytest.approx(num_bytes, rel=0.05), kind


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_bytes_that_a_rank_sends_are_those_of_the_formula(seen, case, ranks):
    found, (sharding, dtype) = seen[ranks][case], parts(case)
    expected = expected_traffic(
        num_trained=NUM_TRAINED + (2 * WIDTH if sharding == "ZeRO-3" else 0),  # there the frozen norm is gathered too
        num_persistent=NUM_PERSISTENT,
        sharding=sharding,
        world_size=ranks,
        dtype=dtype,
        micro_batches=2,
        gathers=2 if "let go" in case else 1,
    )

    for sent in found["sent"]:
        assert sent == pytest.approx(expected.total, rel=1e-3)  # 8e-4: the frozen norm has no gradient


def test_no_engine_has_more_collectives_than_buckets_and_weights(seen):
    """Gradients: 4 buckets of 50,000 in a micro-batch; DDP's are reduced once a step, behind the last micro-batch."""
    names = {case: [name for name, _ in seen[2][case]["collectives"]] for case in CASES}

    assert names["ddp-bfloat16"] == names["ddp-float32"] == ["allreduce_"] * 5
    assert names["zero1-float32"] == ["allreduce_"] * 5 + ["_allgather_base_"] * 2
    assert names["zero1-bfloat16"] == ["allreduce_"] * 2 + ["_allgather_base_"] * 2
    assert names["zero2-bfloat16"] == ["allreduce_"] * 9 + ["_allgather_base_"] * 2
    assert names["zero3-bfloat16"].count("_reduce_scatter_base_") == 8
