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
    single recordings. Nobody is set aside who is the last one left of a language. A language of which nobody can be
    (one speaker, or several who are each the last one of another) gives single recordings, so that these speakers are
    on both sides. At least one group stays in train.

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
    numbers = [number for number, split in enumerate(mapped) if split == TRAIN]
    speakers = {number: _group(recordings[number], holdout_by) for number in numbers}
    keys = {number: _group(recordings[number], "recording") for number in numbers}
    languages = {number: recordings[number].language or "" for number in numbers}
    held = _choose(languages, speakers, holdout=holdout, seed=seed)
    settled = {languages[number] for number in numbers if speakers[number] in held}
    by_recording = {number: language for number, language in languages.items() if language not in settled}
    held |= _choose(by_recording, keys, holdout=holdout, seed=seed)
    return [
        HELDOUT if speakers.get(number) in held or keys.get(number) in held else split
        for number, split in enumerate(mapped)
    ]


def seeded_rank(seed: int, name: str) -> str:
    """Sort by this for an order that is random, yet the same everywhere and whatever else is in the set."""
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def _choose(languages: Mapping[int, str], groups: Mapping[int, str], *, holdout: float, seed: int) -> set[str]:
    """Groups to set aside, given language and group of each recording; one group at least stays in each language."""
    sizes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for number, language in languages.items():
        sizes[language][groups[number]] += 1
    homes: defaultdict[str, list[str]] = defaultdict(list)
    for language, counts in sizes.items():
        for group in counts:
            homes[group].append(language)
    left = {language: len(counts) for language, counts in sizes.items()}
    held: set[str] = set()

    def can_go(group: str) -> bool:
        return all(left[language] > 1 for language in homes[group])

    def set_aside(group: str) -> None:
        held.add(group)
        for language in homes[group]:
            left[language] -= 1

    for _, counts in sorted(sizes.items()):
        target = holdout * counts.total()
        total = sum(size for group, size in counts.items() if group in held)
        order = sorted(counts.keys() - held, key=lambda group: (seeded_rank(seed, group), group))
        for group in order:
            if can_go(group) and abs(total + counts[group] - target) < abs(total - target):
                set_aside(group)
                total += counts[group]
        if total == 0 and (free := list(filter(can_go, order))):
            set_aside(min(free, key=counts.__getitem__))
    return held


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
