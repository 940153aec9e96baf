"""Intervals against the truth, where it is known (sets of 200 speakers, some hard to hear), and another program's."""

import kaldialign
import numpy as np
import pytest

from qad_dist.text.bootstrap import Interval, resample

NUM_SPEAKERS = 200
# Errors by reference words. Most of the teacher's are made by all three; the students avoid some, and add their own.
SHARED, TEACHER_ALONE = 0.08, 0.005


def simulated(
    generator: np.random.Generator, *, ptq_adds: float, qad_adds: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors of teacher, PTQ and QAD, words and speakers: one to seven utterances of about nine words each."""
    speakers = np.repeat(np.arange(NUM_SPEAKERS), generator.integers(1, 8, size=NUM_SPEAKERS))
    words = generator.poisson(8, size=speakers.size) + 1
    hard_words = words * generator.gamma(4.0, 0.25, size=NUM_SPEAKERS)[speakers]
    shared = generator.poisson(hard_words * SHARED)
    added = [generator.poisson(hard_words * rate) for rate in (TEACHER_ALONE, ptq_adds, qad_adds)]
    return np.stack([shared + its for its in added]), words, speakers


def intervals(*, ptq_adds: float, qad_adds: float, num_sets: int) -> dict[str, list[Interval]]:
    generator = np.random.default_rng(1)
    found: dict[str, list[Interval]] = {"rate": [], "difference": [], "recovered": []}
    for seed in range(num_sets):
        errors, words, speakers = simulated(generator, ptq_adds=ptq_adds, qad_adds=qad_adds)
        drawn = resample(errors, words, seed=seed, clusters=speakers, num_resamples=399)
        found["rate"].append(drawn.rate(2))
        found["difference"].append(drawn.difference(2, 0))
        share = drawn.recovered(best=0, lost=1, regained=2)
        if share is not None:
            found["recovered"].append(share)
    return found


def held(found: list[Interval], truth: float) -> float:
    return sum(interval.low <= truth <= interval.high for interval in found) / len(found)


def is_bounded(interval: Interval) -> bool:
    return bool(np.isfinite(interval.low) and np.isfinite(interval.high))


def test_95_of_100_intervals_hold_the_truth_of_a_clear_loss() -> None:
    # PTQ loses 0.025 to the teacher, 6 standard errors, and QAD wins back 0.018 of them.
    found = intervals(ptq_adds=0.03, qad_adds=0.012, num_sets=2000)

    # 0.005 is the standard error of 2,000 sets.
    assert 0.93 <= held(found["rate"], SHARED + 0.012) <= 0.97
    assert 0.93 <= held(found["difference"], 0.012 - TEACHER_ALONE) <= 0.97
    assert len(found["recovered"]) == 2000
    assert sum(map(is_bounded, found["recovered"])) > 1990
    assert 0.93 <= held(found["recovered"], 0.018 / 0.025) <= 0.97


def test_share_of_an_unclear_loss_is_mostly_unbounded_and_errs_on_the_safe_side() -> None:
    # PTQ loses 0.002, about one standard error. Sets that show no loss at all have no share.
    found = intervals(ptq_adds=0.007, qad_adds=0.006, num_sets=2000)

    bounded = [interval for interval in found["recovered"] if is_bounded(interval)]
    assert len(found["recovered"]) < 1900
    assert len(bounded) < 0.4 * len(found["recovered"])
    assert held(found["recovered"], 0.5) >= 0.95


@pytest.mark.parametrize("seed", range(40))
def test_a_share_is_bounded_exactly_where_the_loss_can_be_told_from_nothing(seed: int) -> None:
    errors, words, speakers = simulated(np.random.default_rng(seed), ptq_adds=0.011, qad_adds=0.008)
    drawn = resample(errors, words, seed=seed, clusters=speakers, num_resamples=399)

    share = drawn.recovered(best=0, lost=1, regained=2)

    is_clear = drawn.p_value(0, 1) <= 0.05 and drawn.rates_S[1] > drawn.rates_S[0]
    assert (share is not None and is_bounded(share)) == is_clear


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_intervals_and_p_values_agree_with_kaldialign(seed: int) -> None:
    generator = np.random.default_rng(seed)
    words = generator.integers(1, 20, size=600)
    # Every error is a word heard as another one, so that both count the same.
    is_wrong = [[generator.random(num) < rate for num in words] for rate in (0.12, 0.11)]
    references = [["right"] * num for num in words]
    heard = [[["wrong" if wrong else "right" for wrong in one] for one in its] for its in is_wrong]

    resampled = resample([[one.sum() for one in its] for its in is_wrong], words, seed=seed)
    theirs = kaldialign.bootstrap_wer_ci(references, heard[0], heard[1], replications=10_000, seed=seed)

    for system, name in enumerate(("system1", "system2")):
        rate = resampled.rate(system)
        # Theirs is mean and 1.96 deviations of 10,000 resamples, each known to 1 %; skewness moves both of our ends.
        assert rate.value == pytest.approx(theirs[name]["wer"], abs=0.05 * theirs[name]["ci95"])
        assert (rate.high - rate.low) / 2 == pytest.approx(theirs[name]["ci95"], rel=0.05)
        assert (rate.low + rate.high) / 2 == pytest.approx(theirs[name]["wer"], abs=0.1 * theirs[name]["ci95"])
    # Of resamples, those in which the second makes fewer errors; a share is known to 0.5 %, here as there. Draws, in
    # which both make equally many, are few.
    second_is_better = theirs["p_s2_improv_over_s1"]
    assert resampled.p_value(0, 1) == pytest.approx(2 * min(second_is_better, 1 - second_is_better), abs=0.04)
