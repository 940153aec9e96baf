"""The one text normalisation behind every WER and CER of this project, and the tokens that are counted. Pure: no I/O.

The rules of :data:`NORMALIZER`, in this order:

1. NFKC: decomposed, full-width and ligature forms become one form (Vietnamese arrives in both).
2. Case folding; for Turkish ``I`` folds to dotless ``ı`` and ``İ`` to ``i``. NFKC again, because folding can undo it.
3. Categories P (punctuation) and S (symbols) separate words: ``well-known`` is two words. An apostrophe
   inside a word and before a letter is the exception, it joins: ``don't``, ``don’t`` and ``dont`` are one and the same
   word, and so are ``90's`` and ``90s``, ``l'an`` and ``lan``; in ``5'11`` it separates.
4. Combining marks (category M) stay: they spell the vowels of Hindi, Thai and Arabic. A mark with no letter before it
   (left behind by a dropped symbol) and variation selectors go.
5. Invisible characters (category C, such as the zero-width non-joiner of Persian and bidirectional marks) go.
6. White space of any kind becomes one space.
"""

import unicodedata

NORMALIZER = "norm_v0"
"""Name of the rules above; written beside every score, since rates under different rules cannot be compared."""

CER_LANGUAGES = frozenset({"Chinese", "Cantonese", "Japanese", "Thai"})
"""Languages written without spaces between words: scored by characters (Unicode code points)."""

_APOSTROPHES = dict.fromkeys(map(ord, "‘’ʼ´`"), "'")
_TURKISH_LOWER = {"İ": "i", "I": "ı"}


def normalize(text: str, language: str | None) -> str:
    """``text`` under the rules of :data:`NORMALIZER`: words of letters, marks and digits, one space between them.

    Args:
        text: Any Unicode text.
        language: One of the model's language names; only ``Turkish`` changes the result. None for unknown.
    """
    # The spacing accents go first: NFKC would turn one into a space and a combining mark.
    folded = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES))
    if language == "Turkish":
        for upper, lower in _TURKISH_LOWER.items():
            folded = folded.replace(upper, lower)
    folded = unicodedata.normalize("NFKC", folded.casefold()).translate(_APOSTROPHES)
    if language == "Turkish":
        folded = folded.replace("i\u0307", "i")  # what software that knows no Turkish makes of a capital dotted I
    kept = [" "]
    for position, character in enumerate(folded):
        if left := _normalized_character(character, before=kept[-1], after=folded[position + 1 : position + 2]):
            kept.append(left)
    return " ".join("".join(kept).split())


def tokens(text: str, language: str | None) -> list[str]:
    """What is counted: the words of the normalised text, or its characters without spaces for :data:`CER_LANGUAGES`."""
    words = normalize(text, language).split()
    return list("".join(words)) if language in CER_LANGUAGES else words


def unit(language: str | None) -> str:
    """``CER`` for :data:`CER_LANGUAGES`, else ``WER``: the name of the rate over :func:`tokens`."""
    return "CER" if language in CER_LANGUAGES else "WER"


def _normalized_character(character: str, *, before: str, after: str) -> str:
    """What stays of one character: itself, a space, or nothing. ``before`` is the last that stayed."""
    category = unicodedata.category(character)
    if character.isspace() or category[0] == "Z":
        return " "
    if character == "'" and before != " " and after.isalpha():
        return ""
    if category[0] in "PS":
        return " "
    if category[0] == "C" or _is_variation_selector(character):
        return ""
    if category[0] == "M" and before == " ":
        return ""
    return character


def _is_variation_selector(character: str) -> bool:
    return "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"
