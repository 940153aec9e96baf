"""Which recordings are train, heldout or test: decided once, before anything is decoded. Pure: no I/O."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from shards.columns import Columns
from shards.errors import ConfigError
from shards.schema import HELDOUT, SPLITS, TRAIN, Recording

Codes = npt.NDArray[np.int64]


def assign_splits(
    recordings: Columns[Recording], *, splits: Mapping[str, str], holdout: float, holdout_by: str, seed: int
) -> Codes:
    """The split of each recording, as a place in :data:`~shards.schema.SPLITS`.

    What the source calls by a name is mapped by ``splits``. Of what is then train, or has no name, a share is set aside
    per language as held-out: whole speakers where they are known (one who is set aside is so in all languages), else
    single recordings; stretches of one file go together where no speaker is known. Nobody is set aside who is the last
    one left of a language. A language of which nobody can be (one speaker, or several who are each the last one of
    another) gives single recordings, so that these speakers are on both sides. At least one group stays in train.

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
    assigned = _mapped(recordings, splits)
    train, heldout = SPLITS.index(TRAIN), SPLITS.index(HELDOUT)
    rows = np.flatnonzero(assigned == train)
    if holdout == 0 or not len(rows):
        return assigned
    languages, _ = recordings.codes("language")
    for grouped_by in dict.fromkeys([holdout_by, "recording"]):  # the second for languages that gave nobody
        groups, ranks = _groups(recordings, grouped_by, seed)
        held = _choose(languages[rows], groups[rows], ranks, holdout=holdout)[groups[rows]]
        assigned[rows[held]] = heldout
        rows = rows[~np.isin(languages[rows], np.unique(languages[rows][held]))]
        if not len(rows):
            break
    return assigned


def seeded_ranks(seed: int, names: Iterable[str]) -> npt.NDArray[np.uint64]:
    """Sort by these for an order that is random, yet the same everywhere and whatever else is in the set."""
    digests = (hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in names)
    return np.fromiter((int.from_bytes(digest[:8], "big") for digest in digests), np.uint64)


def _mapped(recordings: Columns[Recording], splits: Mapping[str, str]) -> Codes:
    codes, names = recordings.codes("split")
    for code, name in enumerate(names):
        if name is not None and name not in splits:
            rows = np.flatnonzero(codes == code)
            first = recordings[int(rows[0])]
            raise ConfigError(
                f"pack.splits must list every split of the sources, got {name!r} on {len(rows)} recordings, "
                f"first {first.key!r} of {first.source!r}; add `{name}: train`, `heldout` or `test`"
            )
    places = [SPLITS.index(TRAIN if name is None else splits[name]) for name in names]
    return np.array(places, np.int64)[codes] if places else np.zeros(0, np.int64)


def _groups(recordings: Columns[Recording], grouped_by: str, seed: int) -> tuple[Codes, npt.NDArray[np.uint64]]:
    """What is set aside together: a group for each recording, and the groups' random order."""
    speakers, names = recordings.codes("speaker")
    of_speakers = seeded_ranks(seed, (f"speaker {name}" for name in names if name is not None))
    if grouped_by == "speaker" and len(of_speakers) == len(names):
        return speakers, of_speakers
    files, of_files = _files(recordings, seed)
    if grouped_by == "recording":
        return files, of_files
    # Those without a speaker, whose code is the last, are groups of their own.
    groups = np.where(speakers < len(of_speakers), speakers, len(of_speakers) + files)
    return groups, np.concatenate([of_speakers, of_files])


def _files(recordings: Columns[Recording], seed: int) -> tuple[Codes, npt.NDArray[np.uint64]]:
    """The file that each recording is, or is a stretch of, and the files' order by the lowest of their keys' ranks."""
    ranks = seeded_ranks(seed, (f"key {key}" for key in recordings.texts("key")))
    if np.isnan(recordings.numbers("start_seconds").astype(float)).all():
        return np.arange(len(ranks)), ranks
    offsets = recordings.numbers("offset_bytes").astype(float)
    places = (f"{path}:{offset}" for path, offset in zip(recordings.texts("path"), offsets, strict=True))
    _, files = np.unique(seeded_ranks(0, places), return_inverse=True)
    of_files = np.full(int(files.max()) + 1, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(of_files, files, ranks)
    return files.astype(np.int64), of_files


def _choose(languages: Codes, groups: Codes, ranks: npt.NDArray[np.uint64], *, holdout: float) -> npt.NDArray[np.bool_]:
    """Which groups to set aside, given language and group of each recording; each language keeps one group at least."""
    num_groups = len(ranks)
    pairs, counts = np.unique(languages * num_groups + groups, return_counts=True)
    homes, members = np.divmod(pairs, num_groups)
    left = np.bincount(homes)
    shared: defaultdict[int, list[int]] = defaultdict(list)  # languages of those who are in several
    is_shared = np.bincount(members, minlength=num_groups) > 1
    for place in np.flatnonzero(is_shared[members]).tolist():
        shared[int(members[place])].append(int(homes[place]))
    held = np.zeros(num_groups, np.bool_)

    def set_aside(group: int, language: int) -> bool:
        of_group = shared.get(group) or [language]
        if any(left[home] <= 1 for home in of_group):
            return False
        held[group] = True
        left[of_group] -= 1
        return True

    for language in np.unique(homes).tolist():
        here = np.flatnonzero(homes == language)
        here = here[np.lexsort((members[here], ranks[members[here]]))]
        is_held = held[members[here]]
        target, total = holdout * counts[here].sum(), int(counts[here][is_held].sum())
        free = [(int(members[place]), int(counts[place])) for place in here[~is_held]]
        for group, size in free:
            if total + 0.5 >= target:  # even one recording would lead away from it
                break
            if abs(total + size - target) < abs(total - target) and set_aside(group, language):
                total += size
        if total == 0:
            any(set_aside(group, language) for group, _ in sorted(free, key=lambda one: one[1]))
    return held
