"""How far a rank is: with its audio, one line now and then, from every rank; with its steps, from one of them."""

import logging
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts what this rank has done; tells it at most every 30 seconds, and whenever it is asked to."""

    def __init__(self, stage: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin now.

        Args:
            stage: Its name, for the line.
            clock: Seconds; only their differences count.
        """
        self._stage, self._clock = stage, clock
        self._begun = self._told = clock()
        self.num_utterances = 0
        self.audio_seconds = 0.0

    @property
    def rtfx(self) -> float:
        """Seconds of audio for each second since the beginning."""
        return self.audio_seconds / max(self._clock() - self._begun, 1e-9)

    def add(self, *, utterances: int, audio_seconds: float) -> None:
        """Count what was done since the last time."""
        self.num_utterances += utterances
        self.audio_seconds += audio_seconds

    def tell(self, *, left_seconds: Callable[[], float], ranks: int, now: bool = False) -> None:
        """Log a line, if it is time for one.

        Args:
            left_seconds: Asked only then: audio that no rank has done.
            ranks: Between how many it is shared out.
            now: Whether it is time for a line whenever the last one was.
        """
        present = self._clock()
        if not now and present - self._told < SECONDS_BETWEEN_LINES:
            return
        self._told = present
        left = left_seconds()
        eta = "unknown" if self.rtfx == 0 else f"{left / (self.rtfx * ranks):.0f}"
        log.info(
            "event=progress stage=%s utterances=%d audio_hours=%.3f rtfx=%.1f left_hours=%.3f eta_seconds=%s",
            *(self._stage, self.num_utterances, self.audio_seconds / 3600, self.rtfx, left / 3600, eta),
        )


class StepProgress:
    """Steps that are done: a bar on a terminal; elsewhere a line at most every 30 seconds."""

    def __init__(self, stage: str, *, done: int, steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin now.

        Args:
            stage: Its name.
            done: Steps that an earlier start has done.
            steps: All of them.
            clock: Seconds; only their differences count.
        """
        self._stage, self._steps, self._first, self._clock = stage, steps, done, clock
        self._begun = self._told = clock()
        self._bar = tqdm(
            total=steps, initial=done, desc=stage, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def advance(self, step: int) -> None:
        """This step is done."""
        self._bar.update(step - self._bar.n if not self._bar.disable else 0)
        present = self._clock()
        if not self._bar.disable or present - self._told < SECONDS_BETWEEN_LINES:
            return
        self._told = present
        seconds = (present - self._begun) / max(step - self._first, 1)
        log.info(
            "event=progress stage=%s step=%d/%d seconds_per_step=%.2f eta_seconds=%.0f",
            *(self._stage, step, self._steps, seconds, seconds * (self._steps - step)),
        )

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
