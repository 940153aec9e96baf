"""Which pseudo-labels are fit to calibrate and train on, and why the others are not. Pure: no I/O.

Only what is surely useless is dropped: a response that never ended (the teacher repeats itself, and the student would
learn to), and one without text (nothing was heard, so there is nothing to distil but the language tag).
"""

from dataclasses import dataclass

from shards.schema import ENDED_BY_LENGTH, PseudoLabel

RUNAWAY = "runaway"
"""Generation reached ``label.max_response_tokens`` without an end token."""
NO_TEXT = "no_text"
"""The response has no tokens, or nothing but white space stands behind its language tag."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a pseudo-label is kept; ``reason`` is None exactly then."""

    kept: bool
    reason: str | None


def verdict(label: PseudoLabel) -> Verdict:
    """Judge one pseudo-label by itself; the same label always gets the same verdict."""
    if label.ended_by == ENDED_BY_LENGTH:
        return Verdict(kept=False, reason=RUNAWAY)
    if not label.token_ids or not label.text.strip():
        return Verdict(kept=False, reason=NO_TEXT)
    return Verdict(kept=True, reason=None)
