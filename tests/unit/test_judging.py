"""Answers become a score: counts are summed over utterances and divided once, by language and in all."""

from collections.abc import Sequence
from typing import Any

import pytest

from qad_dist.answers import Answer
from qad_dist.judging import cases_of, judge_section
from qad_dist.text.open_asr import OPEN_ASR, WHISPER
from shards.schema import ENDED_BY_LENGTH, Utterance
from tests.helpers.answers import answer, run_config, utterance


def row(
    utterances: Sequence[Utterance],
    answers: Sequence[Answer],
    teacher: Sequence[Answer] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """The overall row of a system beside its teacher."""
    both = {"teacher": teacher or answers, "qad": answers}
    return judge_section(run_config(**settings), utterances, both)["systems"]["qad"]["overall"]


def test_errors_are_summed_before_they_are_divided() -> None:
    """One word wrong of 1, none of 10: 1 / 11, not the mean of 100 % and 0 %."""
    utterances = [utterance("yes"), utterance("a b c d e f g h i j")]

    scored = row(utterances, [answer("no"), answer("a b c d e f g h i j")])

    assert (scored["substitutions"], scored["deletions"], scored["insertions"]) == (1, 0, 0)
    assert scored["reference_tokens"] == 11
    assert scored["error_rate"] == pytest.approx(1 / 11)
    assert scored["utterances"] == 2


def test_each_kind_of_error_is_counted_by_itself() -> None:
    utterances = [utterance("one two three"), utterance("four"), utterance("five six")]

    scored = row(utterances, [answer("one three"), answer("four four"), answer("nine six")])

    assert (scored["substitutions"], scored["deletions"], scored["insertions"]) == (1, 1, 1)
    assert scored["error_rate"] == pytest.approx(3 / 6)


def test_utterances_without_a_reference_enter_the_distance_only() -> None:
    utterances = [utterance("one two"), utterance(None)]
    answers = [answer("one", kl=1.0, agreements=4), answer("words that nobody asked for", kl=2.0, agreements=2)]

    scored = row(utterances, answers)

    assert scored["error_rate"] == 0.5
    assert (scored["insertions"], scored["reference_tokens"]) == (0, 2)
    assert scored["utterances"] == 2
    assert (scored["kl_per_token"], scored["agreement"]) == (3 / 8, 6 / 8)
    assert len(cases_of(utterances, {"qad": answers})) == 1


def test_words_heard_in_silence_are_inserted() -> None:
    """An empty reference says that nothing was said."""
    utterances = [utterance("one two"), utterance(""), utterance("")]

    scored = row(utterances, [answer("one"), answer("thank you"), answer("")])

    assert (scored["insertions"], scored["deletions"], scored["reference_tokens"]) == (2, 1, 2)
    assert scored["error_rate"] == 3 / 2


def test_kl_and_agreement_are_means_over_the_teachers_tokens() -> None:
    """The teacher wrote 3 and 7 tokens, whatever the system's own responses are long."""
    utterances = [utterance("a"), utterance("b")]
    teacher = [answer("a", tokens=3), answer("b", tokens=7)]
    answers = [answer("a", tokens=50, kl=0.5, agreements=3), answer("b", tokens=1, kl=1.5, agreements=5)]

    scored = row(utterances, answers, teacher)

    assert scored["response_tokens"] == 10
    assert scored["kl_per_token"] == pytest.approx(0.2)
    assert scored["agreement"] == pytest.approx(0.8)


def test_distance_that_was_not_measured_everywhere_is_none() -> None:
    """The teacher itself, and systems with other tokens."""
    scored = row([utterance("a"), utterance("b")], [answer("a", kl=0.0, agreements=4), answer("b")])

    assert scored["kl_per_token"] is None
    assert scored["agreement"] is None


def test_language_accuracy_counts_only_utterances_of_known_language() -> None:
    utterances = [utterance("a"), utterance("b"), utterance("c", language=None)]
    answers = [answer("a"), answer("b", language="German"), answer("c", language="Thai")]

    assert row(utterances, answers)["language_accuracy"] == 0.5
    assert row([utterance("c", language=None)], [answer("c")])["language_accuracy"] is None


def test_a_response_without_a_language_is_not_the_right_one() -> None:
    assert row([utterance("a")] * 2, [answer("a", language=None), answer("a")])["language_accuracy"] == 0.5


def test_a_language_that_was_told_is_not_found() -> None:
    assert row([utterance("a")], [answer("a")], language="manifest")["language_accuracy"] is None


def test_predictions_that_name_no_language_have_no_accuracy() -> None:
    assert row([utterance("a")], [answer("a", language=None)])["language_accuracy"] is None


def test_responses_that_were_cut_or_repeat_themselves_are_runaway() -> None:
    loop = " ".join(["no"] * 20)
    utterances = [utterance("a"), utterance("b"), utterance("c"), utterance(loop)]
    answers = [answer("a a a", ended_by=ENDED_BY_LENGTH), answer("b"), answer(loop, ended_by=None), answer(loop)]

    scored = row(utterances, answers)

    assert scored["runaway"] == 2 / 4  # who says it twenty times is heard saying it twenty times


ENGLISH = ("It's the colour of Mr. Brown's wi-fi, 20 percent.", "its the color of mister browns wifi twenty percent")


def test_the_same_answers_are_counted_under_other_rules_by_name() -> None:
    measures = row([utterance(ENGLISH[0])] * 2, [answer(ENGLISH[1])] * 2)["measures"]

    names = list(measures)
    assert names[:2] == ["norm_v1 CER", "raw"]
    assert names[2:] == [WHISPER, OPEN_ASR]
    # As written, eight of nine words differ, of "the colour of" the middle one.
    assert measures["raw"]["reference_tokens"] == 2 * 9
    assert measures["raw"]["error_rate"] > 0.5
    rates = [measures[name]["error_rate"] for name in names[2:]]
    assert rates[1] < rates[0] < measures["raw"]["error_rate"]


def test_raw_counts_case_and_punctuation_in_the_units_of_the_language() -> None:
    utterances = [utterance("Yes, sir."), utterance("你好。", language="Chinese")]

    measures = row(utterances, [answer("yes sir"), answer("你 好", language="Chinese")])["measures"]

    assert measures["raw"]["reference_tokens"] == 2 + 3
    assert (measures["raw"]["substitutions"], measures["raw"]["deletions"]) == (2, 1)


def test_korean_has_a_character_error_rate_that_spaces_do_not_touch() -> None:
    scored = row([utterance("안녕 하세요", language="Korean")], [answer("안녕하세요", language="Korean")])

    assert (scored["unit"], scored["error_rate"]) == ("WER", 1.0)
    assert scored["measures"]["norm_v1 CER"]["reference_tokens"] == 5
    assert scored["measures"]["norm_v1 CER"]["error_rate"] == 0.0


@pytest.fixture
def judged() -> dict[str, Any]:
    """A system on two English, one Chinese and one utterance of unknown language."""
    utterances = [
        utterance("one two"),
        utterance("一二三", language="Chinese"),
        utterance("three four"),
        utterance("five", language=None),
    ]
    answers = [
        answer("one", kl=0.4, agreements=4),
        answer("一二", language="Chinese", kl=0.1, agreements=3),
        answer("three four", kl=0.0, agreements=4),
        answer("five", kl=0.3, agreements=4),
    ]
    teacher = [answer(one.reference or "") for one in utterances]
    return judge_section(run_config(), utterances, {"teacher": teacher, "ptq": answers, "qad": answers})


def test_languages_are_scored_by_themselves_in_their_own_unit(judged: dict[str, Any]) -> None:
    languages = judged["systems"]["ptq"]["languages"]

    assert list(languages) == ["Chinese", "English", "unknown"]
    assert {name: row["unit"] for name, row in languages.items()} == {
        "Chinese": "CER",
        "English": "WER",
        "unknown": "WER",
    }
    assert languages["Chinese"]["error_rate"] == pytest.approx(1 / 3)  # a character of three
    assert languages["English"]["error_rate"] == pytest.approx(1 / 4)
    assert languages["English"]["kl_per_token"] == pytest.approx(0.4 / 8)
    assert languages["unknown"]["error_rate"] == 0


def test_the_overall_row_is_the_sum_of_the_languages(judged: dict[str, Any]) -> None:
    overall, languages = judged["systems"]["ptq"]["overall"], judged["systems"]["ptq"]["languages"].values()

    for name in ("substitutions", "deletions", "insertions", "reference_tokens", "utterances", "response_tokens"):
        assert overall[name] == sum(row[name] for row in languages), name
    assert overall["error_rate"] == pytest.approx(2 / 8)
    assert overall["kl_per_token"] == pytest.approx(0.8 / 16)
    assert overall["unit"] == "WER/CER"


def test_significance_is_told_in_all_and_by_language(judged: dict[str, Any]) -> None:
    overall, languages = judged["significance"]["overall"], judged["significance"]["languages"]

    assert [(pair["first"], pair["second"]) for pair in overall["pairs"]] == [
        ("teacher", "ptq"),
        ("teacher", "qad"),
        ("ptq", "qad"),
    ]
    assert overall["pairs"][0]["difference"]["value"] == pytest.approx(-2 / 8)
    assert overall["recovered"]["value"] == 0.0  # the two students are the same
    assert list(languages) == ["Chinese", "English", "unknown"]
    assert overall["sentences"]
    assert languages["Chinese"]["summary"].startswith("CER on 3 characters")


def test_intervals_draw_speakers_and_tell_those_of_two_corpora_apart() -> None:
    one = [utterance("a b", speaker="1"), utterance("c d", speaker="1"), utterance("e f", speaker="1", source="y")]

    judged = judge_section(run_config(), one, {"teacher": [answer("a b"), answer("c d"), answer("e f")]})

    told = judged["significance"]["overall"]
    assert (told["num_clusters"], told["is_by_speaker"], told["is_too_narrow"]) == (2, True, True)


def test_worst_utterances_are_looked_for_in_what_all_systems_wrote() -> None:
    (case,) = cases_of([utterance("a", key="k", speaker="s")], {"teacher": [answer("a")], "qad": [answer("b")]})

    assert (case.key, case.speaker, case.texts) == ("k", "s", {"teacher": "a", "qad": "b"})
