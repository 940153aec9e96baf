import json
import math
from typing import Any

import numpy as np
import pytest

from qad_dist.text.bootstrap import resample
from qad_dist.text.significance import compare_systems, holm
from qad_dist.text.significance_words import NonInferiority, Pair, Significance

# Normal distribution: 97.5 % lie below the first, 80 % below the second.
Z_TWO_SIDED, Z_POWER = 1.959964, 0.841621


def compared(errors: dict[str, Any], words: Any, speakers: Any = None, **changes: Any) -> Significance:
    words = np.asarray(words, np.int64)
    return compare_systems(
        {name: np.asarray(its, np.int64) for name, its in errors.items()},
        words,
        [None] * len(words) if speakers is None else speakers,
        **{"unit": "WER", "margin": 0.1, "seed": 0, "num_resamples": 999} | changes,
    )


def extra_errors(num: int, *, worse: float, better: float, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A teacher at 5 %, and a student with errors of its own at one rate, and the teacher's avoided at another."""
    generator = np.random.default_rng(seed)
    words = generator.integers(5, 16, size=num)
    shared, avoided, added = (generator.poisson(words * rate) for rate in (0.05, better, worse))
    return {"teacher": shared + avoided, "ptq": shared + added}, words


def speakers_of(words: np.ndarray, *, num_speakers: int = 200) -> list[str]:
    """Of as many utterances each: there is less to draw, and a test takes less time."""
    return [f"s{place % num_speakers}" for place in range(len(words))]


def pair_of(found: Significance, first: str, second: str) -> Pair:
    return next(pair for pair in found.pairs if (pair.first, pair.second) == (first, second))


def test_every_pair_is_the_bootstraps_own_difference_and_p_value() -> None:
    generator = np.random.default_rng(1)
    words = generator.integers(1, 20, size=200)
    errors = {name: generator.poisson(words * rate) for name, rate in (("teacher", 0.1), ("ptq", 0.13), ("qad", 0.11))}
    speakers = [f"s{place % 60}" for place in range(200)]

    found = compared(errors, words, speakers, seed=7)

    drawn = resample(np.stack(list(errors.values())), words, seed=7, clusters=np.array(speakers), num_resamples=999)
    # The names of the clusters differ, "s1" here and "speaker s1" there, their order does not.
    assert found.rates == {"teacher": drawn.rate(0), "ptq": drawn.rate(1), "qad": drawn.rate(2)}
    assert [(p.first, p.second, p.difference, p.p_value) for p in found.pairs] == [
        ("teacher", "ptq", drawn.difference(0, 1), drawn.p_value(0, 1)),
        ("teacher", "qad", drawn.difference(0, 2), drawn.p_value(0, 2)),
        ("ptq", "qad", drawn.difference(1, 2), drawn.p_value(1, 2)),
    ]
    assert found.non_inferiority["ptq"].difference == drawn.difference(1, 0)
    assert list(found.non_inferiority) == ["ptq", "qad"]
    assert (found.num_clusters, found.is_by_speaker, found.utterances) == (60, True, 200)
    assert found.reference_tokens == words.sum()
    assert found.errors == {name: its.sum() for name, its in errors.items()}


def test_two_utterances_by_hand() -> None:
    # Teacher 0 + 2, student 3 + 1 errors of 10 + 10 words; draws: both, or one of them twice.
    found = compared({"teacher": [0, 2], "ptq": [3, 1]}, [10, 10], num_resamples=9999)

    pair = found.pairs[0]
    assert pair.difference is not None
    assert (pair.difference.low, pair.difference.value, pair.difference.high) == pytest.approx((-0.3, -0.1, 0.1))
    # Differences -3, -1 and 1 errors in 20 words with chances 1/4, 1/2 and 1/4 (of the rates -0.3, -0.1, 0.1).
    assert pair.p_value == pytest.approx(2 * 1 / 4, abs=0.02)  # 4 standard errors of 10,000 draws
    deviation = math.sqrt(1 / 2 * 0.2**2)
    # 4 standard errors of a deviation from 10,000 draws are 2 %, doubled by the square.
    assert pair.words_to_see == pytest.approx(20 * ((Z_TWO_SIDED + Z_POWER) * deviation / 0.1) ** 2, rel=0.06)
    told = "\n".join(found.sentences())
    assert "ptq is worse than teacher by 10.00 points of WER here, but ptq may be anything from" in told
    assert "from 10.00 points better to 30.00 points worse. If this is the true difference, about" in told
    assert "not shown either way: it may be 10.00 points better or 30.00 points worse." in told


def test_holm_by_hand() -> None:
    # 0.01 x 4 = 0.04; 0.02 x 3 = 0.06; 0.025 x 2 = 0.05, never below the one before; 0.6 x 1.
    assert holm([0.02, 0.6, 0.01, 0.025]) == pytest.approx([0.06, 0.6, 0.04, 0.06])
    assert holm([0.7, 0.4]) == pytest.approx([0.8, 0.8])
    assert holm([0.9, 0.8, 0.7]) == [1, 1, 1]
    assert holm([]) == []


def test_more_than_three_systems_are_told_apart_only_after_holms_correction() -> None:
    for seed in range(60):
        errors, words = extra_errors(500, worse=0.009, better=0.004, seed=seed)
        alone = compared(errors, words).pairs[0]
        assert alone.p_value is not None
        if 0.05 / 3 < alone.p_value <= 0.05:
            break
    three = errors | {"qad": errors["teacher"]}
    four = three | {"other": errors["teacher"]}

    assert alone.is_told_apart and alone.p_adjusted == alone.p_value
    among_three, among_six = compared(three, words), compared(four, words)
    assert pair_of(among_three, "teacher", "ptq").is_told_apart
    pair = pair_of(among_six, "teacher", "ptq")
    # Three pairs have this same p-value, the three of equal systems have 1: 6 times the smallest.
    assert pair.p_adjusted == pytest.approx(6 * alone.p_value)
    assert not pair.is_told_apart
    told = among_six.sentences()
    assert any(line.startswith("teacher and ptq cannot be told apart: ptq is ") for line in told)
    assert any("which would do for one pair alone, but of 6 pairs some differ so much by chance." in x for x in told)
    assert any("Holm's correction" in line for line in told)
    assert not any("Holm" in line for line in among_three.sentences())
    assert "0 of 6 pairs of systems can be told apart" in among_six.summary_sentence()


def test_four_equal_systems_are_rarely_told_apart() -> None:
    generator = np.random.default_rng(2)
    alone = together = 0
    for seed in range(400):
        words = generator.integers(5, 16, size=200)
        errors = {name: generator.poisson(words * 0.1) for name in "abcd"}
        found = compared(errors, words, seed=seed, num_resamples=399)
        alone += any(pair.p_value is not None and pair.p_value <= 0.05 for pair in found.pairs)
        together += any(pair.is_told_apart for pair in found.pairs)

    # 400 sets know 5 % to 1.1; with 399 resamples p-values are multiples of 0.005, and six times them of 0.03.
    assert together / 400 <= 0.05 + 3 * 0.011
    assert alone / 400 > 0.12


def test_recovered_share_by_hand() -> None:
    # 10 utterances that are all alike: 1, 5 and 2 errors each; 3 of the 4 that are lost come back in every draw.
    found = compared({"teacher": [1] * 10, "ptq": [5] * 10, "qad": [2] * 10}, [20] * 10)

    assert found.recovered is not None
    ends = (found.recovered.low, found.recovered.value, found.recovered.high)
    assert ends == pytest.approx((0.75, 0.75, 0.75), abs=1e-12)
    assert (
        "Share of ptq's loss to teacher that qad wins back: 75 % (75 to 75), 100 % being as good as teacher."
        in found.sentences()
    )


def test_a_share_of_a_loss_that_may_be_nothing_has_no_ends_and_means_little() -> None:
    found = compared({"teacher": [0, 1, 0, 0], "ptq": [1, 0, 1, 0], "qad": [0, 1, 0, 0]}, [20] * 4)

    assert found.recovered is not None
    assert (found.recovered.low, found.recovered.value, found.recovered.high) == (-math.inf, 1, math.inf)
    assert not found.is_loss_clear
    assert found.as_json()["recovered"] == {"low": None, "value": 1, "high": None}
    assert any(
        line.endswith("the loss itself cannot be told from nothing, so that this share means little.")
        for line in found.sentences()
    )
    assert "wins back" not in found.summary_sentence()


def test_nothing_is_won_back_where_nothing_was_lost() -> None:
    found = compared({"teacher": [2, 1, 0, 0], "ptq": [1, 2, 0, 0], "qad": [0, 1, 0, 0]}, [20] * 4)

    assert found.recovered is None
    assert "ptq makes no more errors than teacher, so that qad has nothing to win back." in found.sentences()


def test_names_decide_who_is_held_against_whom() -> None:
    errors = {"big": [1] * 10, "small": [5] * 10, "tuned": [2] * 10}

    found = compared(errors, [20] * 10, teacher="big", lost="small", regained="tuned")
    unknown = compared(errors, [20] * 10)

    assert found.recovered is not None and found.recovered.value == pytest.approx(0.75)
    assert list(found.non_inferiority) == ["small", "tuned"]
    assert (unknown.recovered, unknown.non_inferiority, unknown.teacher) == (None, {}, None)
    assert len(unknown.pairs) == 3


@pytest.mark.parametrize(
    ("margin", "verdict", "words"),
    [
        # 20 more errors in 4,000 words, one in each of 20 utterances of 400: 0.5 points, 2 sqrt(20) / 40 = 0.22 around.
        (0.2, "inferior", "ptq loses more than 0.20 points of WER to teacher: at least 0."),
        (
            0.5,
            "not shown either way",
            "Whether ptq loses 0.50 points of WER to teacher is not shown either way: it may",
        ),
        (1.0, "not inferior", "ptq loses less than 1.00 points of WER to teacher: at worst it is 0."),
    ],
)
def test_verdict_is_where_the_interval_lies_to_the_margin(margin: float, verdict: str, words: str) -> None:
    found = compared({"teacher": [1] * 400, "ptq": [2] * 20 + [1] * 380}, [10] * 400, margin=margin)

    assert found.non_inferiority["ptq"].verdict == verdict
    assert any(line.startswith(words) for line in found.sentences())


def test_no_system_is_not_inferior_whose_interval_reaches_the_margin() -> None:
    # Two utterances of 400 with 100 errors more: one resample in 40 has them 5 times, 500 errors in 4,000 words, while
    # 1.96 deviations are 200 + 1.96 x 100 x sqrt(2) = 477.
    found = compared({"teacher": [0] * 400, "ptq": [100] * 2 + [0] * 398}, [10] * 400, margin=12.2, num_resamples=9999)

    against = found.non_inferiority["ptq"]
    assert against.difference is not None and against.difference.high == 0.125
    assert against.verdict == "not shown either way"


@pytest.mark.parametrize(("num_words", "verdict"), [(3_800, "not shown either way"), (3_900, "not inferior")])
def test_equal_outputs_show_little_in_few_words(num_words: int, verdict: str) -> None:
    # A count of 3.84 = 1.96 squared may show none: at 0.1 points that takes 3,842 words.
    found = compared({"teacher": [1] * 100, "ptq": [1] * 100}, [num_words // 100] * 100)

    assert found.non_inferiority["ptq"] == NonInferiority(difference=None, verdict=verdict)  # type: ignore[arg-type]
    assert found.pairs[0].p_value == 1
    assert (found.pairs[0].difference, found.pairs[0].words_to_see) == (None, None)
    told = "teacher and ptq make equally many errors in each utterance, so that nothing tells them apart."
    assert told in found.sentences()


@pytest.mark.parametrize(
    ("num_words", "worse", "better"),
    [(10_000, 0.021, 0.020), (10_000, 0.001, 0.0)],
    ids=["410 errors both ways", "10 errors one way"],
)
def test_a_system_that_loses_the_margin_is_rarely_found_not_inferior(
    num_words: int, worse: float, better: float
) -> None:
    verdicts = []
    for seed in range(2000):
        errors, words = extra_errors(num_words // 10, worse=worse, better=better, seed=seed)
        found = compared(errors, words, speakers_of(words), seed=seed, num_resamples=199)
        verdicts.append(found.non_inferiority["ptq"].verdict)

    # 2.5 % by construction; 2,000 sets know it to 0.35 %, and 199 resamples add 0.3 %.
    assert verdicts.count("not inferior") / 2000 <= 0.025 + 3 * 0.0035 + 0.003
    assert verdicts.count("inferior") / 2000 <= 0.025 + 3 * 0.0035 + 0.003


def test_a_difference_is_seen_in_four_of_five_tests_of_as_many_words_as_it_would_take() -> None:
    errors, words = extra_errors(100_000, worse=0.008, better=0.005, seed=1)
    pilot = compared(errors, words, speakers_of(words, num_speakers=5_000))
    needed = pilot.pairs[0].words_to_see
    assert needed is not None
    # Independent counts: a word varies by 0.008 + 0.005, the difference is 0.003.
    assert needed == pytest.approx((Z_TWO_SIDED + Z_POWER) ** 2 * 0.013 / 0.003**2, rel=0.10)
    assert needed < pilot.reference_tokens / 50

    seen = 0
    for seed in range(1000):
        errors, words = extra_errors(needed // 10, worse=0.008, better=0.005, seed=10_000 + seed)
        seen += compared(errors, words, speakers_of(words), seed=seed, num_resamples=399).pairs[0].is_told_apart

    # 1,000 sets know 80 % to 1.3; the pilot knows the words to 8 %, which is 3 % of the chance.
    assert seen / 1000 == pytest.approx(0.80, abs=0.06)


def test_words_that_it_would_take_are_told_where_a_difference_is_not_seen() -> None:
    errors, words = extra_errors(300, worse=0.006, better=0.005, seed=5)
    found = compared(errors, words)
    pair = found.pairs[0]
    assert not pair.is_told_apart and pair.words_to_see is not None

    told = next(line for line in found.sentences() if line.startswith("teacher and ptq cannot be told apart: "))

    assert f"about {float(f'{pair.words_to_see:.2g}'):,.0f} words of such speech" in told
    assert "four of five tests" in told
    errors, words = extra_errors(3000, worse=0.02, better=0.005, seed=5)
    assert not any("four of five" in line for line in compared(errors, words).sentences())


def test_words_say_which_system_is_better_and_by_how_much() -> None:
    # 1 of 20 words more in every utterance: 5 points, whatever is drawn.
    found = compared({"teacher": [1] * 60, "ptq": [2] * 60, "qad": [1] * 60}, [20] * 60)

    assert found.sentences() == [
        "WER on 60 utterances (1,200 words): teacher 5.00 % (5.00 to 5.00), ptq 10.00 % (10.00 to 10.00), "
        "qad 5.00 % (5.00 to 5.00).",
        "ptq is worse than teacher by 5.00 points of WER (5.00 to 5.00).",
        "teacher and qad make equally many errors in each utterance, so that nothing tells them apart.",
        "qad is better than ptq by 5.00 points of WER (5.00 to 5.00).",
        "Share of ptq's loss to teacher that qad wins back: 100 % (100 to 100), 100 % being as good as teacher.",
        "ptq loses more than 0.10 points of WER to teacher: at least 5.00.",
        "Whether qad loses 0.10 points of WER to teacher is not shown either way: on so few words it would be 1.2 "
        "errors, which chance may hide.",
        "In brackets: 95 % paired bootstrap intervals over 60 utterances.",
    ]
    assert found.summary_sentence() == (
        "WER on 1,200 words: ptq is worse than teacher by 5.00 points; qad is better than ptq by 5.00 points; cannot "
        "be told apart: teacher and qad; share of the loss that qad wins back: 100 % (100 to 100)."
    )


def test_few_speakers_are_warned_of() -> None:
    errors, words = extra_errors(196, worse=0.03, better=0.0, seed=1)

    few = compared(errors, words, [f"s{place % 49}" for place in range(196)])
    enough = compared(errors, words, [f"s{place % 50}" for place in range(196)])

    assert (few.is_too_narrow, enough.is_too_narrow) == (True, False)
    assert few.as_json()["is_too_narrow"] is True
    line = "In brackets: 95 % paired bootstrap intervals over 49 speakers; with fewer than 50 they are too narrow."
    assert line in few.sentences()
    assert "fewer than 50 speakers, so less sure than it looks" in few.summary_sentence()
    assert "fewer than" not in "".join(enough.sentences()) + enough.summary_sentence()


def test_one_speaker_is_drawn_by_utterances_and_warned_of() -> None:
    errors, words = extra_errors(100, worse=0.03, better=0.0, seed=1)

    found, unnamed = compared(errors, words, ["anna"] * 100), compared(errors, words)

    assert (found.rates, found.pairs) == (unnamed.rates, unnamed.pairs)
    assert (found.num_clusters, found.is_by_speaker) == (100, False)
    assert any(line.startswith("All utterances are by one speaker") for line in found.sentences())
    assert not any("one speaker" in line for line in unnamed.sentences())


@pytest.mark.parametrize(
    ("errors", "words", "unit", "why"),
    [
        ([3], [20], "WER", "One utterance cannot tell systems apart: how much another would differ is not known."),
        ([3, 1], [0, 0], "CER", "The references have no characters, so that there is no rate and nothing to compare."),
        (
            [],
            [],
            "WER/CER",
            "The references have no words and characters, so that there is no rate and nothing to com",
        ),
    ],
)
def test_where_nothing_can_be_drawn_there_are_no_intervals_and_words_say_why(
    errors: list[int], words: list[int], unit: str, why: str
) -> None:
    found = compared({"teacher": errors, "ptq": errors, "qad": errors}, words, unit=unit)

    assert list(found.rates.values()) == [None] * 3
    assert [(p.difference, p.p_value, p.p_adjusted, p.words_to_see) for p in found.pairs] == [(None,) * 4] * 3
    assert not any(pair.is_told_apart for pair in found.pairs)
    assert found.recovered is None
    assert {against.verdict for against in found.non_inferiority.values()} == {"not shown either way"}
    assert len(found.sentences()) == 2 and found.sentences()[1].startswith(why)
    assert found.summary_sentence().endswith(": too few to tell systems apart.")
    json.dumps(found.as_json(), allow_nan=False)


def test_no_error_at_all_is_no_proof_of_none() -> None:
    found = compared({"teacher": [0] * 50, "ptq": [0] * 50}, [20] * 50)

    assert found.rates == {"teacher": None, "ptq": None}
    assert "teacher and ptq make no error, so that nothing tells them apart." in found.sentences()
    # 3.69 = -ln 0.025 errors in 1,000 words.
    told = "No error does not mean that there never is one: teacher, ptq may have up to 0.37 %."
    assert told in found.sentences()


def test_one_system_has_a_rate_and_nothing_to_compare() -> None:
    found = compared({"teacher": [1, 0, 2]}, [10, 10, 10], unit="WER/CER")

    assert found.pairs == [] and found.non_inferiority == {} and found.recovered is None
    assert found.rates["teacher"] is not None and found.rates["teacher"].value == pytest.approx(0.1)
    assert found.sentences()[0].startswith("WER/CER on 3 utterances (30 words and characters): teacher 10.00 % (")
    assert "one system, nothing to compare" in found.summary_sentence()


def test_json_holds_what_was_found_as_plain_numbers() -> None:
    errors, words = extra_errors(100, worse=0.03, better=0.01, seed=1)

    stored = json.loads(json.dumps(compared(errors, words).as_json(), allow_nan=False))

    assert stored["errors"] == {name: int(its.sum()) for name, its in errors.items()}
    assert stored["rates"]["ptq"]["value"] == errors["ptq"].sum() / words.sum()
    pair = stored["pairs"][0]
    assert pair["difference"]["value"] == pytest.approx((errors["teacher"] - errors["ptq"]).sum() / words.sum())
    assert stored["non_inferiority"]["ptq"]["verdict"] in ("inferior", "not shown either way")
    assert (stored["unit"], stored["margin"], stored["utterances"]) == ("WER", 0.1, 100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"errors": {}}, "errors_U must hold at least one system, got none; score one first"),
        (
            {"errors": {"qad": [1]}},
            r"qad must hold a number for each of 2 utterances, got shape \(1,\); score all sys",
        ),
        ({"words": [3, 4, 5]}, r"reference_tokens_U must hold .* 2 utterances, got shape \(3,\); score all systems on"),
        ({"margin": -0.1}, "margin must be at least 0 points and finite, got -0.1; 0.1 is one error in 1,000 words"),
        ({"margin": math.nan}, "margin must be at least 0 points and finite, got nan; "),
        ({"num_resamples": 38}, "num_resamples must be at least 39, got 38; raise it"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"errors": {"qad": [1, 2]}, "words": [3, 4], "speakers": [None, None]} | changes

    with pytest.raises(ValueError, match="^" + message):
        compared(**arguments)
