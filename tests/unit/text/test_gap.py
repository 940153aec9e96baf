"""Student beside teacher on held-out speech: rates, paired intervals, and when training cannot be seen to help."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from qad_dist.text.gap import Gap, describe_gap, gap_summary

Numbers = Sequence[Any] | np.ndarray


@dataclass(frozen=True)
class Measured:
    """Distances and words of the same utterances."""

    keys: Sequence[str]
    kl_U: np.ndarray
    agreements_U: np.ndarray
    tokens_U: np.ndarray
    languages: Sequence[str | None]
    speakers: Sequence[str | None]
    errors_U: np.ndarray
    teacher_errors_U: np.ndarray
    reference_tokens_U: np.ndarray
    is_human_U: np.ndarray


def measured(errors: Numbers, teacher: Numbers, tokens: Numbers, **others: Any) -> Measured:
    """Of English utterances with human transcripts, whose speakers nobody knows, with 10 response tokens each."""
    num = len(tokens)
    values: dict[str, Any] = {
        "keys": [f"u{place}" for place in range(num)],
        "kl_U": np.linspace(0.1, 0.2, num),
        "agreements_U": np.full(num, 9),
        "tokens_U": np.full(num, 10),
        "languages": ["English"] * num,
        "speakers": [None] * num,
        "errors_U": np.array(errors),
        "teacher_errors_U": np.array(teacher),
        "reference_tokens_U": np.array(tokens),
        "is_human_U": np.ones(num, np.bool_),
    }
    return Measured(**(values | others))


def gap_of(one: Measured, *, format: Any = "int8") -> Gap:
    return describe_gap(one, one, format=format)


def taken(one: Measured, order: Sequence[int]) -> Measured:
    """Utterances in another order."""
    values = vars(one).items()
    return Measured(**{k: v[list(order)] if isinstance(v, np.ndarray) else [v[i] for i in order] for k, v in values})


def test_rates_are_sums_divided_once() -> None:
    one = measured([3, 0, 1], [1, 0, 0], [4, 6, 10], kl_U=np.array([0.4, 0.0, 0.1]), tokens_U=np.array([4, 6, 15]))

    gap = gap_of(replace(one, agreements_U=np.array([3, 6, 15])))

    assert gap.kl_per_token == pytest.approx(0.5 / 25)
    assert gap.agreement == pytest.approx(24 / 25)
    assert (gap.utterances, gap.response_tokens) == (3, 25)
    assert gap.words is not None
    assert gap.words.student_rate == pytest.approx(4 / 20)
    assert gap.words.teacher_rate == pytest.approx(1 / 20)
    assert gap.words.difference == pytest.approx(3 / 20)
    assert (gap.words.utterances, gap.words.reference_tokens, gap.words.unit) == (3, 20, "WER")


def test_intervals_have_the_width_of_the_normal_law_on_many_utterances() -> None:
    """The mean of 1,000 utterances of 10 words, 95 % within 1.96 standard errors."""
    random = np.random.default_rng(0)
    teacher, more = random.poisson(1.0, 1_000), random.binomial(1, 0.2, 1_000)
    kl_U = random.exponential(0.3, 1_000)

    gap = gap_of(measured(teacher + more, teacher, np.full(1_000, 10), kl_U=kl_U))

    assert gap.words is not None
    assert gap.words.difference_interval is not None and gap.kl_interval is not None
    for (low, high), values_U in ((gap.words.difference_interval, more), (gap.kl_interval, kl_U)):
        half = 1.96 * values_U.std() / np.sqrt(1_000) / 10
        assert (low, high) == pytest.approx((values_U.mean() / 10 - half, values_U.mean() / 10 + half), abs=0.15 * half)
    assert gap.is_word_gap_real


def test_one_more_error_in_each_utterance_is_a_gap_for_certain() -> None:
    """Paired: hard and easy utterances move both rates alike."""
    teacher = np.array([0, 9, 3, 1, 7])

    gap = gap_of(measured(teacher + 1, teacher, [10] * 5))

    assert gap.words is not None
    assert gap.words.difference_interval == pytest.approx((0.1, 0.1))
    assert gap.is_word_gap_real
    assert gap.warning is None
    assert not any("Cheaper" in sentence for sentence in gap.sentences())


@pytest.mark.parametrize(
    ("student", "why"),
    [
        ([3, 1, 3, 2, 2, 2], r"cannot be told from nothing, and is at most \d\.\d\d points of WER"),
        ([2, 2, 2, 2, 2, 2], "gets no more words wrong than its teacher on these utterances"),
        ([1, 1, 0, 1, 1, 1], "gets no more words wrong than its teacher on these utterances"),
    ],
    ids=["some better, some worse", "equal", "better"],
)
def test_gap_that_cannot_be_told_from_nothing_names_what_is_cheaper(student: list[int], why: str) -> None:
    gap = gap_of(measured(student, [2] * 6, [50] * 6))

    assert not gap.is_word_gap_real
    assert gap.warning is not None
    assert gap.sentences()[-1] == gap.warning
    assert "serve the PTQ student as it is, or set quantize.format: int8_weight_only" in gap.warning
    assert re.search(why, gap.warning)


def test_bound_of_the_gap_is_the_upper_end_of_its_interval() -> None:
    gap = gap_of(measured([3, 1, 2, 2], [2, 2, 2, 2], [50] * 4))

    assert gap.words is not None and gap.words.difference_interval is not None and gap.warning is not None
    high = gap.words.difference_interval[1]
    assert high > 0
    assert f"at most {100 * high:.2f} points" in gap.warning


def test_student_of_weights_only_is_not_told_to_be_one() -> None:
    gap = gap_of(measured([2] * 6, [2] * 6, [50] * 6), format="int8_weight_only")

    assert gap.warning is not None
    assert "Cheaper: serve the PTQ student as it is. " in gap.warning
    assert "quantize.format" not in gap.warning


def test_words_may_come_in_another_order_than_distances() -> None:
    speakers = ["a", "a", "b", "c", "c", "c"]
    one = measured([3, 0, 1, 2, 2, 0], [1, 0, 0, 2, 1, 0], [4, 6, 9, 5, 8, 7], speakers=speakers)

    other = describe_gap(one, taken(one, [5, 3, 0, 1, 4, 2]), format="int8")

    assert other == gap_of(one)


def test_speakers_are_drawn_whole() -> None:
    """As if each had said it all in one utterance."""
    random = np.random.default_rng(1)
    names = [f"{number:02d}" for number in range(12)]
    apart = measured(
        random.poisson(2.0, 36),
        random.poisson(1.0, 36),
        random.integers(5, 15, 36),
        speakers=[name for name in names for _ in range(3)],
        kl_U=random.exponential(1.0, 36),
    )
    sums = {
        name: value.reshape(12, 3).sum(1)
        for name, value in vars(apart).items()
        if name.endswith("_U") and name != "is_human_U"
    }

    gap = gap_of(apart)
    together = gap_of(measured([], [], names, **sums))

    assert gap.words is not None and together.words is not None
    assert gap.words.difference_interval == pytest.approx(together.words.difference_interval)
    assert gap.kl_interval == pytest.approx(together.kl_interval)
    assert (gap.num_clusters, gap.is_by_speaker, gap.words.num_clusters) == (12, True, 12)
    assert (together.num_clusters, together.is_by_speaker) == (12, False)
    assert "over 12 speakers; with fewer than 50 they are too narrow" in gap_summary(gap)
    assert "over 12 utterances; with" in gap_summary(together)


@pytest.mark.parametrize(
    ("speakers", "num_clusters", "is_by_speaker"),
    [
        (["a", "a", None, None], 3, True),
        (["a", "b", "c", "d"], 4, False),
        (["a", "a", "a", "a"], 4, False),
        ([None, None, None, None], 4, False),
        (["utterance 3", "utterance 3", "x", None], 3, True),
    ],
    ids=["some unknown", "one utterance each", "one speaker", "all unknown", "named as if unknown"],
)
def test_unknown_speakers_are_each_their_own(
    speakers: list[str | None], num_clusters: int, is_by_speaker: bool
) -> None:
    gap = gap_of(measured([1, 0, 2, 1], [0, 0, 1, 1], [9] * 4, speakers=speakers))

    assert (gap.num_clusters, gap.is_by_speaker) == (num_clusters, is_by_speaker)
    assert gap.kl_interval is not None


def test_errors_are_counted_against_transcripts_alone_where_there_are_some() -> None:
    """Against its own texts a teacher makes none, which would be a gap of nothing but differences."""
    is_human = np.array([True, False, True, False, True, False])
    one = measured([2, 5, 1, 5, 3, 5], [2, 0, 2, 0, 2, 0], [10] * 6, is_human_U=is_human)

    gap = gap_of(one)

    assert gap.words is not None
    assert (gap.words.utterances, gap.words.is_reference_human) == (3, True)
    assert gap.words.student_rate == gap.words.teacher_rate == pytest.approx(6 / 30)
    assert not gap.is_word_gap_real
    assert gap.utterances == 6  # of the KL
    assert "WER against 3 human transcripts (30 reference tokens): student 20.00 %, teacher 20.00 %" in gap_summary(gap)


def test_differences_from_the_teachers_own_texts_are_not_called_errors() -> None:
    one = measured([1, 2, 1, 1], [0] * 4, [10] * 4, is_human_U=np.zeros(4, np.bool_), languages=["Thai"] * 4)

    gap = gap_of(one)

    assert gap.words is not None and not gap.words.is_reference_human
    assert "CER against the teacher's own texts, as there are no human transcripts (4 utterances" in gap_summary(gap)
    assert "12.50 (10.00 to 17.50) %. These are differences" in gap_summary(gap)
    assert "human transcripts (4 ref" not in gap_summary(gap)


def test_languages_of_words_and_of_characters_are_named_both() -> None:
    gap = gap_of(measured([1, 0], [0, 0], [9, 9], languages=["Thai", None]))

    assert gap.words is not None
    assert gap.words.unit == "WER/CER"


def test_single_utterance_has_no_interval_and_no_gap() -> None:
    gap = gap_of(measured([5], [0], [9]))

    assert gap.words is not None
    assert gap.kl_interval is None and gap.words.difference_interval is None
    assert gap.words.difference == pytest.approx(5 / 9)
    assert gap.warning is not None
    assert "there are too few words to compare student and teacher by" in gap.warning
    assert "(" not in gap.sentences()[1].replace("(9 reference tokens)", "")
    assert not any("bootstrap" in sentence for sentence in gap.sentences())


def test_references_without_a_word_leave_the_kl() -> None:
    gap = gap_of(measured([2, 3], [0, 0], [0, 0]))

    assert gap.words is None
    assert not gap.is_word_gap_real
    assert gap.kl_per_token == pytest.approx(0.3 / 20)
    assert "too few words" in gap_summary(gap)


def test_what_is_stored_reads_back_and_says_what_follows() -> None:
    gap = gap_of(measured([3, 1, 2, 2], [2, 2, 2, 2], [50] * 4))

    stored = json.loads(json.dumps(gap.as_json(), allow_nan=False))

    assert stored["format"] == "int8"
    assert stored["is_word_gap_real"] is False
    assert stored["warning"] == gap.warning
    assert stored["kl_interval"] == list(gap.kl_interval or ())
    assert gap.words is not None
    assert stored["words"]["difference_interval"] == list(gap.words.difference_interval or ())
    assert stored["words"]["teacher_rate"] == 0.04


def test_summary_tells_the_kl_in_millionths_and_keeps_to_sentences() -> None:
    gap = gap_of(measured([3, 1], [2, 2], [50, 50], kl_U=np.array([0.002, 0.002])))

    first, words, draws, warning, end = gap_summary(gap).split("\n")

    assert first == (
        "KL from the teacher: 200 (200 to 200) times 1e-6 nats per response token, 90.00 % of the tokens as the "
        "teacher's, on 2 held-out utterances (20 tokens)."
    )
    assert words == (
        "WER against 2 human transcripts (100 reference tokens): student 4.00 %, teacher 4.00 %, difference 0.00 "
        "(-2.00 to 2.00) points."
    )
    assert draws.startswith("In brackets: 95 % paired bootstrap intervals over 2 utterances")
    assert warning == gap.warning
    assert end == ""


def test_other_utterances_are_refused() -> None:
    one, other = measured([1, 1], [1, 1], [9, 9]), measured([1, 1], [1, 1], [9, 9], keys=["u1", "u2"])

    with pytest.raises(ValueError, match=r"must be of the same utterances, got 2 and 2, 1 of them alike; measure both"):
        describe_gap(one, other, format="int8")
    twice = replace(one, keys=["u0", "u0"])
    with pytest.raises(ValueError, match=r"must be of the same utterances"):
        describe_gap(twice, twice, format="int8")


def test_distances_over_nothing_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"must be over response tokens, got none; measure utterances that can be read"
    ):
        gap_of(measured([1, 1], [1, 1], [9, 9], tokens_U=np.array([0, 0])))
