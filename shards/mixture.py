"""How often each utterance comes in an epoch, so that large languages do not drown small ones. Pure: no I/O."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageShare:
    """What one language brings to an epoch."""

    language: int
    """Its code."""
    num_utterances: int
    hours: float
    """Of its audio in the data."""
    hours_per_epoch: float
    """Of its audio in an epoch, in the mean over epochs."""
    share: float
    """Its part of an epoch's audio."""
    times: float
    """How often each of its utterances comes in an epoch, in the mean over epochs."""


class Mixture:
    """Appearances of the utterances of each language in an epoch.

    A language of h of the H hours gets the part ``h^(1/T) / sum of h^(1/T)`` of the H hours, at most the cap: t hours.
    So its N utterances appear ``n = round(t / h * N)`` times in every epoch, at least once: each ``n // N`` times, and
    ``n % N`` of them once more. Which ones rotates through a fixed order: after E epochs each has appeared
    ``E * n / N`` times, rounded down or up. At temperature 1 without a cap that is once an epoch.
    """

    def __init__(
        self,
        languages: ArrayLike,
        audio_seconds: Sequence[float] | NDArray[np.floating],
        *,
        temperature: float,
        max_hours_per_language: float | None,
    ) -> None:
        """Count the appearances.

        Args:
            languages: Code of each utterance's language, from 0; utterances without one share a code of their own.
            audio_seconds: Of each utterance, above 0.
            temperature: T, at least 1; the higher, the more equal are the languages.
            max_hours_per_language: Most audio that a language brings to an epoch; None for no limit.
        """
        self.temperature, self.max_hours_per_language = temperature, max_hours_per_language
        self.languages = np.asarray(languages, dtype=np.int32)
        self._hours = np.bincount(self.languages, weights=audio_seconds) / 3600
        self._num_utterances = np.bincount(self.languages)
        most_hours = np.inf if max_hours_per_language is None else max_hours_per_language
        self._appearances = self._count(1 / temperature, most_hours)

    def indices(self, *, seed: int, epoch: int) -> NDArray[np.int32]:
        """The utterances of an epoch, ascending, each as often as it appears."""
        present = np.maximum(self._num_utterances, 1)
        counts = (self._appearances // present)[self.languages]
        once_more = self._appearances % present
        if once_more.any():
            order, ends = self._order(seed), np.cumsum(self._num_utterances)
            for language in np.flatnonzero(once_more).tolist():
                own = order[ends[language] - self._num_utterances[language] : ends[language]]
                first = epoch * int(once_more[language]) % len(own)
                chosen = np.arange(first, first + once_more[language])
                counts[own.take(chosen, mode="wrap")] += 1
        return np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    def shares(self) -> list[LanguageShare]:
        """What each language brings, by code; languages without utterances are left out."""
        times = self._appearances / np.maximum(self._num_utterances, 1)
        hours = self._hours * times
        return [
            LanguageShare(
                language=language,
                num_utterances=int(self._num_utterances[language]),
                hours=float(self._hours[language]),
                hours_per_epoch=float(hours[language]),
                share=float(hours[language] / hours.sum()),
                times=float(times[language]),
            )
            for language in np.flatnonzero(self._num_utterances).tolist()
        ]

    def _count(self, exponent: float, most_hours: float) -> NDArray[np.int64]:
        is_present = self._num_utterances > 0
        hours = self._hours[is_present]
        weights = hours**exponent
        wanted = np.minimum(hours.sum() * weights / weights.sum(), most_hours)
        # Rounded twice: the last bit of a power differs between machines, and must not decide what is half-way.
        appearances = np.rint(np.round(wanted / hours * self._num_utterances[is_present], 6))
        counts = np.zeros(len(self._hours), dtype=np.int64)
        counts[is_present] = np.maximum(appearances, 1)
        return counts

    def _order(self, seed: int) -> NDArray[np.int64]:
        """The utterances language by language, each language in an order of its own that is the same in all epochs."""
        # The spawn key keeps these numbers apart from those that shuffle the epochs and windows.
        random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0, 0)))
        shuffled = random.permutation(len(self.languages))
        return shuffled[np.argsort(self.languages[shuffled], kind="stable")]
