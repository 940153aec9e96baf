"""One way to call pack, so that each test names only what it is about."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from shards.layout import ShardSize
from shards.merge import PackReport, merge
from shards.pack import Progress, pack_tasks
from shards.schema import Recording
from shards.shard import ShardSettings
from shards.sources.keys import Found
from shards.tasks import Layout, TaskFile, plan_pack

SPLITS = {"train": "train", "dev": "heldout", "test": "test"}


def settings(**changes: Any) -> ShardSettings:
    """The usual limits, and changes of them."""
    usual = {
        "min_audio_seconds": 0.1,
        "max_audio_seconds": 30.0,
        "long_recordings": "energy",
        "max_recording_seconds": 3600.0,
    }
    return ShardSettings(**(usual | changes))


def found_of(recordings: Sequence[Recording]) -> list[Found]:
    """What a source would have found to give these recordings."""
    shared = {field.name for field in fields(Recording)} & {field.name for field in fields(Found)}
    return [
        Found(name=recording.key, where="test", **{name: getattr(recording, name) for name in shared})
        for recording in recordings
    ]


def plan_tones(
    recordings: Sequence[Recording],
    folder: Path,
    *,
    seed: int = 0,
    holdout: float = 0.2,
    utterances_per_shard: int = 8,
    hours_per_shard: float = 100.0,
    excluded: Sequence[Recording] = (),
    in_place: bool = False,
) -> TaskFile:
    """Plan with the usual split names and these settings."""
    layout = Layout(
        seed=seed,
        splits=SPLITS,
        holdout=holdout,
        holdout_by="speaker",
        size=ShardSize(hours=hours_per_shard, recordings=utterances_per_shard),
        in_place=in_place,
    )
    return plan_pack(found_of(recordings), folder, layout, excluded=found_of(excluded), about={"seed": seed})


def pack_tones(
    recordings: Sequence[Recording],
    folder: Path,
    *,
    max_rejected_share: float = 0.0,
    max_audio_seconds: float = 30.0,
    long_recordings: str = "energy",
    drop_duplicates: bool = True,
    processes: int = 1,
    progress: Callable[[Progress], None] | None = None,
    **planned: Any,
) -> PackReport:
    """Plan, pack and merge with the usual split names and these settings."""
    tasks = plan_tones(recordings, folder, **planned)
    limits = settings(max_audio_seconds=max_audio_seconds, long_recordings=long_recordings)
    pack_tasks(tasks, limits, max_rejected_share=max_rejected_share, processes=processes, progress=progress)
    report = merge(tasks, limits, drop_duplicates=drop_duplicates, max_rejected_share=max_rejected_share)
    tasks.remove()
    return report


def hashes_of(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder, hidden ones too, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
