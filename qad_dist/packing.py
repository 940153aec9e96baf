"""What pack does, for every stage that packs: a plan that an interrupted start goes on with, shards, one index of them.

It names the settings of ``pack:`` in its messages.
"""

import json
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shards.errors import ShardError, SourceError
from shards.merge import REJECTED, PackReport
from shards.merge import merge as merge_shards
from shards.pack import Progress, pack_tasks, refuse_to_lose
from shards.shard import ShardSettings
from shards.tasks import TASKS, TaskFile

logger = logging.getLogger(__name__)

_SPOOL = "spool"
_SECONDS_BETWEEN_LOGS = 10.0


def kept_plan(folder: Path, about: Mapping[str, Any]) -> TaskFile | None:
    """The plan that an interrupted start left, if it was made from the same.

    Args:
        folder: That is packed into.
        about: What a plan must have been told to remember of itself.
    """
    if not (folder / TASKS).is_file():
        return None
    try:
        tasks = TaskFile(folder)
    except ShardError as damage:
        logger.warning("the plan is damaged and not used: %s", damage)
        return None
    return tasks if tasks.about == about else None


def spool_of(folder: Path) -> Path:
    """Where a plan for ``folder`` leaves audio that is no stretch of a file; gone when all is packed."""
    return folder / _SPOOL


def keep_finished(tasks: TaskFile, *, max_rejected_share: float) -> None:
    """Refuse a plan that would replace a finished folder by less, and remove it.

    Args:
        tasks: The plan.
        max_rejected_share: More missing recordings than this share are an error.

    Raises:
        SourceError: The recordings of a finished folder are gone.
    """
    try:
        refuse_to_lose(tasks, max_rejected_share=max_rejected_share)
    except SourceError:
        tasks.remove()
        raise


def pack_part(
    tasks: TaskFile,
    settings: ShardSettings,
    *,
    part: tuple[int, int] = (0, 1),
    max_rejected_share: float,
    processes: int,
) -> None:
    """Pack the shards of a plan, as :func:`~shards.pack.pack_tasks`, and tell of it now and then."""
    pack_tasks(
        tasks,
        settings,
        part=part,
        max_rejected_share=max_rejected_share,
        processes=processes,
        progress=_LoggedProgress(),
    )


def merge_packed(
    tasks: TaskFile, settings: ShardSettings, *, drop_duplicates: bool, max_rejected_share: float
) -> PackReport:
    """Make one data set of all shards, as :func:`~shards.merge.merge`; the plan stays until it is removed."""
    report = merge_shards(tasks, settings, drop_duplicates=drop_duplicates, max_rejected_share=max_rejected_share)
    shutil.rmtree(spool_of(tasks.folder), ignore_errors=True)
    return report


def results_of(report: PackReport, seconds: float) -> dict[str, object]:
    """What a pack has to say for itself in its record; ``seconds`` is how long it took."""
    return {
        "fingerprint": report.index.fingerprint,
        "num_shards": len(report.index.shards),
        "num_recordings": report.num_recordings,
        "num_utterances": report.index.num_utterances,
        "num_rejected": report.num_rejected,
        "rejected_by_reason": report.rejected_by_reason,
        "num_copies": report.num_copies,
        "hours": report.index.hours,
        "hours_by_split_language": report.index.hours_by_split_language,
        "wall_seconds": round(seconds, 1),
    }


def read_rejected(folder: Path) -> list[dict[str, Any]]:
    """The recordings and utterances that a pack left out, each with its reason.

    Raises:
        ShardError: The list is missing or damaged.
    """
    path = folder / REJECTED
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as cause:
        raise ShardError(f"{path} must be the list of rejected recordings, got {cause}; pack again") from cause


class _LoggedProgress:
    """Logs now and then how far packing is."""

    def __init__(self) -> None:
        self._started = self._logged = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        is_last = progress.num_recordings == progress.num_recordings_in_all
        if now - self._logged < _SECONDS_BETWEEN_LOGS and not is_last:
            return
        self._logged = now
        passed = max(now - self._started, 1e-9)
        left = progress.planned_seconds_in_all - progress.planned_seconds
        logger.info(
            "packed recordings=%d/%d hours=%.3f hours_per_second=%.3f eta_seconds=%.0f",
            *(progress.num_recordings, progress.num_recordings_in_all, progress.seconds / 3600),
            *(progress.seconds / 3600 / passed, left * passed / max(progress.planned_seconds, 1e-9)),
        )
