"""Recordings in, shards out: WebDataset tars of FLAC and JSON, the same bytes whatever the number of processes.

Which recording goes into which shard is decided before anything is decoded, so shards can be packed in any order, by
any number of processes, and again after an interruption. A recording that cannot be used leaves its shard one smaller.
A finished shard stands beside a ``.part.json``, by which an interrupted pack goes on; the index, written last, replaces
these.
"""

import json
import math
import multiprocessing
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import soundfile
import soxr

from shards.audio import Samples, decode, encode_flac
from shards.errors import AudioError, ShardError, SourceError, StageError
from shards.index import INDEX, Index, ShardEntry, make_entry, read_members, write_index
from shards.schema import SAMPLE_RATE_HZ, SPLITS, Recording, Utterance
from shards.splits import assign_splits, seeded_rank
from shards.storage import atomic_write, fingerprint, read_json, sha256_file, write_json

REJECTED = "rejected.jsonl"
"""One JSON line for each recording that could not be used, with the reason."""

_PART = ".part.json"
# Sources round durations, and decoders add padding; what exceeds this is a piece of a longer recording.
_TOLD_SLACK_SECONDS = 0.5
_SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{6}}\.tar")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackReport:
    """What a pack made, and what it left out."""

    index: Index
    num_recordings: int
    num_rejected: int
    rejected_by_reason: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """One tar to make: what goes in, in order."""

    name: str
    split: str
    recordings: tuple[Recording, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    folder: Path
    min_audio_seconds: float
    max_audio_seconds: float


@dataclass(slots=True, kw_only=True)
class _Packed:
    entry: ShardEntry | None = None
    utterances: list[Utterance] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)


def pack(
    tasks: Sequence[ShardTask],
    folder: Path,
    *,
    min_audio_seconds: float,
    max_audio_seconds: float,
    max_rejected_share: float,
    processes: int,
    progress: Callable[[int, float], None] | None = None,
) -> PackReport:
    """Pack recordings into ``folder``; go on where an interrupted call with the same recordings and settings ended.

    Args:
        tasks: From :func:`plan_shards`.
        folder: Gets ``<split>-000042.tar``, ``utterances.parquet``, ``rejected.jsonl`` and, last, ``index.json``. A
            pack that is there is replaced: :func:`refuse_to_lose` says when it should not be.
        min_audio_seconds: Shorter recordings are rejected.
        max_audio_seconds: Longer recordings are rejected.
        max_rejected_share: More rejected recordings than this share are an error.
        processes: Packing processes; 0 is one for each core.
        progress: Called after each shard with the recordings and seconds of audio done so far.

    Raises:
        AudioError: Too many recordings, or all, were rejected; ``rejected.jsonl`` names them, no index is written.
        StageError: The folder cannot be written to, or a packing process died.
    """
    num_recordings = sum(len(task.recordings) for task in tasks)
    (folder / INDEX).unlink(missing_ok=True)  # from here on the folder does not count
    settings = _Settings(folder=folder, min_audio_seconds=min_audio_seconds, max_audio_seconds=max_audio_seconds)
    packed: dict[str, _Packed] = {}
    num_done, seconds, num_rejected = 0, 0.0, 0
    with closing(_pack_all(tasks, settings, processes)) as results:
        for task, result in results:
            packed[task.name] = result
            num_done += len(task.recordings)
            num_rejected += len(result.rejected)
            seconds += result.entry.seconds if result.entry else 0.0
            if progress is not None:
                progress(num_done, seconds)
            if num_rejected > max_rejected_share * num_recordings:
                break
    ordered = [packed[task.name] for task in tasks if task.name in packed]
    rejected = [row for result in ordered for row in result.rejected]
    _write_rejected(folder / REJECTED, rejected)
    _refuse_too_many(rejected, num_done, num_recordings, folder, max_rejected_share)
    entries = [result.entry for result in ordered if result.entry is not None]
    _remove_leftovers(folder, {entry.name for entry in entries})
    index = write_index(folder, entries, [utterance for result in ordered for utterance in result.utterances])
    for path in [*folder.glob(f"*{_PART}"), *folder.glob(".*.tmp")]:  # a killed pack leaves temporary files
        path.unlink(missing_ok=True)
    reasons = Counter(reason_kind(row["reason"]) for row in rejected)
    return PackReport(
        index=index,
        num_recordings=num_recordings,
        num_rejected=len(rejected),
        rejected_by_reason=dict(sorted(reasons.items())),
    )


def plan_shards(
    recordings: Sequence[Recording],
    *,
    seed: int,
    splits: Mapping[str, str],
    holdout: float,
    holdout_by: str,
    utterances_per_shard: int,
) -> list[ShardTask]:
    """Which recordings go into which shard, in which order. Pure.

    Within a split the order is random by seed and key, so that every shard mixes languages, sources and speakers.

    Args:
        recordings: With unique keys; their order does not matter.
        seed: Decides hold-out and order.
        splits: The sources' split names to ours.
        holdout: Share of the training recordings set aside per language.
        holdout_by: ``speaker`` or ``recording``.
        utterances_per_shard: Most utterances in a shard.

    Raises:
        ConfigError: A source's split name is not in ``splits``.
        SourceError: There are no recordings, or two of one key.
    """
    if not recordings:
        raise SourceError("pack.inputs must hold recordings, got none; name manifests or folders of audio")
    if repeated := [key for key, count in Counter(recording.key for recording in recordings).items() if count > 1]:
        raise SourceError(f"keys of recordings must be unique, got {repeated[0]!r} more than once; rename one")
    names = assign_splits(recordings, splits=splits, holdout=holdout, holdout_by=holdout_by, seed=seed)
    tasks = []
    for split in SPLITS:
        members = [recording for recording, name in zip(recordings, names, strict=True) if name == split]
        members.sort(key=lambda recording: seeded_rank(seed, recording.key))
        tasks += [
            ShardTask(
                name=f"{split}-{number:06d}.tar",
                split=split,
                recordings=tuple(members[number * utterances_per_shard : (number + 1) * utterances_per_shard]),
            )
            for number in range(math.ceil(len(members) / utterances_per_shard))
        ]
    return tasks


def refuse_to_lose(folder: Path, tasks: Sequence[ShardTask], *, max_rejected_share: float) -> None:
    """Keep a finished folder when the recordings that it would be made from again are gone.

    Raises:
        SourceError: More recordings are missing than may be rejected.
    """
    if not (folder / INDEX).exists():
        return
    paths = [recording.path for task in tasks for recording in task.recordings]
    missing = [path for path in paths if not Path(path).exists()]
    if len(missing) > max_rejected_share * len(paths):
        raise SourceError(
            f"pack.inputs must name recordings that exist to pack {folder} again, got {len(missing)} of "
            f"{len(paths)} missing, first {missing[0]}; undo the change, or remove the folder"
        )


def reason_kind(reason: str) -> str:
    """What a rejection is counted under: the words before the first colon."""
    return reason.partition(":")[0]


def _pack_all(
    tasks: Sequence[ShardTask], settings: _Settings, processes: int
) -> Generator[tuple[ShardTask, _Packed], None, None]:
    """Results as they come, in any order."""
    num_processes = min(processes or len(os.sched_getaffinity(0)), len(tasks))
    if num_processes == 1:
        for task in tasks:
            yield task, _pack_shard(task, settings)
        return
    # Spawned, not forked: a fork copies the locks of threads that do not exist in the child.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(num_processes, mp_context=context, initializer=_begin_worker)
    try:
        futures = {executor.submit(_pack_shard, task, settings): task for task in tasks}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    except BrokenProcessPool as cause:
        unfinished = [task.name for task in tasks if not _part_path(settings.folder, task).is_file()]
        raise StageError(
            f"pack.processes must all live, got one that died in one of {', '.join(unfinished[:num_processes])}; "
            "if it ran out of memory set pack.processes or pack.utterances_per_shard lower; finished shards are kept"
        ) from cause
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it: orphans would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _pack_shard(task: ShardTask, settings: _Settings) -> _Packed:
    plan = _plan_fingerprint(task, settings)
    part_path = _part_path(settings.folder, task)
    if (kept := _read_part(part_path, plan)) is not None and _are_rejected_still(kept.rejected, task, settings):
        return kept
    packed = _Packed()
    flacs: dict[str, tuple[bytes, float, Recording]] = {}
    for recording in task.recordings:
        try:
            samples = _samples(recording, settings)
        except AudioError as cause:
            packed.rejected.append(_rejection(recording, task.split, cause))
            continue
        flacs[recording.key] = (encode_flac(samples), len(samples) / SAMPLE_RATE_HZ, recording)
    path = settings.folder / task.name
    if flacs:
        _write_tar(path, task, flacs)
        members = read_members(path)
        packed.utterances = [_utterance(task, recording, seconds, members) for _, seconds, recording in flacs.values()]
        packed.entry = make_entry(path, packed.utterances)
    # After the tar: only a shard with this file beside it is whole.
    write_json(part_path, {"plan": plan, **asdict(packed)})
    return packed


def _samples(recording: Recording, settings: _Settings) -> Samples:
    samples = decode(recording.path, min_seconds=settings.min_audio_seconds, max_seconds=settings.max_audio_seconds)
    seconds, told = len(samples) / SAMPLE_RATE_HZ, recording.told_seconds
    if told is not None and seconds > told + _TOLD_SLACK_SECONDS:
        raise AudioError(
            f"longer than told: must last the {told:g} s of its source, got {seconds:.2f} s; "
            "cut the recording into files first, or correct the duration"
        )
    return samples


def _are_rejected_still(rejected: Sequence[Mapping[str, Any]], task: ShardTask, settings: _Settings) -> bool:
    """Whether what was rejected would be so again: permissions may have been mended, a decoder installed since."""
    recordings = {recording.key: recording for recording in task.recordings}
    for row in rejected:
        try:
            _samples(recordings[row["key"]], settings)
        except AudioError as cause:
            if str(cause) == row["reason"]:
                continue
        return False
    return True


def _write_tar(path: Path, task: ShardTask, flacs: Mapping[str, tuple[bytes, float, Recording]]) -> None:
    import webdataset  # brings torch along, a second that verifying or a mistake in a manifest need not cost

    # Onto an open file: given a name, webdataset writes in place, and a pack that is killed leaves half a shard.
    with atomic_write(path) as file, webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
        for key, (flac, seconds, recording) in flacs.items():
            about = {
                "key": key,
                "language": recording.language,
                "duration_seconds": seconds,
                "speaker": recording.speaker,
                "reference": recording.reference,
                "split": task.split,
                "source": recording.source,
            }
            text = json.dumps(about, sort_keys=True, ensure_ascii=False)
            tar.write({"__key__": key, "flac": flac, "json": text.encode()})


def _utterance(
    task: ShardTask, recording: Recording, seconds: float, members: Mapping[str, tuple[int, int]]
) -> Utterance:
    audio_offset, audio_bytes = members[f"{recording.key}.flac"]
    json_offset, json_bytes = members[f"{recording.key}.json"]
    return Utterance(
        key=recording.key,
        shard=task.name,
        audio_offset=audio_offset,
        audio_bytes=audio_bytes,
        json_offset=json_offset,
        json_bytes=json_bytes,
        duration_seconds=seconds,
        split=task.split,
        language=recording.language,
        speaker=recording.speaker,
        reference=recording.reference,
        source=recording.source,
    )


def _rejection(recording: Recording, split: str, cause: AudioError) -> dict[str, Any]:
    return {
        "key": recording.key,
        "path": _printable(recording.path),
        "source": recording.source,
        "language": recording.language,
        "split": split,
        "reason": str(cause),
    }


def _plan_fingerprint(task: ShardTask, settings: _Settings) -> str:
    """Of everything that decides the bytes of a shard; recordings by size and time of change, which is cheap to ask."""
    rows = []
    for recording in task.recordings:
        try:
            status = Path(recording.path).stat()
            state = [status.st_size, status.st_mtime_ns]
        except (OSError, ValueError):
            state = []
        rows.append([{**asdict(recording), "path": _printable(recording.path)}, state])
    versions = [soundfile.__version__, soundfile.__libsndfile_version__, soxr.__version__]
    limits = [settings.min_audio_seconds, settings.max_audio_seconds]
    return fingerprint(task.name, rows, limits, versions)


def _read_part(part_path: Path, plan: str) -> _Packed | None:
    """The result of an earlier, interrupted pack, if it is the same shard and still whole."""
    if not part_path.is_file():
        return None
    try:
        part = read_json(part_path)
        if part["plan"] != plan:
            return None
        entry = None if part["entry"] is None else ShardEntry(**part["entry"])
        utterances = [Utterance(**row) for row in part["utterances"]]
        if entry is not None and sha256_file(part_path.with_name(entry.name)) != entry.sha256:
            return None
    except (ShardError, OSError, KeyError, TypeError):
        return None
    return _Packed(entry=entry, utterances=utterances, rejected=part["rejected"])


def _write_rejected(path: Path, rejected: Sequence[Mapping[str, Any]]) -> None:
    with atomic_write(path) as file:
        for row in rejected:
            file.write(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")


def _refuse_too_many(
    rejected: Sequence[Mapping[str, Any]], num_done: int, num_recordings: int, folder: Path, max_share: float
) -> None:
    examples = ", ".join(f"{row['key']} ({row['reason']})" for row in rejected[:3])
    if len(rejected) > max_share * num_recordings:
        done = "" if num_done == num_recordings else f" among the first {num_done} that were looked at"
        raise AudioError(
            f"pack.max_rejected_share must cover what is rejected, got {max_share} and {len(rejected)} of "
            f"{num_recordings} recordings{done}: {examples}; see {folder / REJECTED}, mend them or raise it"
        )
    if len(rejected) == num_recordings:
        raise AudioError(
            f"pack.inputs must hold a recording that can be used, got {num_recordings} that cannot: {examples}; "
            f"see {folder / REJECTED}"
        )


def _remove_leftovers(folder: Path, names: set[str]) -> None:
    """Shards of an earlier pack with other settings; webdataset users take every tar that they find."""
    for path in folder.glob("*.tar"):
        if _SHARD_NAME.fullmatch(path.name) and path.name not in names:
            path.unlink()


def _part_path(folder: Path, task: ShardTask) -> Path:
    return folder / f"{task.name}{_PART}"


def _printable(path: str) -> str:
    """A path as text that JSON in UTF-8 can hold, also if the file system's bytes are not UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")
