"""Which student is the best, and when training ends for want of a better one."""

from dataclasses import replace
from pathlib import Path

import pytest

from qad_dist.distill.loop import is_better
from tests.helpers.loops import START, Recorder, evaluation_of, settings


def test_best_student_is_the_one_with_the_lowest_heldout_kl(run_loop) -> None:
    recorder = Recorder(1.0, 0.5, 0.7, 0.4, 0.4)

    state, _ = run_loop(recorder, START, settings(steps=4, evaluate_every=1))

    assert recorder.best == [0, 1, 3]  # an equal one is no better
    assert (state.step, state.best_step, state.best_kl) == (4, 3, 0.4)


def test_student_before_training_stays_the_best_when_training_does_harm(run_loop) -> None:
    state, _ = run_loop(recorder := Recorder(0.3, 0.5), START, settings())

    assert recorder.best == [0]
    assert (state.best_step, state.best_kl) == (0, 0.3)


@pytest.mark.parametrize(
    ("found", "best", "expected"),
    [
        pytest.param((0.5, None), (1.0, None), True, id="nearer"),
        pytest.param((1.0, None), (1.0, None), False, id="as near"),
        pytest.param((0.995, 0.3), (1.0, 0.2), False, id="hardly nearer, with more wrong words"),
        pytest.param((1.005, 0.1), (1.0, 0.2), True, id="hardly farther, with fewer wrong words"),
        pytest.param((1.02, 0.1), (1.0, 0.2), False, id="farther, with fewer wrong words"),
        pytest.param((0.98, 0.3), (1.0, 0.2), True, id="nearer, with more wrong words"),
        pytest.param((0.995, 0.2), (1.0, 0.2), True, id="hardly nearer, with as many wrong words"),
        pytest.param((1.005, 0.1), (1.0, None), False, id="words of one alone decide nothing"),
        pytest.param((1.005, None), (1.0, 0.2), False, id="nor of the other"),
        pytest.param((0.0, 0.1), (0.0, 0.2), True, id="both at no distance"),
    ],
)
def test_student_is_better_by_kl_and_within_a_hundredth_of_it_by_words(found, best, expected) -> None:
    state = replace(START, best_step=2, best_kl=best[0], best_word_error_rate=best[1])

    assert is_better(evaluation_of(*found), state) is expected


def test_any_student_is_better_than_none() -> None:
    assert is_better(evaluation_of(1e9, 1.0), START)


def test_words_are_counted_at_both_ends_and_at_their_interval(run_loop) -> None:
    recorder = Recorder(1.0, 0.9, 0.8, 0.7, words=[0.4, 0.3, 0.2])

    state, _ = run_loop(recorder, START, settings(steps=6, evaluate_every=2, decode_every=4))

    assert recorder.of("heldout_word_error_rate") == [(0, 0.4), (4, 0.3), (6, 0.2)]
    assert [step for step, _ in recorder.of("heldout_kl_per_token")] == [0, 2, 4, 6]
    assert (state.best_step, state.best_word_error_rate) == (6, 0.2)


def test_best_student_is_the_one_with_fewer_wrong_words_among_those_that_are_as_near(run_loop) -> None:
    recorder = Recorder(1.0, 0.5, 0.499, 0.502, words=[0.4, 0.2, 0.3, 0.1])

    state, _ = run_loop(recorder, START, settings(steps=6, evaluate_every=2, decode_every=2))

    assert recorder.best == [0, 2, 6]
    assert (state.best_step, state.best_kl, state.best_word_error_rate) == (6, 0.502, 0.1)


def test_last_student_is_kept_if_asked_for_whatever_was_better(run_loop) -> None:
    recorder = Recorder(1.0, 0.5, 0.9, 0.7)

    state, _ = run_loop(recorder, START, settings(steps=6, evaluate_every=2, keep="last"))

    assert recorder.best == [0, 2, 4, 6]
    assert (state.best_step, state.best_kl) == (6, 0.7)


def test_training_ends_when_it_has_not_improved_for_some_looks(run_loop, tmp_path: Path) -> None:
    recorder = Recorder(1.0, 0.9, 0.95, 0.8, 0.85, 0.8, 0.7)

    state, engine = run_loop(recorder, START, settings(steps=50, evaluate_every=2, checkpoint_every=100, patience=2))

    assert recorder.kls == [0.7]  # which would have been better, but nobody looked
    assert (state.step, state.best_step, state.looks_without_better) == (10, 6, 2)
    assert engine.calls.count("step") == 10
    assert [path.name for path in tmp_path.iterdir()] == ["step-000010"]


def test_training_that_had_ended_for_lack_of_improvement_does_not_go_on_when_started_again(run_loop) -> None:
    ended = replace(START, step=10, best_step=6, best_kl=0.8, looks_without_better=2)

    state, engine = run_loop(Recorder(), ended, settings(steps=50, evaluate_every=2, patience=2))

    assert state == ended
    assert engine.calls == []
