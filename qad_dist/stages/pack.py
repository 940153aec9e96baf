"""The pack stage: recordings in, shards out. CPU only, one process that starts the others."""

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence

from qad_dist.config import RunConfig
from qad_dist.runtime.record import begin_stage, finish_stage, is_finished
from shards import index
from shards.audio import header_seconds
from shards.errors import ShardError
from shards.pack import REJECTED, PackReport, ShardTask, pack, plan_shards, reason_kind, refuse_to_lose
from shards.schema import SPLITS, Recording, Utterance
from shards.sources import read_sources

logger = logging.getLogger(__name__)

STAGE = "pack"

_SECONDS_BETWEEN_LOGS = 10.0


def run(run: RunConfig) -> None:
    """Pack the inputs into ``<run>/pack``; does nothing if that was done with this config already."""
    folder = run.stage_folder(STAGE)
    if is_finished(run, STAGE):
        index.verify(folder, quick=True)
        logger.info("pack is finished folder=%s; remove it to pack again", folder)
        return
    recordings = read_sources(run.pack.inputs, default_language=run.pack.language)
    logger.info("packing recordings=%d inputs=%d", len(recordings), len(run.pack.inputs))
    tasks = _plan(run, recordings)
    refuse_to_lose(folder, tasks, max_rejected_share=run.pack.max_rejected_share)
    begin_stage(run, STAGE)  # takes back the record of a finished pack: what can be refused was refused before
    started = time.monotonic()
    report = pack(
        tasks,
        folder,
        min_audio_seconds=run.pack.min_audio_seconds,
        max_audio_seconds=run.pack.max_audio_seconds,
        max_rejected_share=run.pack.max_rejected_share,
        processes=run.pack.processes,
        progress=_Progress(len(recordings)),
    )
    finish_stage(run, STAGE, _results(report, time.monotonic() - started))
    stats(run)


def verify(run: RunConfig) -> None:
    """Check every packed byte against the index."""
    folder = run.stage_folder(STAGE)
    index.verify(folder)
    found = index.read_index(folder)
    logger.info("verified shards=%d utterances=%d hours=%.3f", len(found.shards), found.num_utterances, found.hours)


def stats(run: RunConfig) -> None:
    """Print what the shards hold: utterances and hours per language and split, and what was rejected and why."""
    folder = run.stage_folder(STAGE)
    path = folder / REJECTED
    try:
        rejected = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as cause:
        raise ShardError(f"{path} must be the list of rejected recordings, got {cause}; pack again") from cause
    _show(_table(index.read_utterances(folder), [row["language"] for row in rejected]))
    for reason, count in Counter(reason_kind(row["reason"]) for row in rejected).most_common():
        _show([f"rejected: {reason}: {count}"])


def dry_run(run: RunConfig) -> None:
    """Print what pack would do, from the sources and the headers of the recordings; decodes and writes nothing."""
    recordings = read_sources(run.pack.inputs, default_language=run.pack.language)
    tasks = _plan(run, recordings)
    for split in SPLITS:
        planned = [task for task in tasks if task.split == split]
        members = [recording for task in planned for recording in task.recordings]
        seconds, num_unknown = _header_seconds(members)
        unknown = f" ({num_unknown} recordings whose header tells no length are not counted)" if num_unknown else ""
        _show([f"{split}: {len(members)} recordings, {seconds / 3600:.3f} h{unknown}, {len(planned)} shards"])


def _plan(run: RunConfig, recordings: Sequence[Recording]) -> list[ShardTask]:
    return plan_shards(
        recordings,
        seed=run.seed,
        splits=run.pack.splits,
        holdout=run.pack.holdout,
        holdout_by=run.pack.holdout_by,
        utterances_per_shard=run.pack.utterances_per_shard,
    )


class _Progress:
    """Logs now and then how far packing is."""

    def __init__(self, num_recordings: int) -> None:
        self._num_recordings = num_recordings
        self._started = self._logged = time.monotonic()

    def __call__(self, num_done: int, seconds: float) -> None:
        now = time.monotonic()
        if now - self._logged < _SECONDS_BETWEEN_LOGS and num_done < self._num_recordings:
            return
        self._logged = now
        rate = num_done / max(now - self._started, 1e-9)
        logger.info(
            "packed recordings=%d/%d hours=%.3f recordings_per_second=%.1f",
            num_done,
            self._num_recordings,
            seconds / 3600,
            rate,
        )


def _results(report: PackReport, seconds: float) -> dict[str, object]:
    return {
        "fingerprint": report.index.fingerprint,
        "num_shards": len(report.index.shards),
        "num_recordings": report.num_recordings,
        "num_utterances": report.index.num_utterances,
        "num_rejected": report.num_rejected,
        "rejected_by_reason": report.rejected_by_reason,
        "hours": report.index.hours,
        "hours_by_split_language": report.index.hours_by_split_language,
        "wall_seconds": round(seconds, 1),
    }


def _table(utterances: Sequence[Utterance], rejected_languages: Iterable[str | None]) -> list[str]:
    """One line per language: utterances and hours in each split and altogether, and rejected recordings."""
    rejected = Counter(language or index.UNKNOWN_LANGUAGE for language in rejected_languages)
    by_language: dict[str, list[Utterance]] = {language: [] for language in rejected}
    for utterance in utterances:
        by_language.setdefault(utterance.language or index.UNKNOWN_LANGUAGE, []).append(utterance)
    lines = [f"{'language':<12}" + "".join(f"{split + ' (h)':>20}" for split in (*SPLITS, "all")) + f"{'rejected':>10}"]
    rows = [(language, members, rejected[language]) for language, members in sorted(by_language.items())]
    if len(rows) > 1:
        rows.append(("all", list(utterances), rejected.total()))
    for language, members, num_rejected in rows:
        cells = [[u for u in members if u.split == split] for split in SPLITS] + [members]
        texts = [f"{len(cell)} ({math.fsum(u.duration_seconds for u in cell) / 3600:.3f})" for cell in cells]
        lines.append(f"{language:<12}" + "".join(f"{text:>20}" for text in texts) + f"{num_rejected:>10}")
    return lines


def _header_seconds(recordings: Iterable[Recording]) -> tuple[float, int]:
    """Summed durations, and the number of recordings without one."""
    known = [header_seconds(recording.path) for recording in recordings]
    return math.fsum(seconds for seconds in known if seconds is not None), known.count(None)


def _show(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)  # noqa: T201  a table is this command's result
