"""What the ranks of a run together could not read."""

from collections.abc import Sequence

from qad_dist.config import RunConfig
from qad_dist.runtime.collectives import all_gather_objects
from qad_dist.runtime.world import World
from shards.errors import ShardError
from shards.quarantine import Quarantine
from shards.read import Damaged

QUARANTINE = "quarantine"
"""Folder below ``<run>/train`` with one file for each rank: the utterances that it could not read, and why."""


def open_quarantine(run: RunConfig, world: World, *, num_utterances: int) -> "SharedQuarantine":
    """This rank's share of the run's quarantine; what earlier starts of the training put there stays.

    Args:
        run: The run.
        world: Which rank this is.
        num_utterances: How many there are to read: ``read.max_quarantined_share`` is a share of them.
    """
    folder = run.stage_folder("train") / QUARANTINE

    def of_rank(rank: int) -> Quarantine:
        path = folder / f"rank-{rank:03d}.jsonl"
        return Quarantine(path, num_utterances=num_utterances, max_share=run.read.max_quarantined_share)

    # An earlier start may have had more ranks: nobody else counts what those found.
    ranks = [int(path.stem.removeprefix("rank-")) for path in folder.glob("rank-*.jsonl")] if world.is_main else []
    gone = [damaged for rank in sorted(ranks) if rank >= world.world_size for damaged in of_rank(rank).damaged]
    return SharedQuarantine(of_rank(world.rank), gone)


class SharedQuarantine:
    """One rank's quarantine, and what it has been told of those of the others."""

    def __init__(self, own: Quarantine, gone: Sequence[Damaged] = ()) -> None:
        """Take this rank's, and what ranks of earlier starts left that are not there any more."""
        self._own, self._gone = own, gone
        self._num_told = 0
        self._known: dict[str, Damaged] = {}

    def add(self, damaged: Damaged) -> None:
        """Put an utterance there, once; from any thread, and without a word to the other ranks."""
        self._own.add(damaged)

    def count(self) -> int:
        """How many utterances the ranks together could not read so far; collective.

        Raises:
            ShardError: On every rank, when they are more than the limit.
        """
        own = self._own.damaged
        for share in all_gather_objects((*self._gone, *own[self._num_told :])):
            self._known.update((damaged.key, damaged) for damaged in share)
        self._num_told, self._gone = len(own), ()
        try:
            self._own.check(self._known.values())
        except ShardError as error:
            error.is_shared = True
            raise
        return len(self._known)
