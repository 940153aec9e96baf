"""What is to be packed, task by task: which recordings go into which shard, decided before anything is decoded."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain, groupby, islice
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np
import pyarrow as pa

from shards.audio import estimate_seconds
from shards.columns import Columns, batch_of, records_of, schema_of
from shards.corpus import durations, list_corpus, recording_of
from shards.errors import ConfigError, ShardError
from shards.layout import ShardRows, ShardSize, lay_out
from shards.places import Place
from shards.schema import SPLITS, Recording
from shards.sources.keys import Found, clean_key
from shards.splits import Codes, assign_splits
from shards.storage import atomic_write, read_json, write_json

WRITE, INDEX_IN_PLACE, EXCLUDE = "write", "index in place", "exclude"
"""A shard to write, a tar to index where it is, and test sets to listen to."""

TASKS = "tasks.json"
"""Written last: without it nothing is planned."""

_RECORDINGS, _CORPUS = "tasks.arrow", "corpus.arrow"
_EXCLUDED_AT_ONCE = 4_096
_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one process packs at a time: the recordings of a shard to write, of a tar to index, or of test sets."""

    name: str
    """Of the shard."""
    kind: str
    """:data:`WRITE`, :data:`INDEX_IN_PLACE` or :data:`EXCLUDE`."""
    num_recordings: int
    seconds: float
    """Estimated from what sources and headers tell."""
    location: str | None = None
    """Path or address of the tar that is indexed in place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What decides which recordings go into which shard."""

    seed: int
    """Decides hold-out and order."""
    splits: Mapping[str, str]
    """The sources' split names to ours."""
    holdout: float
    """Share of the training recordings set aside per language."""
    holdout_by: str
    """``speaker`` or ``recording``."""
    size: ShardSize
    in_place: bool = False
    """Index the tars that the recordings are in, each as a shard of its own."""


def plan_pack(
    found: Iterable[Found], folder: Path, layout: Layout, *, excluded: Iterable[Found] = (), about: Mapping[str, Any]
) -> "TaskFile":
    """List the recordings and decide which go into which shard; nothing is decoded.

    Args:
        found: From :func:`~shards.sources.read_found`.
        folder: Gets :data:`TASKS`.
        layout: The rules.
        excluded: Of ``pack.exclude``.
        about: What else to remember of the plan, JSON-able.

    Raises:
        ConfigError: A source's split name is not in ``layout.splits``.
        SourceError: There are no recordings.
    """
    corpus = folder / _CORPUS
    try:
        recordings = list_corpus(found, corpus)
        splits = assign_splits(
            recordings, splits=layout.splits, holdout=layout.holdout, holdout_by=layout.holdout_by, seed=layout.seed
        )
        tasks = (_tars_in_place if layout.in_place else _shards_to_write)(recordings, splits, layout)
        return write_tasks(folder, chain(tasks, _excluded_tasks(excluded)), about=about)
    finally:
        with suppress(OSError):  # the folder itself may not be there
            corpus.unlink()


def write_tasks(
    folder: Path, tasks: Iterable[tuple[Task, Sequence[Recording]]], *, about: Mapping[str, Any]
) -> "TaskFile":
    """Write tasks with their recordings, one after the other.

    Args:
        folder: Gets the two files.
        tasks: In their order.
        about: What else to remember, JSON-able.
    """
    (folder / TASKS).unlink(missing_ok=True)
    listed: list[Task] = []
    with atomic_write(folder / _RECORDINGS) as file, pa.ipc.new_file(file, schema_of(Recording)) as writer:
        for task, recordings in tasks:
            listed.append(task)
            writer.write_batch(batch_of(Recording, recordings))
    write_json(folder / TASKS, {"about": dict(about), "tasks": [asdict(task) for task in listed]})
    return TaskFile(folder)


class TaskFile:
    """What :func:`write_tasks` wrote; the recordings of a task are read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Open it.

        Raises:
            ShardError: It is missing or damaged.
        """
        self.folder = folder
        values = read_json(folder / TASKS)
        path = folder / _RECORDINGS
        try:
            self.tasks = [Task(**task) for task in values["tasks"]]
            self.about: dict[str, Any] = values["about"]
            self._file = pa.ipc.open_file(pa.memory_map(os.fspath(path)))
            num_batches = self._file.num_record_batches
        except (OSError, pa.ArrowInvalid, KeyError, TypeError) as cause:
            raise ShardError(f"{path} must list the recordings to pack, got {cause}; plan the pack again") from cause
        if num_batches != len(self.tasks):
            raise ShardError(f"{path} must hold {len(self.tasks)} tasks, got {num_batches}; plan the pack again")

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        """Another process opens it anew."""
        return type(self), (self.folder,)

    def recordings(self, number: int) -> list[Recording]:
        """Of the task of that number."""
        return list(records_of(Recording, self._file.get_batch(number)))

    def remove(self) -> None:
        """When all is packed."""
        (self.folder / TASKS).unlink(missing_ok=True)
        (self.folder / _RECORDINGS).unlink(missing_ok=True)


def num_recordings(tasks: Iterable[Task]) -> int:
    """Recordings to be packed; test sets that are only listened to do not count."""
    return sum(task.num_recordings for task in tasks if task.kind != EXCLUDE)


def _shards_to_write(
    recordings: Columns[Recording], splits: Codes, layout: Layout
) -> Iterator[tuple[Task, list[Recording]]]:
    seconds = durations(recordings)
    shards = lay_out(recordings, seconds, splits, seed=layout.seed, size=layout.size)
    for some in _at_once(shards):  # rows from all over a file are fetched many at a time
        fetched = iter(recordings.take(np.concatenate([shard.rows for shard in some])))
        for shard in some:
            members = [replace(recording, split=shard.split) for recording in islice(fetched, len(shard.rows))]
            yield (
                Task(name=shard.name, kind=WRITE, num_recordings=len(members), seconds=shard.seconds),
                members,
            )


def _at_once(shards: Iterable[ShardRows]) -> Iterator[list[ShardRows]]:
    some: list[ShardRows] = []
    num_rows = 0
    for shard in shards:
        some.append(shard)
        num_rows += len(shard.rows)
        if num_rows >= _ROWS_AT_ONCE:
            yield some
            some, num_rows = [], 0
    if some:
        yield some


def _tars_in_place(
    recordings: Columns[Recording], splits: Codes, layout: Layout
) -> Iterator[tuple[Task, list[Recording]]]:
    """A task for each tar, in the order in which the sources name them; names by the tars' own, numbered if equal."""
    del layout
    taken: Counter[str] = Counter()
    rows = ((recording, SPLITS[split]) for recording, split in zip(recordings, splits.tolist(), strict=True))
    for path, members in groupby(rows, key=lambda row: row[0].path):
        found = [replace(recording, split=split) for recording, split in members]
        if any(recording.audio_name is None for recording in found):
            raise ConfigError(
                f"pack.in_place must be false for recordings outside WebDataset tars, got true for {path}; "
                "pack them, or name only such tars, with names in UTF-8"
            )
        stem = clean_key(PurePosixPath(path).name.removesuffix(".tar"))
        taken[stem] += 1
        name = f"{stem}.tar" if taken[stem] == 1 else f"{stem}__{taken[stem]}.tar"
        location = path if Place.of(path).is_remote else str(Path(path).absolute())
        seconds = sum(estimate_seconds(recording) for recording in found)
        task = Task(name=name, kind=INDEX_IN_PLACE, num_recordings=len(found), seconds=seconds, location=location)
        yield task, found


def _excluded_tasks(excluded: Iterable[Found]) -> Iterator[tuple[Task, list[Recording]]]:
    found = iter(excluded)
    number = 0
    while some := [recording_of(entry) for entry in islice(found, _EXCLUDED_AT_ONCE)]:
        seconds = sum(estimate_seconds(recording) for recording in some)
        yield Task(name=f"exclude-{number:06d}", kind=EXCLUDE, num_recordings=len(some), seconds=seconds), some
        number += 1
