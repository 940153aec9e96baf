"""What one language or one script spells in several ways, made one spelling: each rule with its source. Pure: no I/O.

A rule stands here if the spellings are the same word to those who read the language, and somebody with authority says
so: a standard, a ministry, an academy, a library that the language's own people normalise with. No rule merges words
that the language tells apart. The one exception is Russian ``ё``, and Russian spelling itself makes it: it allows ``е``
in its place in almost any text.

Rules of a script hold in texts of any language, and when the language is not known. Rules of a language hold in it
alone, since the next one tells the same letters apart: ``ş`` is no ``ș`` in Turkish, ``œ`` is no ``oe`` in Danish.

Not here, because the spellings are different words or the choice is the writer's own: forms of alef and hamza, final
``ي`` and ``ى`` in Arabic; chandrabindu and anusvara in Hindi; ``i`` and ``y`` in Vietnamese (``mĩ``, ``mỹ``); ``â`` and
``î`` in Romanian before and after 1993; accents in Greek, Macedonian, Italian and Turkish; simplified and traditional
Chinese.
"""

import re
import unicodedata
from collections.abc import Callable

TURKISH, ROMANIAN, RUSSIAN, FRENCH = "Turkish", "Romanian", "Russian", "French"
PERSIAN, VIETNAMESE = "Persian", "Vietnamese"

# Sources, by language:
# Romanian: s and t have a comma below. U+015F and U+0163, with cedilla, stand for them where ISO 8859-2 is the
#   character set; ISO 8859-16 came with the right ones (the Unicode Standard, 7.1).
# Russian: "in usual printed texts the letter yo is used selectively" (Rules of Russian Orthography and Punctuation,
#   complete academic handbook, 2006, section 5; before it the rules of 1956, section 10). Short i is no such letter.
# French: the ligatures of oe and ae are ordered as their two letters (Unicode Collation Algorithm, DUCET), and written
#   so where ISO 8859-1 is the character set, which lacks the first; ISO 8859-15 came with it.
# Persian: yeh is U+06CC, kaf U+06A9, and heh with the small yeh of ezafe U+0647 U+0654, never U+06C0 (ISIRI
#   6219:2002, p. 19). The other forms of heh, of Urdu and Uighur keyboards, are none of Persian's letters (hazm's
#   Normalizer writes U+0647 for them too). U+06C0 and U+06C2 are U+06D5 and U+06C1 with a hamza above.
LETTERS: dict[str, tuple[tuple[str, str], ...]] = {
    ROMANIAN: (("\u015f", "\u0219"), ("\u0163", "\u021b")),
    RUSSIAN: (("ё", "е"),),
    FRENCH: (("œ", "oe"), ("æ", "ae")),
    PERSIAN: (
        *(("\u064a", "\u06cc"), ("\u0649", "\u06cc"), ("\u0643", "\u06a9")),
        *(("\u06c0", "\u0647\u0654"), ("\u06c2", "\u0647\u0654")),
        *(("\u06d5", "\u0647"), ("\u06c1", "\u0647"), ("\u06be", "\u0647")),
    ),
}
"""Letters that a language writes as others, by its name; small ones and composed (NFC)."""

# In a separated text, what is neither a letter, a digit nor a space is a combining mark.
_MARKS = r"[^\w ]"


def fold_case(text: str, language: str | None) -> str:
    """``text`` case-folded; in Turkish ``I`` is the capital of dotless ``ı``, and ``İ`` of ``i``.

    Args:
        text: In NFKC, so that a capital with a dot above is one character.
        language: One of the model's language names; None for unknown.

    Source:
        Unicode CaseFolding.txt, statuses C and F, and T for Turkish.
    """
    text = text.replace("İ", "i")  # elsewhere it stands in Turkish names; folding makes i with a second dot of it
    return (text.replace("I", "ı") if language == TURKISH else text).casefold()


def one_spelling(text: str, language: str | None) -> str:
    """``text`` under the rules of its scripts and of its language; not always in NFC, since a rule may free a mark.

    Args:
        text: Letters, marks, digits and single characters of space only, case-folded and in NFC.
        language: One of the model's language names; None for unknown, then only the rules of scripts hold.
    """
    if text.isascii():
        return text  # no rule replaces an ASCII letter
    if _THAI.search(text):
        text = _thai(text)
    text = _DEVANAGARI_VOWEL.sub(_composed_vowel, text)
    for letter, written in LETTERS.get(language or "", ()):
        text = text.replace(letter, written)
    if language in _RULES:
        text = _RULES[language](text)
    return text


# What the rules of Thai are about: sara aa, sara e, tone marks and the killer.
_THAI = re.compile("[\u0e32\u0e40\u0e48-\u0e4c]")
_THAI_SARA_AM = re.compile("\u0e4d([\u0e48-\u0e4b]*)\u0e32")
_THAI_TONE_EARLY = re.compile(f"[\u0e48-\u0e4c]{_MARKS}+")
_THAI_TONE_LATE = re.compile("[\u0e32\u0e33][\u0e32\u0e33\u0e48-\u0e4b]+")
_THAI_TONES = frozenset("\u0e48\u0e49\u0e4a\u0e4b\u0e4c")


def _thai(text: str) -> str:
    """Thai vowels as they are typed by the standard, in its order: sara am and sara ae are one letter each.

    NFKC makes two characters of sara am, and readers count one. Two sara e look like sara ae and stand for nothing
    else. A tone mark or the killer of a letter stands behind a vowel sign above or below, and a tone mark before sara
    aa and sara am; fonts draw the other orders much alike, and no word needs them.

    Source:
        PyThaiNLP, ``pythainlp.util.reorder_vowels``; the Unicode Standard, 16.1, "Vowel Sign Sara Am".
    """
    text = _THAI_SARA_AM.sub("\\1\u0e33", text).replace("\u0e40\u0e40", "\u0e41")
    text = _THAI_TONE_EARLY.sub(lambda run: _sorted_run(run[0], tones_first=False), text)
    return _THAI_TONE_LATE.sub(lambda run: _sorted_run(run[0], tones_first=True), text)


def _sorted_run(run: str, *, tones_first: bool) -> str:
    """A whole run at once: pairs that change places one after the other would go on the next time."""
    tones = "".join(sign for sign in run if sign in _THAI_TONES)
    others = "".join(sign for sign in run if sign not in _THAI_TONES)
    return tones + others if tones_first else others + tones


# The Unicode Standard, 12.1, Table 12-1, "Devanagari Vowel Letters", column "do not use", of the vowels that Hindi has.
_DEVANAGARI_VOWELS = {
    "\u0905\u093e": "\u0906",  # aa
    "\u0909\u0941": "\u090a",  # uu
    "\u090f\u0945": "\u090d",  # candra e
    "\u090f\u0947": "\u0910",  # ai
    **dict.fromkeys(("\u0905\u0949", "\u0906\u0945", "\u0905\u093e\u0945"), "\u0911"),  # candra o
    **dict.fromkeys(("\u0905\u094b", "\u0906\u0947", "\u0905\u093e\u0947"), "\u0913"),  # o
    **dict.fromkeys(("\u0905\u094c", "\u0906\u0948", "\u0905\u093e\u0948"), "\u0914"),  # au
    "\u0905\u0945": "\u0972",  # candra a
}
# The longest first: what is left by a shorter one would be taken the next time.
_DEVANAGARI_VOWEL = re.compile(
    "[\u0905\u0906\u0909\u090f](?:\u093e[\u0945\u0947\u0948]|[\u093e\u0941\u0945\u0947\u0948\u0949\u094b\u094c])"
)


def _composed_vowel(found: re.Match[str]) -> str:
    return _DEVANAGARI_VOWELS.get(found[0], found[0])


_DOTTED_I = re.compile("i\u0307+")


def _turkish(text: str) -> str:
    """Software that knows no Turkish makes ``i`` and a dot above of a capital dotted I (SpecialCasing.txt)."""
    return _DOTTED_I.sub("i", text) if "\u0307" in text else text


def _persian(text: str) -> str:
    """Yeh with a hamza is one letter, whichever yeh it was typed with: NFC knows only that of Arabic."""
    return text.replace("\u06cc\u0654", "\u0626")


_RUSSIAN_E = re.compile(f"е{_MARKS}+")


def _russian(text: str) -> str:
    """No diaeresis on ``е``, also behind other marks: otherwise NFC makes ``ё`` of them again."""
    return _RUSSIAN_E.sub(lambda found: found[0].replace("\u0308", ""), text) if "\u0308" in text else text


_ROMANIAN_S_T = re.compile(f"[sștț]{_MARKS}+")


def _romanian(text: str) -> str:
    """No cedilla on ``s`` and ``t``, also behind other marks: otherwise NFC makes the wrong letter of them again."""
    return _ROMANIAN_S_T.sub(lambda found: found[0].replace("\u0327", "\u0326"), text) if "\u0327" in text else text


_VIETNAMESE_TONES = "\u0300\u0301\u0303\u0309\u0323"
_VIETNAMESE_RHYMES = {
    unicodedata.normalize("NFC", first + tone) + second: first + unicodedata.normalize("NFC", second + tone)
    for first, second in ("oa", "oe", "uy")
    for tone in _VIETNAMESE_TONES
}
_VIETNAMESE_OLD_STYLE = re.compile("[òóỏõọùúủũụ][aey](?![^ ])")


def _vietnamese(text: str) -> str:
    """The tone mark of an open ``oa``, ``oe``, ``uy`` on its second letter, the main vowel.

    New style is ``hoà``, ``khoẻ``, ``thuý``; old style has the mark on the first: ``hòa``, ``khỏe``, ``thúy``. Both
    are read and printed today. Behind ``q`` the ``u`` is no vowel and never has the mark.

    Source:
        Ministry of Education and Training of Vietnam, Decision 1989/QĐ-BGDĐT of 25 May 2018, article 8. The package
        viet_text_tools, ``normalize_diacritics(new_style=True)``.
    """
    return _VIETNAMESE_OLD_STYLE.sub(_in_new_style, text)


def _in_new_style(found: re.Match[str]) -> str:
    start = found.start()
    is_behind_q = start > 0 and found.string[start - 1] == "q"
    return found[0] if is_behind_q else _VIETNAMESE_RHYMES.get(found[0], found[0])


_RULES: dict[str | None, Callable[[str], str]] = {
    TURKISH: _turkish,
    PERSIAN: _persian,
    ROMANIAN: _romanian,
    RUSSIAN: _russian,
    VIETNAMESE: _vietnamese,
}
