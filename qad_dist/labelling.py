"""What there is to label, and when a shard counts as labelled: its label files, its second pass, its verdicts.

A label file counts if it was made from the shard that is in the index, by the teacher and the settings of the run, and
labels just the utterances that were chosen. Anything else is work to do; nothing is ever mended.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from qad_dist.asr.load import resolve_model_folder
from qad_dist.config import RunConfig
from qad_dist.runtime.record import model_fingerprint
from qad_dist.text.accept import judge, judged_by
from shards.errors import ShardError
from shards.index import ShardEntry, UtteranceTable, read_index, read_utterances
from shards.labelled import Answer, Labelled, read_labelled
from shards.labels import LabelFile, LabelHeader, changes, label_path, read_label_file, second_path
from shards.quarantine import check_damaged
from shards.read import Damaged
from shards.schema import UNREADABLE
from shards.selection import label_order, select
from shards.verdicts import ALL, Judged, Verdict, read_verdicts, stored_verdicts, verdict_path, write_verdicts

log = logging.getLogger(__name__)

NONE = "none"
"""Of ``label.second_pass``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A shard, and what of it is to be labelled."""

    entry: ShardEntry
    utterances: UtteranceTable

    @property
    def seconds(self) -> float:
        """Audio to label."""
        return float(self.utterances.numbers("duration_seconds").sum())

    @property
    def longest_seconds(self) -> float:
        """Of its utterances."""
        return float(self.utterances.numbers("duration_seconds").max())


class Labelling:
    """The shards that a run labels."""

    def __init__(self, run: RunConfig) -> None:
        """Read the index.

        Raises:
            ShardError: There is none, or nothing in ``label.splits``.
        """
        self.run = run
        self.folder = run.stage_folder("label")
        self.tasks = _tasks(run)
        self._told: set[str] = set()
        self._last_judged: tuple[str, list[Verdict]] = ("", [])

    @cached_property
    def teacher(self) -> str:
        """Fingerprint of the teacher's folder."""
        return model_fingerprint(resolve_model_folder(self.run.model.path, self.run.model.revision))

    @cached_property
    def order(self) -> list[str]:
        """The shards in the order in which they are begun."""
        return label_order({name: task.entry.seconds_by_language for name, task in self.tasks.items()})

    @property
    def num_utterances(self) -> int:
        """To label, of all shards."""
        return sum(len(task.utterances) for task in self.tasks.values())

    def header(self, shard: str, *, first_sha256: str | None = None) -> LabelHeader:
        """What a label file must have been made from; with the hash of the first one, that of a second pass."""
        label = self.run.label
        settings = {
            "backend": label.backend,
            "language": label.language if first_sha256 is None else label.second_pass,
            "context": label.context,
            "dtype": self.run.model.dtype,
            "audio_attention": self.run.model.audio_attention,
            "batch_audio_seconds": label.batch_audio_seconds,
            "slots": label.slots,
            "max_response_tokens": label.max_response_tokens,
            "max_tokens_per_second": label.max_tokens_per_second,
        }
        return LabelHeader(
            shard=shard,
            shard_sha256=self.tasks[shard].entry.sha256,
            teacher=self.teacher,
            settings=settings,
            first_sha256=first_sha256,
        )

    def read_first(self, shard: str) -> LabelFile:
        """The label file of a shard.

        Raises:
            ShardError: It is missing or damaged, or was made from something else.
        """
        task, path = self.tasks[shard], label_path(self.folder, shard)
        file = self._read(path, self.header(shard))
        if [label.key for label in file.labels] != list(task.utterances.texts("key")):
            raise ShardError(f"{path} must label each chosen utterance of {shard} once, got others; label again")
        return file

    def find_first(self, shard: str) -> LabelFile | None:
        """The label file of a shard, if it counts; tells why not, if there is one that does not."""
        if not label_path(self.folder, shard).is_file():
            return None
        try:
            return self.read_first(shard)
        except ShardError as reason:
            if shard not in self._told:  # it is asked for again before and after it is claimed
                log.warning("event=label_again shard=%s reason=%r", shard, str(reason))
            self._told.add(shard)
            return None

    def read_second(self, shard: str, first: LabelFile) -> LabelFile:
        """The labels of the second pass, which only a run with ``label.second_pass`` has.

        Raises:
            ShardError: They are missing or damaged, were made from something else, or are of other utterances than
                those whose first labels are rejected now.
        """
        path = second_path(self.folder, shard)
        file = self._read(path, self.header(shard, first_sha256=first.sha256))
        rejected = [first.labels[place].key for place in self.rejected(shard, self.judge(first))]
        if [label.key for label in file.labels] != rejected:
            raise ShardError(f"{path} must label again what is rejected of {shard}, got others; label again")
        return file

    def is_done(self, shard: str) -> bool:
        """Whether nothing is left to do for a shard but to judge its labels."""
        if (first := self.find_first(shard)) is None:
            return False
        if self.run.label.second_pass == NONE:
            return True
        try:
            self.read_second(shard, first)
        except ShardError:
            return False
        return True

    def rejected(self, shard: str, verdicts: Sequence[Verdict]) -> list[int]:
        """Places of the labels that a second pass gives anew: objected to, readable, of a language that is known."""
        return [
            place
            for place, (verdict, language) in enumerate(
                zip(verdicts, self.tasks[shard].utterances.texts("language"), strict=True)
            )
            if verdict.use != ALL and UNREADABLE not in verdict.reasons and language is not None
        ]

    def judge(self, file: LabelFile) -> list[Verdict]:
        """The verdicts on a label file: those beside it, if it was judged so before, else new ones, written there."""
        if self._last_judged[0] != file.sha256:
            self._last_judged = (file.sha256, self._judge(file))
        return self._last_judged[1]

    def refuse_too_much_damage(self, damaged: Sequence[Damaged]) -> None:
        """As :func:`~shards.quarantine.check_damaged`: mending the shards would be better than labels without audio."""
        share = self.run.read.max_quarantined_share
        check_damaged(damaged, num_utterances=self.num_utterances, max_share=share, see=self.folder)

    def _judge(self, file: LabelFile) -> list[Verdict]:
        by_key = {utterance.key: utterance for utterance in self.tasks[file.header.shard].utterances}
        facts = [(by_key[label.key].language, by_key[label.key].reference) for label in file.labels]
        filters, path = self.run.label.filters, verdict_path(file.path)
        judged = Judged(shard=file.header.shard, labels_sha256=file.sha256, settings=judged_by(filters, facts))
        try:
            known = read_verdicts(path, judged)
        except ShardError as damage:
            log.warning("event=damaged error=%r; it is judged again", str(damage))
            known = None
        if known is not None:
            return known
        verdicts = [
            judge(label, language=language, reference=reference, filters=filters)
            for label, (language, reference) in zip(file.labels, facts, strict=True)
        ]
        write_verdicts(path, judged, verdicts)
        return verdicts

    def _read(self, path: Path, wanted: LabelHeader) -> LabelFile:
        file = read_label_file(path, shard_sha256=wanted.shard_sha256, first_sha256=wanted.first_sha256)
        if changed := changes(file.header, wanted):
            raise ShardError(f"{path} must be made with this config, got others: {'; '.join(changed)}; label again")
        if self.run.label.hidden_states and file.labels and file.header.hidden is None:
            raise ShardError(f"{path} must have hidden states beside it, got none; label again")
        return file


def read_used_labels(run: RunConfig, split: str, *, wanted: Callable[[Answer], bool] | None = None) -> Labelled:
    """What calibration and training use: the labelled utterances of a split that no filter has dropped.

    Args:
        run: The run.
        split: ``train``, ``heldout`` or ``test``.
        wanted: Answers that come in whatever the filters say; as in :func:`~shards.labelled.read_labelled`.

    Raises:
        ShardError: A label or verdict file is missing, damaged or of another shard; or nothing is left.
    """
    return read_labelled(
        run.stage_folder("pack"),
        run.stage_folder("label"),
        split=split,
        verdicts=stored_verdicts,
        max_hours_per_language=run.label.max_hours_per_language,
        second_pass=run.label.second_pass != NONE,
        wanted=wanted,
    )


def _tasks(run: RunConfig) -> dict[str, Task]:
    """By name, in the order of the index."""
    table = read_utterances(run.stage_folder("pack"), splits=run.label.splits)
    if not len(table):
        raise ShardError(f"label.splits must name splits that were packed, got {run.label.splits}; see `pack.py stats`")
    table = table.take(np.flatnonzero(select(table, run.label.max_hours_per_language)))
    entries = {entry.name: entry for entry in read_index(run.stage_folder("pack")).shards}
    return {name: Task(entry=entries[name], utterances=table[begin:end]) for name, begin, end in table.shards()}
