"""One task of a pack: a shard that is written, or a tar that is indexed where it is, and what is noted of it.

A finished shard stands beside a ``.part.json``, by which an interrupted pack goes on; the index, written last, replaces
these. A recording that cannot be used leaves its shard one smaller.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from shards.audio import Samples, codec_versions, codes_of, digest, digest_of_flac, encode_flac, read_recording
from shards.columns import values_of
from shards.cuts import CostOf, SpeechCost, cut, energy
from shards.errors import AudioError, ShardError
from shards.faults import fault_point
from shards.index import ShardEntry, make_entry
from shards.places import Place, without_queries
from shards.schema import SAMPLE_RATE_HZ, TRAIN, Recording, Utterance
from shards.sources.keys import piece_key
from shards.storage import fingerprint, read_json, sha256_file, write_json
from shards.tasks import EXCLUDE, WRITE, Task
from shards.write import write_shard

PART = ".part.json"

# Sources round durations, and decoders add padding; what exceeds this is a piece of a longer recording.
_TOLD_SLACK_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSettings:
    """What decides the bytes of a shard, besides its recordings."""

    min_audio_seconds: float
    max_audio_seconds: float
    long_recordings: str
    """``energy``, ``vad`` or ``reject``."""
    max_recording_seconds: float


@dataclass(slots=True, kw_only=True)
class Packed:
    """What a task made."""

    entry: ShardEntry | None = None
    """None where nothing is left of it, and for test sets, which are only listened to."""
    utterances: list[Utterance] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    """Of the samples of each utterance, in hexadecimal."""
    copies: list[dict[str, str]] = field(default_factory=list)
    """Utterances that were taken out again, being copies of others: rows of ``rejected.jsonl``, and their digests."""
    rejected: list[dict[str, Any]] = field(default_factory=list)
    """Recordings that could not be used: rows of ``rejected.jsonl``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """An utterance."""

    flac: bytes
    """Empty where it is not written."""
    start_seconds: float
    duration_seconds: float
    digest: str


def pack_task(folder: Path, task: Task, recordings: Sequence[Recording], settings: ShardSettings) -> Packed:
    """Do a task, or take over what an earlier call left of it, if that was the same and is still whole.

    Raises:
        ShardError: A tar that is to be indexed in place is damaged.
        StageError: The folder cannot be written to.
    """
    plan, state = fingerprint_of(task, recordings, settings), _state_of(recordings)
    kept = read_part(folder, task)
    if (
        kept is not None
        and kept[0] == [plan, state]
        and _is_whole(folder, kept[1])
        and _are_rejected_still(kept[1].rejected, recordings, settings)
    ):
        return kept[1]
    packed = Packed()
    if task.kind == WRITE:
        _write(folder, task, recordings, settings, packed)
    elif task.kind == EXCLUDE:
        for _ in _pieces(recordings, settings, packed, encoded=False):
            pass
    else:
        _index(folder, task, recordings, settings, packed)
    fault_point("pack.after_tar", shard=task.name)
    write_part(folder, task, packed, plan=[plan, state])
    return packed


def fingerprint_of(task: Task, recordings: Sequence[Recording], settings: ShardSettings) -> str:
    """Of everything that decides what a task makes, but for the contents of the recordings."""
    rows = [{**values_of(recording), "path": printable(recording.path)} for recording in recordings]
    return fingerprint(values_of(task), rows, values_of(settings), codec_versions())


def write_part(folder: Path, task: Task, packed: Packed, *, plan: list[str]) -> None:
    """Note what a task made. After its tar: only a shard with this file beside it is whole."""
    part = {**values_of(packed), "plan": plan, "entry": packed.entry and values_of(packed.entry)}
    part["utterances"] = [values_of(utterance) for utterance in packed.utterances]
    # An interrupted pack that goes on hashes the tar: neither needs to be on disk before all shards are merged.
    write_json(folder / f"{task.name}{PART}", part, indent=None, durable=False)


def read_part(folder: Path, task: Task) -> tuple[list[str], Packed] | None:
    """What :func:`write_part` wrote: fingerprints of what it was made from, and what was made."""
    path = folder / f"{task.name}{PART}"
    if not path.is_file():
        return None
    try:
        part = read_json(path)
        plan, entry = part.pop("plan"), part.pop("entry")
        utterances = [Utterance(**row) for row in part.pop("utterances")]
        return plan, Packed(entry=entry and ShardEntry(**entry), utterances=utterances, **part)
    except (ShardError, KeyError, TypeError, AttributeError):
        return None


def take_out(folder: Path, packed: Packed, copies: Mapping[str, str]) -> Packed:
    """Take copies of other utterances out of a shard; a tar that was written is written again without them.

    Args:
        folder: Of the pack.
        packed: What the task made; at least one of its utterances is a copy.
        copies: Keys to take out, and why.
    """
    assert packed.entry is not None
    entry, path = packed.entry, folder / packed.entry.name
    kept = [(u, digest) for u, digest in zip(packed.utterances, packed.digests, strict=True) if u.key not in copies]
    rows = [
        {**rejection(utterance, utterance.split, copies[utterance.key]), "digest": digest}
        for utterance, digest in zip(packed.utterances, packed.digests, strict=True)
        if utterance.key in copies
    ]
    result = replace(packed, digests=[digest for _, digest in kept], copies=[*packed.copies, *rows])
    if not kept:
        if entry.location is None:
            path.unlink()
        return replace(result, entry=None, utterances=[])
    utterances = [utterance for utterance, _ in kept]
    if entry.location is None:
        written = write_shard(path, _flacs_of(path, utterances))
        assert written is not None
        entry, utterances = written
    else:
        entry = make_entry(
            utterances, name=entry.name, num_bytes=entry.bytes, sha256=entry.sha256, location=entry.location
        )
    return replace(result, entry=entry, utterances=utterances)


def rejection(what: Recording | Utterance, split: str, reason: str) -> dict[str, Any]:
    """A row of ``rejected.jsonl``."""
    path = printable(what.path) if isinstance(what, Recording) else None
    return {
        "key": what.key,
        "path": path,
        "source": what.source,
        "language": what.language,
        "split": split,
        "start_seconds": what.start_seconds,
        "reason": without_queries(reason),
    }


def printable(path: str) -> str:
    """A path or address as text that people may see, also if the file system's bytes are not UTF-8."""
    return without_queries(os.fsencode(path).decode(errors="backslashreplace"))


def _write(folder: Path, task: Task, recordings: Sequence[Recording], settings: ShardSettings, packed: Packed) -> None:
    def found() -> Iterator[tuple[Utterance, bytes]]:
        for recording, pieces in _pieces(recordings, settings, packed, encoded=True):
            for number, piece in enumerate(pieces):
                yield _utterance(task, recording, piece, number if len(pieces) > 1 else None), piece.flac

    if (written := write_shard(folder / task.name, found())) is not None:
        packed.entry, packed.utterances = written


def _index(folder: Path, task: Task, recordings: Sequence[Recording], settings: ShardSettings, packed: Packed) -> None:
    assert task.location is not None
    with _local_copy(folder, task) as tar:
        local = [replace(recording, path=str(tar)) for recording in recordings]
        for recording, pieces in _pieces(local, replace(settings, long_recordings="reject"), packed, encoded=False):
            (piece,) = pieces
            utterance = _utterance(task, recording, piece, None)
            packed.utterances.append(
                replace(
                    utterance,
                    audio_name=recording.audio_name or "",
                    audio_offset=recording.offset_bytes or 0,
                    audio_bytes=recording.num_bytes or 0,
                    json_offset=recording.json_offset or 0,
                    json_bytes=recording.json_bytes or 0,
                )
            )
        for row in packed.rejected:
            row["path"] = printable(task.location)
        if packed.utterances:
            packed.entry = make_entry(
                packed.utterances,
                name=task.name,
                num_bytes=tar.stat().st_size,
                sha256=sha256_file(tar),
                location=task.location,
            )


@contextmanager
def _local_copy(folder: Path, task: Task) -> Iterator[Path]:
    """The tar itself, or for the time being a copy of one that lies behind an address."""
    place = Place.of(task.location or "")
    if not place.is_remote:
        yield Path(place.url)
        return
    copy = folder / f".{task.name}.copy.tmp"
    try:
        with place.open() as source, copy.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def _pieces(
    recordings: Iterable[Recording], settings: ShardSettings, packed: Packed, *, encoded: bool
) -> Iterator[tuple[Recording, list[_Piece]]]:
    """The utterances of one recording after the other; what cannot be used is noted.

    A recording is kept or rejected as a whole: damage at its end shows only when everything before it is decoded.
    """
    for recording in recordings:
        try:
            pieces = list(_cut(recording, settings, encoded=encoded))
        except AudioError as cause:
            packed.rejected.append(rejection(recording, recording.split or EXCLUDE, str(cause)))
            continue
        packed.digests += [piece.digest for piece in pieces]
        yield recording, pieces


def _cut(recording: Recording, settings: ShardSettings, *, encoded: bool) -> Iterator[_Piece]:
    is_cut = settings.long_recordings != "reject"
    longest = settings.max_recording_seconds if is_cut else settings.max_audio_seconds
    blocks = read_recording(recording, min_seconds=settings.min_audio_seconds, max_seconds=longest)
    limits = {"max_seconds": settings.max_audio_seconds, "min_seconds": settings.min_audio_seconds}
    seconds = 0.0
    for start, samples in cut(blocks, cost_of=_cost_of(settings), **limits) if is_cut else _whole(blocks):
        codes = codes_of(samples)
        seconds += len(codes) / SAMPLE_RATE_HZ
        flac = encode_flac(codes) if encoded else b""
        yield _Piece(
            flac=flac,
            start_seconds=(recording.start_seconds or 0.0) + start / SAMPLE_RATE_HZ,
            duration_seconds=len(codes) / SAMPLE_RATE_HZ,
            digest=(digest_of_flac(flac) if encoded else digest(codes)).hex(),
        )
    told = recording.told_seconds
    if told is not None and recording.start_seconds is None and seconds > told + _TOLD_SLACK_SECONDS:
        raise AudioError(
            f"longer than told: must last the {told:g} s of its source, got {seconds:.2f} s; "
            "say where it begins (offset), or correct the duration"
        )


def _cost_of(settings: ShardSettings) -> CostOf:
    return SpeechCost() if settings.long_recordings == "vad" else energy


def _whole(blocks: Iterable[Samples]) -> Iterator[tuple[int, Samples]]:
    yield 0, np.concatenate(list(blocks))


def _utterance(task: Task, recording: Recording, piece: _Piece, number: int | None) -> Utterance:
    """The utterance that a recording is, or its piece of that number; where its bytes are is not known yet."""
    key = recording.key if number is None else piece_key(recording.key, number)
    return Utterance(
        key=key,
        shard=task.name,
        audio_name=f"{key}.flac",
        audio_offset=0,
        audio_bytes=0,
        json_offset=0,
        json_bytes=0,
        duration_seconds=piece.duration_seconds,
        start_seconds=piece.start_seconds,
        recording=recording.key,
        split=recording.split or TRAIN,
        language=recording.language,
        speaker=recording.speaker,
        reference=recording.reference if number is None else None,
        source=recording.source,
    )


def _flacs_of(path: Path, utterances: Sequence[Utterance]) -> Iterator[tuple[Utterance, bytes]]:
    """What is in a tar already, read before it is replaced."""
    with path.open("rb") as file:
        for utterance in utterances:
            file.seek(utterance.audio_offset)
            yield utterance, file.read(utterance.audio_bytes)


def _is_whole(folder: Path, packed: Packed) -> bool:
    """Whether the tar is still the one that was noted."""
    entry = packed.entry
    if entry is None:
        return True
    if Place.of(entry.path(folder)).is_remote:
        return True  # indexed where it is; reading compares the hash
    path = Path(entry.path(folder))
    return path.is_file() and path.stat().st_size == entry.bytes and sha256_file(path) == entry.sha256


def _are_rejected_still(
    rejected: Sequence[Mapping[str, Any]], recordings: Sequence[Recording], settings: ShardSettings
) -> bool:
    """Whether what was rejected would be so again: permissions may have been mended, a decoder installed since."""
    keys = {row["key"] for row in rejected}
    again = Packed()
    for _ in _pieces([recording for recording in recordings if recording.key in keys], settings, again, encoded=False):
        return False
    return [(row["key"], row["reason"]) for row in again.rejected] == [(row["key"], row["reason"]) for row in rejected]


def _state_of(recordings: Sequence[Recording]) -> str:
    """Sizes and times of change of the files, which are cheap to ask."""
    rows = []
    for path in dict.fromkeys(recording.path for recording in recordings):
        try:
            status = Path(path).stat()
            rows.append([status.st_size, status.st_mtime_ns])
        except (OSError, ValueError):
            rows.append([])
    return fingerprint(rows)
