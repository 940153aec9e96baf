"""Answers become a score: counts, rates, distances and what they tell apart, by language and in all.

Everything here follows from references, answers and settings; nothing is decoded, so that a score is made again in
seconds when only its rules have changed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qad_dist.answers import Answer
from qad_dist.config import RunConfig
from qad_dist.config.score import TEACHER
from qad_dist.text.accept import is_loop
from qad_dist.text.measures import MEASURES
from qad_dist.text.normalize import normalize, unit
from qad_dist.text.significance import Significance, compare_systems
from qad_dist.text.wer import ErrorCounts, corpus, count_errors
from qad_dist.text.worst import Case
from shards.index import UNKNOWN_LANGUAGE
from shards.schema import ENDED_BY_LENGTH, Utterance

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counted:
    """An answer with its errors."""

    answer: Answer
    counts: ErrorCounts | None
    """None where the utterance has no reference."""
    others: Mapping[str, ErrorCounts]
    """By the name of the measure; only those that count this utterance."""
    is_runaway: bool


def judge_section(run: RunConfig, utterances: Sequence[Utterance], answers: Mapping[str, Sequence[Answer]]) -> Row:
    """What a section of ``score.json`` says of its systems.

    Args:
        run: Says margin, seed and what a loop is.
        utterances: The set.
        answers: By system in the order of display, each in the order of the set.

    Returns:
        ``systems``: by name a row in all and one for each language; ``significance``: the same of all pairs.
    """
    counted = {
        name: [_counted(run, utterance, answer) for utterance, answer in zip(utterances, own, strict=True)]
        for name, own in answers.items()
    }
    names_U = np.array([utterance.language or UNKNOWN_LANGUAGE for utterance in utterances])
    languages = sorted(set(names_U.tolist()))
    units = {name: unit(None if name == UNKNOWN_LANGUAGE else name) for name in languages}
    parts = {name: np.flatnonzero(names_U == name).tolist() for name in languages}
    overall_unit = "/".join(sorted(set(units.values()), reverse=True))
    overall = _part(run, utterances, counted, list(range(len(utterances))), overall_unit)
    by_language = {name: _part(run, utterances, counted, parts[name], units[name]) for name in languages}
    return {
        "systems": {
            system: {
                "overall": overall[0][system],
                "languages": {name: rows[system] for name, (rows, _) in by_language.items()},
            }
            for system in answers
        },
        "significance": {
            "overall": _told(overall[1]),
            "languages": {name: _told(found) for name, (_, found) in by_language.items()},
        },
    }


def _told(found: Significance) -> Row:
    return {**found.as_json(), "sentences": found.sentences(), "summary": found.summary_sentence()}


def cases_of(utterances: Sequence[Utterance], answers: Mapping[str, Sequence[Answer]]) -> list[Case]:
    """The utterances that have a reference, as :mod:`qad_dist.text.worst` looks at them."""
    return [
        Case(
            key=utterance.key,
            language=utterance.language,
            speaker=utterance.speaker,
            duration_seconds=utterance.duration_seconds,
            reference=utterance.reference,
            texts={name: own[place].text for name, own in answers.items()},
        )
        for place, utterance in enumerate(utterances)
        if utterance.reference is not None
    ]


def _counted(run: RunConfig, utterance: Utterance, answer: Answer) -> _Counted:
    """An empty reference counts: whatever is heard in silence is inserted."""
    reference, language = utterance.reference, utterance.language

    def repeats(text: str) -> bool:
        return is_loop(normalize(text, language), run.label.filters.loop)

    is_runaway = answer.ended_by == ENDED_BY_LENGTH or (repeats(answer.text) and not repeats(reference or ""))
    if reference is None:
        return _Counted(answer=answer, counts=None, others={}, is_runaway=is_runaway)
    others = {
        measure.name: counts
        for measure in MEASURES
        if measure.is_for(language) and (counts := measure.count(reference, answer.text, language)) is not None
    }
    counts = count_errors(reference, answer.text, language=language)
    return _Counted(answer=answer, counts=counts, others=others, is_runaway=is_runaway)


def _part(
    run: RunConfig,
    utterances: Sequence[Utterance],
    counted: Mapping[str, Sequence[_Counted]],
    places: Sequence[int],
    rate_unit: str,
) -> tuple[dict[str, Row], Significance]:
    """A row for each system on some of the utterances, and what they tell apart."""
    scored = [place for place in places if utterances[place].reference is not None]
    counts = {name: [own[place].counts or ErrorCounts() for place in scored] for name, own in counted.items()}
    first = next(iter(counts.values()))
    significance = compare_systems(
        {name: np.array([one.errors for one in own], np.int64) for name, own in counts.items()},
        np.array([one.reference_length for one in first], np.int64),
        [_speaker(utterances[place]) for place in scored],
        unit=rate_unit,
        margin=run.score.margin,
        seed=run.seed,
        num_resamples=run.score.num_resamples,
    )
    tokens = sum(len(counted[TEACHER][place].answer.token_ids) for place in places)
    # A language that a system was told is not one that it found.
    told = [utterances[place].language if run.score.language == "auto" else None for place in places]
    rows = {
        name: {
            **_row([own[place] for place in places], told, tokens),
            "unit": rate_unit,
            "interval": None if (rate := significance.rates[name]) is None else [rate.low, rate.high],
        }
        for name, own in counted.items()
    }
    return rows, significance


def _speaker(utterance: Utterance) -> str | None:
    """Names of speakers may be those of others in another corpus."""
    return None if utterance.speaker is None else f"{utterance.source}/{utterance.speaker}"


def _row(counted: Sequence[_Counted], languages: Sequence[str | None], num_tokens: int) -> Row:
    """Counts over some utterances; rates are divided once, here."""
    counts = corpus(one.counts for one in counted if one.counts is not None)
    found = [one.answer.language for one, language in zip(counted, languages, strict=True) if language]
    right = sum(one.answer.language == language for one, language in zip(counted, languages, strict=True) if language)
    is_detected = any(language is not None for language in found)
    is_measured = num_tokens > 0 and all(one.answer.kl is not None for one in counted)
    measures = [measure.name for measure in MEASURES if any(measure.name in one.others for one in counted)]
    return {
        **_counts(counts),
        "utterances": len(counted),
        "measures": {
            name: _counts(corpus(one.others[name] for one in counted if name in one.others)) for name in measures
        },
        "kl_per_token": sum(one.answer.kl or 0.0 for one in counted) / num_tokens if is_measured else None,
        "agreement": sum(one.answer.agreements or 0 for one in counted) / num_tokens if is_measured else None,
        "response_tokens": num_tokens,
        "language_accuracy": right / len(found) if is_detected else None,
        "runaway": sum(one.is_runaway for one in counted) / len(counted),
    }


def _counts(counts: ErrorCounts) -> Row:
    return {
        "substitutions": counts.substitutions,
        "deletions": counts.deletions,
        "insertions": counts.insertions,
        "reference_tokens": counts.reference_length,
        "error_rate": counts.rate,
    }
