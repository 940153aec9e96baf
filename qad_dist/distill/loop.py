"""The training loop: micro-batches to gradients, gradients to steps, and a look at the held-out set now and then.

A step waits for nothing. Lines of the log, evaluations and checkpoints do, and there all ranks decide together on what
they have seen: whether steps had to be left out, too much could not be read, or the student improves no more.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from qad_dist.batch import Batch
from qad_dist.config.train import TrainConfig
from qad_dist.distill.checkpoint import Checkpoints, TrainingState
from qad_dist.distill.evaluate import Evaluation
from qad_dist.distill.loss import distillation_loss
from qad_dist.distill.matching import hidden_distance
from qad_dist.distill.models import TeacherAndStudent
from qad_dist.distill.optim import learning_rate_at
from qad_dist.distill.window import BadBatch, Window
from qad_dist.runtime.collectives import own_rank
from qad_dist.runtime.engine import Engine
from shards.errors import NonFiniteError
from shards.faults import fault_point

log = logging.getLogger(__name__)

EQUAL_SHARE = 0.01
"""Students whose held-out KL differs by no more than this share are as near to the teacher; their words decide."""


class TrainingData(Protocol):
    """This rank's micro-batches of each step."""

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """Equally many on every rank."""
        ...

    def num_rows(self, step: int) -> int:
        """Response tokens of the step over all ranks, as planned: rows that turn out to have no weight are among them.

        So every rank knows the number before anybody has read the step, and a batch's gradient does not depend on what
        became of another one.
        """
        ...

    def num_tokens(self, step: int) -> int:
        """Tokens of prompts and responses, likewise."""
        ...

    def audio_seconds(self, step: int) -> float:
        """Audio of the step over all ranks."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What the loop calls and does not know; collective, as a rule."""

    evaluate: Callable[[], Evaluation]
    """The held-out set."""
    count_words: Callable[[], float | None]
    """Held-out word error rate of the student as it is; None if nothing is decoded."""
    keep_best: Callable[[int, Evaluation], None]
    """Store the student as the best so far."""
    write: Callable[[int, dict[str, float]], None]
    """Record values of a step; a no-op on all ranks but one."""
    write_bad: Callable[[int, list[BadBatch]], None]
    """Record micro-batches without a finite loss among the steps before this one; likewise."""
    count_quarantined: Callable[[], int]
    """Utterances that could not be read so far, on any rank. Raises when they are too many."""
    advance: Callable[[int], None] = lambda step: None
    """Is told of each step that is done, before the device has done it; the only one that is not collective."""


def train(
    engine: Engine,
    models: TeacherAndStudent,
    data: TrainingData,
    settings: TrainConfig,
    *,
    state: TrainingState,
    checkpoints: Checkpoints,
    hooks: Hooks,
) -> TrainingState:
    """Train from ``state`` to the last step, or until the student has not improved for ``train.patience`` looks.

    Returns:
        The state behind the last step; its checkpoint is on disk.

    Raises:
        NonFiniteError: On every rank, when more than ``train.max_skipped_steps`` steps had a loss or gradient that is
            no finite number, or a held-out value is none. No update is made of it, and nothing of it is written or
            kept.
        QadError: On every rank, from ``hooks.count_quarantined``: asked for each line and after each evaluation.
    """
    if state.best_step < 0:  # new, or resumed where the best student is gone: then its line is there already
        state = _evaluate(state, settings, hooks, write=state.step == 0)
    skipped_before = engine.num_skipped() - state.skipped  # in a preflight, or before this start
    window = Window(models.device, settings)
    while state.step < settings.steps and not _has_stalled(state, settings):
        learning_rate = learning_rate_at(
            state.step,
            peak=settings.learning_rate,
            warmup_steps=settings.warmup_steps,
            steps=settings.steps,
            final_share=settings.final_learning_rate_share,
        )
        make_step(engine, models, data, settings, step=state.step, learning_rate=learning_rate, window=window)
        state = replace(state, step=state.step + 1)
        hooks.advance(state.step)
        is_last = state.step == settings.steps
        if is_last or any(not state.step % n for n in (settings.log_every, *_pauses(settings))):
            state = _tell(engine, state, settings, hooks, window, learning_rate, skipped_before=skipped_before)
            checkpoints.settle(wait=False)
        if is_last or state.step % settings.evaluate_every == 0:
            state = _evaluate(state, settings, hooks)
        if is_last or state.step % settings.checkpoint_every == 0 or _has_stalled(state, settings):
            checkpoints.save(engine, state)
        if any(not state.step % n for n in _pauses(settings)):
            window.clock.start()  # what came in between is not training
    checkpoints.settle(wait=True)
    return state


def make_step(
    engine: Engine,
    models: TeacherAndStudent,
    data: TrainingData,
    settings: TrainConfig,
    *,
    step: int,
    learning_rate: float,
    window: Window,
) -> None:
    """One update from this rank's micro-batches of a step, or none if a loss or gradient of any rank is not finite."""
    is_finite = accumulate_gradient(engine, models, data, settings, step=step, window=window)
    fault_point("train.after_backward", step=step, rank=own_rank())
    engine.step(learning_rate=learning_rate, is_finite=is_finite)
    window.clock.end("optimizer")
    window.end_step(audio_seconds=data.audio_seconds(step))
    fault_point("train.after_step", step=step, rank=own_rank())


def accumulate_gradient(
    engine: Engine,
    models: TeacherAndStudent,
    data: TrainingData,
    settings: TrainConfig,
    *,
    step: int,
    window: Window,
) -> Tensor:
    """Backward through this rank's micro-batches of a step: sums over rows, divided by the planned rows of all ranks.

    Returns:
        bool scalar on the device: whether all losses were finite numbers.
    """
    step_rows, step_tokens = data.num_rows(step), data.num_tokens(step) if settings.compares_layers else 1
    is_finite = torch.ones((), dtype=torch.bool, device=models.device)
    for host_batch, is_last in _with_last(data.micro_batches(step)):
        fault_point("train.after_read", step=step, rank=own_rank())
        loss = forward(models, host_batch, settings, step=step, rows=step_rows, tokens=step_tokens, window=window)
        is_finite &= torch.isfinite(loss.detach())
        fault_point("train.after_forward", step=step, rank=own_rank())
        engine.backward(loss, is_last=is_last)
        window.clock.end("backward")
    return is_finite


def forward(
    models: TeacherAndStudent,
    host_batch: Batch,
    settings: TrainConfig,
    *,
    step: int,
    rows: int,
    tokens: int,
    window: Window,
) -> Tensor:
    """What a micro-batch adds to the loss of its step, which has so many response rows and tokens over all ranks."""
    batch = host_batch.to(models.device)
    window.clock.end("data")
    embedded = models.embed(batch)
    window.clock.end("tower")
    with torch.no_grad():
        teacher = models.teacher_states(batch, embedded)
    window.clock.end("teacher")
    student = models.student_states(embedded)
    window.clock.end("student")
    sums = distillation_loss(
        student.rows_RD,
        teacher.rows_RD,
        models.head_VD,
        batch.targets_R,
        kl_weight_R=batch.kl_weight_R * settings.kl_weight,
        ce_weight_R=batch.ce_weight_R * settings.ce_weight if settings.ce_weight else None,
        temperature=settings.temperature,
        chunk_rows=settings.loss_chunk_rows,
        divergence=settings.divergence,
        teacher_head_VE=models.teacher_head_VE,
    )
    loss, distance = sums.loss / rows, None
    if settings.compares_layers:
        weight_N = host_batch.token_weights().to(models.device, non_blocking=True)
        distance = hidden_distance(student.layers, teacher.layers, weight_N)
        loss = loss + settings.hidden_weight * distance / tokens
    window.add(sums, batch, step=step, hidden_distance=distance)
    window.clock.end("loss")
    return loss


def _pauses(settings: TrainConfig) -> tuple[int, ...]:
    return settings.evaluate_every, settings.checkpoint_every


def _has_stalled(state: TrainingState, settings: TrainConfig) -> bool:
    return settings.patience is not None and state.looks_without_better >= settings.patience


def _tell(
    engine: Engine,
    state: TrainingState,
    settings: TrainConfig,
    hooks: Hooks,
    window: Window,
    learning_rate: float,
    *,
    skipped_before: int,
) -> TrainingState:
    """Write a line; know again how many steps were left out, and stop when they are too many."""
    line, quarantined = window.close(), hooks.count_quarantined()
    skipped = engine.num_skipped() - skipped_before
    if new := skipped - state.skipped:
        _warn_of_skipped(state.step, new, line.bad)
        hooks.write_bad(state.step, line.bad)
    if skipped > settings.max_skipped_steps:
        error = NonFiniteError(
            f"loss and gradient must be finite in all but train.max_skipped_steps ({settings.max_skipped_steps}) "
            f"steps, got nan or inf in {skipped} of {state.step}; lower train.learning_rate, or see skipped.jsonl"
        )
        error.is_shared = True  # every rank counts the same
        raise error
    told = {"lr": learning_rate, "quarantined": quarantined, "skipped": skipped}
    if math.isfinite(norm := engine.gradient_norm()):  # JSON has no other numbers
        told["gradient_norm"] = norm
    values = {**line.values, **told}
    hooks.write(state.step, values)
    log.info(
        "event=step step=%d/%d loss=%.5f kl=%.5f agreement=%.4f lr=%.2e gradient_norm=%.3f tokens_per_second=%.0f "
        "audio_seconds_per_second=%.1f quarantined=%d skipped=%d eta_seconds=%.0f",
        *(state.step, settings.steps, values["loss"], values["kl"], values["agreement"], learning_rate, norm),
        *(values["tokens_per_second"], values["audio_seconds_per_second"], quarantined, skipped),
        values["seconds_per_step"] * (settings.steps - state.step),
    )
    return replace(state, skipped=skipped)


def _warn_of_skipped(step: int, new: int, bad: list[BadBatch]) -> None:
    named = " ".join(f"{one.step}:{','.join(one.keys[:3])}{',...' if len(one.keys) > 3 else ''}" for one in bad[:3])
    log.warning(
        'event=skipped steps=%d until_step=%d micro_batches="%s" why="a loss or gradient was no finite number"',
        *(new, step, named or "none: only the gradient was not finite"),
    )


def _evaluate(state: TrainingState, settings: TrainConfig, hooks: Hooks, *, write: bool = True) -> TrainingState:
    evaluation = hooks.evaluate()
    hooks.count_quarantined()
    _check_finite(state, evaluation)
    is_end = state.step in (0, settings.steps)
    if is_end or (settings.decode_every is not None and state.step % settings.decode_every == 0):
        evaluation = replace(evaluation, word_error_rate=hooks.count_words())
    if write:
        hooks.write(state.step, evaluation.as_metrics("heldout_"))
    is_best = settings.keep == "last" or is_better(evaluation, state)
    log.info(
        "event=evaluate step=%d heldout_kl=%.6f agreement=%.4f word_error_rate=%s best=%s",
        *(state.step, evaluation.kl_per_token, evaluation.agreement),
        "none" if evaluation.word_error_rate is None else f"{evaluation.word_error_rate:.4f}",
        str(is_best).lower(),
    )
    if not is_best:
        return replace(state, looks_without_better=state.looks_without_better + 1)
    hooks.keep_best(state.step, evaluation)
    return replace(
        state,
        best_step=state.step,
        best_kl=evaluation.kl_per_token,
        best_word_error_rate=evaluation.word_error_rate,
        looks_without_better=0,
    )


def is_better(evaluation: Evaluation, state: TrainingState) -> bool:
    """Whether a student is to take the place of the best so far: by KL, then by words where both were decoded. Pure."""
    if state.best_step < 0:
        return True
    found, best = evaluation.word_error_rate, state.best_word_error_rate
    is_as_near = abs(evaluation.kl_per_token - state.best_kl) <= EQUAL_SHARE * state.best_kl
    if found is not None and best is not None and found != best and is_as_near:
        return found < best
    return evaluation.kl_per_token < state.best_kl


def _check_finite(state: TrainingState, evaluation: Evaluation) -> None:
    for name, value in evaluation.as_metrics("heldout_").items():
        if not math.isfinite(value):
            remedy = "lower train.learning_rate" if state.step else "run quantize again"
            error = NonFiniteError(f"{name} of step {state.step} must be finite, got {value}; {remedy}")
            error.is_shared = True  # every rank has the sums of all
            raise error


def _with_last(batches: Iterator[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Each batch, and whether it is the last one."""
    previous = next(batches)
    for batch in batches:
        yield previous, False
        previous = batch
    yield previous, True
