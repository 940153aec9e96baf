"""Errors between a reference and a hypothesis, counted by jiwer on normalised tokens. Pure: no I/O.

Rates are never averaged: counts are added over utterances, and one division comes last. One wrong word of 1 and none
of 10 make 1 / 11 = 0.09 for the set, not the 0.50 that a mean of the two utterances would say.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

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
    return count_token_errors(tokens(reference, language), tokens(hypothesis, language))


def count_token_errors(reference_tokens: Sequence[str], hypothesis_tokens: Sequence[str]) -> ErrorCounts:
    """Errors between tokens that are ready to be compared; none holds white space or is empty."""
    if not reference_tokens:
        return ErrorCounts(insertions=len(hypothesis_tokens))
    # Joined by single spaces, so that jiwer splits them exactly as they are here.
    aligned = jiwer.process_words(" ".join(reference_tokens), " ".join(hypothesis_tokens))
    return ErrorCounts(
        substitutions=aligned.substitutions,
        deletions=aligned.deletions,
        insertions=aligned.insertions,
        hits=aligned.hits,
    )


def align_tokens(
    reference_tokens: Sequence[str], hypothesis_tokens: Sequence[str]
) -> list[tuple[str | None, str | None]]:
    """Pairs of the cheapest alignment: what :func:`count_errors` counts, one by one.

    Args:
        reference_tokens: From :func:`qad_dist.text.normalize.tokens`, without white space inside; may be empty.
        hypothesis_tokens: Likewise.

    Returns:
        Reference and hypothesis token in the order of both; None as the first: inserted, as the second: deleted.
    """
    if not reference_tokens:
        return [(None, token) for token in hypothesis_tokens]
    aligned = jiwer.process_words(" ".join(reference_tokens), " ".join(hypothesis_tokens))
    pairs: list[tuple[str | None, str | None]] = []
    for chunk in aligned.alignments[0]:
        # Of an insertion the first is empty, of a deletion the second; otherwise they are equally long.
        references = reference_tokens[chunk.ref_start_idx : chunk.ref_end_idx]
        hypotheses = hypothesis_tokens[chunk.hyp_start_idx : chunk.hyp_end_idx]
        pairs += zip_longest(references, hypotheses)
    return pairs


def corpus(counts: Iterable[ErrorCounts]) -> ErrorCounts:
    """Counts of a set of utterances: the sum, whose :attr:`ErrorCounts.rate` is the WER or CER of the set."""
    return sum(counts, start=ErrorCounts())
