"""Which recordings are train, heldout or test: decided once, before anything is decoded. Pure: no I/O."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from shards.errors import ConfigError
from shards.schema import HELDOUT, TRAIN, Recording


def assign_splits(
    recordings: Sequence[Recording], *, splits: Mapping[str, str], holdout: float, holdout_by: str, seed: int
) -> list[str]:
    """The split of each recording.

    What the source calls by a name is mapped by ``splits``. Of what is then train, or has no name, a share is set aside
    per language as held-out: whole speakers where they are known (one who is set aside is so in all languages), else
    single recordings. A language with a single speaker gives recordings of that one. At least one group stays in train.

    Args:
        recordings: With unique keys; their order does not matter.
        splits: ``pack.splits``: the source's names to ours.
        holdout: Share of the recordings, 0 to 1. Speakers are taken in an order drawn from the seed, each one that
            brings the share nearer to this; if none does, the one with fewest recordings.
        holdout_by: ``speaker`` or ``recording``.
        seed: Of the run.

    Raises:
        ConfigError: A source's split is not in ``splits``.
    """
    _refuse_unknown_splits(recordings, splits)
    mapped = [TRAIN if recording.split is None else splits[recording.split] for recording in recordings]
    if holdout == 0:
        return mapped
    by_language: defaultdict[str, list[int]] = defaultdict(list)
    for number, (recording, split) in enumerate(zip(recordings, mapped, strict=True)):
        if split == TRAIN:
            by_language[recording.language or ""].append(number)
    held: set[str] = set()
    groups: dict[int, str] = {}
    for _, numbers in sorted(by_language.items()):
        by = holdout_by if len({_group(recordings[number], holdout_by) for number in numbers}) > 1 else "recording"
        groups |= {number: _group(recordings[number], by) for number in numbers}
        held |= _choose(Counter(groups[number] for number in numbers), holdout=holdout, held=held, seed=seed)
    # Only now: a later language may have set aside a speaker of an earlier one.
    return [HELDOUT if groups.get(number) in held else split for number, split in enumerate(mapped)]


def seeded_rank(seed: int, name: str) -> str:
    """Sort by this for an order that is random, yet the same everywhere and whatever else is in the set."""
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def _choose(sizes: Counter[str], *, holdout: float, held: set[str], seed: int) -> set[str]:
    """Groups of one language to set aside, beside those that another language has set aside already."""
    target = holdout * sizes.total()
    total = sum(size for group, size in sizes.items() if group in held)
    order = sorted((group for group in sizes if group not in held), key=lambda group: (seeded_rank(seed, group), group))
    chosen: set[str] = set()
    for group in order[: len(order) - 1]:
        if abs(total + sizes[group] - target) < abs(total - target):
            chosen.add(group)
            total += sizes[group]
    if total == 0 and len(order) > 1:
        chosen.add(min(order, key=lambda group: sizes[group]))
    return chosen


def _group(recording: Recording, holdout_by: str) -> str:
    if holdout_by == "speaker" and recording.speaker is not None:
        return f"speaker {recording.speaker}"
    return f"key {recording.key}"


def _refuse_unknown_splits(recordings: Sequence[Recording], splits: Mapping[str, str]) -> None:
    names = Counter(recording.split for recording in recordings if recording.split is not None)
    if unknown := sorted(name for name in names if name not in splits):
        first = next(recording for recording in recordings if recording.split == unknown[0])
        raise ConfigError(
            f"pack.splits must list every split of the sources, got {unknown[0]!r} on {names[unknown[0]]} recordings, "
            f"first {first.key!r} of {first.source!r}; add `{unknown[0]}: train`, `heldout` or `test`"
        )
