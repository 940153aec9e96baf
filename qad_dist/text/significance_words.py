"""What is known of several systems scored on the same utterances, and how it is said in words. Pure: no I/O.

Filled by :func:`qad_dist.text.significance.compare_systems`, whose file says what the numbers mean and how far they go.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from qad_dist.text.bootstrap import FEW_CLUSTERS, Interval

LEVEL = 0.05
"""A pair is told apart if its p-value is at most this: where its 95 % interval leaves 0 out."""

PLANNED_SYSTEMS = 3
"""Up to so many, pairs are judged by their own p-values, beyond by those after Holm's correction."""

NOT_INFERIOR, INFERIOR, NOT_SHOWN = "not inferior", "inferior", "not shown either way"
Verdict = Literal["not inferior", "inferior", "not shown either way"]

_TOKENS = {"WER": "words", "CER": "characters"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two systems on the same utterances."""

    first: str
    second: str
    difference: Interval | None
    """Rate of the first minus that of the second. None without resamples, or if they make equally many errors in each
    cluster, so that resamples have nothing to vary."""
    p_value: float | None
    """None without resamples."""
    p_adjusted: float | None
    """After Holm's correction for all pairs of this comparison."""
    is_told_apart: bool
    """By the one of the two that counts, see :data:`PLANNED_SYSTEMS`."""
    words_to_see: int | None
    """Reference tokens at which the difference found is seen at 5 % with a chance of 80 %, in a comparison of this pair
    alone; None if none was found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NonInferiority:
    """A system against the teacher and the margin."""

    difference: Interval | None
    """Rate of the system minus that of the teacher; None as in :attr:`Pair.difference`."""
    verdict: Verdict
    """:data:`NOT_INFERIOR` if it surely loses less than the margin, :data:`INFERIOR` if surely more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Significance:
    """What is known of several systems that were scored on the same utterances."""

    unit: str
    """``WER``, ``CER``, or ``WER/CER`` where languages differ."""
    margin: float
    """In points of the unit: 0.1 is one error in 1,000 words."""
    utterances: int
    reference_tokens: int
    num_clusters: int
    """What intervals draw: speakers, or utterances."""
    is_by_speaker: bool
    is_one_speaker: bool
    """All utterances are by the same speaker, so that utterances are drawn, and nothing is known of other speakers."""
    teacher: str | None
    """None if it is not among the systems; so the next two."""
    lost: str | None
    regained: str | None
    errors: dict[str, int]
    """Of each system, in the order in which systems are shown."""
    rates: dict[str, Interval | None]
    """Errors per reference token. None where there is a single utterance, no reference token, or no error."""
    pairs: list[Pair]
    """Every pair, the system that is shown first being the first."""
    recovered: Interval | None
    """Share of ``lost``'s loss to the teacher that ``regained`` won back. Its ends are infinite where the loss cannot
    be told from nothing. None if one of the three is missing, there are no resamples, or there is no loss."""
    non_inferiority: dict[str, NonInferiority]
    """Of each system but the teacher; empty without one."""

    @property
    def is_too_narrow(self) -> bool:
        """Whether there are fewer than :data:`~qad_dist.text.bootstrap.FEW_CLUSTERS` speakers or utterances."""
        return self.num_clusters < FEW_CLUSTERS

    @property
    def has_resamples(self) -> bool:
        """Whether anything can be said beyond counts."""
        return self.utterances > 1 and self.reference_tokens > 0

    @property
    def is_loss_clear(self) -> bool:
        """Whether :attr:`recovered` is a share of something that is surely not nothing."""
        return self.recovered is not None and math.isfinite(self.recovered.high)

    def as_json(self) -> dict[str, Any]:
        """As it is stored; an infinite end is null."""
        return _finite({**asdict(self), "is_too_narrow": self.is_too_narrow, "is_loss_clear": self.is_loss_clear})

    def sentences(self) -> list[str]:
        """In words: the rates, each pair, what was won back, the verdicts, and what the intervals are."""
        if not self.has_resamples:
            return [_rates_sentence(self), _why_nothing(self)]
        return [
            _rates_sentence(self),
            *(_pair_sentence(self, pair) for pair in self.pairs),
            *_recovered_sentence(self),
            *(_verdict_sentence(self, name, found) for name, found in self.non_inferiority.items()),
            *_draws_sentences(self),
        ]

    def summary_sentence(self) -> str:
        """What can be told apart, in one line."""
        start = f"{self.unit} on {self.reference_tokens:,} {_tokens(self.unit)}: "
        if not self.has_resamples:
            return start + "too few to tell systems apart."
        apart = [pair for pair in self.pairs if pair.is_told_apart]
        if not self.pairs:
            parts = ["one system, nothing to compare"]
        elif len(self.errors) > PLANNED_SYSTEMS:
            parts = [f"{len(apart)} of {len(self.pairs)} pairs of systems can be told apart"]
        else:
            parts = [f"{_comparison(pair)} points" for pair in apart]
            alike = [f"{pair.first} and {pair.second}" for pair in self.pairs if pair not in apart]
            parts += [f"cannot be told apart: {', '.join(alike)}"] if alike else []
        if self.recovered is not None and self.is_loss_clear:
            parts.append(f"share of the loss that {self.regained} wins back: {_share(self.recovered)}")
        if self.is_too_narrow:
            parts.append(f"fewer than {FEW_CLUSTERS} {_draws(self)}, so less sure than it looks")
        return start + "; ".join(parts) + "."


def _rates_sentence(found: Significance) -> str:
    told, utterances = [], "utterance" if found.utterances == 1 else "utterances"
    for name, errors in found.errors.items():
        rate, percent = found.rates[name], f"{100 * errors / max(found.reference_tokens, 1):.2f} %"
        ends = "" if rate is None else f" ({100 * rate.low:.2f} to {100 * rate.high:.2f})"
        told.append(f"{name} {percent}{ends}" if found.reference_tokens else f"{name} {errors:,} errors")
    return (
        f"{found.unit} on {found.utterances:,} {utterances} ({found.reference_tokens:,} {_tokens(found.unit)}): "
        f"{', '.join(told)}."
    )


def _why_nothing(found: Significance) -> str:
    if not found.reference_tokens:
        return f"The references have no {_tokens(found.unit)}, so that there is no rate and nothing to compare."
    return "One utterance cannot tell systems apart: how much another would differ is not known."


def _pair_sentence(found: Significance, pair: Pair) -> str:
    first, second, difference = pair.first, pair.second, pair.difference
    points = f"points of {found.unit}"
    if difference is None:
        if not found.errors[first]:
            return f"{first} and {second} make no error, so that nothing tells them apart."
        each = "with each speaker" if found.is_by_speaker else "in each utterance"
        return f"{first} and {second} make equally many errors {each}, so that nothing tells them apart."
    if pair.is_told_apart:
        ends = sorted((abs(difference.low), abs(difference.high)))
        return f"{_comparison(pair)} {points} ({_points(ends[0])} to {_points(ends[1])})."
    # Told of the second: how much more errors it makes than the first.
    here = f"{_comparison(pair)} {points} here" if difference.value else "here they are equal"
    if pair.p_value is not None and pair.p_value <= LEVEL:
        return (
            f"{first} and {second} cannot be told apart: {here}, which would do for one pair alone, but of "
            f"{len(found.pairs)} pairs some differ so much by chance."
        )
    sentence = (
        f"{first} and {second} cannot be told apart: {here}, but {second} may be anything from "
        f"{_side(-difference.high)} to {_side(-difference.low)}."
    )
    if pair.words_to_see is None:
        return sentence
    times = pair.words_to_see / found.reference_tokens
    return (
        f"{sentence} If this is the true difference, about {_about(pair.words_to_see)} {_tokens(found.unit)} of such "
        f"speech, {_about(times)} times as many as here, would show it in four of five tests."
    )


def _recovered_sentence(found: Significance) -> Iterator[str]:
    teacher, lost, regained = found.teacher, found.lost, found.regained
    if teacher is None or lost is None or regained is None:
        return
    if found.recovered is None:
        yield f"{lost} makes no more errors than {teacher}, so that {regained} has nothing to win back."
    elif not found.is_loss_clear:
        yield (
            f"Share of {lost}'s loss to {teacher} that {regained} wins back: {100 * found.recovered.value:.0f} % here, "
            "but the loss itself cannot be told from nothing, so that this share means little."
        )
    else:
        scale = f"100 % being as good as {teacher}" if found.recovered.value >= 0 else f"as it loses more than {lost}"
        yield f"Share of {lost}'s loss to {teacher} that {regained} wins back: {_share(found.recovered)}, {scale}."


def _verdict_sentence(found: Significance, name: str, against: NonInferiority) -> str:
    margin = f"{_points(found.margin / 100)} points of {found.unit}"
    difference = against.difference
    if against.verdict == INFERIOR and difference is not None:
        return f"{name} loses more than {margin} to {found.teacher}: at least {_points(difference.low)}."
    if against.verdict == NOT_INFERIOR:
        most = "" if difference is None else f": at worst it is {_side(difference.high)}"
        return f"{name} loses less than {margin} to {found.teacher}{most}."
    whether = f"Whether {name} loses {margin} to {found.teacher} is not shown either way"
    if difference is not None and 100 * difference.high >= found.margin:
        return f"{whether}: it may be {_side(difference.low)} or {_side(difference.high)}."
    allowed = found.margin / 100 * found.reference_tokens
    return f"{whether}: on so few {_tokens(found.unit)} it would be {allowed:.3g} errors, which chance may hide."


def _draws_sentences(found: Significance) -> Iterator[str]:
    few = f"; with fewer than {FEW_CLUSTERS} they are too narrow" if found.is_too_narrow else ""
    yield f"In brackets: 95 % paired bootstrap intervals over {found.num_clusters:,} {_draws(found)}{few}."
    if found.is_one_speaker:
        yield "All utterances are by one speaker: with other speakers the systems may compare otherwise."
    faultless = [name for name, errors in found.errors.items() if not errors]
    if faultless:
        # As many errors as one would see at least one of, with 97.5 %.
        most = 100 * -math.log(0.025) / found.reference_tokens
        yield f"No error does not mean that there never is one: {', '.join(faultless)} may have up to {most:.2g} %."
    if len(found.errors) > PLANNED_SYSTEMS:
        yield (
            f"Of {len(found.pairs)} pairs some differ by chance: those told apart are so after Holm's correction, "
            "which keeps the chance of even one false finding at 5 %."
        )


def _comparison(pair: Pair) -> str:
    """The second, which is shown later, against the first."""
    assert pair.difference is not None
    side = "worse" if pair.difference.value < 0 else "better"
    return f"{pair.second} is {side} than {pair.first} by {_points(abs(pair.difference.value))}"


def _side(more: float) -> str:
    return "equal" if more == 0 else f"{_points(abs(more))} points {'worse' if more > 0 else 'better'}"


def _points(rate: float) -> str:
    """Of a rate in points: two digits that count, and two places at least for what is 0.1 or more."""
    points = 100 * rate
    return f"{points:.2f}" if points >= 0.1 else np.format_float_positional(float(f"{points:.2g}"), trim="-")


def _share(share: Interval) -> str:
    return f"{100 * share.value:.0f} % ({100 * share.low:.0f} to {100 * share.high:.0f})"


def _about(number: float) -> str:
    """Two digits that count: more are not known."""
    rounded = float(f"{number:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"


def _tokens(unit: str) -> str:
    return _TOKENS.get(unit, "words and characters")


def _draws(found: Significance) -> str:
    return "speakers" if found.is_by_speaker else "utterances"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
