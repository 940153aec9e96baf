"""Checkpoints of two ranks: each writes its share, both publish or fail together."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from qad_dist.distill.checkpoint import Checkpoints
from shards import faults
from shards.errors import StageError
from shards.storage import verify_manifest
from tests.helpers.loops import START
from tests.helpers.ranks import run_on_ranks
from tests.helpers.states import PlainEngine

NUM_WEIGHTS = 5


def engine_of(value: float) -> PlainEngine:
    """The same on both ranks, as masters that were gathered are."""
    return PlainEngine(**{f"weight{i}": nn.Parameter(torch.full((2,), value + i)) for i in range(NUM_WEIGHTS)})


def values_of(engine: PlainEngine) -> list[float]:
    return [float(weight.detach()[0]) for weight in engine.weights.values()]


def save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(engine_of(float(step)), replace(START, step=step, best_step=0, best_kl=1.0))  # type: ignore[arg-type]


def share_and_load(rank: int, world_size: int, folder: str) -> None:
    assert dist.get_world_size() == world_size == 2
    checkpoints, path = Checkpoints(Path(folder), keep=2), Path(folder) / "step-000020"
    save(checkpoints, 20)
    checkpoints.settle(wait=True)

    own = {name.partition("/")[0] for name in load_file(path / f"rank-{rank:03d}.safetensors")}
    assert own == {f"weight{i}" for i in range(rank, NUM_WEIGHTS, 2)}
    assert set(verify_manifest(path)) == {"rank-000.safetensors", "rank-001.safetensors", "state.json"}
    engine = engine_of(0.0)
    checkpoints.load(engine, path, expected=START)  # type: ignore[arg-type]
    assert values_of(engine) == [20.0 + i for i in range(NUM_WEIGHTS)]


def fail_together(rank: int, world_size: int, folder: str, broken: int) -> None:
    assert dist.get_world_size() == world_size == 2
    checkpoints = Checkpoints(Path(folder), keep=2)
    save(checkpoints, 20)
    checkpoints.settle(wait=True)
    faults._TEXT = f"enospc@checkpoint.before_part,step=40,rank={broken}"
    save(checkpoints, 40)

    with pytest.raises(StageError, match=rf"rank-00{broken}\.safetensors must be writable, got 'No space") as told:
        checkpoints.settle(wait=True)

    assert told.value.is_shared
    dist.barrier()
    assert checkpoints.complete() == [Path(folder) / "step-000020"]


def publish_together(rank: int, world_size: int, folder: str) -> None:
    """The disk of rank 1 is slow: nobody publishes, and nobody waits, until it is done."""
    assert dist.get_world_size() == world_size == 2
    checkpoints = Checkpoints(Path(folder), keep=2)
    if rank == 1:
        faults._TEXT = "sleep=3@checkpoint.before_part"
    save(checkpoints, 20)
    if rank == 0:
        checkpoints._writing.hash.result()  # type: ignore[union-attr]  # its own part is there
    begun = time.monotonic()
    checkpoints.settle(wait=False)
    waited = time.monotonic() - begun
    dist.barrier()
    before = checkpoints.complete()
    checkpoints._writing.hash.result()  # type: ignore[union-attr]
    dist.barrier()

    checkpoints.settle(wait=False)

    assert before == []
    assert waited < 3.0
    assert [path.name for path in checkpoints.complete()] == ["step-000020"]


def test_each_rank_writes_its_share_and_both_load_it_all(tmp_path: Path) -> None:
    run_on_ranks(share_and_load, str(tmp_path), world_size=2, tmp_path=tmp_path)


@pytest.mark.parametrize("broken", [0, 1])
def test_part_that_cannot_be_written_is_told_on_both_ranks(tmp_path: Path, broken: int) -> None:
    run_on_ranks(fail_together, str(tmp_path), broken, world_size=2, tmp_path=tmp_path)


def test_checkpoint_is_published_only_when_both_ranks_have_written(tmp_path: Path) -> None:
    run_on_ranks(publish_together, str(tmp_path), world_size=2, tmp_path=tmp_path)
