"""Memory and traffic of the real student, against numbers worked out by hand."""

import pytest
import torch

from qad_dist.runtime.engine.memory import Memory, memory_formula
from qad_dist.runtime.engine.traffic import Traffic, expected_traffic

MILLION = 1_000_000
NUM_LINEAR = 440 * MILLION
"""About the decoder's; norms are left out."""


@pytest.mark.parametrize(
    ("sharding", "ranks", "megabytes"),
    [
        ("DDP", 1, (880, 1760, 1760, 3520)),
        ("DDP", 8, (880, 1760, 1760, 3520)),
        ("ZeRO-1", 1, (880, 1760, 1760, 3520)),
        ("ZeRO-1", 8, (880, 1760, 220, 440)),
        ("ZeRO-2", 8, (880, 220, 220, 440)),
        ("ZeRO-3", 8, (110, 220, 220, 440)),
    ],
)
def test_memory_of_the_decoder_in_bfloat16(sharding, ranks, megabytes):
    memory = memory_formula(
        num_trained=NUM_LINEAR, num_frozen=0, sharding=sharding, world_size=ranks, dtype=torch.bfloat16
    )

    assert memory == Memory(*(number * MILLION for number in megabytes))
    assert memory.total == sum(megabytes) * MILLION


def test_float32_weights_under_ddp_are_their_own_masters():
    memory = memory_formula(num_trained=10, num_frozen=3, sharding="DDP", world_size=2, dtype=torch.float32)

    assert memory == Memory(weights=52, gradients=40, masters=0, moments=80)


@pytest.mark.parametrize(
    ("sharding", "gradients", "weights"),
    [("DDP", 3080, 0), ("ZeRO-1", 3080, 770), ("ZeRO-2", 12320, 770), ("ZeRO-3", 6160, 3080)],
)
def test_megabytes_that_one_of_eight_ranks_sends_for_four_micro_batches(sharding, gradients, weights):
    traffic = expected_traffic(
        num_trained=NUM_LINEAR, sharding=sharding, world_size=8, dtype=torch.bfloat16, micro_batches=4
    )

    assert traffic == Traffic(gradients=gradients * MILLION, weights=weights * MILLION, decision=28)


@pytest.mark.parametrize("sharding", ["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"])
def test_one_rank_sends_nothing(sharding):
    traffic = expected_traffic(
        num_trained=NUM_LINEAR, sharding=sharding, world_size=1, dtype=torch.bfloat16, micro_batches=4
    )

    assert traffic.total == 0
