"""The training loop: micro-batches to gradients, gradients to steps, and a look at the held-out set now and then."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from qad_dist.batch import Batch
from qad_dist.config import TrainConfig
from qad_dist.distill.checkpoint import Checkpoints, TrainingState
from qad_dist.distill.evaluate import Evaluation
from qad_dist.distill.loss import LossSums, distillation_loss
from qad_dist.distill.models import TeacherAndStudent
from qad_dist.distill.optim import learning_rate_at
from qad_dist.runtime.collectives import all_gather_objects
from qad_dist.runtime.engine import Engine
from shards.errors import NonFiniteError

log = logging.getLogger(__name__)


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

    def audio_seconds(self, step: int) -> float:
        """Audio of the step over all ranks."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What the loop calls and does not know."""

    evaluate: Callable[[], Evaluation]
    """The held-out set; collective."""
    keep_best: Callable[[int, Evaluation], None]
    """Store the student as the best so far; collective."""
    write: Callable[[int, dict[str, float]], None]
    """Record values of a step; a no-op on all ranks but one."""
    count_quarantined: Callable[[], int]
    """Utterances that could not be read so far, on any rank; collective. Raises when they are too many."""


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
    """Train from ``state`` to the last step.

    Returns:
        The state behind the last step; its checkpoint is on disk.

    Raises:
        NonFiniteError: On every rank, when a loss, a gradient or a held-out value is no number; no update is made of
            it, and nothing of it is written or kept.
        QadError: On every rank, from ``hooks.count_quarantined``: asked for each line and after each evaluation.
    """
    if state.best_step < 0:  # new, or resumed where the best student is gone: then its line is there already
        state = _evaluate(state, hooks, write=state.step == 0)
    window = _Window(models.device)
    while state.step < settings.steps:
        step = state.step
        learning_rate = learning_rate_at(
            step,
            peak=settings.learning_rate,
            warmup_steps=settings.warmup_steps,
            steps=settings.steps,
            final_share=settings.final_learning_rate_share,
        )
        is_finite = accumulate_gradient(engine, models, data, settings, step=step, window=window)
        engine.step(learning_rate=learning_rate, is_finite=is_finite)
        window.end_step(audio_seconds=data.audio_seconds(step))
        state = replace(state, step=step + 1)
        if state.step % settings.log_every == 0 or state.step == settings.steps:
            num_quarantined = hooks.count_quarantined()
            told = {"lr": learning_rate, "gradient_norm": engine.gradient_norm(), "quarantined": num_quarantined}
            _write_line(state.step, {**window.close(), **told}, settings, hooks)
        window.pause_clock()
        if state.step % settings.evaluate_every == 0 or state.step == settings.steps:
            state = _evaluate(state, hooks)
        if state.step % settings.checkpoint_every == 0 or state.step == settings.steps:
            checkpoints.save(engine, state)
        window.resume_clock()
    return state


def accumulate_gradient(
    engine: Engine,
    models: TeacherAndStudent,
    data: TrainingData,
    settings: TrainConfig,
    *,
    step: int,
    window: "_Window | None" = None,
) -> Tensor:
    """Backward through this rank's micro-batches of a step: sums over rows, divided by the planned rows of all ranks.

    Returns:
        bool scalar on the device: whether all losses were numbers.
    """
    step_rows = data.num_rows(step)
    is_finite = torch.ones((), dtype=torch.bool, device=models.device)
    for host_batch, is_last in _with_last(data.micro_batches(step)):
        batch = host_batch.to(models.device)
        shared = models.embed(batch)
        with torch.no_grad():
            teacher_RD = models.teacher_states(shared)
        sums = distillation_loss(
            models.student_states(shared),
            teacher_RD,
            models.head_VD,
            batch.targets_R,
            kl_weight_R=batch.kl_weight_R * settings.kl_weight,
            ce_weight_R=batch.ce_weight_R * settings.ce_weight,
            temperature=settings.temperature,
            chunk_rows=settings.loss_chunk_rows,
        )
        is_finite &= torch.isfinite(sums.loss.detach())
        engine.backward(sums.loss / step_rows, is_last=is_last)
        if window is not None:
            window.add(sums, batch)
    return is_finite


def _write_line(step: int, values: dict[str, float], settings: TrainConfig, hooks: Hooks) -> None:
    hooks.write(step, values)
    log.info(
        "event=step step=%d/%d kl=%.5f agreement=%.4f lr=%.2e gradient_norm=%.3f tokens_per_second=%.0f "
        "quarantined=%d eta_seconds=%.0f",
        *(step, settings.steps, values["kl"], values["agreement"], values["lr"], values["gradient_norm"]),
        *(values["tokens_per_second"], values["quarantined"]),
        values["seconds_per_step"] * (settings.steps - step),
    )


def _evaluate(state: TrainingState, hooks: Hooks, *, write: bool = True) -> TrainingState:
    evaluation = hooks.evaluate()
    hooks.count_quarantined()
    values = evaluation.as_metrics("heldout_")
    for name, value in values.items():
        if not math.isfinite(value):
            remedy = "lower train.learning_rate" if state.step else "run quantize again"
            error = NonFiniteError(f"{name} of step {state.step} must be finite, got {value}; {remedy}")
            error.is_shared = True  # every rank has the sums of all
            raise error
    if write:
        hooks.write(state.step, values)
    is_best = state.best_step < 0 or evaluation.kl_per_token < state.best_kl
    log.info(
        "event=evaluate step=%d heldout_kl=%.6f agreement=%.4f best=%s",
        *(state.step, evaluation.kl_per_token, evaluation.agreement, str(is_best).lower()),
    )
    if not is_best:
        return state
    hooks.keep_best(state.step, evaluation)
    return replace(state, best_step=state.step, best_kl=evaluation.kl_per_token)


class _Window:
    """Sums between two log lines. On the device, so that a step that is not logged waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open()
        self._begun = time.perf_counter()
        self._seconds = 0.0

    def _open(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        self._rows = self._tokens = self._steps = 0
        self._audio_seconds = 0.0

    def add(self, sums: LossSums, batch: Batch) -> None:
        """Count a micro-batch of this rank."""
        self._sums += torch.stack([sums.kl, sums.ce, sums.agreements])
        if batch.weighted_rows:
            self._rows += batch.weighted_rows
            self._tokens += batch.num_tokens

    def end_step(self, *, audio_seconds: float) -> None:
        """Count a step of all ranks."""
        self._steps += 1
        self._audio_seconds += audio_seconds

    def pause_clock(self) -> None:
        """Stop counting time: what follows is not training."""
        self._seconds += time.perf_counter() - self._begun

    def resume_clock(self) -> None:
        """Count time again."""
        self._begun = time.perf_counter()

    def close(self) -> dict[str, float]:
        """Means over all ranks since the last line, and begin the next one; collective."""
        self.pause_clock()
        own = [*self._sums.tolist(), self._rows, self._tokens]
        kl, ce, agreements, rows, tokens = (sum(column) for column in zip(*all_gather_objects(own), strict=True))
        num_rows = max(rows, 1)  # none, if nothing of these steps could be read
        values = {
            "kl": kl / num_rows,
            "ce": ce / num_rows,
            "agreement": agreements / num_rows,
            "response_tokens": rows,
            "tokens_per_second": tokens / self._seconds,
            "audio_seconds_per_second": self._audio_seconds / self._seconds,
            "seconds_per_step": self._seconds / self._steps,
        }
        self._open()
        self._seconds = 0.0
        self.resume_clock()
        return values


def _with_last(batches: Iterator[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Each batch, and whether it is the last one."""
    previous = next(batches)
    for batch in batches:
        yield previous, False
        previous = batch
    yield previous, True
