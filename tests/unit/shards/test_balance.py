import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.balance import LEFT_OVER, even_out, fill


def integers(*values):
    return np.array(values, dtype=np.int64)


def test_fill_places_the_longest_first_into_the_emptiest_micro_batch():
    # 5 | 4, then 3 to the 4, 3 to the 5, 2 to the 4 + 3.
    assert fill(integers(3, 5, 2, 4, 3), token_budget=9, num_micro_batches=2).tolist() == [1, 0, 1, 1, 0]


def test_fill_leaves_over_what_fits_nowhere_and_goes_on_with_shorter_ones():
    places = fill(integers(6, 6, 5, 4, 3), token_budget=10, num_micro_batches=2)

    assert places.tolist() == [0, 1, LEFT_OVER, 0, 1]


def test_fill_uses_a_micro_batch_to_the_last_token_and_no_further():
    assert fill(integers(6, 4), token_budget=10, num_micro_batches=1).tolist() == [0, 0]
    assert fill(integers(6, 4), token_budget=9, num_micro_batches=1).tolist() == [0, LEFT_OVER]


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60), num_micro_batches=st.integers(1, 9))
def test_fill_is_the_plain_greedy_rule(lengths, num_micro_batches):
    used = [0] * num_micro_batches
    expected = [LEFT_OVER] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        emptiest = min(range(num_micro_batches), key=lambda n: (used[n], n))
        if used[emptiest] + lengths[index] <= 50:
            used[emptiest] += lengths[index]
            expected[index] = emptiest

    places = fill(integers(*lengths), token_budget=50, num_micro_batches=num_micro_batches)

    assert places.tolist() == expected


def test_even_out_swaps_utterances_of_equal_tokens():
    places, tokens, audio = integers(0, 0, 1, 1), integers(5, 5, 5, 5), integers(10, 9, 2, 1)

    evened = even_out(places, tokens, audio, token_budget=10)

    assert np.bincount(evened, weights=audio).tolist() == [11, 11]


def test_even_out_keeps_the_budget_where_a_swap_would_break_it():
    places, tokens, audio = integers(0, 0, 1, 1), integers(6, 4, 5, 5), integers(10, 10, 2, 2)

    assert even_out(places, tokens, audio, token_budget=10).tolist() == places.tolist()
    assert np.bincount(even_out(places, tokens, audio, token_budget=11), weights=audio).tolist() == [12, 12]


def test_even_out_pairs_others_where_the_fullest_and_the_emptiest_have_nothing_to_swap():
    # The first can only swap with the second and third, whose utterances are as long; the last has shorter ones.
    places = integers(0, 0, 1, 1, 2, 2, 3, 3, 3)
    tokens = integers(50, 50, 50, 50, 50, 50, 33, 33, 33)
    audio = integers(60, 60, 40, 45, 40, 44, 20, 20, 20)

    evened = np.bincount(even_out(places, tokens, audio, token_budget=100), weights=audio)

    assert evened.max() == 100  # 60 + 40: each 60 has to be beside something


windows = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.lists(st.tuples(st.integers(1, 40), st.integers(1, 1000)), min_size=n, max_size=80),
    )
)


@given(windows)
@settings(max_examples=200)
def test_even_out_keeps_budget_and_numbers_and_never_widens_the_audio(window):
    num_micro_batches, rows = window
    tokens, audio = integers(*(t for t, _ in rows)), integers(*(a for _, a in rows))
    places = fill(tokens, token_budget=100, num_micro_batches=num_micro_batches)
    placed = places != LEFT_OVER
    places, tokens, audio = places[placed], tokens[placed], audio[placed]

    evened = even_out(places, tokens, audio, token_budget=100)

    before, after = np.bincount(places, weights=audio), np.bincount(evened, weights=audio)
    assert np.bincount(evened).tolist() == np.bincount(places).tolist()
    assert np.bincount(evened, weights=tokens).max() <= 100
    assert after.max() <= before.max()
    assert after.min() >= before.min()


@pytest.mark.parametrize("num_utterances", [31, 33, 70, 700])
def test_even_out_finds_swaps_whatever_the_number_of_utterances(num_utterances):
    random = np.random.default_rng(num_utterances)
    places = np.repeat(np.arange(8), num_utterances)
    audio = random.integers(1, 1000, len(places))
    tokens = np.full(len(places), 7, dtype=np.int64)

    evened = np.bincount(even_out(places, tokens, audio, token_budget=7 * num_utterances), weights=audio)

    before = np.bincount(places, weights=audio)
    assert before.max() - before.min() > 0.05 * before.mean()
    assert evened.max() - evened.min() <= 0.001 * before.mean()
