"""A look ahead: the largest micro-batches of a plan, forward and backward, before the first step.

What does not fit into memory, or a kernel that is missing, is told in the first minute, not hours later when the plan
comes to it. The update is left out as one with a loss that is no number is: nothing changes.
"""

import logging
from collections.abc import Iterable

import torch

from qad_dist.batch import Batch
from qad_dist.config.train import TrainConfig
from qad_dist.distill.loop import forward
from qad_dist.distill.models import TeacherAndStudent
from qad_dist.distill.window import Window, peak_memory_bytes
from qad_dist.runtime.engine import Engine
from qad_dist.runtime.engine.memory import Memory, measured_memory

log = logging.getLogger(__name__)


def preflight(engine: Engine, models: TeacherAndStudent, batches: Iterable[Batch], settings: TrainConfig) -> None:
    """Run micro-batches and leave out the update; all ranks together, each with the same batches.

    Args:
        engine: Before its first step, or where it has loaded a checkpoint.
        models: Teacher and student.
        batches: On the host; at least one.
        settings: Those that training will have.

    Raises:
        torch.OutOfMemoryError: The device cannot hold one.
    """
    window = Window(models.device, settings)
    held: Memory | None = None
    for host_batch in batches:
        rows, tokens = max(host_batch.num_rows, 1), host_batch.num_tokens
        loss = forward(models, host_batch, settings, step=-1, rows=rows, tokens=tokens, window=window)
        engine.backward(loss, is_last=True)
        held = measured_memory(engine)  # now, as gradients are there
        never = torch.zeros((), dtype=torch.bool, device=models.device)
        engine.step(learning_rate=0.0, is_finite=never)
        log.info(
            "event=preflight tokens=%d utterances=%d response_tokens=%d mel_frames=%d",
            *(host_batch.num_tokens, host_batch.num_utterances, host_batch.num_rows),
            int(host_batch.mel_lengths_U.sum()),
        )
    assert held is not None, "a plan has at least one micro-batch"
    tell_memory("measured", held)
    log.info("event=preflight peak_memory_gib=%.2f", peak_memory_bytes(models.device) / 2**30)


def tell_memory(source: str, memory: Memory) -> None:
    """Log what a rank holds of the engine's module, by formula or as measured."""
    parts = " ".join(f"{name}={value / 2**30:.4f}" for name, value in memory._asdict().items())
    log.info("event=memory_gib_of_a_rank source=%s %s", source, parts)
