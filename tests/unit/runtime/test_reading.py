"""The settings of ``read:`` as readers, and what all ranks together could not read."""

import multiprocessing
from pathlib import Path

import pytest

from qad_dist.config import RunConfig
from qad_dist.runtime.quarantine import open_quarantine
from qad_dist.runtime.reading import open_reader, open_shards
from qad_dist.runtime.world import World
from shards.errors import ConfigError, ShardError
from shards.index import read_utterances
from shards.read import Damaged
from tests.helpers.reading import same_tones, write_tones

RANK_2 = World(rank=2, local_rank=0, world_size=4)


def run_of(folder: Path, **read: object) -> RunConfig:
    values = {"run": str(folder), "model": {"path": "unused"}, "pack": {"inputs": ["unused"]}, "read": read}
    return RunConfig.model_validate(values)


def damaged(name: str) -> Damaged:
    return Damaged(key=name, shard="train-000000.tar", reason=f"{name} must be FLAC")


def test_shards_are_those_that_the_run_packed(tmp_path: Path) -> None:
    write_tones(tmp_path / "pack", 3, per_shard=2)

    assert same_tones(open_shards(run_of(tmp_path)).read(read_utterances(tmp_path / "pack")), [0, 1, 2])


def test_reader_starts_its_workers_with_the_first_utterance_and_ends_them(tmp_path: Path) -> None:
    utterances = write_tones(tmp_path / "pack", 3, per_shard=2)
    before = len(multiprocessing.active_children())

    with open_reader(run_of(tmp_path, workers=2)) as reader:
        unread = len(multiprocessing.active_children())
        found = reader.read(utterances)
        reading = len(multiprocessing.active_children())

    assert same_tones(found, [0, 1, 2])
    assert (unread, reading, len(multiprocessing.active_children())) == (before, before + 2, before)


def test_remote_shards_are_kept_in_the_cache_of_the_settings(tmp_path: Path) -> None:
    utterances = write_tones(tmp_path / "pack", 1, per_shard=1, address="http://127.0.0.1:1")

    with pytest.raises(ConfigError, match=r"^read\.cache must name a folder for http://127\.0\.0\.1:1/train-000000"):
        open_shards(run_of(tmp_path)).read(utterances)
    with pytest.raises(ConfigError, match=r"read\.cache_gib"):
        open_shards(run_of(tmp_path, cache=str(tmp_path / "cache"), cache_gib=1e-9)).read(utterances)


def test_quarantines_of_ranks_that_are_gone_are_counted_once(tmp_path: Path) -> None:
    run = run_of(tmp_path, max_quarantined_share=0.5)
    for rank, name in enumerate("abcb"):
        world = World(rank=rank, local_rank=0, world_size=4)
        open_quarantine(run, world, num_utterances=6).add(damaged(name))

    alone = open_quarantine(run, World(rank=0, local_rank=0, world_size=1), num_utterances=6)

    assert [alone.count(), alone.count()] == [3, 3]
    alone.add(damaged("d"))
    with pytest.raises(ShardError, match=r"at most 3 of 6 utterances\) and 4: a "):
        alone.count()


def test_quarantine_is_a_file_of_the_rank_that_later_starts_go_on_with(tmp_path: Path) -> None:
    run = run_of(tmp_path, max_quarantined_share=0.5)
    open_quarantine(run, RANK_2, num_utterances=6).add(damaged("a"))

    later = open_quarantine(run, RANK_2, num_utterances=6)
    later.add(damaged("b"))
    later.add(damaged("a"))

    assert [path.name for path in (tmp_path / "train" / "quarantine").iterdir()] == ["rank-002.jsonl"]
    assert later.count() == later.count() == 2


def test_share_of_the_settings_is_the_limit(tmp_path: Path) -> None:
    quarantine = open_quarantine(run_of(tmp_path, max_quarantined_share=0.5), RANK_2, num_utterances=5)
    for name in ("a", "b"):
        quarantine.add(damaged(name))
    assert quarantine.count() == 2
    quarantine.add(damaged("c"))

    with pytest.raises(
        ShardError, match=r"^read\.max_quarantined_share must cover .*at most 2 of 5 .* and 3: a "
    ) as told:
        quarantine.count()

    assert told.value.is_shared
