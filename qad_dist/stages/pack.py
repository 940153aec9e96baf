"""The pack stage: recordings in, shards out. CPU only: one program that starts processes, or many as a job array."""

import logging
import os
import re
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qad_dist.config import RunConfig
from qad_dist.packing import keep_finished, kept_plan, merge_packed, pack_part, read_rejected, results_of, spool_of
from qad_dist.runtime.reading import open_cache, open_shards
from qad_dist.runtime.record import DONE, begin_stage, finish_stage, is_finished, require_stage, stage_inputs
from shards import stats as statistics
from shards import verify as verification
from shards.errors import ConfigError, StageError
from shards.index import read_utterances
from shards.layout import ShardSize
from shards.merge import refuse_unpacked
from shards.pictures import drawn_if_possible
from shards.schema import TRAIN
from shards.shard import ShardSettings
from shards.sources import read_found
from shards.splice import Pool, Splicing, write_splices
from shards.storage import fingerprint, read_json
from shards.tasks import EXCLUDE, Layout, TaskFile, plan_pack

logger = logging.getLogger(__name__)

STAGE = "pack"
SPLICES = "splice"
"""Folder of a run: training speech made of pieces of what is packed."""

PLOT = "stats.png"


def run(run: RunConfig, *, array: str | None = None) -> None:
    """Pack the inputs into ``<run>/pack``; does nothing if that was done with this config already.

    Args:
        run: The resolved config.
        array: ``I/N``: pack only the shards of job I, from 0, of N; :func:`merge` makes one data set of them all.
    """
    part = (0, 1) if array is None else _part(array)
    if _tell_finished(run):
        return
    tasks = _planned(run) if array is None else _planned_before(run)
    keep_finished(tasks, max_rejected_share=run.pack.max_rejected_share)
    if array is None:
        begin_stage(run, STAGE)  # takes back the record of a finished pack: what can be refused was refused before
    started = time.monotonic()
    pack_part(
        tasks,
        _settings(run),
        part=part,
        max_rejected_share=run.pack.max_rejected_share,
        processes=run.pack.processes,
    )
    if array is None:
        _finish(run, tasks, started)
    else:
        logger.info("packed part=%s shards=%d; when all parts are: launch/pack.py merge", array, len(tasks.tasks))


def plan(run: RunConfig) -> None:
    """Decide which recordings go into which shard, once for all jobs of an array."""
    if not _tell_finished(run):
        tasks = _planned(run)
        hours = sum(task.seconds for task in tasks.tasks if task.kind != EXCLUDE) / 3600
        logger.info("planned shards=%d hours=%.3f", sum(task.kind != EXCLUDE for task in tasks.tasks), hours)


def merge(run: RunConfig) -> None:
    """Make one data set of what the jobs of an array have packed.

    Raises:
        StageError: Some shards are not packed yet.
    """
    if _tell_finished(run):
        return
    tasks = _planned_before(run)
    refuse_unpacked(tasks, _settings(run))
    begin_stage(run, STAGE)  # removes temporary files: nothing may be writing any more
    _finish(run, tasks, time.monotonic())


def verify(run: RunConfig, *, quick: bool = False, deep: bool = False) -> None:
    """Check the shards against the index: every byte, or sizes only (``quick``), or every sample too (``deep``)."""
    threads = run.pack.processes or len(os.sched_getaffinity(0))
    found = verification.verify(run.stage_folder(STAGE), quick=quick, deep=deep, threads=threads, cache=open_cache(run))
    logger.info(
        "verified shards=%d utterances=%d hours=%.3f decoded=%d",
        *(found.num_shards, found.num_utterances, found.hours, found.num_decoded),
    )


def stats(run: RunConfig) -> None:
    """Print and draw what the shards hold: hours per language and split, durations, and what was rejected and why."""
    folder = run.stage_folder(STAGE)
    rejected = read_rejected(folder)
    counted = statistics.count(read_utterances(folder))
    _show(statistics.table_lines(counted, rejected))
    with drawn_if_possible(folder / PLOT, logger):
        statistics.draw(counted, folder / PLOT)
        _show([f"drawn: {folder / PLOT}"])


def splice(run: RunConfig) -> None:
    """Make training speech of pieces of the packed training speech, into ``<run>/splice``: inputs of another pack.

    Raises:
        QadError: Pack is not finished, there is nothing to take pieces from, or an utterance cannot be read.
    """
    require_stage(run, STAGE)
    utterances = read_utterances(run.stage_folder(STAGE), splits=[TRAIN])
    if run.splice.sources:
        utterances = utterances.take(utterances.places_of(run.splice.sources, setting="splice.sources"))
    if not len(utterances):
        raise ConfigError(f"pack.holdout must leave training speech to splice, got none in {run.stage_folder(STAGE)}")
    settings = run.splice.model_dump(mode="json")
    folder, in_all = run.stage_folder(SPLICES), run.splice.utterances
    write_splices(
        Pool(utterances, Splicing(**run.splice.model_dump(exclude={"utterances", "sources"}))),
        folder,
        open_shards(run),
        num_splices=in_all,
        seed=run.seed,
        about=fingerprint(settings, read_json(run.stage_folder(STAGE) / DONE)["fingerprint"]),
        processes=run.pack.processes,
        progress=lambda done: logger.info("spliced utterances=%d/%d", done, in_all),
    )
    _show([f"{in_all} utterances of pieces in {folder}; pack {run.stage_folder(STAGE)} and {folder} as another run"])


def dry_run(run: RunConfig) -> None:
    """Print what pack would do, from the sources and the headers of the recordings; decodes nothing, leaves nothing."""
    with tempfile.TemporaryDirectory(prefix="qad-pack-") as folder:
        tasks = _plan_in(Path(folder), run, spool=None).tasks
    by_split: dict[str, list[Any]] = {}
    for task in tasks:
        by_split.setdefault(task.name.partition("-")[0] if task.location is None else "in place", []).append(task)
    for name, some in by_split.items():
        hours = sum(task.seconds for task in some) / 3600
        _show(
            [f"{name}: {sum(task.num_recordings for task in some)} recordings, about {hours:.3f} h, {len(some)} shards"]
        )


def _tell_finished(run: RunConfig) -> bool:
    folder = run.stage_folder(STAGE)
    if not is_finished(run, STAGE):
        return False
    verification.verify(folder, quick=True)
    logger.info("pack is finished folder=%s; remove it to pack again", folder)
    return True


def _planned(run: RunConfig) -> TaskFile:
    """The plan of this config; that of an interrupted start, if there is one."""
    folder = run.stage_folder(STAGE)
    return kept_plan(folder, _about(run)) or _plan_in(folder, run, spool=spool_of(folder))


def _plan_in(folder: Path, run: RunConfig, *, spool: Path | None) -> TaskFile:
    layout = Layout(
        seed=run.seed,
        splits=run.pack.splits,
        holdout=run.pack.holdout,
        holdout_by=run.pack.holdout_by,
        size=ShardSize(
            hours=run.pack.hours_per_shard, bytes=run.pack.bytes_per_shard, recordings=run.pack.utterances_per_shard
        ),
        in_place=run.pack.in_place,
    )
    how: dict[str, Any] = {"default_language": run.pack.language, "spool": spool}
    logger.info("listing inputs=%d", len(run.pack.inputs))
    return plan_pack(
        read_found(run.pack.inputs, kind=run.pack.source, **how),
        folder,
        layout,
        excluded=read_found(run.pack.exclude, setting="pack.exclude", **how),
        about=_about(run),
    )


def _planned_before(run: RunConfig) -> TaskFile:
    """The plan that all jobs of an array share."""
    if (tasks := kept_plan(run.stage_folder(STAGE), _about(run))) is None:
        raise StageError(
            f"{run.stage_folder(STAGE)} must hold the plan of this config, got none; run `python launch/pack.py plan "
            "--config ...` once, before the jobs of an array"
        )
    return tasks


def _about(run: RunConfig) -> dict[str, str]:
    return {"inputs": fingerprint(stage_inputs(run, STAGE))}


def _settings(run: RunConfig) -> ShardSettings:
    return ShardSettings(
        min_audio_seconds=run.pack.min_audio_seconds,
        max_audio_seconds=run.pack.max_audio_seconds,
        long_recordings=run.pack.long_recordings,
        max_recording_seconds=run.pack.max_recording_hours * 3600,
    )


def _finish(run: RunConfig, tasks: TaskFile, started: float) -> None:
    report = merge_packed(
        tasks,
        _settings(run),
        drop_duplicates=run.pack.drop_duplicates,
        max_rejected_share=run.pack.max_rejected_share,
    )
    finish_stage(run, STAGE, results_of(report, time.monotonic() - started))
    tasks.remove()
    stats(run)


def _part(array: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", array, re.ASCII)
    if match is None or not int(match[1]) < int(match[2]):
        raise ConfigError(f"--array must be I/N with I from 0 to N - 1, got {array!r}; e.g. --array 3/16")
    return int(match[1]), int(match[2])


def _show(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)  # noqa: T201  a table is this command's result
