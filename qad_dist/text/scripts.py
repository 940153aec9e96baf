"""Scripts: which one a letter belongs to, in which ones each language is written, how long letters take. Pure: no I/O.

Lengths of texts are compared over all languages in words' worth, because neither letters nor words would do: what is
one word of eight letters in English is two characters in Chinese, and Thai puts no space around it.
"""

import unicodedata
from dataclasses import dataclass
from functools import cache

LATIN, CYRILLIC, GREEK, ARABIC, DEVANAGARI = "Latin", "Cyrillic", "Greek", "Arabic", "Devanagari"
HAN, HIRAGANA, KATAKANA, BOPOMOFO, HANGUL, THAI = "Han", "Hiragana", "Katakana", "Bopomofo", "Hangul", "Thai"

LANGUAGE_SCRIPTS: dict[str, frozenset[str]] = {
    "Chinese": frozenset({HAN, BOPOMOFO}),
    "Cantonese": frozenset({HAN, BOPOMOFO}),
    "Japanese": frozenset({HAN, HIRAGANA, KATAKANA}),
    "Korean": frozenset({HANGUL}),
    "Thai": frozenset({THAI}),
    "Hindi": frozenset({DEVANAGARI}),
    "Arabic": frozenset({ARABIC}),
    "Persian": frozenset({ARABIC}),
    "Greek": frozenset({GREEK}),
    "Russian": frozenset({CYRILLIC}),
    "Macedonian": frozenset({CYRILLIC}),
    **dict.fromkeys(
        (
            *("English", "German", "French", "Spanish", "Portuguese", "Indonesian", "Italian", "Vietnamese", "Turkish"),
            *("Malay", "Dutch", "Swedish", "Danish", "Finnish", "Polish", "Czech", "Filipino", "Romanian", "Hungarian"),
        ),
        frozenset({LATIN}),
    ),
}
"""Of the model's 30 languages: the scripts of their own words. Names and foreign words may be in others."""

# Words' worth of one character of the scripts that put no spaces between words.
_UNSPACED = {
    **{HAN: 0.6, BOPOMOFO: 0.4, HIRAGANA: 0.4, KATAKANA: 0.4},
    **dict.fromkeys((THAI, "Lao", "Khmer", "Myanmar", "Tibetan", "Javanese", "Balinese"), 0.25),
}
_SPACED_LETTER, _HANGUL_LETTER = 0.2, 0.4

# Characters per second of usual speech, about: 5 to 8 syllables, of so many letters as the script needs for one.
_CHARACTERS_PER_SECOND = {
    **{LATIN: 14.0, CYRILLIC: 13.0, GREEK: 14.0, ARABIC: 11.0, DEVANAGARI: 12.0, THAI: 13.0},
    **{HAN: 5.0, HIRAGANA: 7.5, KATAKANA: 7.5, BOPOMOFO: 12.0, HANGUL: 6.0},
}
_OTHER_PER_SECOND = 12.0
_DIGITS_PER_SECOND = 10.0

# First words of Unicode's names of letters and marks, where they are not the script's own name.
_NAMED_OTHERWISE = {"CJK": HAN, "IDEOGRAPHIC": HAN, "KATAKANA-HIRAGANA": KATAKANA}
_COMMON = ("MODIFIER", "COMBINING", "VARIATION")


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignLetters:
    """How much of a text is written in scripts that are not its language's, in words' worth."""

    latin: float
    other: float
    """In scripts that are neither the language's nor Latin."""
    all_letters: float
    """The language's own ones too."""


@cache
def script_of(character: str) -> str | None:
    """Script of a letter or of a mark on letters, by its Unicode name after NFKC; None for what is of no one script."""
    if unicodedata.category(character)[0] not in "LM":
        return None
    first = unicodedata.name(character, "UNNAMED").partition(" ")[0]
    return None if first in _COMMON else _NAMED_OTHERWISE.get(first, first.capitalize())


def is_unspaced(character: str) -> bool:
    """Whether the script of a letter or mark is written without spaces between words."""
    return script_of(character) in _UNSPACED


@cache
def words_worth(character: str) -> float:
    """Length of one letter or digit, where a usual word of its script has length 1."""
    script = script_of(character)
    return _UNSPACED.get(script or "", _HANGUL_LETTER if script == HANGUL else _SPACED_LETTER)


@cache
def _usual_seconds_of(character: str) -> float:
    if character.isspace():
        return 0.0
    if character.isnumeric() and not character.isalpha():
        return 1 / _DIGITS_PER_SECOND
    return 1 / _CHARACTERS_PER_SECOND.get(script_of(character) or "", _OTHER_PER_SECOND)


def usual_seconds(normalized: str) -> float:
    """How long somebody would usually speak who reads this aloud, without pauses; half or twice that is also usual.

    Args:
        normalized: From :func:`qad_dist.text.normalize.normalize`.
    """
    return sum(map(_usual_seconds_of, normalized))


def foreign_letters(normalized: str, language: str) -> ForeignLetters | None:
    """Measure the letters that are not of the language's own scripts; None for a language that is not the model's.

    Args:
        normalized: From :func:`qad_dist.text.normalize.normalize`.
        language: One of the model's language names.
    """
    if (own := LANGUAGE_SCRIPTS.get(language)) is None:
        return None
    latin = other = all_letters = 0.0
    for character in normalized:
        if not character.isalpha() or (script := script_of(character)) is None:
            continue
        length = words_worth(character)
        all_letters += length
        if script not in own:
            latin += length if script == LATIN else 0.0
            other += length if script != LATIN else 0.0
    return ForeignLetters(latin=latin, other=other, all_letters=all_letters)
