import random
import sys

import pytest

from qad_dist.config.filters import LoopFilterConfig
from qad_dist.text.loops import LONGEST_UNIT, new_share, repeated_words, units
from qad_dist.text.normalize import normalize
from shards.languages import LANGUAGES

LIMITS = LoopFilterConfig()

# What decoders are known to repeat: courtesies, credits of subtitles, syllables, half sentences; in every language.
LOOPS = {
    "Chinese": ["请不吝点赞订阅转发打赏支持明镜与点点栏目。", "字幕by索兰娅 ", "像", "但是，"],
    "English": ["Thank you. ", "I think. ", "Thanks for watching! ", "and I was like, you know, ", "la la ", "oh, "],
    "Cantonese": ["多謝收看。", "即係，", "係啊，"],
    "Arabic": ["شكرا لكم على المشاهدة. ", "اشتركوا في القناة ", "يعني "],
    "German": ["Untertitel der Amara.org-Community ", "Vielen Dank. ", "und dann "],
    "French": ["Sous-titres réalisés par la communauté d'Amara.org ", "Merci. ", "c'est-à-dire que "],
    "Spanish": ["¡Gracias por ver el video! ", "y entonces, ", "Suscríbete al canal. "],
    "Portuguese": ["Obrigado por assistir. ", "e aí ", "Legendas pela comunidade "],
    "Indonesian": ["Terima kasih telah menonton. ", "jadi, ", "dan kemudian "],
    "Italian": ["Sottotitoli creati dalla comunità Amara.org ", "Grazie. ", "e poi, "],
    "Korean": ["시청해 주셔서 감사합니다. ", "네. ", "그래서 이제 ", "구독과 좋아요 부탁드립니다. "],
    "Russian": ["Субтитры сделал DimaTorzok. ", "Продолжение следует... ", "да, ", "и вот "],
    "Thai": ["ขอบคุณที่รับชม ", "ครับ", "แล้วก็ "],
    "Vietnamese": ["Hãy đăng ký kênh để ủng hộ nhé. ", "Cảm ơn các bạn. ", "rồi thì "],
    "Japanese": ["ご視聴ありがとうございました。", "はい", "あの、", "チャンネル登録お願いします"],
    "Turkish": ["İzlediğiniz için teşekkür ederim. ", "evet, ", "ve sonra "],
    "Hindi": ["देखने के लिए धन्यवाद। ", "हाँ, ", "और फिर "],
    "Malay": ["Terima kasih kerana menonton. ", "kan, ", "lepas tu "],
    "Dutch": ["Ondertiteling door de Amara.org gemeenschap ", "Bedankt. ", "en toen "],
    "Swedish": ["Tack för att ni tittade. ", "ja, ", "Undertexter från Amara.org "],
    "Danish": ["Tak fordi du så med. ", "ja, ", "og så "],
    "Finnish": ["Kiitos kun katsoitte. ", "niin, ", "ja sitten "],
    "Polish": ["Dziękuję za obejrzenie. ", "tak, ", "Napisy stworzone przez społeczność Amara.org "],
    "Czech": ["Titulky vytvořil JohnyX. ", "jo, ", "a potom "],
    "Filipino": ["Maraming salamat sa panonood. ", "oo, ", "at saka "],
    "Persian": ["با تشکر از تماشای شما. ", "خب، ", "و بعد "],
    "Greek": ["Υπότιτλοι AUTHORWAVE ", "ναι, ", "και μετά "],
    "Romanian": ["Mulțumesc pentru vizionare. ", "da, ", "și apoi "],
    "Hungarian": ["Köszönöm, hogy megnézted. ", "igen, ", "és akkor "],
    "Macedonian": ["Ви благодариме за гледањето. ", "да, ", "и потоа "],
}
LOOPED = [(language, unit) for language, units_of in LOOPS.items() for unit in units_of]

# What people say and write although it repeats.
NATURAL = [
    ("English", "ha ha ha ha ha ha"),
    ("English", "no no no no, very very very good, bye bye bye"),
    ("English", "5 5 5 5"),
    ("English", "zero zero zero zero zero zero seven"),
    ("English", "on and on and on and on and on"),
    ("English", "thank you, thank you, thank you, thank you"),
    ("English", "We will, we will rock you. We will, we will rock you."),
    ("English", "buffalo buffalo Buffalo buffalo buffalo buffalo Buffalo buffalo"),
    ("English", "0000000000, 1,000,000,000,000"),
    ("English", "nooooooooooooooo"),
    ("English", "hahahahahahahahahaha"),
    ("Indonesian", "anak-anak, teman-teman, buku-buku, lari-lari, hati-hati"),
    ("Filipino", "araw-araw, gabi-gabi, dahan-dahan, iba-iba, isa-isa"),
    ("Chinese", "看看，试试，慢慢，哈哈哈哈哈哈哈哈哈哈"),
    ("Chinese", "四是四，十是十，十四是十四，四十是四十"),
    ("Chinese", "对不起对不起对不起对不起"),
    ("Chinese", "好好好好好好好好"),
    ("Cantonese", "係係係係，得得得"),
    ("Japanese", "ますます、いろいろ、だんだん、わくわくどきどき"),
    ("Japanese", "ありがとうございます、ありがとうございます、ありがとうございます"),
    ("Japanese", "すもももももももものうち"),
    ("Japanese", "ああああああああああ"),
    ("Thai", "มากๆ ช้าๆ เร็วๆ 555555555"),
    ("Thai", "ขอบคุณครับ ขอบคุณครับ ขอบคุณครับ"),
    ("Korean", "네 네 네 네 네, 하하하하하하하하, ㅋㅋㅋㅋㅋㅋㅋㅋㅋㅋㅋㅋ"),
    ("Korean", "간장 공장 공장장은 강 공장장이고 된장 공장 공장장은 공 공장장이다"),
    ("Russian", "ха-ха-ха-ха-ха, да-да-да, еле-еле, чуть-чуть"),
    ("Hindi", "धीरे धीरे, बार बार, नहीं नहीं नहीं, हा हा हा हा हा"),
    ("Arabic", "لا لا لا لا، شوي شوي، ههههههههههه"),
    ("Vietnamese", "từ từ, xanh xanh đỏ đỏ tím tím vàng vàng"),
    ("Turkish", "yavaş yavaş, güle güle, hayır hayır hayır"),
    ("Greek", "σιγά σιγά, όχι όχι όχι όχι, χα χα χα χα χα"),
]


def measured(text: str, language: str | None = None) -> float:
    return repeated_words(units(normalize(text, language)))


def is_loop(text: str, language: str | None = None) -> bool:
    split = units(normalize(text, language))
    return repeated_words(split) >= LIMITS.repeated_words or new_share(split) < LIMITS.new_share


def test_every_language_has_loops() -> None:
    assert set(LOOPS) == set(LANGUAGES)


@pytest.mark.parametrize(("language", "unit"), LOOPED)
@pytest.mark.parametrize("ending", ["", "cut"])
def test_what_decoders_repeat_is_a_loop(language: str, unit: str, ending: str) -> None:
    copies = 40 if len(unit) < 4 else 16
    text = unit * copies + (unit[: len(unit) // 2] if ending else "")

    assert is_loop(text, language)


@pytest.mark.parametrize(("language", "unit"), LOOPED)
def test_a_loop_behind_speech_is_a_loop(language: str, unit: str) -> None:
    speech = {"Chinese": "我们今天去公园看看那里的花。", "Thai": "วันนี้เราจะไปดูดอกไม้ที่สวน "}.get(
        language, "Today we went to the park and saw all the flowers there. "
    )

    assert is_loop(speech + unit * 40 + speech, language)


@pytest.mark.parametrize(("language", "unit"), LOOPED)
def test_what_is_said_twice_is_no_loop(language: str, unit: str) -> None:
    assert not is_loop(unit * 2, language)


@pytest.mark.parametrize(("language", "text"), NATURAL)
def test_natural_repetition_is_no_loop(language: str, text: str) -> None:
    assert not is_loop(text, language)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a", 0),
        ("", 0),
        ("a b c d e f", 0),
        ("a a", 0),  # two of it are emphasis
        ("a b a b", 0),
        ("a a a", 2),
        ("a b a b a b", 4),
        ("a b a b a b a", 5),  # a round that was cut short counts too
        ("x a b a b a b y", 4),
        ("a b a b a", 0),  # less than three rounds
        ("a a a b b b b", 3),  # the worst of them, not their sum
        ("a b c x a b c x a b c y", 0),
        ("a b c x a b c x a b c x y", 8),
        ("1 1 1 1 1", 2),  # digits count half
        ("A, a! A?", 2),
    ],
)
def test_words_said_again_at_once_are_counted(text: str, words: float) -> None:
    assert measured(text) == words


@pytest.mark.parametrize(("character", "worth"), [("哈", 0.6), ("は", 0.4), ("า", 0.25), ("ລ", 0.25), ("က", 0.25)])
def test_characters_are_counted_where_words_are_not_spaced(character: str, worth: float) -> None:
    assert measured("中" + character * 11) == pytest.approx(10 * worth, abs=1e-9)


@pytest.mark.parametrize(("number", "looping"), [(9, False), (10, True)])
def test_ten_times_one_word_is_the_default_limit(number: int, looping: bool) -> None:
    assert is_loop("so " * number) == looping


@pytest.mark.parametrize(("number", "looping"), [(3, False), (4, True)])
def test_four_times_three_words_are_the_default_limit(number: int, looping: bool) -> None:
    assert is_loop("let it be " * number) == looping


@pytest.mark.parametrize(("number", "looping"), [(15, False), (16, True)])
def test_lengths_add_up_exactly_at_the_limit(number: int, looping: bool) -> None:
    assert 15 * 0.6 == 9.0 and sum([0.6] * 15) != 9.0
    assert is_loop("哈" * number) == looping


def test_a_word_that_is_none_is_looked_at_letter_by_letter() -> None:
    assert is_loop("la" * 24)
    assert not is_loop("la" * 20)
    assert not is_loop("Rindfleischetikettierungsüberwachungsaufgabenübertragungsgesetz")


def test_the_longest_stretch_that_counts_is_bounded() -> None:
    words = [f"w{number}" for number in range(LONGEST_UNIT + 1)]

    assert measured(" ".join(words[:-1] * 3)) == 2 * LONGEST_UNIT
    assert measured(" ".join(words * 3)) == 0


def test_rounds_that_differ_in_a_word_are_a_loop() -> None:
    text = " ".join(
        f"and then it was said that he who was number {number} should go home at night" for number in range(20)
    )

    assert measured(text) == 0
    assert is_loop(text)


def test_the_share_of_new_stretches_is_that_of_distinct_ones() -> None:
    words = [str(number) + "x" for number in range(10)]

    assert new_share(units(" ".join(words * 4))) == 10 / 37
    assert new_share(units(" ".join(words * 2))) == 1.0  # too short to tell
    assert new_share(units("中文字幕组" * 10)) == 5 / 43


def test_random_repetitions_are_found_wherever_they_are() -> None:
    rng = random.Random(0)
    for _ in range(300):
        before, unit, after = (
            [f"{place}{number}" for number in range(rng.randint(low, 12))]
            for place, low in (("b", 0), ("u", 1), ("a", 0))
        )
        copies = rng.randint(3, 9)

        found = measured(" ".join([*before, *unit * copies, *after]))

        assert found == len(unit) * (copies - 1)


def _lines_run(text: str) -> int:
    """Bytecode lines of this project that measuring a text runs, without those of numpy."""
    number = 0

    def count(frame, event, argument):
        nonlocal number
        number += event == "line"
        return count

    sys.settrace(count)
    try:
        split = units(text)
        repeated_words(split)
        new_share(split)
    finally:
        sys.settrace(None)
    return number


@pytest.mark.parametrize("kind", ["one word", "words", "characters", "one long word"])
def test_work_grows_with_the_length_of_the_text_and_no_faster(kind: str) -> None:
    def text(size: int) -> str:
        rng = random.Random(0)
        joined = {
            "one word": ["so "] * size,
            "words": [rng.choice(["yes ", "no ", "or "]) for _ in range(size)],
            "characters": [rng.choice("的一是不了") for _ in range(size)],
            "one long word": [rng.choice("ab") for _ in range(size)],
        }[kind]
        return "".join(joined)

    few, many = _lines_run(text(2_500)), _lines_run(text(10_000))

    assert many <= 4.2 * few
