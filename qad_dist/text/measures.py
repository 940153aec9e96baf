"""Further rates beside the one that everything is judged by: the same texts under other rules, each with its name.

Which rules are taken moves a rate by as much as INT8 does, so that a number without the name of its rules says little.
Pure: no I/O.
"""

from collections.abc import Callable
from dataclasses import dataclass

from qad_dist.text.normalize import CER_LANGUAGES, NORMALIZER, characters
from qad_dist.text.open_asr import OPEN_ASR, WHISPER, count_open_asr_errors, count_whisper_errors
from qad_dist.text.wer import ErrorCounts, count_token_errors

RAW = "raw"
"""No rules at all: words as they were written, case and punctuation counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A way to count errors."""

    name: str
    """Rules and unit, as a score names it: ``norm_v1 CER``."""
    count: Callable[[str, str, str | None], ErrorCounts | None]
    """Of reference, hypothesis and language; None where the rules leave the utterance out."""
    languages: frozenset[str] | None
    """None for all of them."""

    def is_for(self, language: str | None) -> bool:
        """Whether utterances of a language are measured so."""
        return self.languages is None or language in self.languages


def _count_characters(reference: str, hypothesis: str, language: str | None) -> ErrorCounts:
    return count_token_errors(characters(reference, language), characters(hypothesis, language))


def _count_raw(reference: str, hypothesis: str, language: str | None) -> ErrorCounts:
    words = [reference.split(), hypothesis.split()]
    tokens = [list("".join(some)) for some in words] if language in CER_LANGUAGES else words
    return count_token_errors(tokens[0], tokens[1])


_ENGLISH = frozenset({"English"})

MEASURES = (
    Measure(name=f"{NORMALIZER} CER", count=_count_characters, languages=None),
    Measure(name=RAW, count=_count_raw, languages=None),
    Measure(name=WHISPER, count=lambda r, h, _: count_whisper_errors(r, h), languages=_ENGLISH),
    Measure(name=OPEN_ASR, count=lambda r, h, _: count_open_asr_errors(r, h), languages=_ENGLISH),
)
"""Beside the rate of :func:`~qad_dist.text.wer.count_errors`. ``raw`` has the language's own unit."""
