"""What stands beside the tars: ``index.json`` (the shards, their hashes, their hours) and ``utterances.parquet``.

A folder without an index is not finished. The index carries the hash of everything else, so :func:`verify` finds any
damage; webdataset's own reader does not (a tar that was cut merely ends early).
"""

import math
import tarfile
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import ShardError
from shards.schema import SPLITS, Utterance
from shards.storage import atomic_write, fingerprint, read_json, sha256_file, write_json

INDEX, UTTERANCES = "index.json", "utterances.parquet"

UNKNOWN_LANGUAGE = "unknown"
"""Stands for an utterance without a language wherever hours are counted."""

_VERSION = 1
_REMEDY = "pack again into an empty folder"
_TYPES = {"str": pa.string(), "str | None": pa.string(), "int": pa.int64(), "float": pa.float64()}
_REPEATED = ("shard", "split", "language", "speaker", "source")
_ROWS_AT_ONCE = 10_000
_SCHEMA = pa.schema(
    [pa.field(field.name, _TYPES[getattr(field.type, "__name__", str(field.type))]) for field in fields(Utterance)]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """One tar."""

    name: str
    bytes: int
    sha256: str
    num_utterances: int
    seconds: float
    seconds_by_language: dict[str, float]


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


def make_entry(path: Path, utterances: Sequence[Utterance]) -> ShardEntry:
    """Describe a finished tar.

    Args:
        path: The tar.
        utterances: What it holds.
    """
    by_language: defaultdict[str, list[float]] = defaultdict(list)
    for utterance in utterances:
        by_language[utterance.language or UNKNOWN_LANGUAGE].append(utterance.duration_seconds)
    return ShardEntry(
        name=path.name,
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
        num_utterances=len(utterances),
        seconds=math.fsum(utterance.duration_seconds for utterance in utterances),
        seconds_by_language={language: math.fsum(seconds) for language, seconds in sorted(by_language.items())},
    )


def write_index(folder: Path, entries: Sequence[ShardEntry], utterances: Sequence[Utterance]) -> Index:
    """Write ``utterances.parquet``, then ``index.json``, which makes the folder count.

    Args:
        folder: Holds the tars already.
        entries: One for each tar, in the order that readers see.
        utterances: Of all tars, in shard order, then tar order.
    """
    columns = {field.name: [getattr(utterance, field.name) for utterance in utterances] for field in fields(Utterance)}
    with atomic_write(folder / UTTERANCES) as file:
        pq.write_table(pa.table(columns, schema=_SCHEMA), file, compression="zstd")
    seconds: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for utterance in utterances:
        seconds[utterance.split][utterance.language or UNKNOWN_LANGUAGE].append(utterance.duration_seconds)
    index = Index(
        folder=folder,
        shards=tuple(entries),
        num_utterances=len(utterances),
        hours=math.fsum(utterance.duration_seconds for utterance in utterances) / 3600,
        hours_by_split_language={
            split: {language: math.fsum(parts) / 3600 for language, parts in sorted(languages.items())}
            for split, languages in sorted(seconds.items())
        },
        utterances_sha256=sha256_file(folder / UTTERANCES),
        fingerprint=_fingerprint(entries),
    )
    values = {name: value for name, value in asdict(index).items() if name != "folder"}
    write_json(folder / INDEX, {"version": _VERSION, **values})
    return index


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


def read_utterances(folder: Path, *, splits: Collection[str] = SPLITS) -> list[Utterance]:
    """The utterances of some splits, in shard order, then tar order.

    Raises:
        ShardError: Index or table are missing, or the table is not the one that the index was written with.
    """
    return _utterances(folder, read_index(folder), splits)


def verify(folder: Path, *, quick: bool = False) -> None:
    """Check every shard against the index.

    Args:
        folder: The packed folder.
        quick: Compare sizes only, which finds what was cut or is missing; else also contents and every member's place.

    Raises:
        ShardError: Names the first shard that is missing, damaged, or not in the index.
    """
    index = read_index(folder)
    for entry in index.shards:
        _verify_bytes(folder / entry.name, entry, quick=quick)
    listed = {entry.name for entry in index.shards}
    if unlisted := sorted(path.name for path in folder.glob("*.tar") if path.name not in listed):
        raise ShardError(f"{folder / unlisted[0]} must be listed in {INDEX}, got an unknown shard; remove it")
    by_shard: defaultdict[str, list[Utterance]] = defaultdict(list)
    for utterance in _utterances(folder, index, SPLITS):
        by_shard[utterance.shard].append(utterance)
    if not quick:
        for entry in index.shards:
            _verify_members(folder / entry.name, by_shard[entry.name])


def read_members(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of the data of each member of a plain tar, by name, in tar order.

    Raises:
        ShardError: It is no plain tar, or holds two members of one name.
    """
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                if member.name in members:
                    raise ShardError(f"{path} must hold each member once, got {member.name!r} twice; {_REMEDY}")
                members[member.name] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as cause:
        raise ShardError(f"{path} must be a plain tar, got {cause}; {_REMEDY}") from cause
    return members


def _verify_bytes(path: Path, entry: ShardEntry, *, quick: bool) -> None:
    if not path.is_file():
        raise ShardError(f"{path} must exist, got no such file; {_REMEDY}")
    if (size := path.stat().st_size) != entry.bytes:
        raise ShardError(f"{path} must have {entry.bytes} bytes, got {size}; it is damaged, {_REMEDY}")
    if not quick and (digest := sha256_file(path)) != entry.sha256:
        raise ShardError(f"{path} must have sha256 {entry.sha256[:12]}, got {digest[:12]}; it is damaged, {_REMEDY}")


def _verify_members(path: Path, utterances: Sequence[Utterance]) -> None:
    expected = {}
    for utterance in utterances:
        expected[f"{utterance.key}.flac"] = (utterance.audio_offset, utterance.audio_bytes)
        expected[f"{utterance.key}.json"] = (utterance.json_offset, utterance.json_bytes)
    if list((found := read_members(path)).items()) != list(expected.items()):
        wrong = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
        which = wrong[0] if wrong else "another order"
        raise ShardError(f"{path} must hold the members that {UTTERANCES} lists, got {which!r} elsewhere; {_REMEDY}")


def _utterances(folder: Path, index: Index, splits: Collection[str]) -> list[Utterance]:
    path = folder / UTTERANCES
    if not path.is_file():
        raise ShardError(f"{path} must exist, got no such file; {_REMEDY}")
    if (digest := sha256_file(path)) != index.utterances_sha256:
        raise ShardError(
            f"{path} must have sha256 {index.utterances_sha256[:12]}, got {digest[:12]}; it is damaged, {_REMEDY}"
        )
    utterances = []
    strings: dict[str | None, str | None] = {}
    for batch in pq.read_table(path, filters=[("split", "in", list(splits))]).to_batches(max_chunksize=_ROWS_AT_ONCE):
        columns: dict[str, list[Any]] = batch.to_pydict()
        for name in _REPEATED:  # each string once, instead of once an utterance
            columns[name] = [strings.setdefault(value, value) for value in columns[name]]
        rows = zip(*columns.values(), strict=True)
        utterances += [Utterance(**dict(zip(columns, row, strict=True))) for row in rows]
    return utterances


def _fingerprint(entries: Sequence[ShardEntry]) -> str:
    return fingerprint([[entry.name, entry.sha256] for entry in entries])
