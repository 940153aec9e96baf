"""Each Linear quantized alone, on batches that two ranks share, as on one."""

from pathlib import Path

import torch
import torch.distributed as dist

from qad_dist.heldout import kl_between
from qad_dist.pairing import walk_batch
from qad_dist.quant.calibrate import SmoothedGroup
from qad_dist.quant.fold import fold_groups
from qad_dist.quant.search import Choice
from qad_dist.quant.sensitivity import LinearSensitivity, measure_sensitivity
from qad_dist.quant.walk import final_hidden
from tests.helpers.quantized import pack_with_own_responses, quantize
from tests.helpers.qwen import digits, load
from tests.helpers.ranks import run_on_ranks


def measure(rank: int, world_size: int) -> list[LinearSensitivity]:
    """On every ``world_size``-th of three batches."""
    teacher = load()
    packed = [pack_with_own_responses(teacher, digits(3)[i : i + 1]) for i in range(3)]
    layers = quantize(load(), *packed, alpha=1.0).decoder.layers
    batches = [walk_batch(teacher, batch, number=i, is_search=True) for i, batch in enumerate(packed)]
    as_it_is = {
        (number, group.name): SmoothedGroup(
            Choice(alpha=None, scale_C=torch.ones(group.num_channels)), torch.ones(group.num_channels)
        )
        for number, layer in enumerate(layers)
        for group in fold_groups(layer)
    }
    return measure_sensitivity(
        layers,
        batches[rank::world_size],
        kl=lambda batch, hidden_ND: kl_between(teacher, batch, hidden_ND, final_hidden(batch, teacher.decoder.layers)),
        smoothed=as_it_is,
        exact={},
    )


def compare_on_a_rank(rank: int, world_size: int, expected: list[LinearSensitivity]) -> None:
    assert dist.get_world_size() == world_size == 2
    assert measure(rank, world_size) == expected


def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    expected = measure(0, 1)

    assert len({record.kl_per_token for record in expected}) == 21
    run_on_ranks(compare_on_a_rank, expected, world_size=2, tmp_path=tmp_path)
