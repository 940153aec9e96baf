"""All recordings of a run on disk, in two Arrow files: as the sources name them, and then task by task, to be packed.

A corpus may have more recordings than fit in memory: what is kept of each is a few numbers.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.audio import estimate_seconds
from shards.columns import Columns, batch_of, schema_of
from shards.errors import SourceError
from shards.schema import Recording
from shards.sources.keys import Found, clean_key, suffixed_key
from shards.splits import seeded_ranks
from shards.storage import atomic_write

_ROWS_AT_ONCE = 65_536
# Headers lie on a file system that answers slowly and many at a time.
_PROBING_THREADS, _PROBED_AT_ONCE = 8, 64
_COPIED = tuple({field.name for field in fields(Recording)} & {field.name for field in fields(Found)})


def list_corpus(found: Iterable[Found], path: Path) -> Columns[Recording]:
    """Write what the sources name to an Arrow file, with a unique key for each.

    A key depends on nothing but names inside the sources: where several would have the same one, all of them get a
    suffix hashed from the name; equal names in sources of equal names are numbered in the order of their paths.

    Args:
        found: From :func:`~shards.sources.read_found`.
        path: Of the file.

    Raises:
        SourceError: There is nothing.
        StageError: The file cannot be written.
    """
    suffixes: list[npt.NDArray[np.uint32]] = []
    with atomic_write(path) as file, pa.ipc.new_file(file, schema_of(Recording)) as writer:
        for some in _batches(found):
            writer.write_batch(batch_of(Recording, [recording_of(entry) for entry in some]))
            suffixes.append(np.array([_suffix(entry) for entry in some], np.uint32))
    recordings = Columns(Recording, pa.ipc.open_file(pa.memory_map(os.fspath(path))).read_all())
    if not len(recordings):
        raise SourceError("pack.inputs must hold recordings, got none; name manifests or folders of audio")
    return _with_unique_keys(recordings, np.concatenate(suffixes))


def durations(recordings: Columns[Recording]) -> npt.NDArray[np.float64]:
    """About how many seconds each recording lasts, by what its source or its header tells; nothing is decoded."""
    seconds = recordings.numbers("told_seconds").astype(np.float64)
    unknown = np.flatnonzero(np.isnan(seconds))
    with ThreadPoolExecutor(_PROBING_THREADS, thread_name_prefix="headers") as threads:
        for start in range(0, len(unknown), _ROWS_AT_ONCE):
            rows = unknown[start : start + _ROWS_AT_ONCE]
            some = list(recordings.take(rows))
            # Many at a time: handing over a recording costs as much as looking at it on a local disk.
            parts = [some[i : i + _PROBED_AT_ONCE] for i in range(0, len(some), _PROBED_AT_ONCE)]
            seconds[rows] = [s for part in threads.map(_estimate_all, parts) for s in part]
    return seconds


def _estimate_all(recordings: list[Recording]) -> list[float]:
    return [estimate_seconds(recording) for recording in recordings]


def _batches(found: Iterable[Found]) -> Iterator[list[Found]]:
    some: list[Found] = []
    for entry in found:
        some.append(entry)
        if len(some) == _ROWS_AT_ONCE:
            yield some
            some = []
    if some:
        yield some


def recording_of(found: Found) -> Recording:
    """With a key that may not be unique; without a member's name that is not UTF-8, which no index can hold."""
    values = {name: getattr(found, name) for name in _COPIED}
    if found.audio_name is not None and not _is_utf8(found.audio_name):
        values["audio_name"] = None
    return Recording(key=clean_key(found.name), **values)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _suffix(found: Found) -> int:
    """What a key gets behind it if it is not unique, as a number of 32 bits."""
    return int(suffixed_key("", found.source, found.name).removeprefix("-"), 16)


def _with_unique_keys(recordings: Columns[Recording], suffixes: npt.NDArray[np.uint32]) -> Columns[Recording]:
    """Give keys that are there more than once a suffix."""
    hashes = seeded_ranks(0, (str(key) for key in recordings.texts("key")))
    _, places, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    is_repeated = counts[places] > 1
    if not is_repeated.any():
        return recordings
    rows = np.flatnonzero(is_repeated)
    found = sorted(zip(rows.tolist(), recordings.take(rows), strict=True), key=lambda one: _place_of(one[1]))
    taken, keys = set(hashes[~is_repeated].tolist()), {}
    for row, recording in found:
        suffixed = unique = f"{recording.key}-{suffixes[row]:08x}"
        number = 1
        while (digest := int(seeded_ranks(0, [unique])[0])) in taken:
            number += 1
            unique = f"{suffixed}-{number}"
        taken.add(digest)
        keys[row] = unique
    table = recordings.table
    column = pa.chunked_array(
        [
            [keys.get(start + place, key) for place, key in enumerate(chunk.to_pylist())]
            for start, chunk in _chunks(table.column("key"))
        ]
    )
    return Columns(Recording, table.set_column(table.schema.get_field_index("key"), "key", column))


def _chunks(column: pa.ChunkedArray) -> Iterator[tuple[int, pa.Array]]:
    start = 0
    for chunk in column.chunks:
        yield start, chunk
        start += len(chunk)


def _place_of(recording: Recording) -> tuple[str, int, float]:
    return recording.path, recording.offset_bytes or 0, recording.start_seconds or 0.0
