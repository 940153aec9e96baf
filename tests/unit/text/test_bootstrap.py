import math
import os
import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest

from qad_dist.text.bootstrap import Interval, Resampled, resample, speaker_clusters


def scored(num_utterances: int, *, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Errors of two systems that find the same utterances hard, and reference words; all whole numbers."""
    generator = np.random.default_rng(seed)
    words = generator.integers(1, 20, size=num_utterances)
    hardness = generator.gamma(2.0, 0.5, size=num_utterances)
    return np.stack([generator.poisson(words * hardness * rate) for rate in (0.12, 0.10)]), words


def rates_one_by_one(errors: np.ndarray, words: np.ndarray, *, seed: int, num_resamples: int) -> list[list[float]]:
    """Rates of each system, a resample at a time, an utterance at a time."""
    generator = np.random.default_rng(seed)
    rates: list[list[float]] = [[] for _ in errors]
    for _ in range(num_resamples):
        drawn = generator.integers(len(words), size=len(words)).tolist()
        total = sum(words[place] for place in drawn)
        for system, its_errors in enumerate(errors):
            rates[system].append(sum(its_errors[place] for place in drawn) / total)
    return rates


def simulated(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors at true rates of 0.10 and 0.08, words and speakers of a set of 200 speakers, some of them hard to hear."""
    speakers = np.repeat(np.arange(200), generator.integers(1, 8, size=200))
    words = generator.poisson(8, size=speakers.size) + 1
    hardness = generator.gamma(4.0, 0.25, size=200)[speakers]
    return np.stack([generator.poisson(words * hardness * rate) for rate in (0.10, 0.08)]), words, speakers


def holds(interval: Interval | None, truth: float) -> bool:
    assert interval is not None
    return interval.low <= truth <= interval.high


# 1,500 utterances are drawn in several parts, 7 in one; rates of whole numbers have no rounding of their own.
@pytest.mark.parametrize(("num_utterances", "num_resamples"), [(7, 999), (1500, 399)])
def test_rates_are_those_of_drawing_utterances_one_by_one(num_utterances: int, num_resamples: int) -> None:
    errors, words = scored(num_utterances)

    resampled = resample(errors, words, seed=11, num_resamples=num_resamples)

    assert resampled.rates_SR.tolist() == rates_one_by_one(errors, words, seed=11, num_resamples=num_resamples)
    assert resampled.rates_S.tolist() == [errors[0].sum() / words.sum(), errors[1].sum() / words.sum()]


def test_intervals_leave_out_a_fortieth_of_the_sorted_values_at_each_end() -> None:
    errors, words = scored(30)
    first, second = rates_one_by_one(errors, words, seed=5, num_resamples=999)
    differences = sorted(a - b for a, b in zip(first, second, strict=True))
    ratios = sorted(a / b for a, b in zip(first, second, strict=True))

    resampled = resample(errors, words, seed=5, num_resamples=999)

    # Davison and Hinkley: of R sorted values the 0.025 (R + 1)-th from either end, here the 25th.
    value, other = errors.sum(1) / words.sum()
    assert resampled.rate(0) == Interval(low=sorted(first)[24], value=value, high=sorted(first)[-25])
    assert resampled.rate(1) == Interval(low=sorted(second)[24], value=other, high=sorted(second)[-25])
    assert resampled.difference(0, 1) == Interval(low=differences[24], value=value - other, high=differences[-25])
    assert resampled.ratio(0, 1) == Interval(low=ratios[24], value=value / other, high=ratios[-25])


def test_p_value_counts_the_resamples_on_the_other_side_of_zero() -> None:
    errors, words = scored(100, seed=1)
    first, second = rates_one_by_one(errors, words, seed=5, num_resamples=999)
    on_the_other_side = sum(a <= b for a, b in zip(first, second, strict=True))
    assert 10 < on_the_other_side < 400

    resampled = resample(errors, words, seed=5, num_resamples=999)

    assert resampled.p_value(0, 1) == resampled.p_value(1, 0) == 2 * (on_the_other_side + 1) / 1000


def test_p_value_is_never_zero() -> None:
    resampled = resample([[9, 8, 9, 8], [0, 1, 0, 1]], [10] * 4, seed=0, num_resamples=999)

    assert resampled.p_value(0, 1) == 2 / 1000


def test_p_value_of_two_utterances_is_that_of_their_four_draws() -> None:
    # The difference is 3 - 1 on the set; 3 twice, 3 and -1, -1 and 3, -1 twice are equally likely.
    resampled = resample([[3, 0], [0, 1]], [10, 10], seed=1)

    assert resampled.p_value(0, 1) == pytest.approx(2 / 4, abs=0.02)  # 4 standard errors of 10,000 draws
    assert np.mean(resampled.rates_SR[0] == 3 / 20) == pytest.approx(1 / 2, abs=0.02)


def test_p_value_is_at_most_five_percent_exactly_where_the_interval_leaves_zero_out() -> None:
    outcomes = set()

    for seed in range(300):
        errors, words = scored(60, seed=seed)
        resampled = resample(errors, words, seed=seed, num_resamples=200)
        difference = resampled.difference(0, 1)
        is_sure = difference.low > 0 or difference.high < 0
        outcomes.add(is_sure)
        assert is_sure == (resampled.p_value(0, 1) <= 0.05)
    assert outcomes == {True, False}


def test_intervals_agree_with_the_closed_forms_for_large_sets() -> None:
    errors, words = scored(3000)
    rates = errors.sum(1) / words.sum()
    # Delta method: a ratio of sums varies as the mean of these residuals does; its logarithm as they do by the rate.
    residuals = (errors - rates[:, None] * words) / words.mean()
    reach = 1.959964 / math.sqrt(3000)

    resampled = resample(errors, words, seed=2)

    # An end is known to 1 % of the reach by 10,000 resamples, and skewness shifts both by about as much.
    rate, difference, ratio = resampled.rate(0), resampled.difference(0, 1), resampled.ratio(0, 1)
    rate_reach, difference_reach = residuals[0].std() * reach, (residuals[0] - residuals[1]).std() * reach
    ratio_reach = (residuals[0] / rates[0] - residuals[1] / rates[1]).std() * reach
    assert ratio is not None
    assert rate.high - rate.low == pytest.approx(2 * rate_reach, rel=0.03)
    assert (rate.low, rate.high) == pytest.approx((rates[0] - rate_reach, rates[0] + rate_reach), abs=0.06 * rate_reach)
    assert difference.high - difference.low == pytest.approx(2 * difference_reach, rel=0.03)
    assert math.log(ratio.high / ratio.low) == pytest.approx(2 * ratio_reach, rel=0.03)


def test_standard_error_is_that_of_a_ratio_of_sums() -> None:
    errors, words = scored(3000)
    rates = errors.sum(1) / words.sum()
    residuals = (errors - rates[:, None] * words) / words.mean()  # delta method

    resampled = resample(errors, words, seed=2)

    # 10,000 resamples know it to 0.7 %.
    assert resampled.standard_error(0, 1) == pytest.approx((residuals[0] - residuals[1]).std() / 3000**0.5, rel=0.03)


def test_recovered_share_is_a_ratio_of_differences_of_the_same_draws() -> None:
    errors, words = scored(100, seed=1)
    errors = np.stack([errors[1], errors[1] + words, errors[1] + errors[0]])
    best, lost, regained = rates_one_by_one(errors, words, seed=5, num_resamples=999)
    shares = sorted((b - c) / (b - a) for a, b, c in zip(best, lost, regained, strict=True))

    share = resample(errors, words, seed=5, num_resamples=999).recovered(best=0, lost=1, regained=2)

    assert share is not None
    assert (share.low, share.high) == pytest.approx((shares[24], shares[-25]), abs=1e-9)
    assert share.value == pytest.approx(1 - errors[2].sum() / words.sum() + errors[0].sum() / words.sum())


def test_no_share_of_no_loss_is_recovered() -> None:
    resampled = resample([[1, 2, 0], [1, 2, 0], [2, 2, 0]], [5, 5, 5], seed=0)

    assert resampled.recovered(best=0, lost=1, regained=2) is None
    assert resampled.recovered(best=2, lost=1, regained=0) is None
    # In 8 of 27 draws nothing is lost.
    assert resampled.recovered(best=0, lost=2, regained=1) == Interval(low=-math.inf, value=1, high=math.inf)


def test_utterances_without_a_speaker_are_drawn_by_themselves() -> None:
    names = speaker_clusters(["a", None, "a", "1", None])

    assert names == ["speaker a", "utterance 1", "speaker a", "speaker 1", "utterance 4"]


@pytest.mark.parametrize("speakers", [["a", "a"], ["a", "b"], [None, None], ["a", None], ["a"], []])
def test_speakers_are_not_drawn_where_there_is_one_or_one_each(speakers: list[str | None]) -> None:
    assert speaker_clusters(speakers) is None


def test_equal_hardness_cancels_in_a_difference() -> None:
    errors, words = scored(200)

    resampled = resample([errors[0] + 2 * words, errors[0]], words, seed=0)

    difference = resampled.difference(0, 1)
    assert (difference.low, difference.value, difference.high) == pytest.approx((2, 2, 2), abs=1e-12)
    assert resampled.rate(0).high - resampled.rate(0).low > 0.02


def test_equal_errors_cancel_in_a_ratio() -> None:
    errors, words = scored(200)

    ratio = resample([0.05 * errors[0], errors[0]], words, seed=0).ratio(0, 1)

    assert ratio is not None
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((0.05, 0.05, 0.05), abs=1e-12)


def test_swapped_systems_swap_the_ends() -> None:
    resampled = resample(*scored(50), seed=4)

    forth, back = resampled.difference(0, 1), resampled.difference(1, 0)
    share, multiple = resampled.ratio(0, 1), resampled.ratio(1, 0)

    assert share is not None
    assert multiple is not None
    assert (back.low, back.value, back.high) == (-forth.high, -forth.value, -forth.low)
    assert (multiple.low, multiple.high) == pytest.approx((1 / share.high, 1 / share.low))


def test_rounding_makes_no_system_better() -> None:
    kl = np.random.default_rng(0).random(500)

    # Alike but for the order of an addition: (x + 0.1) + 0.2 is often not x + 0.3.
    resampled = resample([kl + 0.1 + 0.2, kl + (0.1 + 0.2)], np.ones(500), seed=0)

    assert resampled.difference(0, 1) == Interval(low=0, value=0, high=0)
    assert resampled.p_value(0, 1) == 1


def test_utterances_of_a_speaker_that_are_all_alike_count_as_one() -> None:
    errors, words = scored(40)
    names = [f"speaker-{number:02d}" for number in range(40)]

    once = resample(errors, words, seed=6)
    # Three times the errors by three times the words, so that there is no rounding either.
    thrice = resample(np.repeat(errors, 3, axis=1), np.repeat(words, 3), seed=6, clusters=np.repeat(names, 3))

    assert thrice.rates_SR.tolist() == once.rates_SR.tolist()
    assert (once.num_clusters, thrice.num_clusters) == (40, 40)


def test_a_speaker_is_drawn_with_all_its_utterances() -> None:
    # Sums of "a": 1 of 3 and 4 of 5; of "b": 6 of 10. Twice "a", one of each, twice "b".
    resampled = resample([[1, 6, 0]], [1, 10, 2], seed=0, clusters=["a", "b", "a"], num_resamples=200)

    assert set(resampled.rates_SR[0]) == {2 / 6, 7 / 13, 12 / 20}


def test_draws_of_speakers_do_not_depend_on_the_order_of_the_utterances() -> None:
    errors, words = scored(60)
    speakers = np.random.default_rng(1).integers(12, size=60)
    shuffled = np.random.default_rng(2).permutation(60)

    given = resample(errors, words, seed=6, clusters=speakers)
    other = resample(errors[:, shuffled], words[shuffled], seed=6, clusters=speakers[shuffled])

    assert given.rates_SR.tolist() == other.rates_SR.tolist()


def test_seed_alone_decides_the_draws() -> None:
    errors, words = scored(65)

    given, again, other = (resample(errors, words, seed=seed).rates_SR for seed in (8, 8, 9))

    assert np.array_equal(given, again)
    assert not np.array_equal(given, other)


KL_RATES = """
import numpy as np
from qad_dist.text.bootstrap import resample
kl_SU = np.random.default_rng(0).random((4, 3000))
print(resample(kl_SU, np.arange(1, 3001), seed=0, num_resamples=1000).rates_SR.tobytes().hex())
"""


def test_rates_are_the_same_to_the_last_digit_on_any_number_of_threads() -> None:
    one, two = (
        subprocess.run(
            [sys.executable, "-c", KL_RATES],
            env=os.environ | {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2")
    )

    assert len(one) > 4 * 1000 * 16
    assert one == two


def coverage(*, by_speaker: bool, num_sets: int) -> dict[str, float]:
    generator = np.random.default_rng(1)
    found = {"rate": 0, "difference": 0, "ratio": 0}
    for seed in range(num_sets):
        errors, words, speakers = simulated(generator)
        drawn: Resampled = resample(
            errors, words, seed=seed, clusters=speakers if by_speaker else None, num_resamples=399
        )
        found["rate"] += holds(drawn.rate(0), 0.10)
        found["difference"] += holds(drawn.difference(0, 1), 0.02)
        found["ratio"] += holds(drawn.ratio(0, 1), 1.25)
    return {name: count / num_sets for name, count in found.items()}


def test_95_of_100_intervals_hold_the_truth() -> None:
    held = coverage(by_speaker=True, num_sets=2000)

    # 0.005 is the standard error of 2,000 sets.
    assert all(0.93 <= share <= 0.97 for share in held.values()), held


def test_intervals_of_a_rate_fall_short_where_speakers_are_left_out() -> None:
    assert coverage(by_speaker=False, num_sets=300)["rate"] < 0.91


def test_an_utterance_without_a_reference_adds_its_insertions() -> None:
    resampled = resample([[2, 1, 0]], [0, 10, 10], seed=0, num_resamples=500)

    assert resampled.rates_S.tolist() == [3 / 20]
    # By how often the first, second and third are drawn; 3 times the first leaves nothing to divide by.
    assert set(resampled.rates_SR[0]) == {
        *(0 / 30, 1 / 30, 2 / 30, 3 / 30, 2 / 20, 3 / 20, 4 / 20, 4 / 10, 5 / 10),
    }


def test_resamples_without_a_reference_are_left_out() -> None:
    resampled = resample([[1, 1]], [0, 4], seed=0)

    assert set(resampled.rates_SR[0]) == {2 / 4, 2 / 8}
    assert resampled.rates_SR.shape[1] == pytest.approx(7500, abs=180)  # 4 standard errors of 10,000 draws
    assert resampled.rate(0) == Interval(low=2 / 8, value=2 / 4, high=2 / 4)


def test_a_ratio_to_a_system_without_errors_does_not_exist() -> None:
    resampled = resample([[1, 2, 0], [0, 0, 0]], [5, 5, 5], seed=0)

    assert resampled.ratio(0, 1) is None
    assert resampled.ratio(1, 0) == Interval(low=0, value=0, high=math.inf)


def test_a_ratio_has_no_upper_end_where_the_other_system_may_make_no_errors() -> None:
    # In 8 of 27 draws the second system makes no error, in 1 of 27 neither makes any: more than 2.5 % all the same.
    ratio = resample([[1, 1, 0], [0, 3, 0]], [5, 5, 5], seed=0).ratio(0, 1)

    assert ratio == Interval(low=0, value=2 / 3, high=math.inf)


def test_a_ratio_is_bounded_below_where_only_the_first_system_always_makes_errors() -> None:
    ratio = resample([[1, 1], [0, 2]], [5, 5], seed=0).ratio(0, 1)

    assert ratio == Interval(low=0.5, value=1.0, high=math.inf)


def test_memory_does_not_grow_with_resamples() -> None:
    errors, words = scored(20_000)
    tracemalloc.start()

    resample(errors, words, seed=0, num_resamples=1000)  # all draws at once would take 160 MB

    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 12e6


@pytest.mark.parametrize(
    ("errors", "words", "changes", "message"),
    [
        ([1, 2], [3, 4], {}, r"numerators_SU must have a row for each system and 2 columns, got shape \(2,\); "),
        ([[1, 2, 3]], [3, 4], {}, r"numerators_SU must have .* 2 columns, got shape \(1, 3\); give them for the same"),
        ([[1, 2]], [[3, 4]], {}, r"denominators_U must have one dimension, got shape \(1, 2\); give one for each utt"),
        ([[1, 2], [1, math.nan]], [3, 4], {}, r"numerators_SU must be finite, got nan at \[1, 1\]; leave this utteran"),
        ([[1, 2]], [3, math.inf], {}, r"denominators_U must be finite, got inf at \[1\]; leave this utterance out"),
        ([[1, 2]], [3, -4], {}, r"denominators_U must be at least 0, got -4.0 at \[1\]; count words or tokens"),
        ([[1, 2]], [0, 0], {}, "denominators_U must not all be 0, got 2 of them; there is no rate without a reference"),
        ([[1]], [3], {}, "resample needs at least 2 to draw from, got 1 utterances; score more"),
        ([[]], [], {}, "denominators_U must not all be 0, got 0 of them; there is no rate without a reference"),
        ([[1, 2]], [3, 4], {"clusters": ["a"]}, r"clusters must name one for each of 2 utterances, got shape \(1,\); "),
        ([[1, 2]], [3, 4], {"clusters": ["a", None]}, "clusters must be strings or whole numbers, got object; give an"),
        ([[1, 2]], [3, 4], {"clusters": ["a", "a"]}, "resample needs at least 2 to draw from, got 1 clusters; leave"),
        ([[1, 2]], [3, 4], {"num_resamples": 38}, "num_resamples must be at least 39, got 38; raise it"),
        (
            [[1, 2]],
            [0, 4],
            {"num_resamples": 39},
            r"denominators_U must be above 0 in .* 39 resamples, got \d\d of 39; raise",
        ),
        ([[1, 2]], [3, 4], {"num_resamples": 0}, "num_resamples must be at least 39, got 0; raise it"),
    ],
)
def test_what_cannot_be_resampled_is_refused(errors: Any, words: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        resample(errors, words, seed=0, **changes)


def test_forty_less_one_resamples_give_an_interval_of_all_of_them() -> None:
    resampled = resample(*scored(30), seed=0, num_resamples=39)

    rate = resampled.rate(0)
    assert (rate.low, rate.high) == (min(resampled.rates_SR[0]), max(resampled.rates_SR[0]))
