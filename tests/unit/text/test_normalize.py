import time
import unicodedata
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qad_dist.text.normalize import CER_LANGUAGES, NORMALIZER, characters, normalize, tokens, unit
from shards.languages import LANGUAGES

ANY_LANGUAGE = st.sampled_from([*LANGUAGES, None])
TATWEEL, LETTER_APOSTROPHE = "\u0640", "\u02bc"


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
        ("English", "İzmir and I\u0307zmir", "izmir and izmir"),
        ("English", "take 5\ufe0f\u20e3 of them", "take 5 of them"),
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


def test_characters_are_those_of_the_normalised_text_without_spaces_in_any_language() -> None:
    assert characters("Wie geht's, Ørsted?", "German") == list("wiegehtsørsted")
    assert characters("नमस्ते, दो", "Hindi") == ["न", "म", "स", "\u094d", "त", "\u0947", "द", "\u094b"]
    assert characters(" .,! ", "English") == []


def test_the_rules_have_a_name_of_their_own() -> None:
    assert NORMALIZER == "norm_v1"


@pytest.mark.parametrize(
    ("language", "digits"),
    [
        ("Arabic", "٠١٢٣٤٥٦٧٨٩"),
        ("Persian", "۰۱۲۳۴۵۶۷۸۹"),
        ("Hindi", "०१२३४५६७८९"),
        ("Thai", "๐๑๒๓๔๕๖๗๘๙"),
        ("Japanese", "０１２３４５６７８９"),
        (None, "০১২৩৪৫৬৭৮৯"),
    ],
)
def test_digits_of_any_script_are_0_to_9(language: str | None, digits: str) -> None:
    assert normalize(digits, language) == "0123456789"


def test_numbers_that_are_no_decimal_digits_stay() -> None:
    assert normalize("三十 Ⅳ 〇", "Chinese") == "三十 iv 〇"


@pytest.mark.parametrize("language", ["Arabic", "Persian", None])
def test_tatweel_goes_and_the_harakat_on_it_stay(language: str | None) -> None:
    # "Mohammed", stretched; then with a fatha that stands on the stroke.
    assert normalize("محـمـــد", language) == "محمد"
    assert normalize("مح\u0640\u064eمد", language) == "مح\u064eمد"
    assert normalize("ـــ", language) == ""


def test_harakat_are_part_of_the_word() -> None:
    # In canonical order, in which shadda is behind the vowel; typed the other way round it is the same word.
    assert normalize("مُدَرِّسٌ", "Arabic") == normalize("م\u064fد\u064eر\u0651\u0650س\u064c", "Arabic") != "مدرس"
    assert len(characters("مُدَرِّسٌ", "Arabic")) == 4 + 5


@pytest.mark.parametrize("mark", ["\u034f", "\u180b", "\ufe0f", "\U000e0100"])
def test_marks_that_nobody_sees_go_and_what_they_parted_composes(mark: str) -> None:
    assert normalize(f"e{mark}\u0301t{mark}", None) == "ét"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a -\u0301 b", "a b"),
        ("+\u0308\u0301b", "b"),
        ("\u0301", ""),
        ("naive ¨ ˘x", "naive x"),
        ("\u0e31 ก\u0e31", "ก\u0e31"),
    ],
)
def test_a_mark_without_a_letter_goes(text: str, expected: str) -> None:
    assert normalize(text, None) == expected


@pytest.mark.parametrize("letter", ["\u01f0", "\u0390", "\u1e96", "\u1fb6"])
def test_a_letter_that_case_folding_takes_apart_is_whole_again(letter: str) -> None:
    assert len(letter.casefold()) > 1

    assert normalize(letter, None) == letter


def test_dutch_ij_is_two_letters() -> None:
    assert normalize("\u0132sland, \u0133s", "Dutch") == "ijsland ijs"


@pytest.mark.parametrize("language", ["Turkish", "English", "Thai", None])
def test_normalize_changes_nothing_the_second_time(language: str | None) -> None:
    text = "I\u0307stanbul’da ŞİŞLİ; ǰ ΐ ŉ é ½ ™ ① ดำ ﬃ \u0345 नमस्ते can't 'x' ᄀ'ᅡ e\u200d\u0301"

    once = normalize(text, language)

    assert normalize(once, language) == once


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=30), language=ANY_LANGUAGE)
@example(text="e\u200d\u0301", language=None)
@example(text="ᄀ'ᅡ", language="Korean")
def test_any_text_is_normal_after_once(text: str, language: str | None) -> None:
    once = normalize(text, language)

    assert normalize(once, language) == once
    assert unicodedata.is_normalized("NFC", once)
    assert {unicodedata.category(character)[0] for character in once} <= set("LMN") | {"Z"}
    assert once.split(" ") == once.split() or once == ""
    assert all(word[0].isalnum() for word in once.split()), "no word begins with a mark"


@settings(deadline=None, max_examples=200)
@given(
    letter=st.characters(categories=["L"]),
    around=st.text(st.characters(categories=["P", "S", "M", "Z", "C", "N"]), max_size=6),
    language=ANY_LANGUAGE,
)
def test_a_text_with_a_letter_never_becomes_empty(letter: str, around: str, language: str | None) -> None:
    text = around + letter + around[::-1]
    letters = [one for one in unicodedata.normalize("NFKC", letter) if unicodedata.category(one)[0] == "L"]

    is_nothing = all(one in TATWEEL + LETTER_APOSTROPHE for one in letters)

    assert is_nothing or any(map(str.isalpha, normalize(text, language)))


def marks(text: str) -> Counter[str]:
    return Counter(one for one in unicodedata.normalize("NFKD", text) if unicodedata.category(one)[0] == "M")


# Taken away or exchanged by rules that have tests of their own: the iota below, the marks of three languages.
ANSWERED_ELSEWHERE = {None: "\u0345", "Turkish": "\u0307", "Russian": "\u0308", "Romanian": "\u0326\u0327"}
VOWELS_THAT_TAKE_SIGNS = "\u0905\u0906\u0909\u090f"  # of Devanagari, into themselves
TAKE_A_DOT = "Iİ"  # likewise, when they become small
LETTERS_ON_THEIR_OWN = st.characters(
    categories=["L"], exclude_characters=TATWEEL + LETTER_APOSTROPHE + VOWELS_THAT_TAKE_SIGNS + TAKE_A_DOT
).filter(
    # Some become a letter and punctuation, such as the l of Catalan with its dot, or a space and a mark.
    lambda one: (
        all(unicodedata.category(part)[0] in "LM" for part in unicodedata.normalize("NFKC", one))
        and not set(unicodedata.normalize("NFKC", one)) & {TATWEEL, LETTER_APOSTROPHE}
    )
)
SEEN_MARKS = st.characters(
    categories=["Mn", "Mc"],
    max_codepoint=0xDFFFF,
    exclude_characters=[*"\u034f\u17b4\u17b5\u180b\u180c\u180d\u180f", *map(chr, range(0xFE00, 0xFE10))],
)


@settings(deadline=None, max_examples=200)
@given(
    parts=st.lists(st.tuples(LETTERS_ON_THEIR_OWN, st.text(SEEN_MARKS, max_size=3)), max_size=8),
    language=ANY_LANGUAGE,
)
@example(parts=[("ก", "\u0e48\u0e35"), ("व", "\u093e")], language="Thai")
def test_every_mark_on_a_letter_is_kept(parts: list[tuple[str, str]], language: str | None) -> None:
    text = " ".join(letter + on_it for letter, on_it in parts)
    ignored = ANSWERED_ELSEWHERE[None] + ANSWERED_ELSEWHERE.get(language, "")

    before, after = marks(text), marks(normalize(text, language))

    assert {mark: n for mark, n in before.items() if mark not in ignored} == {
        mark: n for mark, n in after.items() if mark not in ignored
    }


@pytest.mark.parametrize(
    ("unit_of_text", "language"),
    [
        ("a\u0301\u0323", None),
        ("\u0301\u0323", None),
        ("\u0301\ufe0f\u0323\u200d", None),
        ("a'", "English"),
        ("' ", "English"),
        ("е\u0308\u0323", "Russian"),
        ("i\u0307", "Turkish"),
        ("hỏe ", "Vietnamese"),
        ("\u0e4d\u0e48", "Thai"),
        ("\u0e48\u0e38", "Thai"),
        ("\u0e32\u0e48", "Thai"),
        ("\u0905\u093e", "Hindi"),
        ("\u06d5\u0654\u064e", "Persian"),
    ],
)
def test_the_cost_grows_with_the_length_and_not_with_its_square(unit_of_text: str, language: str) -> None:
    """Sixteen times the text: 16 times the time if linear, 256 times if not. 50 is far from both."""

    def seconds(copies: int) -> float:
        text = "e" + unit_of_text * copies
        times = []
        for _ in range(3):
            start = time.process_time()
            normalize(text, language)
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(32_000) < 50 * seconds(2_000)
