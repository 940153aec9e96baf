from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest

from shards.errors import ConfigError
from shards.plan import MIN_CHARGED_SECONDS, Plan, plan_decoding, plan_epoch, share_of_rank

LENGTHS = np.random.default_rng(5).integers(30, 601, 3_000).tolist()


def plan(lengths=LENGTHS, *, seed=0, epoch=0, token_budget=8192, micro_batches_per_step=8):
    return plan_epoch(
        lengths, seed=seed, epoch=epoch, token_budget=token_budget, micro_batches_per_step=micro_batches_per_step
    )


def micro_batches_of(steps):
    return [micro_batch for step in steps for micro_batch in step if micro_batch]


@pytest.mark.parametrize("token_budget", [600, 1024, 8192, 65_536, 10_000_000])
def test_plan_gives_every_utterance_exactly_once(token_budget):
    steps = plan(token_budget=token_budget)

    assert sorted(chain.from_iterable(chain.from_iterable(steps))) == list(range(len(LENGTHS)))


@pytest.mark.parametrize("token_budget", [600, 1024, 8192])
def test_no_micro_batch_exceeds_the_budget(token_budget):
    assert max(sum(LENGTHS[i] for i in m) for m in micro_batches_of(plan(token_budget=token_budget))) <= token_budget


@pytest.mark.parametrize("token_budget", [8192, 16_384])
def test_at_most_two_percent_of_the_budget_stay_empty(token_budget):
    micro_batches = micro_batches_of(plan(token_budget=token_budget))

    assert sum(LENGTHS) / (len(micro_batches) * token_budget) >= 0.98


def test_every_step_has_all_its_micro_batches_and_only_the_last_has_empty_ones():
    steps = plan(micro_batches_per_step=7)

    assert {len(step) for step in steps} == {7}
    assert all(all(step) for step in steps[:-1])
    assert sum(not micro_batch for micro_batch in steps[-1]) == -len(micro_batches_of(steps)) % 7


def test_every_micro_batch_mixes_short_and_long_utterances():
    means = [np.mean([LENGTHS[i] for i in micro_batch]) for micro_batch in micro_batches_of(plan())]

    assert 250 < min(means) and max(means) < 400  # the mean of all is 315


def test_equal_seed_and_epoch_give_the_same_plan_and_others_another():
    assert plan(seed=3, epoch=2) == plan(seed=3, epoch=2)
    assert plan(seed=3, epoch=2) != plan(seed=3, epoch=1)
    assert plan(seed=3, epoch=2) != plan(seed=2, epoch=2)


def test_an_utterance_above_the_budget_is_refused():
    with pytest.raises(
        ConfigError, match=r"train\.micro_batch_tokens must hold the longest utterance \(601 tokens\), got 600"
    ):
        plan([30, 601], token_budget=600)


def test_no_utterances_are_refused():
    with pytest.raises(ConfigError, match="at least one utterance, got 0"):
        plan([])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8, 12])
def test_shares_of_all_ranks_are_the_step_and_of_one_size(world_size):
    step = plan()[0]

    shares = [share_of_rank(step, rank=rank, world_size=world_size) for rank in range(world_size)]

    assert {len(share) for share in shares} == {-(-8 // world_size)}
    assert sorted(m for share in shares for m in share if m) == sorted(step)
    assert shares[0][0] == step[0]
    if world_size == 3:
        assert shares[1] == [step[1], step[4], step[7]] and shares[2] == [step[2], step[5], []]


def test_steps_are_counted_over_epochs():
    lengths = LENGTHS[:300]
    settings = {"seed": 1, "token_budget": 1024, "micro_batches_per_step": 3}
    epochs = [plan_epoch(lengths, epoch=epoch, **settings) for epoch in range(3)]
    rows = [step for epoch in epochs for step in epoch]
    whole = Plan(lengths, **settings)

    assert [whole.step(number) for number in range(len(rows))] == rows
    assert Plan(lengths, **settings).step(len(rows) - 1) == rows[-1]
    assert whole.step(0) == rows[0]
    assert whole.position(len(epochs[0]) + 2) == (1, 2)


def test_decoding_batches_hold_every_utterance_once_longest_first():
    durations = np.random.default_rng(0).uniform(0.1, 30, 500).tolist()

    batches = plan_decoding(durations, batch_audio_seconds=160)

    assert Counter(chain.from_iterable(batches)) == Counter(range(500))
    order = [durations[i] for i in chain.from_iterable(batches)]
    assert all(first >= second for first, second in pairwise(order))


def test_decoding_batches_stay_below_the_padded_budget_and_are_as_full_as_can_be():
    durations = [10.0, 30.0, 5.0, 10.0, 10.0, 200.0]

    assert plan_decoding(durations, batch_audio_seconds=30) == [[5], [1], [0, 3, 4], [2]]
    assert plan_decoding([], batch_audio_seconds=30) == []


def test_short_utterances_are_charged_a_least_length_so_that_rows_are_bounded():
    assert MIN_CHARGED_SECONDS == 2
    durations = [5.0] * 3 + [0.1] * 100

    batches = plan_decoding(durations, batch_audio_seconds=20)

    assert [len(batch) for batch in batches] == [4, *[10] * 9, 9]
    assert plan_decoding([0.1, 0.1], batch_audio_seconds=1) == [[0], [1]]
