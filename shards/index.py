"""What stands beside the tars: ``index.json`` (the shards, their hashes, their hours) and ``utterances.parquet``.

A folder without an index is not finished. The index carries the hash of everything else, so :mod:`shards.verify` finds
any damage; webdataset's own reader does not (a tar that was cut merely ends early).
"""

import math
import types
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from shards.columns import Columns, batch_of, schema_of
from shards.errors import ConfigError, ShardError
from shards.schema import SPLITS, Utterance
from shards.storage import atomic_write, fingerprint, read_json, sha256_file, write_json

INDEX, UTTERANCES = "index.json", "utterances.parquet"

UNKNOWN_LANGUAGE = "unknown"
"""Stands for an utterance without a language wherever hours are counted."""

_VERSION = 2
_REMEDY = "pack again into an empty folder"
_REPEATED = ("shard", "split", "language", "speaker", "source")
_ROWS_OF_A_GROUP = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """One tar."""

    name: str
    """Unique in the index; the tar's file name where this project wrote it."""
    location: str | None = None
    """Path or address of a tar that is indexed in place; None for ``<folder>/<name>``."""
    bytes: int
    sha256: str
    num_utterances: int
    seconds: float
    seconds_by_language: dict[str, float]

    def path(self, folder: Path) -> str:
        """Where the tar is, given the folder of the index: a path or an address."""
        return str(folder / self.name) if self.location is None else self.location


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """The contents of ``index.json``."""

    folder: Path
    shards: tuple[ShardEntry, ...]
    num_utterances: int
    hours: float
    hours_by_split_language: dict[str, dict[str, float]]
    utterances_sha256: str
    fingerprint: str
    """Of names and contents of the shards: equal data, equal fingerprint, wherever and however it was packed."""


class UtteranceTable(Columns[Utterance]):
    """The utterances of an index, about 165 bytes each."""

    def shards(self) -> Iterator[tuple[str, int, int]]:
        """Each shard, and where its utterances begin and end: they lie together, in the order of the index."""
        codes, names = self.codes("shard")
        begins = np.flatnonzero(np.diff(codes, prepend=-1)).tolist()
        for begin, end in pairwise([*begins, len(codes)]):
            yield str(names[codes[begin]]), begin, end

    def places_of(self, sources: Sequence[str], *, setting: str) -> npt.NDArray[np.int64]:
        """Rows of some sources, by their names.

        Raises:
            ConfigError: A source has no row; ``setting`` is what its name stands in.
        """
        codes, names = self.codes("source")
        if unknown := sorted(set(sources).difference(map(str, names))):
            raise ConfigError(
                f"{setting} must be sources of this speech ({', '.join(sorted(map(str, names)))}), got "
                f"{', '.join(unknown)}; name some of those"
            )
        return np.flatnonzero(np.isin(codes, [number for number, name in enumerate(names) if name in sources]))


class IndexWriter:
    """Writes ``utterances.parquet`` shard by shard, then ``index.json``, which makes the folder count."""

    def __init__(self, folder: Path) -> None:
        """Begin; ``folder`` holds the tars already."""
        self._folder = folder
        self._entries: list[ShardEntry] = []
        self._pending: list[Utterance] = []
        self._seconds: defaultdict[tuple[str, str], list[float]] = defaultdict(list)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            file = stack.enter_context(atomic_write(self._folder / UTTERANCES))
            self._writer = stack.enter_context(pq.ParquetWriter(file, schema_of(Utterance), compression="zstd"))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if error is None:
            self._flush()
        self._stack.__exit__(kind, error, trace)
        if error is None:
            self._write_index()

    def add(self, entry: ShardEntry, utterances: Sequence[Utterance]) -> None:
        """The next shard in the order that readers see, with what it holds in tar order."""
        self._entries.append(entry)
        self._pending += utterances
        by_group: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        for utterance in utterances:
            by_group[utterance.split, utterance.language or UNKNOWN_LANGUAGE].append(utterance.duration_seconds)
        for group, seconds in by_group.items():
            self._seconds[group].append(math.fsum(seconds))
        if len(self._pending) >= _ROWS_OF_A_GROUP:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_batch(batch_of(Utterance, self._pending))
        self._pending = []

    def _write_index(self) -> None:
        hours: defaultdict[str, dict[str, float]] = defaultdict(dict)
        for (split, language), seconds in sorted(self._seconds.items()):
            hours[split][language] = math.fsum(seconds) / 3600
        index = {
            "version": _VERSION,
            "shards": [asdict(entry) for entry in self._entries],
            "num_utterances": sum(entry.num_utterances for entry in self._entries),
            "hours": math.fsum(entry.seconds for entry in self._entries) / 3600,
            "hours_by_split_language": hours,
            "utterances_sha256": sha256_file(self._folder / UTTERANCES),
            "fingerprint": _fingerprint(self._entries),
        }
        write_json(self._folder / INDEX, index)


def make_entry(
    utterances: Sequence[Utterance], *, name: str, num_bytes: int, sha256: str, location: str | None = None
) -> ShardEntry:
    """Describe a finished tar.

    Args:
        utterances: What of it is in the index.
        name: Its name in the index.
        num_bytes: Its size.
        sha256: Of its bytes.
        location: Where it is, if it is indexed in place.
    """
    by_language: defaultdict[str, list[float]] = defaultdict(list)
    for utterance in utterances:
        by_language[utterance.language or UNKNOWN_LANGUAGE].append(utterance.duration_seconds)
    return ShardEntry(
        name=name,
        location=location,
        bytes=num_bytes,
        sha256=sha256,
        num_utterances=len(utterances),
        seconds=math.fsum(utterance.duration_seconds for utterance in utterances),
        seconds_by_language={language: math.fsum(seconds) for language, seconds in sorted(by_language.items())},
    )


def read_index(folder: Path) -> Index:
    """Read ``index.json``; the tars themselves are not looked at.

    Raises:
        ShardError: It is missing, damaged, or of another version.
    """
    path = folder / INDEX
    if not path.exists():
        raise ShardError(f"{path} must exist, got no such file; run the pack stage to its end")
    values = read_json(path)
    try:
        if (version := values.pop("version")) != _VERSION:
            raise ShardError(f"{path} must be of version {_VERSION}, got {version!r}; {_REMEDY}")
        shards = tuple(ShardEntry(**entry) for entry in values.pop("shards"))
        index = Index(folder=folder, shards=shards, **values)
        counted = sum(entry.num_utterances for entry in shards)
    except (AttributeError, KeyError, TypeError) as cause:
        raise ShardError(f"{path} must be an index of shards, got {cause}; {_REMEDY}") from cause
    if index.fingerprint != _fingerprint(shards) or index.num_utterances != counted:
        raise ShardError(f"{path} must agree with its own fingerprint and count, got others; it was edited, {_REMEDY}")
    return index


def read_utterances(folder: Path, *, splits: Collection[str] = SPLITS) -> UtteranceTable:
    """The utterances of some splits, in shard order, then tar order.

    Raises:
        ShardError: Index or table are missing, or the table is not the one that the index was written with.
    """
    index = read_index(folder)
    path = folder / UTTERANCES
    if not path.is_file():
        raise ShardError(f"{path} must exist, got no such file; {_REMEDY}")
    if (digest := sha256_file(path)) != index.utterances_sha256:
        raise ShardError(
            f"{path} must have sha256 {index.utterances_sha256[:12]}, got {digest[:12]}; it is damaged, {_REMEDY}"
        )
    wanted = None if set(splits) >= set(SPLITS) else [("split", "in", list(splits))]
    return UtteranceTable(Utterance, pq.read_table(path, filters=wanted, read_dictionary=list(_REPEATED)))


def _fingerprint(entries: Sequence[ShardEntry]) -> str:
    return fingerprint([[entry.name, entry.sha256] for entry in entries])
