import unicodedata

import pytest

from qad_dist.text.normalize import CER_LANGUAGES, normalize, tokens, unit


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        # Vowel signs, virama and nukta are marks: the Whisper normaliser would tear these words apart.
        ("Hindi", "नमस्ते, दुनिया।", "नमस्ते दुनिया"),
        # A precomposed nukta letter (U+095E) and its two-character spelling are the same word.
        ("Hindi", "\u095eोन", "\u092b\u093cोन"),
        ("Arabic", "السَّلامُ عَلَيْكُمْ؟", "السَّلامُ عَلَيْكُمْ"),
        ("Thai", "สวัสดี ครับ!", "สวัสดี ครับ"),
        ("Persian", "می\u200cخواهم", "میخواهم"),
        ("Turkish", "IŞIK İSTANBUL", "ışık istanbul"),
        ("Turkish", "I\u0307zmir i\u0307yi", "izmir iyi"),
        ("English", "IS IT", "is it"),
        ("German", "Straße", "strasse"),
        ("Greek", "Οδυσσεύς", "οδυσσεύσ"),
        ("English", "Ｈｅｌｌｏ　ﬁne", "hello fine"),
        ("English", "Well-known, 3.5 % — ok…", "well known 3 5 ok"),
        ("English", "a\u00a0b\tc\n d", "a b c d"),
        ("English", "I ❤\ufe0f it", "i it"),
        ("English", "\ufeffone\u00adtwo", "onetwo"),
        (None, "¡Qué!", "qué"),
        (None, " .,!? ", ""),
    ],
)
def test_normalize_gives_the_words_that_a_reader_would_count(language: str | None, text: str, expected: str) -> None:
    assert normalize(text, language) == unicodedata.normalize("NFC", expected)


def test_normalize_makes_decomposed_vietnamese_equal_to_composed() -> None:
    composed = "Ti\u1ebfng Vi\u1ec7t"
    decomposed = "Tie\u0302\u0301ng Vie\u0323\u0302t"
    assert composed != decomposed

    assert normalize(decomposed, "Vietnamese") == normalize(composed, "Vietnamese") == "ti\u1ebfng vi\u1ec7t"


@pytest.mark.parametrize("spelling", ["don't", "don\u2019t", "don\u2018t", "don\u02bct", "don\u00b4t", "DON`T", "dont"])
def test_an_apostrophe_inside_a_word_joins_it(spelling: str) -> None:
    assert tokens(spelling, "English") == ["dont"]


@pytest.mark.parametrize(
    ("language", "text", "words"),
    [
        ("English", "the 90's", ["the", "90s"]),
        ("French", "l'an", ["lan"]),
        ("Hindi", "कि'म", ["किम"]),  # behind a vowel sign
        ("English", "5'11", ["5", "11"]),
        ("English", "the '90s", ["the", "90s"]),
    ],
)
def test_an_apostrophe_joins_before_a_letter_only(language: str, text: str, words: list[str]) -> None:
    assert tokens(text, language) == words


@pytest.mark.parametrize(
    ("text", "words"), [("'tis the dogs' bone", ["tis", "the", "dogs", "bone"]), ("a ' b", ["a", "b"])]
)
def test_an_apostrophe_at_the_edge_of_a_word_is_punctuation(text: str, words: list[str]) -> None:
    assert tokens(text, "English") == words


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("Chinese", "你好，世界 3！", ["你", "好", "世", "界", "3"]),
        ("Cantonese", "我 係", ["我", "係"]),
        ("Japanese", "ｶﾞｷﾞ。", ["ガ", "ギ"]),
        # Each vowel sign and tone mark is a character of its own.
        ("Thai", "ดี ๆ", ["ด", "\u0e35", "ๆ"]),
        ("Korean", "안녕 하세요", ["안녕", "하세요"]),
    ],
)
def test_tokens_are_characters_without_spaces_only_where_words_have_none(
    language: str, text: str, expected: list[str]
) -> None:
    assert tokens(text, language) == expected


def test_unit_says_cer_for_the_four_languages_without_spaces() -> None:
    assert {"Chinese", "Cantonese", "Japanese", "Thai"} == CER_LANGUAGES
    assert [unit("Thai"), unit("Korean"), unit(None)] == ["CER", "WER", "WER"]


@pytest.mark.parametrize("language", ["Turkish", "English", "Thai", None])
def test_normalize_changes_nothing_the_second_time(language: str | None) -> None:
    text = "I\u0307stanbul’da ŞİŞLİ; ǰ ΐ ŉ é ½ ™ ① ดำ ﬃ \u0345 नमस्ते can't 'x'"

    once = normalize(text, language)

    assert normalize(once, language) == once
