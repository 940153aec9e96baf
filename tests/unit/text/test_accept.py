import math
import random
from dataclasses import replace
from typing import Any

import pytest

from qad_dist.config.filters import FiltersConfig
from qad_dist.text.accept import REASONS, judge, judged_by
from shards.languages import LANGUAGES
from shards.schema import ENDED_BY_END_TOKEN, ENDED_BY_LENGTH, UNREADABLE, PseudoLabel
from shards.verdicts import Verdict
from tests.helpers.sentences import FAMILIES, sentences

KEPT = Verdict(use="all", reasons=())

# Wrong-script answers that are long enough to be no name: one text for each script.
WRITTEN_IN = {
    "Latin": "Dobar den, kako ste denes, vo koj grad živeete",
    "Cyrillic": "Добрый день, как у вас дела сегодня",
    "Greek": "Καλημέρα, τι κάνετε σήμερα",
    "Arabic": "صباح الخير، كيف حالكم اليوم",
    "Devanagari": "नमस्ते, आज आप कैसे हैं",
    "Thai": "สวัสดีครับ วันนี้เป็นอย่างไรบ้าง",
    "Han": "你们好，今天过得怎么样",
    "Hiragana": "こんにちは、おげんきですか",
    "Katakana": "コンニチハ、オゲンキデスカ",
    "Hangul": "안녕하세요, 오늘 어떻게 지내세요",
    "Bengali": "নমস্কার, আজ আপনি কেমন আছেন",
    "Hebrew": "שלום, מה שלומכם היום",
}
OWN = {
    "Chinese": {"Han"},
    "Cantonese": {"Han"},
    "Japanese": {"Han", "Hiragana", "Katakana"},
    "Korean": {"Hangul"},
    "Thai": {"Thai"},
    "Hindi": {"Devanagari"},
    "Arabic": {"Arabic"},
    "Persian": {"Arabic"},
    "Greek": {"Greek"},
    "Russian": {"Cyrillic"},
    "Macedonian": {"Cyrillic"},
}


NEARLY_A_LOOP = " ".join(
    f"and then it was said that he who came as number {number} should go home again before night"
    for number in range(20)
)


def label(
    text: str = "one two three four",
    *,
    language: str | None = "English",
    seconds: float = 2.0,
    num_tokens: int = 8,
    mean: float | None = -0.1,
    ended_by: str = ENDED_BY_END_TOKEN,
) -> PseudoLabel:
    return PseudoLabel(
        key="a",
        token_ids=(7,) * num_tokens,
        text=text,
        language=language,
        token_logprobs=(mean or 0.0,) * num_tokens,
        mean_logprob=mean,
        ended_by=ended_by,
        duration_seconds=seconds,
    )


def filters(**changes: dict[str, Any]) -> FiltersConfig:
    return FiltersConfig.model_validate(changes)


def verdict(
    heard: PseudoLabel, *, named: str | None = None, transcript: str | None = None, **changes: dict[str, Any]
) -> Verdict:
    """``named`` is the manifest's language; other names are filters."""
    return judge(heard, language=named, reference=transcript, filters=filters(**changes))


def reasons(heard: PseudoLabel, **known: Any) -> tuple[str, ...]:
    return verdict(heard, **known).reasons


# One label for each reason, and what must be known for it to be found.
OBJECTIONABLE: dict[str, tuple[PseudoLabel, dict[str, Any]]] = {
    "no_text": (label(""), {}),
    "runaway": (label(ended_by=ENDED_BY_LENGTH), {}),
    "loop": (label("thank you " * 8, seconds=8), {}),
    "rate": (label("one two three four five six", seconds=0.2), {}),
    "script": (label("Добрый день, как дела"), {}),
    "language": (label(), {"named": "German"}),
    "confidence": (label(mean=-3.0), {}),
    "reference": (label(), {"transcript": "something else altogether"}),
}


def test_a_label_without_objections_is_used_for_everything() -> None:
    assert verdict(label(), named="English", transcript="one two three four") == KEPT


def test_reasons_are_the_filters_and_unreadable() -> None:
    assert REASONS == ("unreadable", *FiltersConfig.model_fields)
    assert set(OBJECTIONABLE) == set(FiltersConfig.model_fields)


@pytest.mark.parametrize("reason", FiltersConfig.model_fields)
@pytest.mark.parametrize(("action", "use"), [("drop", "nothing"), ("kl_only", "kl_only"), ("none", "all")])
def test_the_action_of_a_filter_decides_the_use(reason: str, action: str, use: str) -> None:
    heard, known = OBJECTIONABLE[reason]

    found = verdict(heard, **known, **{reason: {"action": action}})

    assert found == Verdict(use=use, reasons=() if action == "none" else (reason,))


@pytest.mark.parametrize(
    ("reason", "use"),
    [
        ("no_text", "nothing"),
        ("runaway", "nothing"),
        ("loop", "nothing"),
        ("rate", "nothing"),
        ("script", "nothing"),
        ("language", "kl_only"),
        ("confidence", "kl_only"),
        ("reference", "all"),
    ],
)
def test_doubt_costs_the_cross_entropy_and_nonsense_everything_by_default(reason: str, use: str) -> None:
    heard, known = OBJECTIONABLE[reason]

    assert verdict(heard, **known).use == use


def test_all_reasons_are_named_in_order_and_the_strictest_action_counts() -> None:
    heard = label("спасибо " * 12, seconds=0.5, mean=-3.0, ended_by=ENDED_BY_LENGTH)

    found = verdict(heard, named="German", transcript="nothing of it", reference={"action": "kl_only"})

    assert found == Verdict(
        use="nothing", reasons=("runaway", "loop", "rate", "script", "language", "confidence", "reference")
    )


def test_an_unreadable_utterance_is_never_used() -> None:
    heard = replace(label("", language=None, num_tokens=0, mean=None, ended_by=UNREADABLE), error="cut short")
    everything_off = {name: {"action": "none"} for name in FiltersConfig.model_fields}

    assert verdict(heard, named="German", **everything_off) == Verdict(use="nothing", reasons=("unreadable",))


@pytest.mark.parametrize("text", ["", " \n", "...", "♪♪", "\u200b"])
def test_a_text_without_letters_and_digits_is_none(text: str) -> None:
    assert reasons(label(text, seconds=20)) == ("no_text",)


@pytest.mark.parametrize("language", [None, ""])
def test_a_text_without_a_language_is_none(language: str | None) -> None:
    assert reasons(label(language=language), named="German") == ("no_text",)


def test_silence_may_be_kept() -> None:
    heard = label("", language=None, seconds=25)

    assert verdict(heard, named="German", no_text={"action": "none"}) == KEPT


def test_a_single_letter_or_digit_is_a_text() -> None:
    assert reasons(label("A", seconds=1.5)) == reasons(label("7", seconds=1.5)) == ()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("thank you " * 5, ()),
        ("thank you " * 6, ("loop",)),
        (" ".join(f"and then number {number} went home again" for number in range(9)), ()),
        (NEARLY_A_LOOP, ("loop",)),
    ],
)
def test_a_loop_is_what_repeats_too_much(text: str, found: tuple[str, ...]) -> None:
    assert reasons(label(text, seconds=len(text) / 14)) == found


def test_the_limits_of_loops_are_settings() -> None:
    heard = label("thank you " * 5, seconds=8)
    nearly = label(NEARLY_A_LOOP, seconds=60)

    assert verdict(heard, loop={"repeated_words": 8}).reasons == ("loop",)
    assert verdict(heard, loop={"repeated_words": 8.01}).reasons == ()
    assert verdict(nearly).reasons == ("loop",)
    assert verdict(nearly, loop={"new_share": 0}).reasons == ()


@pytest.mark.parametrize(
    ("letters", "seconds", "found"),
    [  # 14 Latin letters are a second of usual speech
        (14 * 5 - 1, 2.0, ()),
        (14 * 5 + 1, 2.0, ("rate",)),  # 2.5 times as fast as usual
        (17, 0.1, ()),  # heard as half a second
        (18, 0.1, ("rate",)),
        (15, 13.0, ()),
        (13, 13.0, ("rate",)),  # less than a tenth of what is left without 3 s of silence
        (1, 3.5, ()),
        (1, 3.8, ("rate",)),
    ],
)
def test_a_text_must_be_about_as_long_as_its_audio(letters: int, seconds: float, found: tuple[str, ...]) -> None:
    text = " ".join("abcdefghijklmnopqrstuvwxyz"[number % 26] for number in range(letters))

    assert reasons(label(text, seconds=seconds), loop={"action": "none"}) == found


def test_the_limits_of_the_rate_are_settings() -> None:
    slow, fast = label("yes", seconds=20), label("one two three four", seconds=0.5)

    assert reasons(slow) == ("rate",)
    assert reasons(slow, rate={"silence_seconds": 18}) == reasons(slow, rate={"slowest": 0}) == ()
    assert reasons(fast) == ()
    assert reasons(fast, rate={"fastest": 1.5}) == ("rate",)


def test_more_text_is_never_slower_and_more_audio_never_faster() -> None:
    rng = random.Random(1)
    words = [word for family in FAMILIES for sentence in sentences(family) for word in sentence.text.split()]
    order = {"too short": 0, "right": 1, "too long": 2}

    def kind(text: str, seconds: float) -> int:
        if "rate" not in reasons(label(text, seconds=seconds)):
            return order["right"]
        # A limit that cannot be passed leaves the other one.
        only_fast = reasons(label(text, seconds=seconds), rate={"slowest": 0})
        return order["too long" if "rate" in only_fast else "too short"]

    for _ in range(150):
        text = " ".join(rng.choices(words, k=rng.randint(1, 60)))
        seconds = rng.uniform(0.1, 40)
        longer = f"{text} {' '.join(rng.choices(words, k=rng.randint(1, 60)))}"
        assert kind(text, seconds) <= kind(longer, seconds)
        assert kind(text, seconds) >= kind(text, seconds + rng.uniform(0, 40))


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("script", WRITTEN_IN)
def test_a_text_is_in_the_scripts_of_its_language(language: str, script: str) -> None:
    found = reasons(label(WRITTEN_IN[script], language=language, seconds=4))

    assert found == (() if script in OWN.get(language, {"Latin"}) else ("script",))


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("Hindi", "मैंने laptop पर software install किया"),
        ("Japanese", "Google ChromeでYouTubeを見る"),
        ("Chinese", "我用iPhone和MacBook"),
        ("Korean", "MacBook Pro를 샀어요"),
        ("Russian", "Я купил новый MacBook Pro в Apple Store"),
        ("Japanese", "Microsoft Office"),
        ("Thai", "OK"),
        ("English", "the letter α and the letter β"),
        ("English", "He said привет to me and I said hello back to him"),
        ("Persian", "WhatsApp دارید"),
    ],
)
def test_foreign_names_and_words_are_no_wrong_script(language: str, text: str) -> None:
    assert reasons(label(text, language=language, seconds=3)) == ()


def test_the_limits_of_scripts_are_settings() -> None:
    some_latin = label("я купил новый notebook, monitor, keyboard, mouse", language="Russian", seconds=5)
    some_cyrillic = label("he said привет to me and to her", seconds=3)

    assert reasons(some_latin) == reasons(some_cyrillic) == ()
    assert reasons(some_latin, script={"max_latin_share": 0.5}) == ("script",)
    assert reasons(some_cyrillic, script={"max_share": 0.2}) == ("script",)


def test_languages_beyond_the_models_have_no_script() -> None:
    assert reasons(label(WRITTEN_IN["Bengali"], language="Bengali")) == ()


@pytest.mark.parametrize(
    ("named", "found"), [("English", ()), (None, ()), ("German", ("language",)), ("Dutch", ("language",))]
)
def test_the_source_may_name_no_other_language(named: str | None, found: tuple[str, ...]) -> None:
    assert reasons(label(), named=named) == found


@pytest.mark.parametrize("num_tokens", [1, 4, 9, 25, 100, 400])
def test_short_responses_may_be_less_sure(num_tokens: int) -> None:
    limit = -0.6 - 1.5 / math.sqrt(num_tokens)

    assert reasons(label(num_tokens=num_tokens, mean=limit + 1e-9)) == ()
    assert reasons(label(num_tokens=num_tokens, mean=limit - 1e-9)) == ("confidence",)


def test_nothing_is_unsure_about_a_response_without_probabilities() -> None:
    assert reasons(label(mean=None)) == ()


def test_the_limits_of_confidence_are_settings() -> None:
    heard = label(mean=-1.0, num_tokens=100)

    assert reasons(heard) == ("confidence",)
    assert reasons(heard, confidence={"min_mean_logprob": -1.0}) == ()
    assert reasons(heard, confidence={"short_slack": 5.0}) == ()


@pytest.mark.parametrize(
    ("language", "text", "reference", "rate"),
    [
        ("English", "one two three four", "one two three for", 1 / 4),
        ("English", "One, two: three; FOUR!", "one two three four", 0),
        ("Chinese", "今天天气很好", "今天天汽很好吗", 2 / 7),
        ("Thai", "วันนี้ดี", "วันนั้นดี", 2 / 9),
    ],
)
def test_the_error_rate_is_held_against_the_transcript(language: str, text: str, reference: str, rate: float) -> None:
    heard = label(text, language=language)
    for limit, found in [(rate, ()), (rate - 1e-6, ("reference",))]:
        if limit < 0:
            continue
        settings = filters(reference={"action": "drop", "max_error_rate": limit})
        assert judge(heard, language=language, reference=reference, filters=settings).reasons == found


def test_without_a_transcript_nothing_is_held_against_it() -> None:
    settings = filters(reference={"action": "drop", "max_error_rate": 0})

    assert judge(label(), language="English", reference=None, filters=settings) == KEPT


def test_equal_labels_get_equal_verdicts() -> None:
    for heard, known in OBJECTIONABLE.values():
        assert verdict(heard, **known) == verdict(replace(heard), **known)


def test_what_decided_is_told_by_settings_and_facts() -> None:
    facts = [("English", None), (None, "so it is")]

    told = judged_by(filters(), facts)

    assert told == judged_by(filters(), iter(list(facts)))
    assert told["filters"] == filters().model_dump(mode="json")
    assert told != judged_by(filters(loop={"repeated_words": 10}), facts)
    assert told != judged_by(filters(), [("English", None), (None, "so it was")])
    assert told != judged_by(filters(), [("English", "so it is"), (None, None)])
