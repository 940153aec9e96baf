import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.mixture import Mixture

# 90 and 10 utterances of an hour each.
LARGE_AND_SMALL = np.repeat([0, 1], [90, 10])


def mixture(languages=LARGE_AND_SMALL, seconds=None, *, temperature=1.0, max_hours_per_language=None):
    seconds = np.full(len(languages), 3600.0) if seconds is None else seconds
    return Mixture(languages, seconds, temperature=temperature, max_hours_per_language=max_hours_per_language)


def counts_of(mixed, *, num_epochs, seed=0):
    """How often each utterance came in the first epochs, and in the last of them."""
    epochs = [np.bincount(mixed.indices(seed=seed, epoch=e), minlength=len(mixed.languages)) for e in range(num_epochs)]
    return sum(epochs), epochs[-1]


def test_at_temperature_1_without_a_cap_every_utterance_comes_once():
    languages = np.random.default_rng(0).integers(0, 30, 1000)
    seconds = np.random.default_rng(1).uniform(1, 30, 1000)

    for epoch in range(3):
        assert mixture(languages, seconds).indices(seed=4, epoch=epoch).tolist() == list(range(1000))


def test_temperature_2_shares_the_hours_by_their_square_roots():
    # 90 and 10 hours: roots are 3 : 1, so 75 and 25 of the 100 hours.
    mixed = mixture(temperature=2.0)

    total, _ = counts_of(mixed, num_epochs=1)

    assert total[:90].sum() == 75
    assert set(total[:90]) == {0, 1}
    assert total[90:].sum() == 25
    assert sorted(total[90:]) == [2] * 5 + [3] * 5
    large, small = mixed.shares()
    assert (large.language, large.num_utterances, large.hours, large.hours_per_epoch) == (0, 90, 90, 75)
    assert (large.share, large.times) == (0.75, 75 / 90)
    assert (small.language, small.num_utterances, small.hours, small.hours_per_epoch) == (1, 10, 10, 25)
    assert (small.share, small.times) == (0.25, 2.5)


def test_hours_count_and_not_utterances():
    # 60 utterances of half an hour and 10 of 3 hours are 30 hours each: nothing to even out.
    languages, seconds = np.repeat([0, 1], [60, 10]), np.repeat([1800.0, 10_800.0], [60, 10])

    assert mixture(languages, seconds, temperature=5.0).indices(seed=0, epoch=0).tolist() == list(range(70))


def test_a_cap_cuts_what_a_language_brings_and_leaves_the_others_as_they_were():
    total, _ = counts_of(mixture(max_hours_per_language=40), num_epochs=1)

    assert total[:90].sum() == 40
    assert total[90:].tolist() == [1] * 10


def test_a_cap_applies_to_what_the_temperature_gives():
    total, _ = counts_of(mixture(temperature=2.0, max_hours_per_language=20), num_epochs=1)

    assert total[:90].sum() == 20
    assert total[90:].tolist() == [2] * 10


def test_every_language_brings_at_least_one_utterance_an_epoch():
    total, _ = counts_of(mixture(max_hours_per_language=0.001), num_epochs=1)

    assert (total[:90].sum(), total[90:].sum()) == (1, 1)


def test_which_utterances_come_once_more_rotates_through_all_of_them():
    # 40 of 90 an epoch: after 9 epochs 4 times each, and until then never two more than another.
    mixed = mixture(max_hours_per_language=40)

    for num_epochs in range(1, 10):
        total, _ = counts_of(mixed, num_epochs=num_epochs)
        assert total[:90].sum() == 40 * num_epochs
        assert total[:90].max() == -(-40 * num_epochs // 90)
        assert total[:90].min() == 40 * num_epochs // 90


tables = st.lists(st.tuples(st.integers(0, 3), st.floats(0.5, 30)), min_size=1, max_size=60)


@given(
    tables,
    st.floats(1, 20),
    st.one_of(st.none(), st.floats(0.001, 0.2)),
    st.integers(1, 7),
    st.integers(0, 2**32),
)
@settings(max_examples=200)
def test_after_any_epochs_each_utterance_came_as_often_as_the_rule_says(table, temperature, cap, num_epochs, seed):
    languages, seconds = np.array([language for language, _ in table]), np.array([s for _, s in table])
    mixed = mixture(languages, seconds, temperature=temperature, max_hours_per_language=cap)
    hours = {language: sum(seconds[languages == language]) / 3600 for language in set(languages.tolist())}
    powers = {language: h ** (1 / temperature) for language, h in hours.items()}

    total, last = counts_of(mixed, num_epochs=num_epochs, seed=seed)

    for language, power in powers.items():
        own = languages == language
        num = int(own.sum())
        wanted = sum(hours.values()) * power / sum(powers.values())
        exact = min(wanted, np.inf if cap is None else cap) / hours[language] * num
        appearances = int(last[own].sum())
        assert abs(appearances - exact) <= 0.5 + 1e-5 or (appearances == 1 and exact < 1)
        assert set(last[own]) <= {appearances // num, -(-appearances // num)}
        assert set(total[own]) <= {num_epochs * appearances // num, -(-num_epochs * appearances // num)}


def test_the_rotation_follows_the_seed_and_is_not_the_order_of_the_table():
    mixed = mixture(max_hours_per_language=40)
    firsts = [set(mixed.indices(seed=seed, epoch=0).tolist()) - set(range(90, 100)) for seed in range(3)]

    assert all(first != second for first, second in itertools.combinations(firsts, 2))
    assert all(first != set(range(40)) for first in firsts)


def test_the_order_of_a_language_does_not_depend_on_the_numbers_of_the_codes():
    swapped = mixture(1 - LARGE_AND_SMALL, temperature=2.0)

    assert swapped.indices(seed=3, epoch=1).tolist() == mixture(temperature=2.0).indices(seed=3, epoch=1).tolist()


def test_a_code_without_utterances_is_no_language():
    with np.errstate(all="raise"):
        mixed = mixture(2 * LARGE_AND_SMALL, temperature=2.0)
        indices, shares = mixed.indices(seed=0, epoch=0), mixed.shares()

    assert [share.language for share in shares] == [0, 2]
    assert indices.tolist() == mixture(temperature=2.0).indices(seed=0, epoch=0).tolist()


def test_a_table_without_utterances_brings_nothing():
    with np.errstate(all="raise"):
        mixed = mixture([], temperature=2.0)

    assert mixed.shares() == []
    assert len(mixed.indices(seed=0, epoch=0)) == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1000.0])
def test_an_epoch_keeps_the_hours_of_the_data(temperature):
    random = np.random.default_rng(2)
    languages = random.choice(5, 5000, p=[0.6, 0.25, 0.1, 0.04, 0.01])
    seconds = random.uniform(1, 30, 5000)

    shares = mixture(languages, seconds, temperature=temperature).shares()

    # Each language is rounded to whole utterances, of 15 s.
    assert sum(share.hours_per_epoch for share in shares) * 3600 == pytest.approx(seconds.sum(), abs=5 * 15)
    assert sum(share.share for share in shares) == pytest.approx(1)
    if temperature == 1000:
        assert [share.share for share in shares] == pytest.approx([0.2] * 5, abs=0.001)
