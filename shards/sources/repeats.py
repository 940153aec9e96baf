"""Recordings that are named twice, found among any number of them. Pure: no I/O."""

import hashlib

import numpy as np
import numpy.typing as npt

from shards.errors import SourceError
from shards.places import Place
from shards.sources.keys import Found

Digests = npt.NDArray[np.uint64]

_AT_ONCE = 16_384


class Repeats:
    """A recording that is named twice could land in training and in held-out at once.

    Of each one 8 bytes are kept: in sorted arrays, each more than twice as long as the next one. Two of 10 million
    different recordings have equal digests in one of 400,000 corpora.
    """

    def __init__(self, setting: str) -> None:
        """Begin with none; ``setting`` is named in messages."""
        self._setting = setting
        self._levels: list[Digests] = []
        self._pending: list[Found] = []

    def add(self, found: Found) -> None:
        """Take a recording.

        Raises:
            SourceError: One of the last ones was there before.
        """
        self._pending.append(found)
        if len(self._pending) == _AT_ONCE:
            self.check()

    def check(self) -> None:
        """Look for those that were taken since the last time.

        Raises:
            SourceError: One of them was there before.
        """
        digests = np.array([_digest(found) for found in self._pending], np.uint64)
        order = np.argsort(digests, kind="stable")
        ordered = digests[order]
        is_repeated = np.zeros(len(ordered), bool)
        is_repeated[1:] = ordered[1:] == ordered[:-1]
        for level in self._levels:
            places = np.minimum(np.searchsorted(level, ordered), len(level) - 1)
            is_repeated |= level[places] == ordered
        if is_repeated.any():
            again = self._pending[order[is_repeated].min()]
            first = next((one for one in self._pending if one is not again and _digest(one) == _digest(again)), None)
            before = f" at {first.where}" if first is not None else " before"
            raise SourceError(
                f"{self._setting} must name every recording once, got {again.path!r}{before} and again at "
                f"{again.where}; remove one"
            )
        self._pending = []
        if len(ordered):
            self._levels.append(ordered)
        while len(self._levels) > 1 and len(self._levels[-2]) < 2 * len(self._levels[-1]):
            self._levels[-2:] = [np.sort(np.concatenate(self._levels[-2:]), kind="stable")]


def _digest(found: Found) -> int:
    """Of the stretch of audio that a recording is, whatever it is called."""
    text = f"{Place(found.path).full}\0{found.offset_bytes or 0}\0{found.start_seconds or 0.0}"
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest(), "big")
