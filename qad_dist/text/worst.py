"""The utterances on which a system makes the most errors, aligned with what was said, to be read. Pure: no I/O.

What is aligned are the tokens that are counted, in columns: words, or characters where characters are scored. Which
kind of error a token is stands below it as a letter, because most scripts have no capitals to mark it with. Columns run
from left to right in every script, as in all tables of alignments; right-to-left words are written so within theirs.
"""

import heapq
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, zip_longest
from typing import Any, NamedTuple

from qad_dist.config.score import TEACHER
from qad_dist.text.grid import WIDTH, escaped, visible
from qad_dist.text.normalize import NORMALIZER, tokens, unit
from qad_dist.text.wer import ErrorCounts, align_tokens, count_errors
from shards.index import UNKNOWN_LANGUAGE

LONGEST_TEXT = 2_000
"""Characters of a text in :func:`worst_lines`: more than anybody says in a minute."""

MOST_LINES = 8
"""Lines of :data:`~qad_dist.text.grid.WIDTH` columns that an alignment may fill, each in as many rows as it has."""

_LONGEST_NAME, _LONGEST_LABEL, _LONGEST_TOKEN = 100, 12, 24
_REFERENCE = "REF"
# Tokens that stay at both ends of a long stretch: right ones as context, others for what they say.
_RIGHT_ENDS, _WRONG_ENDS = 6, 20
_MIN_FOLDED = 8
# Ends a right-to-left run, so that the next word starts right of it and not left.
_LEFT_TO_RIGHT_MARK = "\u200e"
_DOTTED_CIRCLE = "\u25cc"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One utterance and what each system made of it."""

    key: str
    language: str | None
    """Of the reference; decides whether words or characters are counted."""
    speaker: str | None
    duration_seconds: float
    reference: str
    """As delivered."""
    texts: Mapping[str, str]
    """Hypotheses as written, by system."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worst:
    """An utterance with errors."""

    case: Case
    system: str
    """The one whose errors put the utterance here."""
    counts: Mapping[str, ErrorCounts]
    """Of every system of the case."""


class _Column(NamedTuple):
    """Tokens that belong together: of the reference, then of each system; None where there is nothing."""

    cells: tuple[str | None, ...]
    num_tokens: int = 1
    """More than 1 where it stands for a folded stretch."""


def worst_utterances(cases: Sequence[Case], *, system: str, number: int) -> list[Worst]:
    """Utterances with at least one error, most errors first; of equally many the higher rate, then the lower key.

    Args:
        cases: Each has a text of ``system``; texts of others may be missing.
        system: Whose errors count.
        number: Of utterances at most.
    """
    counts = [count_errors(case.reference, case.texts[system], language=case.language) for case in cases]
    wrong = (place for place, found in enumerate(counts) if found.errors)
    chosen = heapq.nsmallest(number, wrong, key=lambda place: (*_goodness(counts[place]), cases[place].key))
    return [
        Worst(
            case=case,
            system=system,
            counts={
                name: count_errors(case.reference, text, language=case.language) for name, text in case.texts.items()
            },
        )
        for case in (cases[place] for place in chosen)
    ]


def worst_markdown(worst: Sequence[Worst], *, section: str) -> str:
    """The utterances with their alignments as Markdown that stays within its blocks, whatever the texts hold.

    An alignment has a row for the reference, the system and the teacher. Long stretches that are right, left out or
    inserted are folded, and after :data:`MOST_LINES` lines it ends with what is not shown.

    Args:
        worst: From :func:`worst_utterances`.
        section: What was scored.
    """
    title = f"## {_told(section)}: most errors"
    if not worst:
        return f"{title}\n\nNo utterance has an error.\n"
    notes = (
        f"Text {NORMALIZER}. Below a system: S, another word or character than in the reference; D, left out; "
        "I, inserted. `***` stands for nothing, `[12]` for 12 words or characters."
    )
    parts = [f"{title} of {_told(worst[0].system)}", notes]
    for place, one in enumerate(worst, start=1):
        parts += [f"### {place}. {_told(one.case.key)}", _facts(one), *_alignment(one)]
    return "\n\n".join(parts) + "\n"


def worst_lines(worst: Sequence[Worst]) -> list[dict[str, Any]]:
    """The same utterances with their counts, one JSON object each; texts as written, without what cannot be seen."""
    return [
        {
            "key": visible(one.case.key, longest=_LONGEST_NAME),
            "language": _seen(one.case.language),
            "speaker": _seen(one.case.speaker),
            "duration_seconds": one.case.duration_seconds,
            "unit": unit(one.case.language),
            "reference_tokens": one.counts[one.system].reference_length,
            "reference": _cut(one.case.reference),
            "system": one.system,
            "systems": {
                name: {
                    "errors": found.errors,
                    "substitutions": found.substitutions,
                    "deletions": found.deletions,
                    "insertions": found.insertions,
                    "error_rate": found.rate,
                    "hypothesis": _cut(one.case.texts[name]),
                }
                for name, found in one.counts.items()
            },
        }
        for one in worst
    ]


def _goodness(counts: ErrorCounts) -> tuple[int, float]:
    return -counts.errors, -(counts.rate or 0.0)


def _seen(name: str | None) -> str | None:
    return None if name is None else visible(name, longest=_LONGEST_NAME)


def _told(name: str) -> str:
    return escaped(visible(name, longest=_LONGEST_NAME))


def _cut(text: str) -> str:
    """A line of at most :data:`LONGEST_TEXT` characters, and how many more there were."""
    line = visible(text, longest=len(text))
    if len(line) <= LONGEST_TEXT:
        return line
    start = visible(line, longest=LONGEST_TEXT)
    return f"{start} [{len(line) - len(start) + 1:,} more characters]"


def _facts(one: Worst) -> str:
    """Whose utterance it is, and the errors of each system: first the one it is about, then the teacher."""
    case = one.case
    who = [_told(case.language or UNKNOWN_LANGUAGE), f"{case.duration_seconds:.2f} seconds"]
    if case.speaker is not None:
        who.append(f"speaker {_told(case.speaker)}")
    names = dict.fromkeys([*_shown_systems(one), *one.counts])
    errors = [
        f"{_told(name)} {found.errors:,} ({found.substitutions:,} S, {found.deletions:,} D, {found.insertions:,} I)"
        for name, found in ((name, one.counts[name]) for name in names)
    ]
    length = _amount(one.counts[one.system].reference_length, case.language)
    return f"{', '.join(who)}. Errors in {length}: {', '.join(errors)}."


def _amount(number: int, language: str | None) -> str:
    noun = "character" if unit(language) == "CER" else "word"
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _shown_systems(one: Worst) -> list[str]:
    return list(dict.fromkeys([one.system, *([TEACHER] if TEACHER in one.case.texts else [])]))


def _alignment(one: Worst) -> Iterator[str]:
    """A fenced block, then what it leaves out."""
    case, names = one.case, _shown_systems(one)
    hypotheses = [tokens(case.texts[name], case.language) for name in names]
    columns = _folded(_columns(tokens(case.reference, case.language), hypotheses))
    labels = [visible(name, longest=_LONGEST_LABEL) for name in (_REFERENCE, *names)]
    start = max(map(_width, labels)) + 2
    gap = "" if unit(case.language) == "CER" else " "
    lines = _lines(columns, width=WIDTH - start, gap=gap)
    text = "\n\n".join(_rows(line, labels, start=start, gap=gap) for line in lines)
    # No row is a fence: each has a label, tokens have no backticks, and marks are letters.
    yield f"```text\n{text}\n```"
    if left_out := columns[sum(map(len, lines)) :]:
        amount = _amount(sum(column.num_tokens for column in left_out), case.language)
        errors = (
            f"{_told(name)} {sum(column.num_tokens for column in left_out if _mark(column, row) != ' '):,}"
            for row, name in enumerate(names, start=1)
        )
        yield f"Not shown: {amount}, with errors: {', '.join(errors)}."


def _columns(reference: Sequence[str], hypotheses: Sequence[Sequence[str]]) -> list[_Column]:
    """The alignments of all hypotheses to the same reference, joined: a column for each token of the reference, and
    between two of them as many as the hypothesis with the most insertions there needs.
    """
    inserted: list[list[list[str | None]]] = []  # by hypothesis, before each token of the reference and at its end
    facing: list[list[str | None]] = []
    for hypothesis in hypotheses:
        inserted.append([[] for _ in range(len(reference) + 1)])
        facing.append([])
        for wanted, found in align_tokens(reference, hypothesis):
            if wanted is None:
                inserted[-1][len(facing[-1])].append(found)
            else:
                facing[-1].append(found)
    columns: list[_Column] = []
    for place in range(len(reference) + 1):
        between = zip_longest(*(gaps[place] for gaps in inserted))
        columns += [_Column((None, *cells)) for cells in between]
        if place < len(reference):
            columns.append(_Column((reference[place], *(cells[place] for cells in facing))))
    return columns


def _folded(columns: Sequence[_Column]) -> list[_Column]:
    """The columns, with one in place of the middle of each long stretch that is alike: right, left out or inserted."""
    kept: list[_Column] = []
    place = 0
    for marks, stretch in groupby(columns, key=_marks):
        found = list(stretch)
        ends = _WRONG_ENDS if marks.strip() else _RIGHT_ENDS
        first = ends if place or marks.strip() else 0  # no context is needed before the beginning or after the end
        place += len(found)
        last = len(found) - (ends if place < len(columns) or marks.strip() else 0)
        if "S" in marks or last - first < _MIN_FOLDED:
            kept += found
            continue
        cells = (None if cell is None else f"[{last - first}]" for cell in found[0].cells)
        kept += [*found[:first], _Column(tuple(cells), num_tokens=last - first), *found[last:]]
    return kept


def _lines(columns: Iterable[_Column], *, width: int, gap: str) -> list[list[_Column]]:
    """The first columns, in at most :data:`MOST_LINES` lines of at most this width."""
    lines: list[list[_Column]] = []
    free = 0
    for column in columns:
        needed = _column_width(column) + len(gap)
        if needed > free or not lines:
            if len(lines) == MOST_LINES:
                break
            lines.append([])
            free = width + len(gap)  # the last column has no gap behind it
        lines[-1].append(column)
        free -= needed
    return lines


def _rows(line: Sequence[_Column], labels: Sequence[str], *, start: int, gap: str) -> str:
    """One line of the alignment: a row for the reference, and one or two for each system, the second with marks."""
    widths = [_column_width(column) for column in line]
    rows = []
    for row, label in enumerate(labels):
        cells = [_cell(column.cells[row], width) for column, width in zip(line, widths, strict=True)]
        rows.append(_padded(label, start) + gap.join(cells))
        marks = [_padded(_mark(column, row), width) for column, width in zip(line, widths, strict=True)]
        rows += [" " * start + gap.join(marks)] if any(map(str.strip, marks)) else []
    return "\n".join(text.rstrip() for text in rows)


def _mark(column: _Column, row: int) -> str:
    """S, D or I for an error in this row, a space for none."""
    wanted, found = column.cells[0], column.cells[row]
    if wanted == found:
        return " "
    return "I" if wanted is None else "D" if found is None else "S"


def _marks(column: _Column) -> str:
    """Of all systems."""
    return "".join(_mark(column, row) for row in range(1, len(column.cells)))


def _column_width(column: _Column) -> int:
    return max(_width(_token_text(cell)) for cell in column.cells if cell is not None)


def _cell(token: str | None, width: int) -> str:
    text = "*" * min(3, width) if token is None else _token_text(token)
    padding = " " * (width - _width(text))
    return text + (_LEFT_TO_RIGHT_MARK if _has_right_to_left(text) else "") + padding


def _token_text(token: str) -> str:
    """A token that fills a cell: cut where it is too long, and a mark has something to stand on."""
    text = visible(token, longest=_LONGEST_TOKEN)
    return _DOTTED_CIRCLE + text if text and unicodedata.category(text[0])[0] == "M" else text


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


def _width(text: str) -> int:
    """Columns that a text takes where all characters are equally wide, or twice as wide."""
    return sum(map(_character_width, text))


@cache
def _character_width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _has_right_to_left(text: str) -> bool:
    return any(unicodedata.bidirectional(character) in ("R", "AL", "AN") for character in text)
