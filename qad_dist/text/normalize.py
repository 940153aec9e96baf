"""The one text normalisation behind every WER and CER of this project, and the tokens that are counted. Pure: no I/O.

The rules of :data:`NORMALIZER`, in this order:

1. NFKC: decomposed, full-width, ligature and presentation forms become one form (Vietnamese arrives in both, and Dutch
   ``ĳ`` is two letters). The nukta letters of Hindi get one form too, the one with a mark.
2. Case folding; ``ß`` becomes ``ss``, final sigma the other one, and for Turkish ``I`` folds to dotless ``ı`` and ``İ``
   to ``i``.
3. Categories P (punctuation, so the danda too) and S (symbols) separate words: ``well-known`` is two words. An
   apostrophe inside a word and before a letter is the exception, it joins: ``don't``, ``don’t`` and ``dont`` are one
   and the same word, and so are ``90's`` and ``90s``, ``l'an`` and ``lan``; in ``5'11`` it separates.
4. Combining marks (category M) stay: they spell the vowels of Hindi, Thai and Arabic, where harakat that somebody wrote
   are part of the word. A mark with no letter before it (left behind by a dropped symbol) goes, and so do marks that
   nobody sees, variation selectors and the rest of Unicode's default ignorable ones, and those that enclose (keycaps).
5. Invisible characters (category C, such as the zero-width non-joiner of Persian and bidirectional marks) and tatweel,
   which only stretches the letter before it (the Unicode Standard, 9.2), go.
6. Decimal digits of any script (category Nd) become 0 to 9.
7. Where a script or a language has several spellings of a word, they become one: :mod:`qad_dist.text.script_rules`.
8. White space of any kind becomes one space.

A text with a letter never becomes empty. Tatweel and the apostrophe that Unicode calls a letter (U+02BC) are none here,
and neither are the marks standing alone to which it gives letters (U+FF9E, U+FE70): NFKC makes marks of them.

The cost is linear in the length of the text. What becomes of a character is worked out when it is first seen.
"""

import re
import unicodedata
from itertools import groupby
from typing import Literal

from qad_dist.text.script_rules import fold_case, one_spelling

NORMALIZER = "norm_v1"
"""Name of the rules above; written beside every score, since rates under different rules cannot be compared."""

CER_LANGUAGES = frozenset({"Chinese", "Cantonese", "Japanese", "Thai"})
"""Languages written without spaces between words: scored by characters (Unicode code points)."""

_APOSTROPHES = "'‘’ʼ´`"
_TATWEEL = "\u0640"
# Marks with the property Default_Ignorable_Code_Point (DerivedCoreProperties.txt): NFKC_Casefold drops them as well.
_UNSEEN_MARKS = frozenset(
    chr(code)
    for first, last in ((0x34F, 0x34F), (0x17B4, 0x17B5), (0x180B, 0x180D), (0x180F, 0x180F), (0xFE00, 0xFE0F))
    for code in range(first, last + 1)
) | frozenset(map(chr, range(0xE0100, 0xE01F0)))
# Python puts the marks of one letter into their order by moving each past the ones before it: a second for ten thousand
# marks on a letter, and nothing at all for as many as a text that is shorter than this can have.
_LONG_TEXT = 1000
_MANY_MARKS = re.compile(r"[^\w\s]{32,}")


class _Separated(dict[int, str | None]):
    """What stays of a character without its neighbours: itself, a digit, an apostrophe, a space, or nothing (None)."""

    def __missing__(self, code: int) -> str | None:
        self[code] = left = _left_of(chr(code))
        return left


def normalize(text: str, language: str | None) -> str:
    """``text`` under the rules of :data:`NORMALIZER`: words of letters, marks and digits, one space between them.

    Twice gives the same as once, in any language.

    Args:
        text: Any Unicode text.
        language: One of the model's language names; decides which rules of spelling hold. None for unknown.
    """
    # The spacing accent goes first: NFKC would turn it into a space and a combining mark.
    folded = fold_case(_composed(text.replace("´", "'"), "NFKC"), language)
    separated = folded.translate(_SEPARATED)
    if "'" in separated:
        separated = _without_apostrophes(separated)
    # What went may have stood between a letter and its mark, and folding takes some apart: they compose only now.
    spelt = one_spelling(_composed(separated, "NFC"), language)
    words = _composed(spelt, "NFC").split()
    return " ".join(words if spelt.isascii() else filter(None, map(_without_leading_marks, words)))


def tokens(text: str, language: str | None) -> list[str]:
    """What is counted: the words of the normalised text, or its characters without spaces for :data:`CER_LANGUAGES`."""
    return characters(text, language) if language in CER_LANGUAGES else normalize(text, language).split()


def characters(text: str, language: str | None) -> list[str]:
    """Characters (Unicode code points) of the normalised text without spaces, for a CER in any language."""
    return list(normalize(text, language).replace(" ", ""))


def unit(language: str | None) -> str:
    """``CER`` for :data:`CER_LANGUAGES`, else ``WER``: the name of the rate over :func:`tokens`."""
    return "CER" if language in CER_LANGUAGES else "WER"


def _composed(text: str, form: Literal["NFC", "NFKC"]) -> str:
    """``unicodedata.normalize``, linear also for many marks on one letter."""
    return unicodedata.normalize(form, _MANY_MARKS.sub(_in_order, text) if len(text) > _LONG_TEXT else text)


def _in_order(run: re.Match[str]) -> str:
    """Canonical order (the Unicode Standard, D109): marks of class 0 stay in place, the others between them sort."""
    parts = groupby(run[0], key=lambda mark: unicodedata.combining(mark) == 0)
    return "".join("".join(part if stay else sorted(part, key=unicodedata.combining)) for stay, part in parts)


def _left_of(character: str) -> str | None:
    category = unicodedata.category(character)
    if character.isspace() or category[0] == "Z":
        return " "
    if character in _APOSTROPHES:
        return "'"
    if category[0] in "PS":
        return " "
    if category[0] == "C" or category == "Me" or character == _TATWEEL or character in _UNSEEN_MARKS:
        return None
    return str(unicodedata.decimal(character)) if category == "Nd" else character


def _without_apostrophes(separated: str) -> str:
    """An apostrophe inside a word and before a letter joins its two parts, any other separates them."""
    first, *others = separated.split("'")
    return first + "".join(part if part[:1].isalpha() else " " + part for part in others)


def _without_leading_marks(word: str) -> str:
    if word[0].isalnum():
        return word
    start = next((place for place, character in enumerate(word) if character.isalnum()), len(word))
    return word[start:]


_SEPARATED = _Separated()
