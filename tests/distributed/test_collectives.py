"""What ranks decide together, on two and three processes."""

from pathlib import Path

import pytest
import torch.distributed as dist

from qad_dist.runtime.collectives import all_gather_objects, barrier, run_on_main
from shards.errors import ModelError, WorldError
from tests.helpers.ranks import run_on_ranks


def gather_in_rank_order(rank: int, world_size: int) -> None:
    assert dist.get_world_size() == world_size == 3
    barrier()

    assert all_gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]


def give_the_result_of_rank_0_to_all(rank: int, world_size: int, folder: str) -> None:
    assert dist.get_world_size() == world_size == 2

    def write() -> str:
        Path(folder, f"written-by-{dist.get_rank()}").touch()
        return "result"

    assert run_on_main(write) == "result"
    assert [path.name for path in Path(folder).glob("written-*")] == ["written-by-0"]


def raise_what_rank_0_raised(rank: int, world_size: int) -> None:
    assert dist.get_world_size() == world_size == 2

    def fail() -> None:
        raise ModelError("model.path must be a folder, got nothing")

    with pytest.raises(ModelError, match=r"^model\.path must be a folder, got nothing$") as caught:
        run_on_main(fail)
    assert caught.value.is_shared
    barrier()


def leave_no_rank_waiting_for_a_bug_of_rank_0(rank: int, world_size: int) -> None:
    assert dist.get_world_size() == world_size == 2

    def fail() -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError if rank == 0 else WorldError, match="a bug" if rank == 0 else "rank 0 must finish"):
        run_on_main(fail)
    barrier()


def test_gathered_values_stand_in_rank_order(tmp_path):
    run_on_ranks(gather_in_rank_order, world_size=3, tmp_path=tmp_path)


def test_run_on_main_runs_once_and_gives_every_rank_the_result(tmp_path):
    run_on_ranks(give_the_result_of_rank_0_to_all, str(tmp_path), world_size=2, tmp_path=tmp_path)


def test_run_on_main_raises_on_every_rank(tmp_path):
    run_on_ranks(raise_what_rank_0_raised, world_size=2, tmp_path=tmp_path)


def test_run_on_main_leaves_no_rank_waiting_for_a_bug(tmp_path):
    run_on_ranks(leave_no_rank_waiting_for_a_bug_of_rank_0, world_size=2, tmp_path=tmp_path)


def test_single_process_needs_no_group(tmp_path):
    barrier()

    assert all_gather_objects(3) == [3]
    assert run_on_main(lambda: "x") == "x"
