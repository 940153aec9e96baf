"""Errors between a reference and a hypothesis, counted by jiwer on normalised tokens. Pure: no I/O.

Rates are never averaged: counts are added over utterances, and one division comes last. One wrong word of 1 and none
of 10 make 1 / 11 = 0.09 for the set, not the 0.50 that a mean of the two utterances would say.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import jiwer

from qad_dist.text.normalize import tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorCounts:
    """Counts of the cheapest alignment of reference and hypothesis tokens, of one utterance or summed over many."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    hits: int = 0

    def __add__(self, other: "ErrorCounts") -> "ErrorCounts":
        return ErrorCounts(
            substitutions=self.substitutions + other.substitutions,
            deletions=self.deletions + other.deletions,
            insertions=self.insertions + other.insertions,
            hits=self.hits + other.hits,
        )

    @property
    def reference_length(self) -> int:
        """Tokens of the reference: each is hit, substituted or deleted."""
        return self.hits + self.substitutions + self.deletions

    @property
    def errors(self) -> int:
        """Substitutions, deletions and insertions."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float | None:
        """Errors per reference token; above 1 if there are more insertions than the reference has tokens.

        With an empty reference it is the number of insertions, as in jiwer, and None if there are none: nothing was
        asked and nothing was said, which is neither right nor wrong.
        """
        if self.reference_length == 0 and self.errors == 0:
            return None
        return self.errors / max(self.reference_length, 1)


def count_errors(reference: str, hypothesis: str, *, language: str | None) -> ErrorCounts:
    """Errors of one hypothesis, in words, or in characters for the languages that are scored so.

    Args:
        reference: Human transcript, as delivered; may be empty.
        hypothesis: What a model wrote, as written; may be empty.
        language: Language of the reference, never the one that the model detected; decides words or characters.
    """
    reference_tokens, hypothesis_tokens = tokens(reference, language), tokens(hypothesis, language)
    if not reference_tokens:
        return ErrorCounts(insertions=len(hypothesis_tokens))
    # Tokens hold no white space, so that joined by single spaces jiwer splits them exactly as they are here.
    aligned = jiwer.process_words(" ".join(reference_tokens), " ".join(hypothesis_tokens))
    return ErrorCounts(
        substitutions=aligned.substitutions,
        deletions=aligned.deletions,
        insertions=aligned.insertions,
        hits=aligned.hits,
    )


def corpus(counts: Iterable[ErrorCounts]) -> ErrorCounts:
    """Counts of a set of utterances: the sum, whose :attr:`ErrorCounts.rate` is the WER or CER of the set."""
    return sum(counts, start=ErrorCounts())
