"""Calibration on several ranks finds the quantizers and the weights that one rank finds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from qad_dist.asr.load import AsrModel, state_hash
from qad_dist.batch import Batch
from qad_dist.config.quantize import QuantizeConfig
from qad_dist.formats import FormatName
from qad_dist.pairing import walk_batch
from qad_dist.quant.calibrate import Calibration, Source
from qad_dist.quant.fold import fold_groups
from qad_dist.quant.state import quantizer_hash
from qad_dist.quant.walk import Walk
from qad_dist.runtime.world import World
from tests.helpers.quantized import copied, logits_of, pack_with_own_responses, source_of
from tests.helpers.qwen import digits, load
from tests.helpers.ranks import run_on_ranks

NUM_BATCHES, NUM_ROWS = 3, 256
"""Of 2 clips each; some, but not all, of their tokens are sampled."""


def numbers_of(rank: int, world_size: int) -> list[int]:
    """This rank's share of the batches, at least one: the first where none is left."""
    return list(range(NUM_BATCHES))[rank::world_size] or [0]


def source_on(rank: int, world_size: int, batches: list[Batch], model: AsrModel) -> Source:
    own = numbers_of(rank, world_size)
    source = source_of(model, batches, World(rank=rank, local_rank=rank, world_size=world_size))
    return replace(
        source,
        batches=[source.batches[number] for number in own],
        run_all=lambda: [logits_of(model, batches[number]) for number in own] and None,
    )


def calibrated_hashes(
    rank: int, world_size: int, teacher: AsrModel, batches: list[Batch], name: FormatName
) -> dict[str, str]:
    """Of quantizers, weights, and what was chosen."""
    model = copied(teacher)
    section = QuantizeConfig(format=name, group_size=32, search_rows=NUM_ROWS)
    source = source_on(rank, world_size, batches, model)
    smoothed = Calibration(model.model, model.decoder.layers, section, source).run(torch.bfloat16)
    told = {str(key): [one.choice.alpha, one.choice.scale_C.tolist()] for key, one in smoothed.items()}
    return {
        "quantizers": quantizer_hash(model.model),
        "weights": state_hash(model.model),
        "choices": json.dumps(told),
    }


def sampled(rank: int, world_size: int, teacher: AsrModel, packed: list[Batch]) -> list[tuple[torch.Tensor, ...]]:
    """Maxima and tokens of the second layer's groups."""
    own = numbers_of(rank, world_size)
    batches = [walk_batch(teacher, packed[number], number=number, is_search=number == 1) for number in own]
    walk = Walk(batches, num_rows=50, is_corrected=True)
    first, second, _ = teacher.decoder.layers
    walk.pass_layer(first, fold_groups(first))
    amax, tokens = walk.pass_layer(second, fold_groups(second))
    found = []
    for name, parts in tokens.items():
        of_parts = [(parts[part].inputs_SC, parts[part].weights_S) for part in (True, False)]
        found.append((amax[name].of_all_C, amax[name].of_rest_C, *of_parts[0], *of_parts[1]))
    return found


Made = tuple[dict[str, dict[str, str]], list[tuple[torch.Tensor, ...]]]


def made_on(rank: int, world_size: int) -> Made:
    """Hashes of the students of two formats, and the samples."""
    teacher = load()
    batches = [pack_with_own_responses(teacher, digits(6)[i : i + 2]) for i in range(0, 6, 2)]
    formats: tuple[FormatName, ...] = ("int8", "w4a8")
    students: dict[str, dict[str, str]] = {
        name: calibrated_hashes(rank, world_size, teacher, batches, name) for name in formats
    }
    return students, sampled(rank, world_size, teacher, batches)


def compare_on_a_rank(rank: int, world_size: int, expected: Made) -> None:
    assert dist.get_world_size() == world_size
    students, samples = made_on(rank, world_size)
    assert students == expected[0]
    for found, wanted in zip(samples, expected[1], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.fixture(scope="module")
def on_one_rank() -> Made:
    torch.set_num_threads(1)
    return made_on(0, 1)


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_remembers_the_tokens_and_makes_the_student_of_one(
    on_one_rank: Made, tmp_path: Path, world_size: int
) -> None:
    """Tokens, quantizers and weights to the last bit; four ranks are more than there are batches."""
    students, samples = on_one_rank
    assert len({hashes["weights"] for hashes in students.values()}) == 2
    assert [len(found[2]) for found in samples] == [50] * 4

    run_on_ranks(compare_on_a_rank, on_one_rank, world_size=world_size, tmp_path=tmp_path)


def quantized(run: Path) -> dict[str, object]:
    return json.loads((run / "quantize" / "done.json").read_text())["results"]


def test_two_ranks_calibrate_the_same_quantizers_as_one(one_rank_run, two_rank_run):
    one, two = quantized(one_rank_run.folder), quantized(two_rank_run.folder)

    assert one["quantizers"] == 42
    assert two == one


def test_two_ranks_write_the_same_student_weights_as_one(one_rank_run, two_rank_run):
    files = [run.folder / "quantize" / "student" / "model.safetensors" for run in (one_rank_run, two_rank_run)]

    assert files[0].read_bytes() == files[1].read_bytes()
    assert sum(name.endswith("_quantizer._amax") for name in load_file(files[0])) == 42
