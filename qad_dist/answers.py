"""What each system made of each utterance of a test set, on disk: group by group while ranks decode, then as one file.

``<folder>/<system>.jsonl`` is a prediction a line, in the Open ASR Leaderboard's form and in the order of the set;
``<system>.json`` beside it says what it was made from and how long that took. Until all groups are there, each is a
file of its own, so that whatever was decoded before an interruption is not decoded again.
"""

import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qad_dist.text.predictions import prediction_line
from shards.errors import ShardError
from shards.schema import Utterance
from shards.storage import atomic_write, read_json, sha256_file, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one system made of one utterance."""

    key: str
    text: str
    language: str | None
    """As the system detected it, or was told."""
    ended_by: str | None = None
    """:data:`~shards.schema.ENDED_BY_END_TOKEN` or ``length``; None for predictions, of which nobody knows."""
    token_ids: tuple[int, ...] = ()
    """The response; empty for predictions."""
    kl: float | None = None
    """From the teacher, summed over the teacher's response tokens, in nats; None where it cannot be measured."""
    agreements: int | None = None
    """Of these tokens, those that the system prefers too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """The answers of one system to a set, and what they cost."""

    answers: list[Answer]
    """In the order of the set."""
    seconds: float | None
    """From audio to text, summed over ranks; None for predictions."""
    served_bytes: int | None = None
    """Of the system's weights in their few bits; None if it is not quantized."""


class AnswerFiles:
    """The answers of all systems to one test set in one attention mode."""

    def __init__(self, folder: Path) -> None:
        """Name the folder; nothing is made yet."""
        self.folder = folder

    def predictions(self, system: str) -> Path:
        """The file of all predictions."""
        return self.folder / f"{system}.jsonl"

    def read(self, system: str, about: str, utterances: Sequence[Utterance]) -> Answered | None:
        """The answers, if they were made from what ``about`` is the fingerprint of; None: they are to be made."""
        note, path = self._note(system), self.predictions(system)
        if not note.is_file() or not path.is_file():
            return None
        try:
            told = read_json(note)
            if told["about"] != about:
                log.info("event=score_again system=%s folder=%s reason='made from something else'", system, self.folder)
                return None
            if sha256_file(path) != told["sha256"]:
                raise ShardError(f"{path} must be as it was written, got other bytes")
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
            answers = [_answer_of_line(line) for line in lines]
            _check_keys(answers, [utterance.key for utterance in utterances], path)
            return Answered(answers=answers, seconds=told["seconds"], served_bytes=told["served_bytes"])
        except (ShardError, KeyError, ValueError, TypeError) as damage:
            log.warning("event=damaged error=%r; it is made again", str(damage))
            return None

    def write(self, system: str, about: str, answered: Answered, utterances: Sequence[Utterance]) -> None:
        """Write the whole file, then its note; the groups are not needed any more."""
        path = self.predictions(system)
        self._note(system).unlink(missing_ok=True)
        with atomic_write(path) as file:
            for answer, utterance in zip(answered.answers, utterances, strict=True):
                file.write(_line_of(answer, utterance).encode() + b"\n")
        costs = {"seconds": answered.seconds, "served_bytes": answered.served_bytes}
        write_json(self._note(system), {"about": about, "sha256": sha256_file(path), **costs})
        shutil.rmtree(self._groups(system), ignore_errors=True)
        with suppress(OSError):  # those of another system may be there
            self._groups(system).parent.rmdir()

    def missing(self, system: str, about: str, keys: Mapping[int, Sequence[str]]) -> list[int]:
        """Numbers of the groups that are not there; those of anything else than ``about`` are not either.

        Args:
            system: Its name.
            about: Fingerprint of what the answers are made from.
            keys: Of the utterances of each group.
        """
        return [number for number in keys if self._read_group(system, about, number, keys[number]) is None]

    def write_group(self, system: str, about: str, number: int, answered: Answered) -> None:
        """Write one group."""
        write_json(self._group(system, number), {"about": about, **asdict(answered)}, indent=None, durable=False)

    def gather(self, system: str, about: str, keys: Mapping[int, Sequence[str]], order: Sequence[str]) -> Answered:
        """The answers of all groups, in the order of the set.

        Raises:
            ShardError: A group is missing.
        """
        parts = []
        for number, group in keys.items():
            part = self._read_group(system, about, number, group)
            if part is None:
                raise ShardError(f"{self._group(system, number)} must exist, got none; score again")
            parts.append(part)
        found = {answer.key: answer for part in parts for answer in part.answers}
        return Answered(
            answers=[found[key] for key in order],
            seconds=sum(part.seconds or 0.0 for part in parts),
            served_bytes=parts[0].served_bytes,
        )

    def _read_group(self, system: str, about: str, number: int, keys: Sequence[str]) -> Answered | None:
        path = self._group(system, number)
        if not path.is_file():
            return None
        try:
            told = read_json(path)
            if told["about"] != about:
                return None
            answers = [Answer(**{**one, "token_ids": tuple(one["token_ids"])}) for one in told["answers"]]
            _check_keys(answers, keys, path)
            return Answered(answers=answers, seconds=float(told["seconds"]), served_bytes=told["served_bytes"])
        except (ShardError, KeyError, ValueError, TypeError) as damage:
            log.warning("event=damaged error=%r; it is made again", str(damage))
            return None

    def _note(self, system: str) -> Path:
        return self.folder / f"{system}.json"

    def _groups(self, system: str) -> Path:
        return self.folder / "groups" / system

    def _group(self, system: str, number: int) -> Path:
        return self._groups(system) / f"{number:06d}.json"


def _check_keys(answers: Iterable[Answer], keys: Sequence[str], path: Path) -> None:
    if [answer.key for answer in answers] != list(keys):
        raise ShardError(f"{path} must answer each utterance of the set once, in its order, got others")


def _line_of(answer: Answer, utterance: Utterance) -> str:
    extra: dict[str, Any] = {
        "key": answer.key,
        "language": utterance.language,
        "detected_language": answer.language,
        "ended_by": answer.ended_by,
        "token_ids": answer.token_ids,
        "kl": answer.kl,
        "agreements": answer.agreements,
    }
    return prediction_line(
        audio_filepath=utterance.audio_name,
        duration=utterance.duration_seconds,
        text=utterance.reference or "",
        pred_text=answer.text,
        extra=extra,
    )


def _answer_of_line(line: Mapping[str, Any]) -> Answer:
    return Answer(
        key=line["key"],
        text=line["pred_text"],
        language=line["detected_language"],
        ended_by=line["ended_by"],
        token_ids=tuple(line["token_ids"]),
        kl=line["kl"],
        agreements=line["agreements"],
    )
