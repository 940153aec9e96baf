"""Losses, gradients and held-out values that are no numbers: what is left out, told, and when training stops."""

import logging
import math
from dataclasses import replace

import pytest
import torch

from qad_dist.distill.loop import accumulate_gradient, make_step
from qad_dist.distill.preflight import preflight
from qad_dist.distill.window import BadBatch, Window
from shards.errors import NonFiniteError
from tests.helpers.loops import NAN_ID, START, Recorder, Steps, batch_of, settings
from tests.helpers.states import PlainEngine, make_batch

CPU = torch.device("cpu")
BAD = make_batch([3, NAN_ID], [1, 1], key="bad")


def test_step_whose_loss_is_no_number_changes_nothing_and_is_told_with_its_utterances(
    run_loop, student, models, caplog
) -> None:
    good = [batch_of(3, seed=0), batch_of(8, seed=1), batch_of(5, seed=2), batch_of(2, seed=3)]
    data = Steps([good[0]], [good[1], BAD], [good[2]], [good[3]])
    config, initial = settings(), student.detach().clone()
    recorder = Recorder(1.0, 0.9)

    state, engine = run_loop(recorder, START, config, data)

    found = student.detach().clone()
    with torch.no_grad():
        student.copy_(initial)
    without = PlainEngine(table=student)
    for step in (0, 2, 3):
        rate = engine.learning_rates[step]
        window = Window(CPU, config)
        make_step(without, models, data, config, step=step, learning_rate=rate, window=window)  # type: ignore[arg-type]
    assert (state.step, state.skipped, state.updates) == (4, 1, 3)
    assert torch.equal(found, student.detach())
    assert recorder.bad == [(2, [BadBatch(step=1, keys=("bad",))])]
    assert recorder.of("skipped") == [(2, 1), (4, 1)]
    # Means are over the 11 rows that have numbers, those beside the bad ones included.
    assert recorder.of("response_tokens") == [(2, 11), (4, 7)]
    assert all(math.isfinite(value) for _, values in recorder.lines for value in values.values())
    (warned,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert 'event=skipped steps=1 until_step=2 micro_batches="1:bad"' in warned.getMessage()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_loss_that_is_no_number_is_enough_wherever_it_is_in_the_step(student, models, place) -> None:
    batches = [batch_of(3, seed=0), batch_of(8, seed=1)]
    batches.insert(place, BAD)
    config, engine = settings(), PlainEngine(table=student)

    window = Window(CPU, config)
    is_finite = accumulate_gradient(engine, models, Steps(batches), config, step=0, window=window)  # type: ignore[arg-type]

    assert is_finite.dtype == torch.bool
    assert not is_finite
    assert engine.calls == ["backward", "backward", "last"]  # all ranks go on: each has as many


def test_step_of_which_only_the_gradient_is_no_number_is_left_out_without_a_name(run_loop, student, caplog) -> None:
    factors = iter([1.0, torch.inf, 1.0, torch.inf])
    engine = PlainEngine(table=student)
    student.register_hook(lambda gradient: gradient * next(factors))
    recorder = Recorder(1.0, 0.9)

    state, _ = run_loop(recorder, START, settings(), Steps([batch_of(3, seed=0)]), engine)

    assert (state.step, state.skipped, engine.updates) == (4, 2, 2)
    assert torch.isfinite(student).all()
    assert recorder.bad == [(2, []), (4, [])]
    assert recorder.of("gradient_norm") == []  # infinite at both lines, which JSON cannot hold
    assert "none: only the gradient was not finite" in caplog.text


@pytest.mark.parametrize(("limit", "lines"), [(0, []), (1, [2])])
def test_more_bad_steps_than_allowed_stop_training_with_one_message(run_loop, student, limit, lines) -> None:
    data = Steps([BAD], [batch_of(3, seed=0)])
    recorder = Recorder(1.0, 0.9)

    with pytest.raises(NonFiniteError) as told:
        run_loop(recorder, START, settings(max_skipped_steps=limit), data)

    assert str(told.value) == (
        f"loss and gradient must be finite in all but train.max_skipped_steps ({limit}) steps, got nan or inf in "
        f"{limit + 1} of {2 * limit + 2}; lower train.learning_rate, or see skipped.jsonl"
    )
    assert told.value.is_shared
    assert [step for step, _ in recorder.of("kl")] == lines
    assert [step for step, _ in recorder.bad] == [*lines, 2 * limit + 2]  # also those of the last straw are named


def test_steps_left_out_before_a_resume_count_and_those_of_a_preflight_do_not(run_loop, student, models) -> None:
    engine = PlainEngine(table=student)
    preflight(engine, models, [batch_of(3, seed=0)] * 5, settings())  # type: ignore[arg-type]
    resumed = replace(START, step=2, skipped=2, best_step=0, best_kl=1.0)
    recorder = Recorder(0.9)

    state, _ = run_loop(recorder, resumed, settings(), Steps([BAD], [batch_of(3, seed=0)]), engine)

    assert (state.step, state.skipped) == (4, 3)
    assert recorder.of("skipped") == [(4, 3)]
    with pytest.raises(NonFiniteError, match=r"max_skipped_steps \(2\) steps, got nan or inf in 3 of 4;"):
        run_loop(Recorder(0.9), resumed, settings(max_skipped_steps=2), Steps([BAD], [batch_of(3, seed=0)]))


def test_student_that_is_lost_to_nan_stops_training_and_is_kept_nowhere(run_loop, student, tmp_path) -> None:
    with torch.no_grad():
        student[:] = torch.nan
    recorder = Recorder(1.0, 0.9)

    with pytest.raises(NonFiniteError, match=r"got nan or inf in 12 of 12"):
        run_loop(recorder, START, settings(steps=20, checkpoint_every=100))

    assert recorder.best == [0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kls", [(math.nan,), (1.0, math.inf)], ids=["before training", "in training"])
def test_heldout_value_that_is_no_number_is_told_and_neither_written_nor_kept(run_loop, kls) -> None:
    recorder = Recorder(*kls)
    step = 2 * (len(kls) - 1)

    with pytest.raises(NonFiniteError, match=rf"^heldout_kl_per_token of step {step} must be finite, got {kls[-1]};"):
        run_loop(recorder, START, settings(evaluate_every=2, log_every=4))

    assert recorder.best == [0][: len(kls) - 1]
    assert [s for s, _ in recorder.of("heldout_kl_per_token")] == recorder.best
