import tracemalloc
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import shards.plan
from shards.errors import ConfigError
from shards.mixture import Mixture
from shards.plan import MIN_CHARGED_SECONDS, Plan, plan_decoding, plan_epoch, share_of_rank
from tests.helpers.mixes import make_mix

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


@pytest.mark.parametrize("token_budget", [4096, 8192, 16_384])
@pytest.mark.parametrize("median_seconds", [None, 6.0])
@pytest.mark.parametrize("micro_batches_per_step", [8, 16, 64])
def test_micro_batches_of_speech_are_full_and_those_of_a_step_even_in_audio(
    micro_batches_per_step, median_seconds, token_budget
):
    mix = make_mix(40_000, seed=micro_batches_per_step, median_seconds=median_seconds)

    steps = plan_epoch(
        mix.num_tokens,
        audio_seconds=mix.seconds,
        seed=0,
        epoch=0,
        token_budget=token_budget,
        micro_batches_per_step=micro_batches_per_step,
    )

    assert Counter(chain.from_iterable(chain.from_iterable(steps))) == Counter(range(40_000))
    tokens = np.array([mix.num_tokens[m].sum() for m in micro_batches_of(steps)])
    assert tokens.max() <= token_budget
    assert tokens.sum() / (len(tokens) * token_budget) >= 0.98
    audio = np.array([[mix.seconds[m].sum() for m in step] for step in steps[:-1]])
    assert (audio.max(axis=1) / audio.mean(axis=1)).max() <= 1.01


def test_without_seconds_the_audio_of_a_step_is_uneven():
    mix = make_mix(40_000)

    steps = plan_epoch(mix.num_tokens, seed=0, epoch=0, token_budget=8192, micro_batches_per_step=8)

    audio = np.array([[mix.seconds[m].sum() for m in step] for step in steps[:-1]])
    assert (audio.max(axis=1) / audio.mean(axis=1)).max() > 1.02


def test_the_last_window_is_cut_into_even_micro_batches_too():
    # 2,500 utterances are less than one and a half windows of 64: the steps from the ninth on are of the rest.
    mix = make_mix(2_500)

    steps = plan_epoch(
        mix.num_tokens, audio_seconds=mix.seconds, seed=0, epoch=0, token_budget=8192, micro_batches_per_step=8
    )

    assert 10 < len(steps) < 16
    audio = np.array([[mix.seconds[m].sum() for m in step] for step in steps[:-1]])
    assert (audio.max(axis=1) / audio.mean(axis=1)).max() <= 1.01


@pytest.mark.parametrize(
    "lengths",
    [
        [600] * 1000,
        [301] * 1000,
        [300] * 1000,
        [600, *[1] * 5000],
        [*[600] * 500, *[1] * 500],
        [599, *[2] * 700],
        [1],
        [1] * 64,
        list(range(1, 601)),
    ],
    ids=["budget", "above half", "half", "giant", "giants and dwarfs", "odd giant", "one", "few", "stairs"],
)
@pytest.mark.parametrize("micro_batches_per_step", [1, 7, 200])
def test_hard_lengths_keep_budget_steps_and_utterances(lengths, micro_batches_per_step):
    steps = plan(lengths, token_budget=600, micro_batches_per_step=micro_batches_per_step)

    assert_is_an_epoch(steps, lengths, token_budget=600, micro_batches_per_step=micro_batches_per_step)


@given(
    lengths=st.lists(st.one_of(st.integers(1, 100), st.sampled_from([1, 50, 51, 99, 100])), min_size=1, max_size=400),
    slack=st.one_of(st.just(0), st.integers(0, 300)),
    micro_batches_per_step=st.integers(1, 90),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
)
@settings(max_examples=200)
def test_any_lengths_keep_budget_steps_and_utterances(lengths, slack, micro_batches_per_step, seed, epoch):
    token_budget = max(lengths) + slack

    steps = plan_epoch(
        lengths,
        audio_seconds=[0.08 * (length % 37 + 1) for length in lengths],
        seed=seed,
        epoch=epoch,
        token_budget=token_budget,
        micro_batches_per_step=micro_batches_per_step,
    )

    assert_is_an_epoch(steps, lengths, token_budget=token_budget, micro_batches_per_step=micro_batches_per_step)


def assert_is_an_epoch(steps, lengths, *, token_budget, micro_batches_per_step):
    assert sorted(chain.from_iterable(chain.from_iterable(steps))) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in m) for m in micro_batches_of(steps)) <= token_budget
    assert {len(step) for step in steps} == {micro_batches_per_step}
    assert all(all(step) for step in steps[:-1])
    is_filled = [bool(micro_batch) for micro_batch in steps[-1]]
    assert is_filled == sorted(is_filled, reverse=True)
    assert is_filled[0]


def test_micro_batches_are_lists_of_python_integers():
    steps = plan(np.array(LENGTHS, dtype=np.int32))

    assert {type(micro_batch) for step in steps for micro_batch in step} == {list}
    assert {type(index) for micro_batch in micro_batches_of(steps) for index in micro_batch} == {int}
    assert steps == plan()


def test_micro_batches_of_a_window_are_shuffled():
    # Half of the utterances are as long as the budget, so in the order of filling they would come first.
    lengths = [600] * 300 + [300] * 600

    kinds = [len(micro_batch) for micro_batch in micro_batches_of(plan(lengths, token_budget=600))]

    assert sum(first != second for first, second in pairwise(kinds)) > 150


def test_each_window_is_shuffled_on_its_own():
    # As long as the budget: a window is 64 utterances, filled in the shuffled order of the epoch.
    lengths = [600] * 128
    order = np.random.default_rng([0, 0]).permutation(128).tolist()

    turns = [order.index(index) for (index,) in micro_batches_of(plan(lengths, token_budget=600))]

    first, second = turns[:64], [turn - 64 for turn in turns[64:]]
    assert sorted(first) == sorted(second) == list(range(64))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 10


def test_other_utterances_come_first_in_another_epoch_and_with_another_seed():
    def first_window(**which):
        return set(chain.from_iterable(chain.from_iterable(plan(token_budget=2048, **which)[:8])))

    # A window is about 400 of 3,000 utterances; two that are drawn apart share about 50.
    first, epoch, seed = first_window(), first_window(epoch=1), first_window(seed=1)
    assert 350 < len(first) < 450
    assert len(first & epoch) < 100
    assert len(first & seed) < 100


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


class Counted:
    """A function of the plan, and how often it was called."""

    def __init__(self, monkeypatch, name):
        self.times = 0
        self._function = getattr(shards.plan, name)
        monkeypatch.setattr(shards.plan, name, self)

    def __call__(self, *args, **kwargs):
        self.times += 1
        return self._function(*args, **kwargs)


def make_plan(num_utterances=20_000, **settings):
    mix = make_mix(num_utterances)
    settings = {"seed": 0, "token_budget": 2048, "micro_batches_per_step": 16, **settings}
    return Plan(mix.num_tokens, audio_seconds=mix.seconds, **settings)


def test_a_step_costs_the_windows_before_it_and_evens_out_its_own_only(monkeypatch):
    filled, evened = Counted(monkeypatch, "fill"), Counted(monkeypatch, "even_out")
    lazy = make_plan()

    lazy.step(0)
    assert (filled.times, evened.times) == (1, 1)
    lazy.step(3)  # of the same window: 64 micro-batches are four steps
    assert (filled.times, evened.times) == (1, 1)
    lazy.step(41)
    assert (filled.times, evened.times) == (11, 2)
    lazy.position(81)
    assert (filled.times, evened.times) == (21, 2)


def test_a_step_costs_one_window_also_where_no_micro_batch_has_two_utterances(monkeypatch):
    filled = Counted(monkeypatch, "fill")
    lazy = Plan([600] * 5_000, seed=0, token_budget=600, micro_batches_per_step=500)

    assert [len(micro_batch) for micro_batch in lazy.step(0)] == [1] * 500
    assert filled.times == 1
    lazy.step(1)
    assert filled.times == 2


def test_looking_back_across_the_edge_of_a_window_costs_nothing(monkeypatch):
    lazy = make_plan()
    before, after = lazy.step(3), lazy.step(4)
    filled = Counted(monkeypatch, "fill")

    assert (lazy.step(3), lazy.step(4), lazy.position(2)) == (before, after, (0, 2))
    assert filled.times == 0


def test_steps_come_alike_in_any_order():
    plans = make_plan(3_000)
    num_steps = plans.num_steps(0) + plans.num_steps(1)
    rows = plans.epoch(0) + plans.epoch(1) + plans.epoch(2)
    asked = np.random.default_rng(0).permutation(num_steps).tolist()

    found = {number: plans.step(number) for number in asked}

    assert all(found[number] == rows[number] for number in asked)
    assert [plans.position(number)[0] for number in range(num_steps)] == sorted(
        plans.position(number)[0] for number in asked
    )
    assert plans.position(num_steps) == (2, 0)
    assert len(plans.epoch(0)) == plans.num_steps(0)


def test_walking_an_epoch_keeps_no_more_than_a_window():
    long_plan = make_plan(60_000, token_budget=1024)
    long_plan.step(0)
    long_plan.step(4)  # two windows are kept
    tracemalloc.start()

    for number in range(8, 150):
        long_plan.step(number)

    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # 150 steps are 37 windows of some 270 utterances, each a Python integer in a list: 40 bytes.
    assert peak < 37 * 270 * 40


def test_a_mixture_says_how_often_each_utterance_comes():
    mix = make_mix(3_000, num_languages=4)
    mixture = Mixture(mix.languages, mix.seconds, temperature=3.0, max_hours_per_language=None)
    mixed = Plan(
        mix.num_tokens,
        audio_seconds=mix.seconds,
        mixture=mixture,
        seed=6,
        token_budget=2048,
        micro_batches_per_step=8,
    )

    for epoch in range(2):
        planned = sorted(chain.from_iterable(chain.from_iterable(mixed.epoch(epoch))))
        assert planned == mixture.indices(seed=6, epoch=epoch).tolist()
        assert planned != list(range(3_000))
    assert max(mix.num_tokens[m].sum() for m in micro_batches_of(mixed.epoch(0))) <= 2048


def test_a_mixture_at_temperature_1_without_a_cap_is_the_plan_without_a_mixture():
    mix = make_mix(3_000)
    mixture = Mixture(mix.languages, mix.seconds, temperature=1.0, max_hours_per_language=None)

    assert plan_epoch(
        mix.num_tokens, mixture=mixture, seed=1, epoch=1, token_budget=2048, micro_batches_per_step=8
    ) == plan_epoch(mix.num_tokens, seed=1, epoch=1, token_budget=2048, micro_batches_per_step=8)


def test_fingerprints_are_equal_for_equal_plans_and_differ_with_everything_that_decides_them():
    mix = make_mix(50, num_languages=2)
    tokens, seconds, languages = mix.num_tokens, mix.seconds, mix.languages

    def mark(num_tokens=tokens, seconds=seconds, languages=languages, temperature=1.0, cap=None, **changed):
        mixture = Mixture(languages, mix.seconds, temperature=temperature, max_hours_per_language=cap)
        settings = {"seed": 0, "token_budget": 2048, "micro_batches_per_step": 8, **changed}
        return Plan(num_tokens, audio_seconds=seconds, mixture=mixture, **settings).fingerprint()

    changes = [
        {},
        {"num_tokens": tokens + (np.arange(50) == 7)},
        {"seconds": seconds + (np.arange(50) == 7) / 16_000},
        {"seconds": None},
        {"languages": languages ^ (np.arange(50) == 7)},
        {"temperature": 2.0},
        {"cap": 3.0},
        {"seed": 1},
        {"token_budget": 2049},
        {"micro_batches_per_step": 4},
    ]
    marks = [mark(**change) for change in changes]

    assert mark(tokens.tolist(), seconds.tolist(), languages.tolist()) == marks[0]
    assert len(set(marks)) == len(changes)
    assert {len(text) for text in marks} == {64}
    plain = Plan(tokens, audio_seconds=seconds, seed=0, token_budget=2048, micro_batches_per_step=8)
    assert plain.fingerprint() not in marks


def test_a_plan_is_refused_when_it_is_made():
    with pytest.raises(ConfigError, match=r"must hold the longest utterance \(601 tokens\), got 600"):
        Plan([30, 601], seed=0, token_budget=600, micro_batches_per_step=8)


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


@given(
    durations=st.lists(
        st.one_of(st.floats(0.05, 40), st.sampled_from([0.1, 0.3, 1.1, 2.0, 2.2, 3.3, 16.0])), max_size=120
    ),
    budget=st.one_of(st.floats(0.5, 400), st.sampled_from([3.3, 6.6, 9.9, 22.0, 33.0])),
    most=st.one_of(st.none(), st.integers(1, 130)),
)
# The quotient is 65, but 65 times as long is above the budget; the quotient is 4, but 5 times is not above.
@example(durations=[38.78] * 200, budget=2520.7, most=None)
@example(durations=[28.584621063723503] * 20, budget=142.9231053186175, most=None)
@settings(max_examples=200)
def test_decoding_batches_are_what_taking_one_utterance_after_the_other_gives(durations, budget, most):
    expected = []
    for index in sorted(range(len(durations)), key=lambda i: (-durations[i], i)):
        size = len(expected[-1]) if expected else 0
        charged = max(durations[expected[-1][0]], MIN_CHARGED_SECONDS) if expected else 0
        if expected and (size + 1) * charged <= budget and size + 1 <= (most or size + 1):
            expected[-1].append(index)
        else:
            expected.append([index])

    assert plan_decoding(durations, batch_audio_seconds=budget, max_utterances=most) == expected
    assert plan_decoding(np.array(durations), batch_audio_seconds=budget, max_utterances=most) == expected


def test_decoding_batches_hold_no_more_utterances_than_are_asked_for():
    durations = [10.0] * 7 + [1.0] * 5

    assert plan_decoding(durations, batch_audio_seconds=40, max_utterances=3) == [
        *([0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11])
    ]
    assert plan_decoding(durations, batch_audio_seconds=40, max_utterances=1) == [[i] for i in range(12)]
