"""How far a student is from its teacher on the held-out split, in nats and in words: what training may gain.

KL tells two students apart on a few hundred utterances, words often do not: training may halve a KL that has cost no
word. Both are told here with their 95 % intervals, so that nobody trains for what cannot be measured. Pure: no I/O.

Dimension key: S student and teacher, U utterances.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qad_dist.formats import FormatName
from qad_dist.text.bootstrap import FEW_CLUSTERS, Interval, Resampled, resample, speaker_clusters
from qad_dist.text.normalize import unit
from shards.pictures import number_text

GAP = "gap.json"
"""In the folder of the stage that measures it."""

SEED = 0
NEAREST: FormatName = "int8_weight_only"
"""The format that is nearest to the teacher without training."""


class Distances(Protocol):
    """From teacher to student, utterance by utterance."""

    @property
    def keys(self) -> Sequence[str]:
        """Of the utterances."""
        ...

    @property
    def kl_U(self) -> npt.NDArray[np.float64]:
        """In nats, summed over response tokens."""
        ...

    @property
    def agreements_U(self) -> npt.NDArray[np.int64]:
        """Response tokens on which both prefer the same one."""
        ...

    @property
    def tokens_U(self) -> npt.NDArray[np.int64]:
        """Response tokens."""
        ...


class Words(Protocol):
    """Errors of student and teacher on the same utterances, in whatever order."""

    @property
    def keys(self) -> Sequence[str]:
        """Of the utterances."""
        ...

    @property
    def languages(self) -> Sequence[str | None]:
        """By which words or characters were counted."""
        ...

    @property
    def speakers(self) -> Sequence[str | None]:
        """Where they are known."""
        ...

    @property
    def errors_U(self) -> npt.NDArray[np.int64]:
        """Of the student."""
        ...

    @property
    def teacher_errors_U(self) -> npt.NDArray[np.int64]:
        """Of the teacher: 0 where its own text is the reference."""
        ...

    @property
    def reference_tokens_U(self) -> npt.NDArray[np.int64]:
        """Words, or characters."""
        ...

    @property
    def is_human_U(self) -> npt.NDArray[np.bool_]:
        """Whether the reference is a human transcript."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WordGap:
    """Errors of both on the same utterances: those with a human transcript or, where there is none at all, all of them.

    Intervals are None where there is a single utterance, or nothing to divide by.
    """

    unit: str
    """``WER``, ``CER``, or both of them where languages differ."""
    is_reference_human: bool
    """Otherwise the teacher's text is the reference, and what is counted are differences, no errors."""
    utterances: int
    num_clusters: int
    """What the interval draws: speakers, or utterances."""
    reference_tokens: int
    student_rate: float
    """Errors per token of the references."""
    teacher_rate: float
    difference: float
    """Rate of the student minus that of the teacher."""
    difference_interval: tuple[float, float] | None
    """Paired."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """What there is to be gained by training a student."""

    format: FormatName
    utterances: int
    response_tokens: int
    num_clusters: int
    """What intervals draw: speakers, or utterances."""
    is_by_speaker: bool
    kl_per_token: float
    """From the teacher, in nats."""
    kl_interval: tuple[float, float] | None
    agreement: float
    """Share of the response tokens."""
    words: WordGap | None
    """None where the references have no words."""

    @property
    def is_word_gap_real(self) -> bool:
        """Whether the student gets more words wrong than the teacher: the interval lies above 0."""
        interval = None if self.words is None else self.words.difference_interval
        return interval is not None and interval[0] > 0

    @property
    def warning(self) -> str | None:
        """What to do instead of training, where words cannot tell student and teacher apart; else None."""
        if self.is_word_gap_real:
            return None
        ways = ["serve the PTQ student as it is"]
        if self.format != NEAREST:
            ways.append(f"set quantize.format: {NEAREST}, which is nearer to the teacher without training")
        return (
            f"Training may not be worth its cost: {self._why_not()}. Cheaper: {', or '.join(ways)}. "
            "What training lowers may be seen in the KL alone."
        )

    def sentences(self) -> list[str]:
        """What was measured, how, and the warning if there is one."""
        told = [
            f"KL from the teacher: {number_text(1e6 * self.kl_per_token)}"
            f"{_in_brackets(self.kl_interval, 1e6, number_text)} times 1e-6 nats per response token, "
            f"{100 * self.agreement:.2f} % of the tokens as the teacher's, on {self.utterances:,} held-out utterances "
            f"({self.response_tokens:,} tokens)."
        ]
        if self.words is not None:
            told.append(_words_sentence(self.words))
        if self.kl_interval is not None:
            told.append(self._draws_sentence())
        return [*told, *([self.warning] if self.warning else [])]

    def as_json(self) -> dict[str, Any]:
        """As it is stored, tuples being lists there."""
        return {**asdict(self), "is_word_gap_real": self.is_word_gap_real, "warning": self.warning}

    def _why_not(self) -> str:
        if self.words is None or self.words.difference_interval is None:
            return "there are too few words to compare student and teacher by"
        high = self.words.difference_interval[1]
        if high <= 0:
            return "the student gets no more words wrong than its teacher on these utterances"
        return (
            f"what the student gets wrong beyond its teacher cannot be told from nothing, and is at most "
            f"{_percent(high)} points of {self.words.unit}"
        )

    def _draws_sentence(self) -> str:
        what = "speakers" if self.is_by_speaker else "utterances"
        fewest = min(self.num_clusters, self.num_clusters if self.words is None else self.words.num_clusters)
        few = f"; with fewer than {FEW_CLUSTERS} they are too narrow" if fewest < FEW_CLUSTERS else ""
        return f"In brackets: 95 % paired bootstrap intervals over {self.num_clusters:,} {what}{few}."


def describe_gap(distances: Distances, words: Words, *, format: FormatName) -> Gap:
    """Compare a student with its teacher.

    Args:
        distances: In nats.
        words: Of the same utterances, which may come in another order.
        format: ``quantize.format`` of the student.

    Raises:
        ValueError: They are not of the same utterances, or these have no response tokens.
    """
    places = {key: place for place, key in enumerate(words.keys)}
    if len(places) != len(words.keys) or sorted(places) != sorted(distances.keys):
        raise ValueError(
            f"distances and words must be of the same utterances, got {len(distances.keys)} and {len(words.keys)}, "
            f"{len(places.keys() & set(distances.keys))} of them alike; measure both on one set"
        )
    order_U = np.array([places[key] for key in distances.keys], np.int64)
    clusters_U = speaker_clusters([words.speakers[place] for place in order_U.tolist()])
    if not (num_tokens := int(distances.tokens_U.sum())):
        raise ValueError("distances must be over response tokens, got none; measure utterances that can be read")
    resampled = _resampled([distances.kl_U], distances.tokens_U, clusters_U)
    return Gap(
        format=format,
        utterances=len(order_U),
        response_tokens=num_tokens,
        num_clusters=len(order_U) if clusters_U is None else len(set(clusters_U)),
        is_by_speaker=clusters_U is not None,
        kl_per_token=float(distances.kl_U.sum() / num_tokens),
        kl_interval=None if resampled is None else _ends(resampled.rate(0)),
        agreement=float(distances.agreements_U.sum() / num_tokens),
        words=_word_gap(words),
    )


def gap_summary(gap: Gap) -> str:
    """For a terminal."""
    return "\n".join([*gap.sentences(), ""])


def _word_gap(words: Words) -> WordGap | None:
    """One meaning of an error for all that is counted: transcripts and the teacher's texts are not mixed."""
    is_human = bool(words.is_human_U.any())
    chosen = np.flatnonzero(words.is_human_U == is_human)
    errors_SU = [words.errors_U[chosen], words.teacher_errors_U[chosen]]
    tokens_U = words.reference_tokens_U[chosen]
    if not (num_tokens := int(tokens_U.sum())):
        return None
    clusters_U = speaker_clusters([words.speakers[place] for place in chosen.tolist()])
    resampled = _resampled(errors_SU, tokens_U, clusters_U)
    student_rate, teacher_rate = (float(errors_U.sum() / num_tokens) for errors_U in errors_SU)
    units = {unit(words.languages[place]) for place in chosen.tolist()}
    return WordGap(
        unit="/".join(sorted(units, reverse=True)),
        is_reference_human=is_human,
        utterances=len(chosen),
        num_clusters=len(chosen) if clusters_U is None else len(set(clusters_U)),
        reference_tokens=num_tokens,
        student_rate=student_rate,
        teacher_rate=teacher_rate,
        difference=student_rate - teacher_rate,
        difference_interval=None if resampled is None else _ends(resampled.difference(0, 1)),
    )


def _words_sentence(words: WordGap) -> str:
    if words.is_reference_human:
        return (
            f"{words.unit} against {words.utterances:,} human transcripts ({words.reference_tokens:,} reference tokens)"
            f": student {_percent(words.student_rate)} %, teacher {_percent(words.teacher_rate)} %, difference "
            f"{_percent(words.difference)}{_in_brackets(words.difference_interval, 1, _percent)} points."
        )
    return (
        f"{words.unit} against the teacher's own texts, as there are no human transcripts ({words.utterances:,} "
        f"utterances, {words.reference_tokens:,} reference tokens): {_percent(words.student_rate)}"
        f"{_in_brackets(words.difference_interval, 1, _percent)} %. These are differences: where the student differs, "
        "it may be right, so that it loses at most as much to its teacher."
    )


def _percent(rate: float) -> str:
    return f"{round(100 * rate, 2) + 0.0:.2f}"  # never -0.00


def _in_brackets(interval: tuple[float, float] | None, factor: float, text: Callable[[float], str]) -> str:
    return "" if interval is None else f" ({text(factor * interval[0])} to {text(factor * interval[1])})"


def _resampled(
    numerators_SU: Sequence[npt.ArrayLike], denominators_U: npt.ArrayLike, clusters_U: Sequence[str] | None
) -> Resampled | None:
    """None where there is a single utterance."""
    denominators_U = np.asarray(denominators_U)
    if len(denominators_U) < 2:
        return None
    return resample(np.stack(numerators_SU), denominators_U, clusters=clusters_U, seed=SEED)


def _ends(interval: Interval) -> tuple[float, float]:
    return interval.low, interval.high
