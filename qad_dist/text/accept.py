"""The judge: what each pseudo-label is good for, by the record and the manifest alone. Pure: no I/O.

A label that a filter objects to is left out, or only distilled from: the teacher's distributions (KL) may be worth
learning where its tokens (cross-entropy) are doubtful. Equal labels, facts and settings always get equal verdicts, so
that settings can be changed without labelling again.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from qad_dist.config.filters import FiltersConfig, LoopFilterConfig
from qad_dist.text.loops import new_share, repeated_words, units
from qad_dist.text.normalize import NORMALIZER, normalize
from qad_dist.text.scripts import foreign_letters, usual_seconds
from qad_dist.text.wer import count_errors
from shards.schema import ENDED_BY_LENGTH, UNREADABLE, PseudoLabel
from shards.storage import fingerprint
from shards.verdicts import ALL, KL_ONLY, NOTHING, Verdict

JUDGE = "judge_v1"
"""Name of the rules below; stored beside every verdict, since other rules may decide otherwise."""

NO_TEXT, RUNAWAY, LOOP, RATE, SCRIPT = "no_text", "runaway", "loop", "rate", "script"
LANGUAGE, CONFIDENCE, REFERENCE = "language", "confidence", "reference"
REASONS = (UNREADABLE, NO_TEXT, RUNAWAY, LOOP, RATE, SCRIPT, LANGUAGE, CONFIDENCE, REFERENCE)
"""In the order in which verdicts name them: ``unreadable``, which no setting turns off, then a filter each."""

FEW_LATIN_WORDS = 4.0
"""Words' worth of Latin letters that a text in any language may consist of: a name, a title, "OK"."""

SHORTEST_SECONDS = 0.5
"""What is shorter is heard with silence added up to this, so that no rate is measured over less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """A label and what is known about its utterance."""

    label: PseudoLabel
    normalized: str
    language: str | None
    reference: str | None


def judge(label: PseudoLabel, *, language: str | None, reference: str | None, filters: FiltersConfig) -> Verdict:
    """Judge one pseudo-label.

    Args:
        label: As the teacher gave it.
        language: Of the utterance, as its source names it; None if it does not.
        reference: Human transcript, if there is one.
        filters: Which filters are on, what they allow, and what happens to a label that they object to.

    Returns:
        All reasons that speak against the label, in the order of :data:`REASONS`, and the strictest of their actions.
    """
    if label.ended_by == UNREADABLE:
        return Verdict(use=NOTHING, reasons=(UNREADABLE,))
    case = _Case(label=label, normalized=normalize(label.text, label.language), language=language, reference=reference)
    actions = {reason: getattr(filters, reason).action for reason in _OBJECTS}
    reasons = tuple(
        reason for reason, objects in _OBJECTS.items() if actions[reason] != "none" and objects(case, filters)
    )
    use = ALL if not reasons else NOTHING if any(actions[reason] == "drop" for reason in reasons) else KL_ONLY
    return Verdict(use=use, reasons=reasons)


def judged_by(filters: FiltersConfig, facts: Iterable[tuple[str | None, str | None]]) -> dict[str, Any]:
    """Everything but the labels that decides the verdicts, for :attr:`shards.verdicts.Judged.settings`.

    Args:
        filters: As given to :func:`judge`.
        facts: Language and reference of each utterance, in the order of its labels.
    """
    return {
        "judge": JUDGE,
        "normalizer": NORMALIZER,
        "filters": filters.model_dump(mode="json"),
        "facts": fingerprint(*facts),
    }


def is_loop(normalized: str, limits: LoopFilterConfig) -> bool:
    """Whether a text repeats itself as nobody speaks.

    Args:
        normalized: From :func:`qad_dist.text.normalize.normalize`.
        limits: ``label.filters.loop``.
    """
    text = units(normalized)
    return repeated_words(text) >= limits.repeated_words or new_share(text) < limits.new_share


def _has_no_text(case: _Case, filters: FiltersConfig) -> bool:
    return not case.normalized or not case.label.language


def _runs_away(case: _Case, filters: FiltersConfig) -> bool:
    return case.label.ended_by == ENDED_BY_LENGTH


def _loops(case: _Case, filters: FiltersConfig) -> bool:
    return is_loop(case.normalized, filters.loop)


def _has_wrong_rate(case: _Case, filters: FiltersConfig) -> bool:
    """Whether the text is too long or too short. Without text there is no rate: silence is no_text's business."""
    usual, heard = usual_seconds(case.normalized), case.label.duration_seconds
    is_too_long = usual > filters.rate.fastest * max(heard, SHORTEST_SECONDS)
    is_too_short = 0 < usual < filters.rate.slowest * (heard - filters.rate.silence_seconds)
    return is_too_long or is_too_short


def _is_in_wrong_script(case: _Case, filters: FiltersConfig) -> bool:
    found = foreign_letters(case.normalized, case.label.language or "")
    if found is None:
        return False
    has_much_latin = found.latin > max(FEW_LATIN_WORDS, filters.script.max_latin_share * found.all_letters)
    return has_much_latin or found.other > filters.script.max_share * found.all_letters


def _is_in_other_language(case: _Case, filters: FiltersConfig) -> bool:
    named = case.label.language
    return case.language is not None and bool(named) and named != case.language


def _is_unsure(case: _Case, filters: FiltersConfig) -> bool:
    mean, limits = case.label.mean_logprob, filters.confidence
    # The mean of n tokens scatters by 1 / sqrt(n): below the limit by chance alone is no doubt.
    slack = limits.short_slack / math.sqrt(max(case.label.num_tokens, 1))
    return mean is not None and mean < limits.min_mean_logprob - slack


def _differs_from_reference(case: _Case, filters: FiltersConfig) -> bool:
    if case.reference is None:
        return False
    errors = count_errors(case.reference, case.label.text, language=case.language or case.label.language)
    return errors.rate is not None and errors.rate > filters.reference.max_error_rate


_OBJECTS: dict[str, Callable[[_Case, FiltersConfig], bool]] = {
    NO_TEXT: _has_no_text,
    RUNAWAY: _runs_away,
    LOOP: _loops,
    RATE: _has_wrong_rate,
    SCRIPT: _is_in_wrong_script,
    LANGUAGE: _is_in_other_language,
    CONFIDENCE: _is_unsure,
    REFERENCE: _differs_from_reference,
}
