"""The normaliser against sentences whose words a speaker has written down, in each of the model's languages.

``tests/unit/text/normalized/<language>.jsonl`` holds a sentence a line: its ``language`` and ``text``; its ``words`` in
NFC, or for languages that are scored by characters the ``characters`` one behind another; and ``why``, what it shows.
"""

import json
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from qad_dist.text.normalize import normalize, tokens
from shards.languages import LANGUAGES

FOLDER = Path(__file__).parent / "normalized"
BY_CHARACTERS = ("Chinese", "Cantonese", "Japanese", "Thai")


@dataclass(frozen=True)
class Sentence:
    name: str
    language: str
    text: str
    tokens: tuple[str, ...]


def _read(path: Path) -> list[Sentence]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        unit = "characters" if row["language"] in BY_CHARACTERS else "words"
        assert row.keys() == {"language", "text", unit, "why"}, f"{path.name}:{number}"
        assert row["language"].lower() == path.stem, f"{path.name}:{number}"
        found.append(Sentence(f"{path.stem}-{number}", row["language"], row["text"], tuple(row[unit])))
    return found


SENTENCES = [sentence for path in sorted(FOLDER.glob("*.jsonl")) for sentence in _read(path)]

every_sentence = pytest.mark.parametrize("sentence", SENTENCES, ids=lambda sentence: sentence.name)

# What the rules of a language take away or exchange on purpose, after composition.
_CHANGED_LETTERS = {
    "Russian": str.maketrans("ёЁ", "еЕ"),
    "Romanian": str.maketrans("şŞţŢ", "șȘțȚ"),
    "Turkish": str.maketrans("İ", "i"),
}


def _marks(text: str) -> Counter[str]:
    """How often each combining mark comes, in letters taken apart; the selectors of emoji are no part of a word."""
    # NFKD would make a mark above a space of the acute that some keyboards offer as an apostrophe.
    apart = unicodedata.normalize("NFKD", text.replace("\u00b4", "'"))
    return Counter(
        character
        for character in apart
        if unicodedata.category(character).startswith("M") and not "\ufe00" <= character <= "\ufe0f"
    )


@every_sentence
def test_a_sentence_becomes_the_words_or_characters_that_a_speaker_writes(sentence: Sentence) -> None:
    assert tokens(sentence.text, sentence.language) == list(sentence.tokens)


@every_sentence
def test_the_normalised_sentence_is_its_words_with_one_space_between(sentence: Sentence) -> None:
    normalised = normalize(sentence.text, sentence.language)

    words = normalised.split(" ")
    assert "" not in words
    if sentence.language in BY_CHARACTERS:
        assert "".join(words) == "".join(sentence.tokens)
    else:
        assert words == list(sentence.tokens)


@every_sentence
def test_a_normalised_sentence_stays_as_it_is(sentence: Sentence) -> None:
    once = normalize(sentence.text, sentence.language)

    assert normalize(once, sentence.language) == once


@every_sentence
def test_no_combining_mark_of_a_sentence_is_lost(sentence: Sentence) -> None:
    """Reckoned from the text alone, so a mark that the table forgot is missed too."""
    composed = unicodedata.normalize("NFC", sentence.text)
    kept = composed.translate(_CHANGED_LETTERS.get(sentence.language, {}))

    assert _marks(normalize(sentence.text, sentence.language)) == _marks(kept)


@every_sentence
def test_the_expected_tokens_are_composed_and_of_letters_marks_and_numbers(sentence: Sentence) -> None:
    """Of the table, not of the normaliser: what a slip of the pen would break."""
    assert sentence.tokens
    for token in sentence.tokens:
        assert unicodedata.is_normalized("NFC", token)
        assert token
        assert {unicodedata.category(character)[0] for character in token} <= {"L", "M", "N"}
        assert token == token.lower()


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_table_shows_each_language_from_every_side(language: str) -> None:
    texts = [sentence.text for sentence in SENTENCES if sentence.language == language]
    characters = "".join(texts)
    categories = {unicodedata.category(character) for character in characters}

    assert len(set(texts)) >= 6
    assert any(not unicodedata.is_normalized("NFC", text) for text in texts)
    assert {"Lu", "Nd", "Po"} <= categories  # capitals at least in a foreign word, digits, punctuation
    assert categories & {"Pi", "Pf", "Ps"}  # quotes or brackets
    assert categories & {"Pd", "Lm"}  # dashes, or letters that repeat and lengthen
    assert any("a" <= character <= "z" for character in characters.lower())


def test_every_file_of_the_table_is_of_a_language_of_the_model() -> None:
    assert {sentence.language for sentence in SENTENCES} == set(LANGUAGES)
