"""One way to call pack, so that each test names only what it is about."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from shards.pack import PackReport, pack, plan_shards
from shards.schema import Recording


def pack_tones(
    recordings: Sequence[Recording],
    folder: Path,
    *,
    seed: int = 0,
    holdout: float = 0.2,
    utterances_per_shard: int = 8,
    max_rejected_share: float = 0.0,
    max_audio_seconds: float = 30.0,
    processes: int = 1,
    progress: Callable[[int, float], None] | None = None,
) -> PackReport:
    """Pack with the usual split names and these settings."""
    tasks = plan_shards(
        recordings,
        seed=seed,
        splits={"train": "train", "dev": "heldout", "test": "test"},
        holdout=holdout,
        holdout_by="speaker",
        utterances_per_shard=utterances_per_shard,
    )
    return pack(
        tasks,
        folder,
        min_audio_seconds=0.1,
        max_audio_seconds=max_audio_seconds,
        max_rejected_share=max_rejected_share,
        processes=processes,
        progress=progress,
    )


def hashes_of(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder, hidden ones too, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
