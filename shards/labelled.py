"""Index and label files joined: the utterances of a split that have a pseudo-label fit for use."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.errors import ShardError
from shards.index import read_index, read_utterances
from shards.labels import label_path, read_labels
from shards.schema import PseudoLabel, Utterance


@dataclass(frozen=True, slots=True)
class Response:
    """What of a pseudo-label is learned from. Every rank holds one for each utterance; the rest stays on disk."""

    token_ids: npt.NDArray[np.int32]
    """As :attr:`~shards.schema.PseudoLabel.token_ids`."""
    language: str | None
    """As the teacher detected it."""


LabelledUtterance = tuple[Utterance, Response]


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """The joined table, in index order."""

    rows: list[LabelledUtterance]
    dropped: Counter[str]
    """Why utterances were left out, and how many."""


def read_labelled(
    pack_folder: Path, label_folder: Path, *, split: str, reject: Callable[[PseudoLabel], str | None]
) -> Labelled:
    """Join the shards of a split with their label files, one shard at a time.

    Args:
        pack_folder: Of the index.
        label_folder: Of the label files.
        split: ``train``, ``heldout`` or ``test``.
        reject: Why a label is not to be used; None for one that is.

    Raises:
        ShardError: A label file is missing, damaged, of another shard, or lacks an utterance; or nothing is left.
    """
    hashes = {entry.name: entry.sha256 for entry in read_index(pack_folder).shards}
    rows: list[LabelledUtterance] = []
    dropped: Counter[str] = Counter()
    languages: dict[str | None, str | None] = {}  # each name once, instead of once an utterance
    for shard, utterances in groupby(read_utterances(pack_folder, splits=[split]), key=attrgetter("shard")):
        path = label_path(label_folder, shard)
        _, labels = read_labels(path, shard_sha256=hashes[shard])
        by_key = {label.key: label for label in labels}
        for utterance in utterances:
            label = by_key.get(utterance.key)
            if label is None:
                raise ShardError(f"{path} must have a label for {utterance.key!r}, got none; delete it and label again")
            if reason := reject(label):
                dropped[reason] += 1
                continue
            language = languages.setdefault(label.language, label.language)
            rows.append((utterance, Response(np.array(label.token_ids, np.int32), language)))
    if not rows:
        raise ShardError(
            f"{label_folder} must hold usable labels of the split {split!r}, got 0 ({dict(dropped)}); "
            "see pack.splits, pack.holdout and label.splits"
        )
    return Labelled(rows=rows, dropped=dropped)
