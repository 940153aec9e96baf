"""Whether a packed folder is what its index says: every shard is looked at, and all damage is told at once."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from shards.cache import Cache
from shards.errors import ShardError, SourceError
from shards.index import (
    INDEX,
    UNKNOWN_LANGUAGE,
    UTTERANCES,
    Index,
    ShardEntry,
    UtteranceTable,
    read_index,
    read_utterances,
)
from shards.places import Place
from shards.read import Shards
from shards.schema import Utterance
from shards.storage import sha256_file
from shards.tars import iterate_members
from shards.write import RECORD_FIELDS

MAX_TOLD = 20
"""Damaged shards that are told one by one; the rest is counted."""

_REMEDY = "pack again into an empty folder"
_REWRITTEN = f"it was not written with this {INDEX}, {_REMEDY}"
# Sums of the same numbers in another order differ in their last digits.
_TOLERANCE = 1e-9
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was looked at, and found as it should be."""

    num_shards: int
    num_bytes: int
    num_utterances: int
    hours: float
    num_decoded: int
    """Utterances whose audio was decoded too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Check:
    folder: Path
    entry: ShardEntry
    rows: UtteranceTable | None
    """What the table says of the shard; None to look at sizes only."""
    decoder: Shards | None


def verify(
    folder: Path, *, quick: bool = False, deep: bool = False, threads: int = 1, cache: Cache | None = None
) -> Verified:
    """Check index, table and every shard against each other.

    The tars that this project wrote must hold exactly the members that the table lists, with records that say the same;
    of a tar that is indexed in place, the listed members must be there. A tar at an address is read once, for its hash.

    Args:
        folder: The packed folder.
        quick: Compare sizes only, which finds what was cut or is missing.
        deep: Decode all audio too and count its samples, which finds what was damaged before the shard was hashed.
        threads: Shards that are checked at the same time; hashing, reading and decoding do not wait for each other.
        cache: Where tars at an address are kept while they are decoded.

    Returns:
        What was found to be as it should be.

    Raises:
        ShardError: The index or the table is damaged, a tar is not in the index, or some shards are missing, damaged or
            not as listed: of these it names the first :data:`MAX_TOLD`, each with its reason.
        ConfigError: A tar at an address is to be decoded without a cache.
    """
    index = read_index(folder)
    listed = {entry.name for entry in index.shards if entry.location is None}
    if unlisted := sorted(path.name for path in folder.glob("*.tar") if path.name not in listed):
        more = f" and {len(unlisted) - 1} more" if len(unlisted) > 1 else ""
        raise ShardError(f"{folder / unlisted[0]}{more} must be listed in {INDEX}, got an unknown shard; remove it")
    table = _check_table_hash(folder, index) if quick else _check_table(folder, index)
    decoder = Shards(folder, cache=cache) if deep and not quick else None
    faults = [fault for fault in _run_all(_fault, _checks(index, table, decoder), threads) if fault is not None]
    _refuse_damaged(folder, faults, len(index.shards))
    return Verified(
        num_shards=len(index.shards),
        num_bytes=sum(entry.bytes for entry in index.shards),
        num_utterances=index.num_utterances,
        hours=index.hours,
        num_decoded=0 if decoder is None else index.num_utterances,
    )


def _refuse_damaged(folder: Path, faults: Sequence[str], num_shards: int) -> None:
    if not faults:
        return
    told = [f"  {fault}" for fault in faults[:MAX_TOLD]]
    if len(faults) > MAX_TOLD:
        told.append(f"  and {len(faults) - MAX_TOLD} more")
    raise ShardError(
        "\n".join([f"{folder} must hold whole shards, got {len(faults)} of {num_shards} damaged; {_REMEDY}", *told])
    )


def _checks(index: Index, table: UtteranceTable | None, decoder: Shards | None) -> Iterator[_Check]:
    start = 0
    for entry in index.shards:
        rows = None if table is None else table[start : start + entry.num_utterances]
        yield _Check(folder=index.folder, entry=entry, rows=rows, decoder=decoder)
        start += entry.num_utterances


def _run_all(function: Callable[[_Check], str | None], checks: Iterator[_Check], threads: int) -> Iterator[str | None]:
    """Results in the order of ``checks``, of which only a few wait at a time."""
    if threads <= 1:
        yield from map(function, checks)
        return
    executor = ThreadPoolExecutor(threads, thread_name_prefix="verify")
    try:
        pending: list[Future[str | None]] = [executor.submit(function, check) for check in islice(checks, 2 * threads)]
        while pending:
            yield pending.pop(0).result()
            pending += [executor.submit(function, check) for check in islice(checks, 1)]
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _fault(check: _Check) -> str | None:
    """What is wrong with a shard."""
    try:
        _check_shard(check)
    except ShardError as cause:
        return str(cause)
    return None


def _check_shard(check: _Check) -> None:
    entry, where = check.entry, check.entry.path(check.folder)
    is_remote = entry.location is not None and Place.of(where).is_remote
    with _open(entry, check.folder, is_read_once=is_remote and check.rows is not None) as file:
        try:
            # What is read once need not be able to seek.
            if check.rows is None or not is_remote:
                _check_size(file.seek(0, os.SEEK_END) if file.seekable() else entry.bytes, where, entry)
                file.seek(0)
            if check.rows is None:
                return
            _check_hash(file, where, entry)
            if entry.location is None:
                _check_own_members(file, where, check.rows)
            elif not is_remote:
                _check_listed_members(file, where, check.rows)
        except OSError as cause:
            raise ShardError(f"{where} must be readable, got {cause.strerror or cause}; mend the disk") from cause
    if check.decoder is not None:
        for utterance in check.rows:  # one by one: they may last 20 minutes each
            check.decoder.read([utterance])


def _open(entry: ShardEntry, folder: Path, *, is_read_once: bool) -> BinaryIO:
    where = entry.path(folder)
    try:
        if entry.location is not None:
            return Place.of(where).open(is_read_once=is_read_once)
        if not Path(where).is_file():  # opening a pipe would wait for ever
            state = "something else" if Path(where).exists() else "no such file"
            raise ShardError(f"{where} must exist, got {state}; {_REMEDY}")
        return Path(where).open("rb")
    except (SourceError, OSError) as cause:
        raise ShardError(f"{where} must be readable, got {cause}; {_REMEDY}") from cause


def _check_size(size: int, where: str, entry: ShardEntry) -> None:
    if size != entry.bytes:
        raise ShardError(f"{where} must have {entry.bytes} bytes, got {size}; it was cut or replaced")


def _check_hash(file: BinaryIO, where: str, entry: ShardEntry) -> None:
    digest, size = hashlib.sha256(), 0
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
        size += len(block)
    _check_size(size, where, entry)
    if digest.hexdigest() != entry.sha256:
        raise ShardError(f"{where} must have sha256 {entry.sha256[:12]}, got {digest.hexdigest()[:12]}; it is damaged")


def _check_own_members(file: BinaryIO, where: str, rows: UtteranceTable) -> None:
    """Exactly the members of the table, and the same said in both."""
    listed = []
    for utterance in rows:
        listed.append((utterance.audio_offset, utterance.audio_bytes, utterance.audio_name))
        listed.append((utterance.json_offset, utterance.json_bytes, f"{utterance.key}.json"))
    listed.sort()
    found = [(member.offset, member.num_bytes, member.name) for member in iterate_members(file, where)]
    if found != listed:
        wrong = sorted(set(found) ^ set(listed))
        which = wrong[0][2] if wrong else "a member twice"
        raise ShardError(
            f"{where} must hold the members that {UTTERANCES} lists, got {which!r} elsewhere; {_REWRITTEN}"
        )
    for utterance in rows:
        file.seek(utterance.json_offset)
        _check_record(file.read(utterance.json_bytes), f"{where}: {utterance.key}.json", utterance)


def _check_record(text: bytes, where: str, utterance: Utterance) -> None:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise ShardError(f"{where} must be a JSON object, got {cause}; {_REWRITTEN}") from cause
    if not isinstance(record, dict) or record.keys() != set(RECORD_FIELDS):
        names = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ShardError(f"{where} must tell {', '.join(RECORD_FIELDS)}, got {names}; {_REWRITTEN}")
    for name in RECORD_FIELDS:
        if record[name] != (listed := getattr(utterance, name)):
            raise ShardError(f"{where} must have {name} {listed!r} of {UTTERANCES}, got {record[name]!r}; {_REWRITTEN}")


def _check_listed_members(file: BinaryIO, where: str, rows: UtteranceTable) -> None:
    """The tar may hold more than is listed; several utterances may be pieces of one member."""
    audio = {(utterance.audio_offset, utterance.audio_bytes, utterance.audio_name): utterance.key for utterance in rows}
    records = {
        (utterance.json_offset, utterance.json_bytes): utterance.key for utterance in rows if utterance.json_bytes
    }
    for member in iterate_members(file, where):
        audio.pop((member.offset, member.num_bytes, member.name), None)
        records.pop((member.offset, member.num_bytes), None)
    if missing := sorted([*audio.values(), *records.values()]):
        raise ShardError(
            f"{where} must hold the members that {UTTERANCES} lists, got none for {missing[0]!r} there; {_REWRITTEN}"
        )


def _check_table_hash(folder: Path, index: Index) -> None:
    path = folder / UTTERANCES
    if not path.is_file() or sha256_file(path) != index.utterances_sha256:
        state = "other contents" if path.is_file() else "no such file"
        raise ShardError(f"{path} must have sha256 {index.utterances_sha256[:12]}, got {state}; {_REMEDY}")


def _check_table(folder: Path, index: Index) -> UtteranceTable:
    """That index and table tell the same of each shard and altogether."""
    table, path = read_utterances(folder), folder / UTTERANCES
    shards, names = table.codes("shard")
    starts = np.flatnonzero(np.diff(shards, prepend=-1))
    runs = [
        (names[shards[i]], end - i) for i, end in zip(starts.tolist(), [*starts[1:].tolist(), len(table)], strict=True)
    ]
    if runs != [(entry.name, entry.num_utterances) for entry in index.shards if entry.num_utterances]:
        raise ShardError(f"{path} must list the shards of {INDEX} in its order, got others; {_REWRITTEN}")
    _check_sums(index, table, path)
    _check_unique(table, path)
    return table


def _check_sums(index: Index, table: UtteranceTable, path: Path) -> None:
    seconds = table.numbers("duration_seconds")
    languages, language_names = table.codes("language")
    start = 0
    for entry in index.shards:
        rows = slice(start, start + entry.num_utterances)
        found = _sums(seconds[rows], languages[rows], language_names)
        if not _are_close(found, entry.seconds_by_language) or not math.isclose(
            entry.seconds, math.fsum(found.values()), rel_tol=_TOLERANCE
        ):
            raise ShardError(f"{path} must have the seconds per language of {INDEX} in {entry.name}, got others")
        start += entry.num_utterances
    if not math.isclose(index.hours * 3600, float(seconds.sum()), rel_tol=_TOLERANCE):
        raise ShardError(f"{path} must have the hours of {INDEX}, got others; {_REWRITTEN}")
    splits, split_names = table.codes("split")
    told = {
        split: {name: hours * 3600 for name, hours in row.items()}
        for split, row in index.hours_by_split_language.items()
    }
    for code, split in enumerate(split_names):
        rows = splits == code
        if not _are_close(_sums(seconds[rows], languages[rows], language_names), told.pop(str(split), {})):
            raise ShardError(f"{path} must have the hours per language of {INDEX} in {split}, got others; {_REWRITTEN}")
    if told:
        raise ShardError(f"{path} must hold utterances of {min(told)}, got none; {_REWRITTEN}")


def _sums(seconds: np.ndarray, languages: np.ndarray, names: Sequence[str | None]) -> dict[str, float]:
    totals = np.bincount(languages, weights=seconds, minlength=len(names))
    return {names[code] or UNKNOWN_LANGUAGE: float(totals[code]) for code in np.unique(languages).tolist()}


def _are_close(first: dict[str, float], second: dict[str, float]) -> bool:
    return first.keys() == second.keys() and all(
        math.isclose(value, second[name], rel_tol=_TOLERANCE) for name, value in first.items()
    )


def _check_unique(table: UtteranceTable, path: Path) -> None:
    """Keys are compared by 8 bytes each: all of them as text would not fit into memory."""
    digests = np.fromiter((hash(key) for key in table.texts("key")), np.int64, len(table))
    ordered = np.sort(digests)
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    seen: set[str | None] = set()
    for key in table.texts("key") if suspects else ():
        if hash(key) in suspects:
            if key in seen:
                raise ShardError(f"{path} must hold each key once, got {key!r} twice; {_REWRITTEN}")
            seen.add(key)
