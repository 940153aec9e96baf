"""Index and label files joined: the utterances of a split that have a pseudo-label fit for use."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shards.errors import ShardError
from shards.index import read_index, read_utterances
from shards.labels import label_path, read_labels
from shards.schema import PseudoLabel, Utterance


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """The joined table, in index order."""

    rows: list[tuple[Utterance, PseudoLabel]]
    dropped: Counter[str]
    """Why utterances were left out, and how many."""


def read_labelled(
    pack_folder: Path, label_folder: Path, *, split: str, reject: Callable[[PseudoLabel], str | None]
) -> Labelled:
    """Join the shards of a split with their label files.

    Args:
        pack_folder: Of the index.
        label_folder: Of the label files.
        split: ``train``, ``heldout`` or ``test``.
        reject: Why a label is not to be used; None for one that is.

    Raises:
        ShardError: A label file is missing, damaged, of another shard, or lacks an utterance; or nothing is left.
    """
    hashes = {entry.name: entry.sha256 for entry in read_index(pack_folder).shards}
    labels_by_shard: dict[str, dict[str, PseudoLabel]] = {}
    rows: list[tuple[Utterance, PseudoLabel]] = []
    dropped: Counter[str] = Counter()
    for utterance in read_utterances(pack_folder):
        if utterance.split != split:
            continue
        if utterance.shard not in labels_by_shard:
            path = label_path(label_folder, utterance.shard)
            header, labels = read_labels(path)
            if header.shard_sha256 != hashes[utterance.shard]:
                raise ShardError(f"{path} must label the shard that is in the index, got another one; label again")
            labels_by_shard[utterance.shard] = {label.key: label for label in labels}
        label = labels_by_shard[utterance.shard].get(utterance.key)
        if label is None:
            path = label_path(label_folder, utterance.shard)
            raise ShardError(f"{path} must have a label for {utterance.key!r}, got none; delete it and label again")
        if reason := reject(label):
            dropped[reason] += 1
        else:
            rows.append((utterance, label))
    if not rows:
        raise ShardError(
            f"{label_folder} must hold usable labels of the split {split!r}, got 0 ({dict(dropped)}); "
            "see pack.splits, pack.holdout and label.splits"
        )
    return Labelled(rows=rows, dropped=dropped)
