"""The loop on one rank, with an engine that is plain gradient descent, and models that look states up in a table."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qad_dist.batch import Batch
from qad_dist.distill.checkpoint import Checkpoints
from qad_dist.distill.loop import accumulate_gradient
from qad_dist.distill.models import TeacherAndStudent
from qad_dist.distill.optim import learning_rate_at
from qad_dist.distill.window import Window
from shards.errors import ShardError
from tests.helpers.loops import START, PlannedSteps, Recorder, Steps, batch_of, settings
from tests.helpers.states import PlainEngine, pack


def gradient_of(models: TeacherAndStudent, student: nn.Parameter, batches: list[Batch], **values: object) -> Tensor:
    student.grad = None
    engine, config = PlainEngine(table=student), settings(**values)
    is_finite = accumulate_gradient(
        engine,  # type: ignore[arg-type]
        models,
        Steps(batches),
        config,
        step=0,
        window=Window(torch.device("cpu"), config),
    )
    assert student.grad is not None
    assert is_finite
    assert engine.calls == ["backward"] * (len(batches) - 1) + ["last"]
    return student.grad.clone()


@pytest.mark.parametrize("values", [{}, {"ce_weight": 0.5, "temperature": 2.0}, {"kl_weight": 0.25}])
def test_micro_batches_of_unequal_length_give_the_gradient_of_one_big_batch(
    models: TeacherAndStudent, student: nn.Parameter, values: dict[str, float]
) -> None:
    small, large, one = batch_of(3, seed=0), batch_of(40, seed=1), batch_of(1, seed=2)

    parts = gradient_of(models, student, [small, large, one], **values)
    whole = gradient_of(models, student, [pack(small, large, one)], **values)

    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)


def test_gradient_is_the_mean_over_tokens(models: TeacherAndStudent, student: nn.Parameter) -> None:
    """Against autograd on the definition, with cross-entropy as well."""
    batch = batch_of(17, seed=0)
    found = gradient_of(models, student, [batch], ce_weight=0.5)
    student.grad = None
    ids, head_VD = batch.input_ids_N, models.head_VD
    log_student = (student[ids] @ head_VD.T).log_softmax(-1)
    log_teacher = (models.teacher_states(batch, ids).rows_RD @ head_VD.T).log_softmax(-1)

    kl_R = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    ce_R = -log_student[torch.arange(17), batch.targets_R]
    (kl_R + 0.5 * ce_R).mean().backward()

    torch.testing.assert_close(found, student.grad, rtol=1e-5, atol=1e-7)


def test_batch_without_weight_changes_nothing(models: TeacherAndStudent, student: nn.Parameter) -> None:
    batch, stand_in = batch_of(9, seed=0), batch_of(5, seed=1).without_weight()

    alone = gradient_of(models, student, [batch])
    beside = gradient_of(models, student, [batch, stand_in])

    assert torch.equal(alone, beside)


def test_each_step_has_its_micro_batches_its_rate_and_one_update(run_loop) -> None:
    _, engine = run_loop(Recorder(1.0, 0.9), START, settings())

    assert engine.calls == ["backward", "last", "step", "last", "step"] * 2
    expected = [learning_rate_at(i, peak=0.1, warmup_steps=1, steps=4, final_share=0.1) for i in range(4)]
    assert engine.learning_rates == expected


def test_student_is_evaluated_before_training_at_intervals_and_at_the_end(run_loop) -> None:
    recorder = Recorder(1.0, 0.9, 0.8, 0.7)

    run_loop(recorder, START, settings(steps=5, evaluate_every=2))

    assert recorder.of("heldout_kl_per_token") == [(0, 1.0), (2, 0.9), (4, 0.8), (5, 0.7)]
    assert recorder.kls == []


def test_checkpoints_are_written_at_intervals_and_at_the_end(run_loop, tmp_path: Path) -> None:
    run_loop(Recorder(1.0, 0.9), START, settings(steps=5, checkpoint_every=2, keep_checkpoints=5))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000004", "step-000005"]


class KilledError(Exception):
    """Stands for a kill."""


class StepsUntilKill(Steps):
    """Never gets to its fourth step."""

    def num_rows(self, step: int) -> int:
        if step == 3:
            raise KilledError
        return super().num_rows(step)


def test_resumed_training_goes_on_with_the_next_step_and_remembers_the_best(run_loop, student, tmp_path: Path) -> None:
    data = ([batch_of(3, seed=0), batch_of(8, seed=1)], [batch_of(5, seed=2)])
    config, initial = settings(evaluate_every=2, checkpoint_every=1), student.detach().clone()
    whole, _ = run_loop(Recorder(1.0, 0.9, 0.95), START, config, Steps(*data))
    trained = student.detach().clone()
    shutil.rmtree(tmp_path)
    with torch.no_grad():
        student.copy_(initial)
    with pytest.raises(KilledError):
        run_loop(Recorder(1.0, 0.9), START, config, StepsUntilKill(*data))
    with torch.no_grad():
        student.zero_()  # what a new process knows of it

    recorder, engine = Recorder(0.95), PlainEngine(table=student)
    checkpoints = Checkpoints(tmp_path, keep=2)
    newest = checkpoints.choose("auto")
    state = checkpoints.load(engine, newest, expected=START)  # type: ignore[arg-type]
    resumed, _ = run_loop(recorder, state, config, Steps(*data), engine)

    # That of step 3 was not yet published when the kill came.
    assert newest == tmp_path / "step-000002"
    assert engine.calls == ["backward", "last", "step", "last", "step"]
    assert recorder.best == []
    assert torch.equal(student.detach(), trained)
    assert resumed == whole


def test_resumed_training_without_its_best_student_is_evaluated_at_once_and_writes_no_second_line(run_loop) -> None:
    recorder = Recorder(0.7, 0.8)

    state, _ = run_loop(recorder, replace(START, step=2), settings(evaluate_every=2, log_every=4))

    assert recorder.best == [2]
    assert (state.best_step, state.best_kl) == (2, 0.7)
    assert [step for step, values in recorder.lines if "heldout_kl_per_token" in values] == [4]


def test_logged_values_are_means_over_the_tokens_since_the_last_line(run_loop, models, student) -> None:
    """With a rate of nearly 0 the student stands still: what is logged can be computed afterwards."""
    batches = [batch_of(3, seed=0), batch_of(8, seed=1), batch_of(5, seed=2)]
    recorder = Recorder(1.0, 0.9)
    run_loop(recorder, START, settings(learning_rate=1e-12))

    values = [values for _, values in recorder.lines if "kl" in values]
    everything = pack(*batches)
    ids = everything.input_ids_N
    log_student = (student.detach()[ids] @ models.head_VD.T).log_softmax(-1)
    log_teacher = (models.teacher_states(everything, ids).rows_RD @ models.head_VD.T).log_softmax(-1)

    assert [step for step, _ in recorder.of("kl")] == [2, 4]
    for line in values:  # two steps each: all three batches
        assert line["kl"] == pytest.approx(float((log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean()))
        assert line["ce"] == pytest.approx(float(-log_student[torch.arange(16), everything.targets_R].mean()))
        agrees = (log_teacher.argmax(-1) == log_student.argmax(-1)).double().mean()
        assert line["agreement"] == pytest.approx(float(agrees))
        assert line["response_tokens"] == 16
        assert line["gradient_norm"] == pytest.approx(float(gradient_of(models, student, [batches[2]]).norm()))
        assert line["skipped"] == 0
        seconds = line["seconds_per_step"] * 2
        assert line["audio_seconds_per_second"] * seconds == pytest.approx(20.0)
        assert line["tokens_per_second"] * seconds == pytest.approx(16.0)


def test_lines_come_at_their_intervals_and_wherever_training_pauses(run_loop) -> None:
    recorder = Recorder(1.0, 0.9, 0.8)

    run_loop(recorder, START, settings(steps=7, log_every=100, evaluate_every=5, checkpoint_every=3))

    assert [step for step, _ in recorder.of("kl")] == [3, 5, 6, 7]


def test_utterances_that_cannot_be_read_are_counted_for_each_line_and_after_each_evaluation(run_loop) -> None:
    recorder = Recorder(1.0, 0.9, 0.8)

    run_loop(recorder, START, settings(steps=5, log_every=2, evaluate_every=3))

    # Evaluations before training, at 3 and at the end; lines at 2, 4 and, before an evaluation, at 3 and at the end.
    assert recorder.of("quarantined") == [(2, 2), (3, 3), (4, 5), (5, 6)]
    assert recorder.quarantined == 7


@pytest.mark.parametrize(
    ("too_many", "lines", "best", "steps"),
    [(1, [], [], 0), (2, [0], [0], 2), (3, [0, 2], [0], 2)],
    ids=["at the first evaluation", "at a line", "at a later evaluation"],
)
def test_too_many_that_cannot_be_read_stop_the_loop_before_anything_more_is_written_or_kept(
    run_loop, student, tmp_path: Path, too_many, lines, best, steps
) -> None:
    recorder = Recorder(1.0, 0.5, too_many=too_many)
    before = student.detach().clone()

    with pytest.raises(ShardError, match="^too many cannot be read$"):
        run_loop(recorder, START, settings(evaluate_every=2))

    assert [step for step, _ in recorder.lines] == lines
    assert recorder.best == best
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(student.detach(), before) == (steps == 0)


def test_step_of_which_nothing_could_be_read_has_no_gradient_and_a_line(run_loop, student) -> None:
    before = student.detach().clone()
    nothing = [batch_of(3, seed=0).without_weight(), batch_of(8, seed=1).without_weight()]
    recorder = Recorder(1.0, 0.9)

    state, _ = run_loop(recorder, START, settings(), PlannedSteps(nothing))

    assert torch.equal(student.detach(), before)
    assert recorder.of("kl") == [(2, 0.0), (4, 0.0)]
    assert recorder.of("response_tokens") == [(2, 0), (4, 0)]
    assert state.skipped == 0


def test_gradient_of_readable_rows_does_not_depend_on_what_became_of_the_others(models, student) -> None:
    """A batch beside one that could not be read weighs what it weighs beside one that could."""
    batch, other, config = batch_of(9, seed=0), batch_of(5, seed=1), settings()

    accumulate_gradient(
        PlainEngine(table=student),  # type: ignore[arg-type]
        models,
        PlannedSteps([batch, other.without_weight()]),
        config,
        step=0,
        window=Window(torch.device("cpu"), config),
    )

    found = student.grad.clone()
    expected = gradient_of(models, student, [batch]) * 9 / 14
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_checkpoint_is_published_while_training_goes_on(run_loop, tmp_path: Path) -> None:
    """At the next line, long before the next checkpoint."""
    seen: list[list[str]] = []
    recorder = Recorder(1.0, 0.9)

    class Watching(Steps):
        def num_rows(self, step: int) -> int:
            time.sleep(0.2)  # for the thread that writes
            seen.append(sorted(path.name for path in tmp_path.glob("step-*")))
            return super().num_rows(step)

    run_loop(recorder, START, settings(steps=5, log_every=1, checkpoint_every=2), Watching([batch_of(3, seed=0)]))

    one, two = "step-000002", "step-000004"
    # Step 2's is published by the line behind the step after it.
    assert seen == [[], [], [], [one], [one]]
    assert sorted(path.name for path in tmp_path.iterdir()) == [two, "step-000005"]
