"""Can this student learn at all? A few utterances, over and over, until it has them by heart."""

import logging

import torch

from qad_dist.batch import Batch
from qad_dist.config.train import TrainConfig
from qad_dist.distill.loop import forward
from qad_dist.distill.models import TeacherAndStudent
from qad_dist.distill.window import Window
from qad_dist.runtime.engine import Engine
from shards.errors import ModelError

log = logging.getLogger(__name__)

LINES = 10
"""Of the log, over all steps."""


def overfit(
    engine: Engine, models: TeacherAndStudent, batch: Batch, settings: TrainConfig, *, must_fall_to: float
) -> list[float]:
    """Train on one batch at the peak of the learning rate; all ranks together, each with the same batch.

    Args:
        engine: Before its first step.
        models: Teacher and student.
        batch: On the host.
        settings: Loss, steps and rate.
        must_fall_to: Share of the first loss.

    Returns:
        Loss per response token before the first step, then of each tenth of the steps.

    Raises:
        ModelError: On every rank, when it does not fall so far: something between the loss and the weights is broken,
            or the rate is wrong.
    """
    window = Window(models.device, settings)
    losses: list[float] = []
    for step in range(settings.steps):
        rows, tokens = batch.num_rows * engine.world_size, batch.num_tokens * engine.world_size
        loss = forward(models, batch, settings, step=step, rows=rows, tokens=tokens, window=window)
        engine.backward(loss, is_last=True)
        engine.step(learning_rate=settings.learning_rate, is_finite=torch.isfinite(loss.detach()))
        window.end_step(audio_seconds=0.0)
        if step == 0 or (step + 1) % max(1, settings.steps // LINES) == 0:
            losses.append(window.close().values["loss"])
            log.info("event=sanity step=%d loss=%.6f skipped=%d", step + 1, losses[-1], engine.num_skipped())
    if not losses[-1] <= must_fall_to * losses[0]:
        error = ModelError(
            f"the loss of {batch.num_utterances} utterances must fall to {must_fall_to:g} of what it was in "
            f"{settings.steps} steps, got {losses[0]:.6f} and then {losses[-1]:.6f}; raise train.learning_rate or "
            "train.steps"
        )
        error.is_shared = True  # every rank has the sums of all
        raise error
    return losses
