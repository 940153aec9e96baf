"""Which recordings go into which shard, and in which order. Pure: no I/O."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shards.columns import Columns
from shards.schema import SPLITS, Recording
from shards.splits import Codes, seeded_ranks

BYTES_PER_SECOND = 32_000
"""Of 16-bit samples at 16 kHz; FLAC of speech takes a little more than half of it."""

# Recordings of a language are spread by duration, too: as many classes of equal number.
_DURATION_CLASSES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSize:
    """About how much a shard holds: whichever of these comes first."""

    hours: float
    bytes: int | None = None
    """Counting :data:`BYTES_PER_SECOND`."""
    recordings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRows:
    """The rows of one shard, in its order."""

    name: str
    split: str
    rows: Codes
    seconds: float


def lay_out(
    recordings: Columns[Recording],
    seconds: npt.NDArray[np.float64],
    splits: Codes,
    *,
    seed: int,
    size: ShardSize,
) -> Iterator[ShardRows]:
    """Spread the recordings of each split over equally large shards.

    Every shard gets its share of each language and of short and long recordings: those of one kind are put at equal
    distances along the row of shards, in an order that is random by seed and key.

    Args:
        recordings: With unique keys; their order does not matter.
        seconds: About how long each one lasts.
        splits: Of each, as a place in :data:`~shards.schema.SPLITS`.
        seed: Of the run.
        size: Of a shard. What is planned exceeds it by less than one recording.

    Returns:
        Shards named ``<split>-000042.tar``, in the order of splits and numbers.
    """
    ranks = seeded_ranks(seed, (str(key) for key in recordings.texts("key")))
    languages, _ = recordings.codes("language")
    most_seconds = min(size.hours * 3600, (size.bytes or math.inf) / BYTES_PER_SECOND)
    for place, split in enumerate(SPLITS):
        rows = np.flatnonzero(splits == place)
        if not len(rows):
            continue
        rows = rows[_spread(languages[rows], seconds[rows], ranks[rows])]
        # A recording fills as much of a shard as it takes of whichever is scarce.
        weights = np.maximum(1 / size.recordings, seconds[rows] / most_seconds)
        ends = np.cumsum(weights)
        num_shards = math.ceil(ends[-1] - 1e-9)
        numbers = ((ends - weights / 2) * (num_shards / ends[-1])).astype(np.int64)
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        for number, chosen in enumerate(np.split(rows, starts[1:])):
            yield ShardRows(
                name=f"{split}-{number:06d}.tar", split=split, rows=chosen, seconds=float(seconds[chosen].sum())
            )


def _spread(languages: Codes, seconds: npt.NDArray[np.float64], ranks: npt.NDArray[np.uint64]) -> Codes:
    """An order in which recordings of each language and duration come at equal distances."""
    by_duration = np.lexsort((ranks, seconds, languages))
    sizes = np.bincount(languages)
    starts = np.cumsum(sizes) - sizes
    classes = np.empty(len(languages), np.int64)
    within = np.arange(len(languages)) - starts[languages[by_duration]]
    classes[by_duration] = within * _DURATION_CLASSES // sizes[languages[by_duration]]
    kinds = languages * _DURATION_CLASSES + classes
    in_kind = np.lexsort((ranks, kinds))
    kind_sizes = np.bincount(kinds)
    kind_starts = np.cumsum(kind_sizes) - kind_sizes
    places = np.empty(len(kinds), np.float64)
    ordered = kinds[in_kind]
    places[in_kind] = (np.arange(len(kinds)) - kind_starts[ordered] + 0.5) / kind_sizes[ordered]
    return np.lexsort((ranks, places))
