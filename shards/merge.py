"""All packed shards become one data set: what is there twice is taken out, and an index is written."""

import json
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.duplicates import EXCLUDED, Digests, digests_of, originals
from shards.errors import AudioError, StageError
from shards.faults import fault_point
from shards.index import INDEX, Index, IndexWriter, read_index
from shards.schema import SPLITS, TEST
from shards.shard import PART, Packed, ShardSettings, fingerprint_of, pack_task, read_part, take_out, write_part
from shards.splits import seeded_ranks
from shards.storage import atomic_write, sync
from shards.tasks import EXCLUDE, TaskFile, num_recordings

REJECTED = "rejected.jsonl"
"""One JSON line for each recording that could not be used and each utterance that is a copy, with the reason."""

_SYNCING_THREADS = 8
_SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{6}}\.tar")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackReport:
    """What a pack made, and what it left out."""

    index: Index
    num_recordings: int
    num_rejected: int
    rejected_by_reason: dict[str, int]
    num_copies: int
    """Utterances that were dropped because another one has the same samples."""


def merge(plan: TaskFile, settings: ShardSettings, *, drop_duplicates: bool, max_rejected_share: float) -> PackReport:
    """Make one index of all packed shards.

    Of utterances with the same samples one is kept: that of test before that of held-out before that of train. What has
    the samples of an utterance of ``pack.exclude`` is not kept, unless it is in test.

    Args:
        plan: All its shards are packed.
        settings: Those that they were packed with.
        drop_duplicates: Whether to look for them; what is excluded goes in any case.
        max_rejected_share: More rejected recordings than this share are an error.

    Raises:
        AudioError: Too many recordings, or all, were rejected; ``rejected.jsonl`` names them, no index is written.
        StageError: Shards are not packed yet.
    """
    folder = plan.folder
    rows = _listen(plan, settings)
    (folder / INDEX).unlink(missing_ok=True)
    if _put_back_copies(plan, settings, rows, drop_duplicates=drop_duplicates):
        rows = _listen(plan, settings)
    _take_out_copies(plan, rows, drop_duplicates=drop_duplicates)
    left_out = _write_rejected(plan)
    in_all = num_recordings(plan.tasks)
    if left_out.num_rejected > max_rejected_share * in_all:
        raise AudioError(_too_many(left_out, max_rejected_share, in_all, folder))
    if not left_out.shards:
        raise AudioError(
            f"pack.inputs must hold a recording that can be used, got {in_all} that cannot: "
            f"{left_out.examples}; see {folder / REJECTED}"
        )
    _remove_leftovers(folder, left_out.shards)
    with ThreadPoolExecutor(_SYNCING_THREADS, thread_name_prefix="sync") as threads:
        list(threads.map(sync, [path for name in left_out.shards if (path := folder / name).is_file()]))
    fault_point("pack.before_index")
    with IndexWriter(folder) as writer:
        for number in range(len(plan.tasks)):
            packed = _part(plan, number)[1]
            if packed.entry is not None:
                writer.add(packed.entry, packed.utterances)
    for path in [*folder.glob(f"*{PART}"), *folder.glob(".*.tmp")]:  # a killed pack leaves temporary files
        path.unlink(missing_ok=True)
    return PackReport(
        index=read_index(folder),
        num_recordings=in_all,
        num_rejected=left_out.num_rejected,
        rejected_by_reason=dict(sorted(left_out.reasons.items())),
        num_copies=left_out.num_copies,
    )


def refuse_unpacked(plan: TaskFile, settings: ShardSettings) -> None:
    """Stop where shards are not packed yet, or were with other settings.

    Raises:
        StageError: Names the first of them.
    """
    _listen(plan, settings)


def refuse_too_many(plan: TaskFile, *, num_rejected: int, num_done: int, max_rejected_share: float) -> None:
    """Stop packing where more was rejected than may be.

    Args:
        plan: Its folder gets :data:`REJECTED`.
        num_rejected: So far.
        num_done: Recordings that were looked at.
        max_rejected_share: Of all recordings of the plan.

    Raises:
        AudioError: There are more.
    """
    in_all = num_recordings(plan.tasks)
    if num_rejected > max_rejected_share * in_all:
        left_out = _write_rejected(plan)
        raise AudioError(_too_many(left_out, max_rejected_share, in_all, plan.folder, num_done=num_done))


@dataclass(slots=True, kw_only=True)
class _LeftOut:
    """Counts of what is in :data:`REJECTED`."""

    num_rejected: int = 0
    num_copies: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: str = ""
    shards: set[str] = field(default_factory=set)
    """Names of those of which something is left."""


def _write_rejected(plan: TaskFile) -> _LeftOut:
    """Write what was left out of all shards that are packed."""
    left_out = _LeftOut()
    examples: list[str] = []
    with atomic_write(plan.folder / REJECTED) as file:
        for task in plan.tasks:
            if (part := read_part(plan.folder, task)) is None:
                continue
            packed = part[1]
            for row in [*packed.rejected, *packed.copies]:
                shown = {name: value for name, value in row.items() if name != "digest"}
                file.write(json.dumps(shown, sort_keys=True, ensure_ascii=False).encode() + b"\n")
            left_out.num_copies += len(packed.copies)
            left_out.shards |= {packed.entry.name} if packed.entry else set()
            if task.kind != EXCLUDE:
                left_out.num_rejected += len(packed.rejected)
                left_out.reasons.update(row["reason"].partition(":")[0] for row in packed.rejected)
                examples += [f"{row['key']} ({row['reason']})" for row in packed.rejected[: 3 - len(examples)]]
    left_out.examples = ", ".join(examples)
    return left_out


def _too_many(
    left_out: _LeftOut, max_share: float, num_recordings: int, folder: Path, *, num_done: int | None = None
) -> str:
    done = "" if num_done in (None, num_recordings) else f" among the first {num_done} that were looked at"
    return (
        f"pack.max_rejected_share must cover what is rejected, got {max_share} and {left_out.num_rejected} of "
        f"{num_recordings} recordings{done}: {left_out.examples}; see {folder / REJECTED}, mend them or raise it"
    )


def _part(plan: TaskFile, number: int) -> tuple[list[str], Packed]:
    part = read_part(plan.folder, plan.tasks[number])
    if part is None:
        raise StageError(
            f"{plan.folder / plan.tasks[number].name} must be packed before all are merged, got no note of it; "
            "run pack again, or the part of the array that has it"
        )
    return part


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listened:
    """A row for each utterance of all tasks, test sets included: what copies are found by."""

    digests: Digests
    splits: npt.NDArray[np.int8]
    ranks: npt.NDArray[np.uint64]
    tasks: npt.NDArray[np.int32]
    places: npt.NDArray[np.int32]
    taken: dict[int, list[str]]
    """By number of the task: digests of the copies that an interrupted merge has taken out."""

    def take(self, rows: npt.NDArray[np.integer]) -> "_Listened":
        """Some rows."""
        return _Listened(
            digests=self.digests[rows],
            splits=self.splits[rows],
            ranks=self.ranks[rows],
            tasks=self.tasks[rows],
            places=self.places[rows],
            taken=self.taken,
        )


def _listen(plan: TaskFile, settings: ShardSettings) -> _Listened:
    columns: list[tuple[Any, ...]] = [(digests_of([]), *(np.zeros(0, kind) for kind in (np.int8, "u8", "i4", "i4")))]
    missing: list[str] = []
    taken: dict[int, list[str]] = {}
    for number, task in enumerate(plan.tasks):
        part = read_part(plan.folder, task)
        if part is None or part[0][0] != fingerprint_of(task, plan.recordings(number), settings):
            missing.append(task.name)
            continue
        packed, size = part[1], len(part[1].digests)
        if packed.copies:
            taken[number] = [row["digest"] for row in packed.copies]
        keys = [utterance.key for utterance in packed.utterances]
        splits = [SPLITS.index(utterance.split) for utterance in packed.utterances]
        if task.kind == EXCLUDE:
            keys, splits = [f"{task.name} {place}" for place in range(size)], [EXCLUDED] * size
        places = np.arange(size, dtype=np.int32)
        row = (np.array(splits, np.int8), seeded_ranks(0, keys), np.full(size, number, np.int32), places)
        columns.append((digests_of(packed.digests), *row))
    if missing:
        raise StageError(
            f"{plan.folder} must hold all {len(plan.tasks)} shards of its plan before they are merged, got "
            f"{len(missing)} that are not, first {missing[0]}; run pack, or the parts of the array that have them"
        )
    digests, splits, ranks, tasks, places = (np.concatenate(column) for column in zip(*columns, strict=True))
    return _Listened(digests=digests, splits=splits, ranks=ranks, tasks=tasks, places=places, taken=taken)


def _take_out_copies(plan: TaskFile, rows: _Listened, *, drop_duplicates: bool) -> None:
    """Take out what is there twice, or only what ``pack.exclude`` has, too."""
    if not drop_duplicates:  # test utterances are not compared, so that what is excluded comes first
        rows = rows.take(np.flatnonzero(rows.splits != SPLITS.index(TEST)))
    part = lru_cache(maxsize=64)(lambda number: _part(plan, number)[1].utterances)

    def key_of(row: int) -> str:
        return part(int(rows.tasks[row]))[rows.places[row]].key

    found: defaultdict[int, dict[str, str]] = defaultdict(dict)
    for copy, original in originals(rows.digests, rows.splits, rows.ranks).items():
        is_excluded = rows.splits[original] == EXCLUDED
        if rows.splits[copy] == EXCLUDED or not (drop_duplicates or is_excluded):
            continue
        same_as = "an utterance of pack.exclude" if is_excluded else repr(key_of(original))
        kind = "excluded" if is_excluded else "duplicate"
        found[int(rows.tasks[copy])][key_of(copy)] = f"{kind}: has the same samples as {same_as}"
    for number, copies in sorted(found.items()):
        made_from, packed = _part(plan, number)
        write_part(plan.folder, plan.tasks[number], take_out(plan.folder, packed, copies), plan=made_from)
        fault_point("pack.after_copies", shard=plan.tasks[number].name)


def _put_back_copies(plan: TaskFile, settings: ShardSettings, rows: _Listened, *, drop_duplicates: bool) -> bool:
    """Pack shards again that an interrupted merge took copies out of, where these are copies of nothing any more.

    Returns:
        Whether there were any.
    """
    # Half of a digest tells them apart well enough to decide what is packed again.
    known = rows.digests[:, 0] if drop_duplicates else rows.digests[rows.splits == EXCLUDED, 0]
    again = [number for number, texts in rows.taken.items() if not np.isin(digests_of(texts)[:, 0], known).all()]
    for number in again:
        (plan.folder / f"{plan.tasks[number].name}{PART}").unlink()
        pack_task(plan.folder, plan.tasks[number], plan.recordings(number), settings)
    return bool(again)


def _remove_leftovers(folder: Path, names: set[str]) -> None:
    """Shards of an earlier pack with other settings; webdataset users take every tar that they find."""
    for path in folder.glob("*.tar"):
        if _SHARD_NAME.fullmatch(path.name) and path.name not in names:
            path.unlink()
