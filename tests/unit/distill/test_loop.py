"""The loop on one rank, with an engine that is plain autograd and SGD, and models that look states up in a table."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qad_dist.batch import Batch
from qad_dist.config import TrainConfig
from qad_dist.distill.checkpoint import Checkpoints, TrainingState
from qad_dist.distill.evaluate import Evaluation
from qad_dist.distill.loop import Hooks, accumulate_gradient, train
from qad_dist.distill.models import TeacherAndStudent
from qad_dist.distill.optim import learning_rate_at
from shards.errors import NonFiniteError, ShardError
from tests.helpers.states import make_batch, make_models

VOCABULARY, WIDTH = 29, 6


class PlainEngine:
    """What the loop asks of an engine, on one rank and without any library."""

    def __init__(self, table: nn.Parameter) -> None:
        self.table = table
        self.calls: list[str] = []
        self.learning_rates: list[float] = []

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        loss.backward()
        self.calls.append("last" if is_last else "backward")

    def step(self, *, learning_rate: float, is_finite: Tensor) -> None:
        if not is_finite:
            raise NonFiniteError("the loss of every rank must be finite, got nan or inf")
        self.calls.append("step")
        self.learning_rates.append(learning_rate)
        with torch.no_grad():
            self.table -= learning_rate * self.table.grad
        self.table.grad = None

    def gradient_norm(self) -> float:
        return 1.25

    def save(self, folder: Path) -> None:
        torch.save(self.table.detach(), folder / "table.pt")


class Steps:
    """Micro-batches by step; the same for every step where only one list is given."""

    def __init__(self, *steps: list[Batch]) -> None:
        self.steps = steps

    def micro_batches(self, step: int) -> Iterator[Batch]:
        return iter(self.steps[step % len(self.steps)])

    def num_rows(self, step: int) -> int:
        return sum(batch.weighted_rows for batch in self.steps[step % len(self.steps)])

    def audio_seconds(self, step: int) -> float:
        return 10.0


def settings(**values: object) -> TrainConfig:
    return TrainConfig.model_validate({"steps": 4, "warmup_steps": 1, "log_every": 2, "learning_rate": 0.1, **values})


def batch_of(count: int, *, seed: int) -> Batch:
    ids, targets = torch.randint(VOCABULARY, (2, count), generator=torch.Generator().manual_seed(seed)).tolist()
    return make_batch(ids, targets)


def joined(*batches: Batch) -> Batch:
    ids = [i for batch in batches for i in batch.input_ids_N.tolist()]
    return make_batch(ids, [t for batch in batches for t in batch.targets_R.tolist()])


@pytest.fixture
def student() -> nn.Parameter:
    return nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def models(student: nn.Parameter) -> TeacherAndStudent:
    generator = torch.Generator().manual_seed(2)
    teacher_VD, head_VD = (torch.randn(VOCABULARY, WIDTH, generator=generator) for _ in range(2))
    return make_models(teacher_VD, student, head_VD)


def gradient_of(models: TeacherAndStudent, student: nn.Parameter, batches: list[Batch], **values: object) -> Tensor:
    student.grad = None
    engine = PlainEngine(student)
    accumulate_gradient(engine, models, Steps(batches), settings(**values), step=0)  # type: ignore[arg-type]
    assert student.grad is not None
    assert engine.calls == ["backward"] * (len(batches) - 1) + ["last"]
    return student.grad.clone()


@pytest.mark.parametrize("values", [{}, {"ce_weight": 0.5, "temperature": 2.0}, {"kl_weight": 0.25}])
def test_micro_batches_of_unequal_length_give_the_gradient_of_one_big_batch(
    models: TeacherAndStudent, student: nn.Parameter, values: dict[str, float]
) -> None:
    small, large, one = batch_of(3, seed=0), batch_of(40, seed=1), batch_of(1, seed=2)

    parts = gradient_of(models, student, [small, large, one], **values)
    whole = gradient_of(models, student, [joined(small, large, one)], **values)

    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)


def test_gradient_is_the_mean_over_tokens(models: TeacherAndStudent, student: nn.Parameter) -> None:
    """Against autograd on the definition, with cross-entropy as well."""
    batch = batch_of(17, seed=0)
    found = gradient_of(models, student, [batch], ce_weight=0.5)
    student.grad = None
    ids, head_VD = batch.input_ids_N, models.head_VD
    log_student = (student[ids] @ head_VD.T).log_softmax(-1)
    log_teacher = (models.teacher_states(ids) @ head_VD.T).log_softmax(-1)

    kl_R = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    ce_R = -log_student[torch.arange(17), batch.targets_R]
    (kl_R + 0.5 * ce_R).mean().backward()

    torch.testing.assert_close(found, student.grad, rtol=1e-5, atol=1e-7)


def test_batch_without_weight_changes_nothing(models: TeacherAndStudent, student: nn.Parameter) -> None:
    batch, stand_in = batch_of(9, seed=0), batch_of(5, seed=1).without_weight()

    alone = gradient_of(models, student, [batch])
    beside = gradient_of(models, student, [batch, stand_in])

    assert torch.equal(alone, beside)


class Recorder:
    """Evaluations from a list, what cannot be read one utterance a time, and everything that the loop tells."""

    def __init__(self, *kls: float, too_many: int = 1_000) -> None:
        self.kls = list(kls)
        self.quarantined = 0
        self.too_many = too_many
        self.best: list[int] = []
        self.lines: list[tuple[int, dict[str, float]]] = []

    def hooks(self) -> Hooks:
        return Hooks(
            evaluate=lambda: Evaluation(
                kl_per_token=self.kls.pop(0), ce_per_token=1.0, agreement=0.5, response_tokens=8
            ),
            keep_best=lambda step, _: self.best.append(step),
            write=lambda step, values: self.lines.append((step, values)),
            count_quarantined=self.count_quarantined,
        )

    def count_quarantined(self) -> int:
        self.quarantined += 1
        if self.quarantined >= self.too_many:
            raise ShardError("too many cannot be read")
        return self.quarantined


@pytest.fixture
def start() -> TrainingState:
    return TrainingState(step=0, best_step=-1, best_kl=math.inf, world_size=1, zero_stage=1, fingerprint="f")


@pytest.fixture
def run_loop(
    models: TeacherAndStudent, student: nn.Parameter, tmp_path: Path
) -> Callable[[Recorder, TrainingState, TrainConfig], tuple[TrainingState, PlainEngine]]:
    def run(
        recorder: Recorder, state: TrainingState, config: TrainConfig, data: Steps | None = None
    ) -> tuple[TrainingState, PlainEngine]:
        engine = PlainEngine(student)
        state = train(
            engine,  # type: ignore[arg-type]
            models,
            data or Steps([batch_of(3, seed=0), batch_of(8, seed=1)], [batch_of(5, seed=2)]),
            config,
            state=state,
            checkpoints=Checkpoints(tmp_path, keep=config.keep_checkpoints),
            hooks=recorder.hooks(),
        )
        return state, engine

    return run


def test_each_step_has_its_micro_batches_its_rate_and_one_update(run_loop, start) -> None:
    _, engine = run_loop(Recorder(1.0, 0.9), start, settings())

    assert engine.calls == ["backward", "last", "step", "last", "step"] * 2
    expected = [learning_rate_at(i, peak=0.1, warmup_steps=1, steps=4, final_share=0.1) for i in range(4)]
    assert engine.learning_rates == expected


def test_student_is_evaluated_before_training_at_intervals_and_at_the_end(run_loop, start) -> None:
    recorder = Recorder(1.0, 0.9, 0.8, 0.7)

    run_loop(recorder, start, settings(steps=5, evaluate_every=2))

    assert [step for step, values in recorder.lines if "heldout_kl_per_token" in values] == [0, 2, 4, 5]
    assert recorder.kls == []


def test_best_student_is_the_one_with_the_lowest_heldout_kl(run_loop, start) -> None:
    recorder = Recorder(1.0, 0.5, 0.7, 0.4, 0.4)

    state, _ = run_loop(recorder, start, settings(steps=4, evaluate_every=1))

    assert recorder.best == [0, 1, 3]  # an equal one is no better
    assert (state.step, state.best_step, state.best_kl) == (4, 3, 0.4)


def test_student_before_training_stays_the_best_when_training_does_harm(run_loop, start) -> None:
    state, _ = run_loop(recorder := Recorder(0.3, 0.5), start, settings())

    assert recorder.best == [0]
    assert (state.best_step, state.best_kl) == (0, 0.3)


def test_checkpoints_are_written_at_intervals_and_at_the_end(run_loop, start, tmp_path: Path) -> None:
    run_loop(Recorder(1.0, 0.9), start, settings(steps=5, checkpoint_every=2, keep_checkpoints=5))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000004", "step-000005"]


class KilledError(Exception):
    """Stands for a kill."""


class StepsUntilKill(Steps):
    """Never gets to its third step."""

    def num_rows(self, step: int) -> int:
        if step == 2:
            raise KilledError
        return super().num_rows(step)


def test_resumed_training_goes_on_with_the_next_step_and_remembers_the_best(run_loop, start, student) -> None:
    data = ([batch_of(3, seed=0), batch_of(8, seed=1)], [batch_of(5, seed=2)])
    config, initial = settings(evaluate_every=2), student.detach().clone()
    whole, _ = run_loop(Recorder(1.0, 0.9, 0.95), start, config, Steps(*data))
    trained = student.detach().clone()
    with torch.no_grad():
        student.copy_(initial)

    with pytest.raises(KilledError):
        run_loop(Recorder(1.0, 0.9), start, config, StepsUntilKill(*data))
    recorder = Recorder(0.95)
    resumed, engine = run_loop(recorder, replace(start, step=2, best_step=2, best_kl=0.9), config, Steps(*data))

    assert engine.calls == ["backward", "last", "step", "last", "step"]
    assert [step for step, _ in recorder.lines] == [4, 4]  # the student is not evaluated again before the first step
    assert recorder.best == []
    assert torch.equal(student.detach(), trained)
    assert resumed == whole


def test_resumed_training_without_its_best_student_is_evaluated_at_once_and_writes_no_second_line(
    run_loop, start
) -> None:
    recorder = Recorder(0.7, 0.8)

    state, _ = run_loop(recorder, replace(start, step=2), settings(evaluate_every=2, log_every=4))

    assert recorder.best == [2]
    assert (state.best_step, state.best_kl) == (2, 0.7)
    assert [step for step, values in recorder.lines if "heldout_kl_per_token" in values] == [4]


def test_logged_values_are_means_over_the_tokens_since_the_last_line(run_loop, start, models, student) -> None:
    """With a rate of nearly 0 the student stands still: what is logged can be computed afterwards."""
    batches = [batch_of(3, seed=0), batch_of(8, seed=1), batch_of(5, seed=2)]
    recorder = Recorder(1.0, 0.9)
    run_loop(recorder, start, settings(learning_rate=1e-12))

    values = [values for _, values in recorder.lines if "kl" in values]
    everything = joined(*batches)
    ids = everything.input_ids_N
    log_student = (student.detach()[ids] @ models.head_VD.T).log_softmax(-1)
    log_teacher = (models.teacher_states(ids) @ models.head_VD.T).log_softmax(-1)

    assert [step for step, values in recorder.lines if "kl" in values] == [2, 4]
    for line in values:  # two steps each: all three batches
        assert line["kl"] == pytest.approx(float((log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean()))
        assert line["ce"] == pytest.approx(float(-log_student[torch.arange(16), everything.targets_R].mean()))
        agrees = (log_teacher.argmax(-1) == log_student.argmax(-1)).double().mean()
        assert line["agreement"] == pytest.approx(float(agrees))
        assert line["response_tokens"] == 16
        assert line["gradient_norm"] == 1.25
        seconds = line["seconds_per_step"] * 2
        assert line["audio_seconds_per_second"] * seconds == pytest.approx(20.0)
        assert line["tokens_per_second"] * seconds == pytest.approx(16.0)


def test_loss_that_is_no_number_stops_before_the_update(run_loop, start, student) -> None:
    with torch.no_grad():
        student[:] = torch.nan

    with pytest.raises(NonFiniteError, match="must be finite"):
        run_loop(Recorder(1.0), start, settings())


@pytest.mark.parametrize("kls", [(math.nan,), (1.0, math.inf)], ids=["before training", "in training"])
def test_heldout_value_that_is_no_number_is_told_and_neither_written_nor_kept(run_loop, start, kls) -> None:
    recorder = Recorder(*kls)
    step = 2 * (len(kls) - 1)

    with pytest.raises(NonFiniteError, match=rf"^heldout_kl_per_token of step {step} must be finite, got {kls[-1]};"):
        run_loop(recorder, start, settings(evaluate_every=2, log_every=4))

    assert recorder.best == [0][: len(kls) - 1]
    assert [s for s, _ in recorder.lines] == recorder.best


def test_utterances_that_cannot_be_read_are_counted_for_each_line_and_after_each_evaluation(run_loop, start) -> None:
    recorder = Recorder(1.0, 0.9, 0.8)

    run_loop(recorder, start, settings(steps=5, log_every=2, evaluate_every=3))

    # Evaluations before training, at 3 and at the end; lines at 2, 4 and, before the evaluation, at the end.
    assert [(step, line["quarantined"]) for step, line in recorder.lines if "kl" in line] == [(2, 2), (4, 4), (5, 5)]
    assert recorder.quarantined == 6


@pytest.mark.parametrize(
    ("too_many", "lines", "best", "steps"),
    [(1, [], [], 0), (2, [0], [0], 2), (3, [0, 2], [0], 2)],
    ids=["at the first evaluation", "at a line", "at a later evaluation"],
)
def test_too_many_that_cannot_be_read_stop_the_loop_before_anything_more_is_written_or_kept(
    run_loop, start, student, tmp_path: Path, too_many, lines, best, steps
) -> None:
    recorder = Recorder(1.0, 0.5, too_many=too_many)
    before = student.detach().clone()

    with pytest.raises(ShardError, match="^too many cannot be read$"):
        run_loop(recorder, start, settings(evaluate_every=2))

    assert [step for step, _ in recorder.lines] == lines
    assert recorder.best == best
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(student.detach(), before) == (steps == 0)


def test_step_of_which_nothing_could_be_read_has_no_gradient_and_a_line(run_loop, start, student) -> None:
    before = student.detach().clone()
    nothing = [batch_of(3, seed=0).without_weight(), batch_of(8, seed=1).without_weight()]
    recorder = Recorder(1.0, 0.9)

    run_loop(recorder, start, settings(), PlannedSteps(nothing))

    assert torch.equal(student.detach(), before)
    assert [line["kl"] for _, line in recorder.lines if "kl" in line] == [0.0, 0.0]
    assert [line["response_tokens"] for _, line in recorder.lines if "kl" in line] == [0, 0]


class PlannedSteps(Steps):
    """Rows are counted as planned, with a weight or without."""

    def num_rows(self, step: int) -> int:
        return sum(batch.num_rows for batch in self.steps[step % len(self.steps)])


def test_gradient_of_readable_rows_does_not_depend_on_what_became_of_the_others(models, student) -> None:
    """A batch beside one that could not be read weighs what it weighs beside one that could."""
    batch, other = batch_of(9, seed=0), batch_of(5, seed=1)
    engine = PlainEngine(student)

    accumulate_gradient(engine, models, PlannedSteps([batch, other.without_weight()]), settings(), step=0)

    found = student.grad.clone()
    expected = gradient_of(models, student, [batch]) * 9 / 14
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
