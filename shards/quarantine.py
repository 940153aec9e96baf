"""Utterances that could not be read: one JSON line for each in a file of the rank, and a limit for all ranks together.

Bad audio is told, counted and bounded, and never changes the number of steps.
"""

import json
import math
import os
import threading
from collections.abc import Iterable
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

from shards.errors import ShardError, StageError
from shards.read import Damaged

_EXAMPLES = 3


class Quarantine:
    """A file of damaged utterances that grows; a run that goes on after an interruption goes on with it.

    May be added to from any thread.
    """

    def __init__(self, path: Path, *, num_utterances: int, max_share: float) -> None:
        """Read what is there.

        Args:
            path: JSON lines; appears with the first damaged utterance.
            num_utterances: Of the data set, over all ranks.
            max_share: ``read.max_quarantined_share``: this part of them, rounded down, may be damaged.

        Raises:
            ShardError: The file is no such file.
        """
        self.path = path
        self._num_utterances, self._max_share = num_utterances, max_share
        self._adding = threading.Lock()
        self._damaged = {one.key: one for one in _read(path)}

    @property
    def damaged(self) -> tuple[Damaged, ...]:
        """What is in the file, earlier starts included."""
        return tuple(self._damaged.values())

    @property
    def keys(self) -> frozenset[str]:
        """Of the utterances in the file."""
        return frozenset(self._damaged)

    def add(self, damaged: Damaged) -> None:
        """Write one down, unless its key is there; it is on disk when this returns.

        Raises:
            StageError: The file cannot be written.
        """
        with self._adding:
            if damaged.key not in self._damaged:
                self._append(damaged)
                self._damaged[damaged.key] = damaged

    def check(self, damaged: Iterable[Damaged]) -> None:
        """Refuse to go on without too much of the data, as :func:`check_damaged`.

        Args:
            damaged: Of all ranks; an utterance that several of them met counts once.
        """
        check_damaged(damaged, num_utterances=self._num_utterances, max_share=self._max_share, see=self.path)

    def _append(self, damaged: Damaged) -> None:
        line = json.dumps(asdict(damaged), sort_keys=True).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as cause:
            raise StageError(
                f"{self.path} must be writable, got {cause.strerror!r}; mend the disk or its permissions"
            ) from cause


def check_damaged(damaged: Iterable[Damaged], *, num_utterances: int, max_share: float, see: Path) -> None:
    """Refuse to go on without too much of the data.

    Args:
        damaged: Utterances that cannot be read; one that is there twice counts once.
        num_utterances: Of the data set.
        max_share: ``read.max_quarantined_share``: this part of them, rounded down, may be damaged.
        see: Where they are written down.

    Raises:
        ShardError: There are more than the limit.
    """
    reasons = {one.key: one.reason for one in damaged}
    # As the number is written: 0.29 of 100 are 29, though as a binary fraction it is less.
    limit = math.floor(Fraction(str(max_share)) * num_utterances)
    if len(reasons) <= limit:
        return
    examples = ", ".join(f"{key} ({reason})" for key, reason in sorted(reasons.items())[:_EXAMPLES])
    raise ShardError(
        f"read.max_quarantined_share must cover what cannot be read, got {max_share:g} (at most {limit} of "
        f"{num_utterances} utterances) and {len(reasons)}: {examples}; see {see}, mend the shards or raise it"
    )


def _read(path: Path) -> list[Damaged]:
    """The lines of a file; one that was cut when a run was killed is removed, and will be written again."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    whole = data[: data.rfind(b"\n") + 1]
    try:
        found = [Damaged(**json.loads(line)) for line in whole.splitlines()]
    except (ValueError, TypeError) as cause:
        raise ShardError(f"{path} must hold damaged utterances as JSON lines, got {cause}; remove it") from cause
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return found
