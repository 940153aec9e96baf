"""Index, label files and verdicts joined: the utterances of a split that have a pseudo-label fit for use."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from shards.errors import ShardError
from shards.index import UtteranceTable, read_index, read_utterances
from shards.labels import LabelFile, label_path, read_label_file, second_path
from shards.schema import PseudoLabel, Utterance
from shards.selection import select
from shards.verdicts import ALL, NOTHING, USES, Verdict

NOT_SELECTED = "not_selected"
"""Counts among the reasons for utterances beyond ``label.max_hours_per_language``, which have no label."""

Verdicts = Callable[[LabelFile], Sequence[Verdict]]
"""Gives the verdicts on a label file, of a first or a second pass: one for each label, in their order."""


@dataclass(frozen=True, slots=True)
class Response:
    """What of a pseudo-label is learned from; the rest stays on disk."""

    token_ids: npt.NDArray[np.int32]
    """As :attr:`~shards.schema.PseudoLabel.token_ids`."""
    language: str | None
    """As the teacher detected it, or was told."""
    prompt_language: str | None = None
    """The language that the prompt told the teacher, as it must tell the student; None if it told none."""
    ce_weight: float = 1.0
    """Of its tokens' cross-entropy: 0 where only the teacher's distributions are worth learning, else 1."""


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
    prompt_languages: npt.NDArray[np.int64]
    """What the prompt of each tells, as a place in ``names``."""
    names: list[str | None]
    ce_weights: npt.NDArray[np.float32]
    """As :attr:`Response.ce_weight`."""
    hidden_starts: npt.NDArray[np.int64]
    """Tokens before each in its label file: where its hidden states begin in the file beside that."""
    is_second: npt.NDArray[np.bool_]
    """Whether that is the label file of the second pass."""

    @property
    def num_tokens(self) -> npt.NDArray[np.int64]:
        """Of each response."""
        return np.diff(self.starts)

    def __getitem__(self, row: int) -> Response:
        row = range(len(self.languages))[row]
        start, end = self.starts[row : row + 2]
        return Response(
            self.token_ids[start:end],
            self.names[self.languages[row]],
            self.names[self.prompt_languages[row]],
            float(self.ce_weights[row]),
        )

    def take(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> "Responses":
        """These rows, in this order."""
        rows = np.asarray(rows, np.int64)
        starts = np.concatenate([[0], np.cumsum(self.num_tokens[rows])])
        shifts = np.repeat(self.starts[rows] - starts[:-1], np.diff(starts))
        return Responses(
            token_ids=self.token_ids[np.arange(starts[-1]) + shifts],
            starts=starts,
            languages=self.languages[rows],
            prompt_languages=self.prompt_languages[rows],
            names=self.names,
            ce_weights=self.ce_weights[rows],
            hidden_starts=self.hidden_starts[rows],
            is_second=self.is_second[rows],
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Labelled:
    """The joined table, in index order."""

    rows: LabelledTable
    dropped: Counter[str]
    """Why utterances were left out, and how many: each counts once, for the first reason of its verdict."""
    is_wanted: npt.NDArray[np.bool_]
    """For each row, whether its answer is one that was asked for whatever its verdict."""


class Answer(NamedTuple):
    """The teacher's answer for an utterance, of whichever pass, and what it is good for."""

    label: PseudoLabel
    verdict: Verdict
    hidden_start: int
    """Tokens before it in its label file."""
    is_second: bool


def better_answers(first: LabelFile, second: LabelFile | None, verdicts: Verdicts) -> dict[str, Answer]:
    """By key, in the order of the shard, the better of the labels of each utterance.

    Args:
        first: The label file of a shard.
        second: That of its second pass, if there is one.
        verdicts: What each label is good for. If both are good for the same, the first one counts.

    Raises:
        ShardError: The second pass has labels of other utterances.
    """
    answers = dict(_judged(first, verdicts))
    if second is None:
        return answers
    for key, answer in _judged(second, verdicts):
        if key not in answers:
            raise ShardError(
                f"{second.path} must label utterances of {first.path.name}, got {key!r}; delete it and label again"
            )
        if USES.index(answer.verdict.use) < USES.index(answers[key].verdict.use):
            answers[key] = answer
    return answers


def read_labelled(
    pack_folder: Path,
    label_folder: Path,
    *,
    split: str,
    verdicts: Verdicts,
    max_hours_per_language: float | None = None,
    second_pass: bool = False,
    wanted: Callable[[Answer], bool] | None = None,
) -> Labelled:
    """Join the shards of a split with their label files, one shard at a time.

    Args:
        pack_folder: Of the index.
        label_folder: Of the label files.
        split: ``train``, ``heldout`` or ``test``.
        verdicts: What each label is good for.
        max_hours_per_language: ``label.max_hours_per_language``: what lies beyond it needs no label.
        second_pass: Whether there is a second label file for each shard. Its label stands for the first one where it is
            good for more.
        wanted: Answers that come into the table whatever their verdict, and are marked there; None for no such ones.

    Raises:
        ShardError: A label file is missing, damaged, of another shard, or lacks an utterance; or nothing is left.
    """
    hashes = {entry.name: entry.sha256 for entry in read_index(pack_folder).shards}
    utterances = read_utterances(pack_folder, splits=[split])
    selected = select(utterances, max_hours_per_language)
    dropped = Counter({NOT_SELECTED: num_left}) if (num_left := int((~selected).sum())) else Counter[str]()
    gathered, marks = _Gathered(), list[bool]()
    for shard, begin, end in utterances.shards():
        if not selected[begin:end].any():
            continue
        answers = _read_answers(label_folder, shard, hashes[shard], verdicts, second_pass=second_pass)
        kept = []
        for row, key in enumerate(utterances[begin:end].texts("key"), start=begin):
            if not selected[row]:
                continue
            if (answer := answers.get(str(key))) is None:
                path = label_path(label_folder, shard)
                raise ShardError(f"{path} must have a label for {key!r}, got none; delete it and label again")
            is_wanted = wanted is not None and wanted(answer)
            if answer.verdict.use == NOTHING and not is_wanted:
                dropped[answer.verdict.reasons[0]] += 1
            else:
                kept.append((row, answer))
                marks.append(is_wanted)
        gathered.add(kept)
    if not len(rows := gathered.rows()):
        raise ShardError(
            f"{label_folder} must hold usable labels of the split {split!r}, got 0 ({dict(dropped)}); "
            "see pack.splits, pack.holdout, label.splits and label.filters"
        )
    return Labelled(
        rows=LabelledTable(utterances.take(rows), gathered.responses()),
        dropped=dropped,
        is_wanted=np.array(marks, np.bool_),
    )


class _Gathered:
    """What is kept of each shard, in arrays: as objects it would take ten times the memory."""

    def __init__(self) -> None:
        self._names: dict[str | None, int] = {}
        self._token_ids = [np.zeros(0, np.int32)]
        # One column for each of: row, tokens, language, prompt's language, cross-entropy, hidden start, second pass.
        self._columns = [np.zeros((7, 0), np.int64)]

    def add(self, kept: Sequence[tuple[int, Answer]]) -> None:
        """Some rows with their answers."""
        code = self._names.setdefault
        records = [
            (
                *(row, label.num_tokens),
                *(code(language, len(self._names)) for language in (label.language, label.prompt_language)),
                *(verdict.use == ALL, hidden_start, is_second),
            )
            for row, (label, verdict, hidden_start, is_second) in kept
        ]
        self._columns.append(np.array(records, np.int64).reshape(-1, 7).T)
        self._token_ids.append(np.array([token for _, answer in kept for token in answer.label.token_ids], np.int32))

    def rows(self) -> npt.NDArray[np.int64]:
        """All that were added."""
        return np.concatenate([columns[0] for columns in self._columns])

    def responses(self) -> Responses:
        """Of these rows."""
        _, num_tokens, languages, prompt_languages, has_ce, hidden_starts, is_second = (
            np.concatenate(parts) for parts in zip(*self._columns, strict=True)
        )
        return Responses(
            token_ids=np.concatenate(self._token_ids),
            starts=np.concatenate([[0], np.cumsum(num_tokens)]),
            languages=languages,
            prompt_languages=prompt_languages,
            names=list(self._names),
            ce_weights=has_ce.astype(np.float32),
            hidden_starts=hidden_starts,
            is_second=is_second.astype(np.bool_),
        )


def _read_answers(
    folder: Path, shard: str, shard_sha256: str, verdicts: Verdicts, *, second_pass: bool
) -> dict[str, Answer]:
    first = read_label_file(label_path(folder, shard), shard_sha256=shard_sha256)
    path = second_path(folder, shard)
    second = read_label_file(path, shard_sha256=shard_sha256, first_sha256=first.sha256) if second_pass else None
    return better_answers(first, second, verdicts)


def _judged(file: LabelFile, verdicts: Verdicts) -> Iterator[tuple[str, Answer]]:
    is_second, start = file.header.first_sha256 is not None, 0
    for label, verdict in zip(file.labels, verdicts(file), strict=True):
        yield label.key, Answer(label, verdict, start, is_second)
        start += label.num_tokens
