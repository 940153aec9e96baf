"""What happened between two lines of the log. Sums stay on the device: a step that is not logged never waits."""

import resource
from dataclasses import dataclass

import torch
from torch import Tensor

from qad_dist.batch import Batch
from qad_dist.config.train import TrainConfig
from qad_dist.distill.clock import PARTS, StepClock
from qad_dist.distill.loss import LossSums
from qad_dist.runtime.collectives import all_gather_objects

LOSS = "loss"
"""The sum that is learned from: KL and cross-entropy per response token, and the weighted distance of hidden states."""
SUMS = (LOSS, "kl", "ce", "agreement")
"""Of :class:`~qad_dist.distill.loss.LossSums`; lines tell them per response token."""
HIDDEN = "hidden_distance"
"""Of hidden states behind all layers, per token; told where ``train.hidden_weight`` is not 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BadBatch:
    """A micro-batch whose loss was no finite number."""

    step: int
    """That was left out for it, from 0."""
    keys: tuple[str, ...]
    """Its utterances: one of them, or more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """All ranks together, since the last line."""

    values: dict[str, float]
    """By the names of ``metrics.jsonl``."""
    bad: list[BadBatch]
    """Of all ranks, in the order of steps and ranks."""


class Window:
    """Counts micro-batches and steps of this rank until a line is written."""

    def __init__(self, device: torch.device, settings: TrainConfig) -> None:
        """Begin, the clock running.

        Args:
            device: Where losses are.
            settings: How many tokens a micro-batch may have, and what the loss is made of.
        """
        self._device, self._settings = device, settings
        self.clock = StepClock(device)
        self.clock.start()
        self._open()

    def _open(self) -> None:
        self._sums = torch.zeros(len(SUMS) + 1, dtype=torch.float64, device=self._device)
        self._batches: list[tuple[BadBatch, int, Tensor]] = []
        self._tokens = self._num_batches = self._steps = 0
        self._audio_seconds = 0.0

    def add(self, sums: LossSums, batch: Batch, *, step: int, hidden_distance: Tensor | None = None) -> None:
        """Count a micro-batch; one whose loss is not finite has a part in the speeds only."""
        loss = sums.loss.detach()
        distance = torch.zeros_like(loss) if hidden_distance is None else hidden_distance.detach()
        is_finite = torch.isfinite(loss + distance)
        found = torch.stack([loss, sums.kl, sums.ce, sums.agreements, distance])
        self._sums += torch.where(is_finite, found, 0.0)
        self._batches.append((BadBatch(step=step, keys=batch.keys), batch.weighted_rows, is_finite))
        if batch.weighted_rows:
            self._tokens += batch.num_tokens
            self._num_batches += 1

    def end_step(self, *, audio_seconds: float) -> None:
        """Count a step of all ranks."""
        self._steps += 1
        self._audio_seconds += audio_seconds

    def close(self) -> Line:
        """Means over all ranks since the last line, and begin the next one; collective, waits for the device."""
        seconds = self.clock.read()
        flags = torch.stack([flag for _, _, flag in self._batches]).tolist() if self._batches else []
        bad = [batch for (batch, _, _), is_finite in zip(self._batches, flags, strict=True) if not is_finite]
        rows = sum(rows for (_, rows, _), is_finite in zip(self._batches, flags, strict=True) if is_finite)
        own = (
            [*self._sums.tolist(), rows, self._tokens, self._num_batches],
            seconds,
            bad,
            peak_memory_bytes(self._device),
        )
        counts, times, bad_of_ranks, peaks = zip(*all_gather_objects(own), strict=True)
        *sums, distance, rows, tokens, batches = (sum(column) for column in zip(*counts, strict=True))
        num_rows = max(rows, 1)  # none, if nothing of these steps could be read
        # The slowest rank sets the pace, whichever part it waits in.
        total = max(sum(one.values()) for one in times)
        values = {name: value / num_rows for name, value in zip(SUMS, sums, strict=True)}
        if self._settings.compares_layers:
            values[HIDDEN] = distance / max(tokens, 1)
            values[LOSS] += self._settings.hidden_weight * values[HIDDEN]
        values |= {
            "response_tokens": rows,
            "tokens_per_second": tokens / total,
            "audio_seconds_per_second": self._audio_seconds / total,
            "seconds_per_step": total / self._steps,
            "unfilled": 1 - tokens / (max(batches, 1) * self._settings.micro_batch_tokens),
            "peak_memory_gib": max(peaks) / 2**30,
        }
        for part in PARTS:
            values[f"seconds_{part}"] = sum(one[part] for one in times) / len(times) / self._steps
        self._open()
        return Line(values=values, bad=sorted((one for share in bad_of_ranks for one in share), key=lambda b: b.step))


def peak_memory_bytes(device: torch.device) -> int:
    """Of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
