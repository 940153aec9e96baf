"""English in Whisper's form and in the Open ASR Leaderboard's, and the errors that are counted in each. Pure: no I/O.

These two stand beside the project's own form (:mod:`qad_dist.text.normalize`) for numbers that are compared with what
others publish. Both write numbers in digits, contractions in full and British spellings as American ones, and drop
fillers, accents and what stands in brackets. The leaderboard's goes further: it knows more fillers, one spelling of
each of 152 names, letters that are spelled out (``b b c`` is ``bbc``), and some words that are written as two.

The rules are whisper-normalizer's, read from its classes, and the leaderboard's differences from them
(:mod:`qad_dist.text.open_asr_words`). What costs time there is done otherwise here, with the same result: a pattern is
tried only where a part of it that no match can do without is in the text, each character is looked up once, and a
sentence without numbers is not searched for them.

Source:
    Radford et al. 2022, arXiv:2212.04356, appendix C; whisper-normalizer 0.1.15; huggingface/open_asr_leaderboard,
    commit d1e99b25 (2026-08-21): ``EnglishTextNormalizer`` of ``normalizer/normalizer.py``, ``is_target_text_in_range``
    of ``data_utils.py``, and ``score_results`` of ``eval_utils.py``.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import kaldialign
from whisper_normalizer.basic import remove_symbols_and_diacritics
from whisper_normalizer.english import EnglishTextNormalizer

from qad_dist.text.open_asr_words import (
    COMPOUNDS,
    FILLERS,
    KEPT_SPELLINGS,
    KEPT_WORDS,
    NAMES,
    POSSESSIVE,
    SPELLINGS,
    WORDS_WITH_IS,
)
from qad_dist.text.wer import ErrorCounts, count_token_errors

WHISPER = "whisper_english_0.1.15"
"""Name of :func:`whisper_english`, with whisper-normalizer's version; written beside every number under it."""

OPEN_ASR = "open_asr_english_2026-08"
"""Name of :func:`open_asr_english`, with the month of the leaderboard's rules; they change a few times a year."""

# What the leaderboard's transcripts hold in place of words where nothing is to be scored (TED-LIUM's).
_NOT_SCORED = "ignore time segment in scoring"

_IN_BRACKETS = re.compile(r"[<\[][^>\]]*[>\]]")
_IN_PARENTHESES = re.compile(r"\(([^)]+?)\)")
_SPACE_BEFORE_APOSTROPHE = re.compile(r"\s+'")
_COMMA_IN_NUMBER = re.compile(r"(\d),(\d)")
_PERIOD_OUTSIDE_NUMBER = re.compile(r"\.([^0-9]|$)")
_SIGN_BEFORE_NO_NUMBER = re.compile(r"[.$¢€£]([^0-9])")
_PERCENT_AFTER_NO_NUMBER = re.compile(r"([^0-9])%")
_SPACES = re.compile(r" {2,}")
_DIGIT = re.compile(r"\d")
_COMPOUND = re.compile(rf"\b(?:{'|'.join(words.replace(' ', chr(92) + 's+') for words in COMPOUNDS)})\b")

# What numbers may hold: these stay until the numbers are read.
_NUMBER_SIGNS = ".%$¢€£"


def whisper_english(text: str) -> str:
    """``text`` as ``whisper_normalizer.english.EnglishTextNormalizer`` writes it.

    That may begin or end with a space. A number of more than 4,300 digits, over which the library fails, stays as it
    is written.
    """
    rules = _whisper_rules()
    words = rules.numbered(rules.plain(text))
    return _without_stray_signs(rules.spellings.get(word, word) for word in words)


def open_asr_english(text: str) -> str:
    """``text`` as the leaderboard's ``EnglishTextNormalizer`` writes it; otherwise as :func:`whisper_english`."""
    rules = _open_asr_rules()
    plain = _COMPOUND.sub(lambda match: COMPOUNDS[" ".join(match[0].split())], rules.plain(text))
    words = [rules.spellings.get(word, word) for word in rules.numbered(plain)]
    return _without_stray_signs(_with_joined_letters(words))


def count_whisper_errors(reference: str, hypothesis: str) -> ErrorCounts | None:
    """Errors of one English hypothesis in words of Whisper's form.

    Args:
        reference: Human transcript, as delivered.
        hypothesis: What a model wrote, as written; may be empty.

    Returns:
        None where the reference has no words in this form: it is left out, as :func:`count_open_asr_errors` does.
    """
    wanted = whisper_english(reference)
    return count_token_errors(wanted.split(), whisper_english(hypothesis).split()) if _is_scored(wanted) else None


def count_open_asr_errors(reference: str, hypothesis: str) -> ErrorCounts | None:
    """Errors of one English hypothesis as the leaderboard counts them.

    Words that one side writes as one and the other as several are no errors (``white paper``, ``whitepaper``). They
    count in the denominator as the reference writes them: a hit here is a word of the reference that is neither
    substituted nor deleted.

    Args:
        reference: Human transcript, as delivered: the leaderboard normalises once, from the text of the data set.
        hypothesis: What a model wrote, as written; may be empty. Both are valid Unicode.

    Returns:
        None where the leaderboard leaves the utterance out: its reference has no words in this form, or says
        ``ignore time segment in scoring``.
    """
    wanted = open_asr_english(reference)
    if not _is_scored(wanted):
        return None
    reference_words, hypothesis_words = wanted.split(), open_asr_english(hypothesis).split()
    if reference_words == hypothesis_words:
        return ErrorCounts(hits=len(reference_words))
    counts = kaldialign.edit_distance(reference_words, hypothesis_words, merge_compounds=True)
    substitutions, deletions = int(counts["sub"]), int(counts["del"])
    return ErrorCounts(
        substitutions=substitutions,
        deletions=deletions,
        insertions=int(counts["ins"]),
        hits=len(reference_words) - substitutions - deletions,
    )


class _Characters(dict[int, str]):
    """What becomes of each character, asked of the library once: for :meth:`str.translate`.

    The library decomposes the whole text first (NFKD). That differs from one character at a time only in the order of
    combining marks, of which none stays.
    """

    def __missing__(self, code: int) -> str:
        self[code] = kept = remove_symbols_and_diacritics(chr(code), keep=_NUMBER_SIGNS)
        return kept


_CHARACTERS = _Characters()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rules:
    """One form's words and patterns, ready to be applied."""

    fillers: re.Pattern[str]
    replacements: tuple[tuple[str, re.Pattern[str], str], ...]
    """In their order: a text that every match holds, the pattern, and what it becomes."""
    spellings: dict[str, str]
    """Of whole words."""
    standardize_numbers: Callable[[str], str]
    number_words: frozenset[str]
    """All that the library reads as part of a number, but ``and``: alone, that stays as it is."""

    def plain(self, text: str) -> str:
        """``text`` in lower case, with contractions in full, and without brackets, fillers, accents and most signs."""
        text = text.lower()
        if "<" in text or "[" in text:
            text = _IN_BRACKETS.sub("", text)
        if "(" in text:
            text = _IN_PARENTHESES.sub("", text)
        text = self.fillers.sub("", text)
        if "'" in text:
            text = _SPACE_BEFORE_APOSTROPHE.sub("'", text)
        for part, pattern, replacement in self.replacements:
            if part in text:
                text = pattern.sub(replacement, text)
        if "," in text:
            text = _COMMA_IN_NUMBER.sub(r"\1\2", text)
        if "." in text:
            text = _PERIOD_OUTSIDE_NUMBER.sub(r" \1", text)
        return text.translate(_CHARACTERS)

    def numbered(self, text: str) -> list[str]:
        """The words of ``text``, with its numbers in digits."""
        words = text.split()
        # "half", because the library also drops "and a half" where nothing stands before it.
        if self.number_words.isdisjoint(words) and "half" not in text and not _DIGIT.search(text):
            return words
        try:
            return self.standardize_numbers(text).split()
        except (AssertionError, ValueError):  # Python reads and writes no int of more than 4,300 digits
            return words


@cache
def _whisper_rules() -> _Rules:
    whisper = EnglishTextNormalizer()
    return _rules_of(whisper, whisper.ignore_patterns, whisper.replacers, whisper.standardize_spellings.mapping)


@cache
def _open_asr_rules() -> _Rules:
    whisper = EnglishTextNormalizer()
    replacers = dict(
        WORDS_WITH_IS if pattern == POSSESSIVE else (pattern, replacement)
        for pattern, replacement in whisper.replacers.items()
        if pattern not in KEPT_WORDS
    )
    spellings = {
        word: spelled
        for word, spelled in (whisper.standardize_spellings.mapping | SPELLINGS).items()
        if word not in KEPT_SPELLINGS
    }
    # One map for both: no word is in the two, and none becomes a word that the other changes.
    spellings |= {written: name for name, spelled in NAMES.items() for written in spelled.split()}
    return _rules_of(whisper, rf"\b({FILLERS.replace(' ', '|')})\b", replacers, spellings)


def _rules_of(
    whisper: EnglishTextNormalizer, fillers: str, replacers: dict[str, str], spellings: dict[str, str]
) -> _Rules:
    numbers = whisper.standardize_numbers
    return _Rules(
        fillers=re.compile(fillers),
        # What is behind a pattern's last group, or all of it, is plain text between borders of words.
        replacements=tuple(
            (pattern.replace(r"\b", "").rpartition(")")[2], re.compile(pattern), replacement)
            for pattern, replacement in replacers.items()
        ),
        spellings=spellings,
        standardize_numbers=numbers,
        number_words=frozenset(numbers.words - {"and"}),
    )


def _with_joined_letters(words: list[str]) -> list[str]:
    """With neighbouring words of one letter or digit joined: two or more, or three if ``a`` or ``i`` is among them."""
    joined: list[str] = []
    for is_letter, some in groupby(words, key=lambda word: len(word) == 1 and word.isalnum()):
        run = list(some)
        is_acronym = is_letter and len(run) >= (3 if "a" in run or "i" in run else 2)
        joined += ["".join(run)] if is_acronym else run
    return joined


def _without_stray_signs(words: Iterable[str]) -> str:
    """The words as one text, without the signs of :data:`_NUMBER_SIGNS` that belong to no number."""
    text = _SIGN_BEFORE_NO_NUMBER.sub(r" \1", " ".join(words))
    if "%" in text:
        text = _PERCENT_AFTER_NO_NUMBER.sub(r"\1 ", text)
    return _SPACES.sub(" ", text)


def _is_scored(reference: str) -> bool:
    """Whether a normalised reference has words, and not the mark of a stretch that is left out."""
    return reference.strip() not in ("", _NOT_SCORED)
