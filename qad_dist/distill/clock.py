"""Where the time of a step goes, without a step that waits to learn it."""

import time
from collections.abc import Callable

import torch

PARTS = ("data", "tower", "teacher", "student", "loss", "backward", "optimizer")
"""Of a step, in their order: waiting for a batch and copying it; embeddings and audio tower; the teacher's decoder; the
student's; both heads and the loss; backward; reduction of gradients, clipping and update."""


class StepClock:
    """Attributes the time between two marks to a part.

    On a GPU the marks are events in its stream, read when it has come there anyway: a part that has been launched is
    not a part that has run. Waiting for data shows as the gap that it leaves in the stream.
    """

    def __init__(self, device: torch.device, *, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begin, not running.

        Args:
            device: Whose time counts.
            clock: Seconds, for a device without events.
        """
        self._uses_events = device.type == "cuda"
        self._clock = clock
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._last: float | torch.cuda.Event | None = None
        self._seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    def start(self) -> None:
        """What was before does not count."""
        self._settle()
        self._last = self._now()

    def end(self, part: str) -> None:
        """The time since the last mark was this part's."""
        assert self._last is not None, "start() first"
        now = self._now()
        self._marks.append((part, now))
        if not self._uses_events:
            self._settle()

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last time; waits for the device."""
        self._settle()
        seconds = dict(self._seconds)
        self._seconds = dict.fromkeys(PARTS, 0.0)
        return seconds

    def _now(self) -> "float | torch.cuda.Event":
        if not self._uses_events:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _settle(self) -> None:
        if self._marks and self._uses_events:
            self._marks[-1][1].synchronize()  # type: ignore[union-attr]  # an event
        for part, mark in self._marks:
            self._seconds[part] += self._between(self._last, mark)
            self._last = mark
        self._marks = []

    def _between(self, first: "float | torch.cuda.Event | None", second: "float | torch.cuda.Event") -> float:
        if isinstance(first, float) and isinstance(second, float):
            return second - first
        return first.elapsed_time(second) / 1000  # type: ignore[union-attr]  # events count milliseconds
