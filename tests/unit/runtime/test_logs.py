"""Logs: one line per event, events from rank 0 only, warnings and progress from every rank, libraries kept quiet."""

import logging
import re

import pytest

from qad_dist.runtime.logs import configure_logging
from qad_dist.runtime.world import World


@pytest.fixture(autouse=True)
def restored_logging():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in ("qad_dist", "shards", "qad_dist.runtime.progress"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def lines_of(rank: int, world_size: int, capsys) -> list[str]:
    configure_logging(World(rank=rank, local_rank=rank, world_size=world_size))
    ours = logging.getLogger("qad_dist.stages.label")
    ours.debug("detail")
    ours.info("event=labelled shard=%s utterances=%d", "audio-000001.tar", 64)
    ours.warning("event=skipped key=%s", "a-1")
    return capsys.readouterr().err.splitlines()


def test_single_rank_tells_events_and_warnings_with_their_time(capsys):
    told = lines_of(0, 1, capsys)

    assert [re.sub(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d ", "", line) for line in told] == [
        "INFO event=labelled shard=audio-000001.tar utterances=64",
        "WARNING event=skipped key=a-1",
    ]


def test_rank_0_of_several_tells_events_and_the_others_only_warnings(capsys):
    assert [line.split(" ", 1)[1] for line in lines_of(0, 2, capsys)] == [
        "INFO rank=0 event=labelled shard=audio-000001.tar utterances=64",
        "WARNING rank=0 event=skipped key=a-1",
    ]
    assert [line.split(" ", 1)[1] for line in lines_of(1, 2, capsys)] == ["WARNING rank=1 event=skipped key=a-1"]


def test_every_rank_tells_its_own_progress(capsys):
    configure_logging(World(rank=1, local_rank=1, world_size=2))

    logging.getLogger("qad_dist.runtime.progress").info("event=progress stage=label")

    assert [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()] == [
        "INFO rank=1 event=progress stage=label"
    ]


def test_libraries_tell_warnings_only_even_if_they_set_their_level_on_import(capsys, monkeypatch):
    configure_logging(World(rank=0, local_rank=0, world_size=1))
    library = logging.getLogger("DeepSpeed")
    monkeypatch.setattr(library, "propagate", True)  # DeepSpeed, if a test has imported it, has its own handler
    monkeypatch.setattr(library, "handlers", [])
    library.setLevel(logging.INFO)

    library.info("a screenful")
    library.warning("worth knowing")

    assert [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()] == ["WARNING worth knowing"]
