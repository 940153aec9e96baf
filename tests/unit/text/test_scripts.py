import pytest

from qad_dist.text.normalize import normalize
from qad_dist.text.scripts import LANGUAGE_SCRIPTS, foreign_letters, script_of, usual_seconds, words_worth
from shards.languages import LANGUAGES
from tests.helpers.sentences import FAMILIES, sentences


@pytest.mark.parametrize(
    ("characters", "script"),
    [
        ("aZßñőşđ", "Latin"),
        ("яЖЅќѓ", "Cyrillic"),
        ("αΩςάΰ", "Greek"),
        ("حپگچءً", "Arabic"),
        ("कऔृ्ड़", "Devanagari"),
        ("กเๆ่", "Thai"),
        ("中𠮷々", "Han"),
        ("ぁん", "Hiragana"),
        ("カヶー", "Katakana"),
        ("ㄅ", "Bopomofo"),
        ("한ㅋ", "Hangul"),
        ("ກ", "Lao"),
        ("ខ", "Khmer"),
        ("က", "Myanmar"),
    ],
)
def test_letters_and_their_marks_have_the_script_of_their_name(characters: str, script: str) -> None:
    assert {character: script_of(character) for character in characters} == dict.fromkeys(characters, script)


@pytest.mark.parametrize("character", "1٣५๓〇 .。،\u0301\ufe0fˈ😀")
def test_digits_punctuation_and_common_marks_have_no_script(character: str) -> None:
    assert script_of(character) is None


def test_every_language_has_scripts() -> None:
    assert set(LANGUAGE_SCRIPTS) == set(LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_sentences_of_a_language_are_written_in_its_scripts(language: str) -> None:
    texts = [sentence.text for family in FAMILIES for sentence in sentences(family) if sentence.language == language]
    letters = [character for text in texts for character in normalize(text, language) if character.isalpha()]

    share = sum(script_of(letter) in LANGUAGE_SCRIPTS[language] for letter in letters) / len(letters)

    assert len(texts) >= 20
    assert 0.9 < share <= 1, "the rest are foreign names"


def test_foreign_letters_are_measured_in_words() -> None:
    found = foreign_letters("我用 iphone и чай", "Chinese")

    assert found is not None
    assert found.latin == pytest.approx(6 * 0.2)
    assert found.other == pytest.approx(4 * 0.2)
    assert found.all_letters == pytest.approx(2 * 0.6 + 6 * 0.2 + 4 * 0.2)


def test_nothing_is_known_of_the_scripts_of_another_language() -> None:
    assert foreign_letters("হ্যাঁ", "Bengali") is None


# The same sentence in eleven languages, its syllables, and how many of them fluent readers speak a second on average:
# between 5 (Thai, Chinese, Vietnamese) and 8 (Spanish, Japanese). Half as much more or less is usual among speakers.
@pytest.mark.parametrize(
    ("text", "syllables", "rate"),
    [
        ("the children are playing in the garden behind the house", 14, 6.2),
        ("los niños están jugando en el jardín detrás de la casa", 18, 7.8),
        ("孩子们在房子后面的花园里玩", 13, 5.2),
        ("bọn trẻ đang chơi trong khu vườn phía sau nhà", 10, 5.2),
        ("子どもたちが家の裏の庭で遊んでいます", 23, 7.8),
        ("아이들이 집 뒤의 정원에서 놀고 있어요", 16, 6.5),
        ("τα παιδιά παίζουν στον κήπο πίσω από το σπίτι", 15, 6.5),
        ("дети играют в саду за домом", 11, 6.2),
        ("बच्चे घर के पीछे बगीचे में खेल रहे हैं", 14, 6.2),
        ("الأطفال يلعبون في الحديقة خلف المنزل", 16, 6.2),
        ("เด็กๆ กำลังเล่นอยู่ในสวนหลังบ้าน", 10, 4.7),
    ],
)
def test_usual_seconds_agree_with_syllable_rates_within_a_half(text: str, syllables: int, rate: float) -> None:
    assert usual_seconds(text) == pytest.approx(syllables / rate, rel=0.5)


def test_spaces_take_no_time_and_digits_take_some() -> None:
    assert usual_seconds("a b") == usual_seconds("ab")
    assert usual_seconds("42") == usual_seconds("४२") == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("word", "length"), [("water", 1.0), ("вода", 0.8), ("水", 0.6), ("みず", 0.8), ("น้ำ", 0.75), ("물", 0.4)]
)
def test_a_word_is_worth_about_as_much_in_every_script(word: str, length: float) -> None:
    assert sum(map(words_worth, word)) == pytest.approx(length)
