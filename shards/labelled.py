"""Index and label files joined: the utterances of a split that have a pseudo-label fit for use."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from shards.errors import ShardError
from shards.index import UtteranceTable, read_index, read_utterances
from shards.labels import label_path, read_labels
from shards.schema import PseudoLabel, Utterance


@dataclass(frozen=True, slots=True)
class Response:
    """What of a pseudo-label is learned from; the rest stays on disk."""

    token_ids: npt.NDArray[np.int32]
    """As :attr:`~shards.schema.PseudoLabel.token_ids`."""
    language: str | None
    """As the teacher detected it."""


LabelledUtterance = tuple[Utterance, Response]


class LabelledTable(Sequence[LabelledUtterance]):
    """Utterances with their responses, in columns: one pair is made when it is asked for."""

    def __init__(self, utterances: UtteranceTable, responses: "Responses") -> None:
        """Join two tables of equally many rows."""
        self.utterances, self.responses = utterances, responses

    def __len__(self) -> int:
        return len(self.utterances)

    @overload
    def __getitem__(self, place: int) -> LabelledUtterance: ...
    @overload
    def __getitem__(self, place: slice) -> "LabelledTable": ...
    def __getitem__(self, place: int | slice) -> "LabelledUtterance | LabelledTable":
        if isinstance(place, slice):
            return self.take(np.arange(*place.indices(len(self))))
        return self.utterances[place], self.responses[place]

    def __iter__(self) -> Iterator[LabelledUtterance]:
        return zip(self.utterances, map(self.responses.__getitem__, range(len(self))), strict=True)

    def take(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> "LabelledTable":
        """These rows, in this order."""
        return LabelledTable(self.utterances.take(rows), self.responses.take(rows))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Responses:
    """Responses one behind the other."""

    token_ids: npt.NDArray[np.int32]
    """Of all of them."""
    starts: npt.NDArray[np.int64]
    """Where each begins, and where the last one ends."""
    languages: npt.NDArray[np.int64]
    """Of each, as a place in ``names``."""
    names: list[str | None]

    @property
    def num_tokens(self) -> npt.NDArray[np.int64]:
        """Of each response."""
        return np.diff(self.starts)

    def __getitem__(self, row: int) -> Response:
        row = range(len(self.languages))[row]
        start, end = self.starts[row : row + 2]
        return Response(self.token_ids[start:end], self.names[self.languages[row]])

    def take(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> "Responses":
        """These rows, in this order."""
        rows = np.asarray(rows, np.int64)
        starts = np.concatenate([[0], np.cumsum(self.num_tokens[rows])])
        shifts = np.repeat(self.starts[rows] - starts[:-1], np.diff(starts))
        token_ids = self.token_ids[np.arange(starts[-1]) + shifts]
        return Responses(token_ids=token_ids, starts=starts, languages=self.languages[rows], names=self.names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """The joined table, in index order."""

    rows: LabelledTable
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
    utterances = read_utterances(pack_folder, splits=[split])
    kept: list[int] = []
    tokens: list[npt.NDArray[np.int32]] = []
    num_tokens: list[int] = []
    languages: list[int] = []
    names: dict[str | None, int] = {}
    dropped: Counter[str] = Counter()
    for shard, rows in groupby(enumerate(utterances), key=lambda row: row[1].shard):
        path = label_path(label_folder, shard)
        by_key = {label.key: label for label in read_labels(path, shard_sha256=hashes[shard])[1]}
        ids: list[int] = []
        for row, utterance in rows:
            label = by_key.get(utterance.key)
            if label is None:
                raise ShardError(f"{path} must have a label for {utterance.key!r}, got none; delete it and label again")
            if reason := reject(label):
                dropped[reason] += 1
                continue
            kept.append(row)
            languages.append(names.setdefault(label.language, len(names)))
            num_tokens.append(len(label.token_ids))
            ids += label.token_ids
        tokens.append(np.array(ids, np.int32))
    if not kept:
        raise ShardError(
            f"{label_folder} must hold usable labels of the split {split!r}, got 0 ({dict(dropped)}); "
            "see pack.splits, pack.holdout and label.splits"
        )
    responses = Responses(
        token_ids=np.concatenate(tokens),
        starts=np.concatenate([[0], np.cumsum(num_tokens)]),
        languages=np.array(languages),
        names=list(names),
    )
    return Labelled(rows=LabelledTable(utterances.take(kept), responses), dropped=dropped)
