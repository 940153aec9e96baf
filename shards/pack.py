"""Shards packed by any number of processes, on any number of machines, and again after an interruption.

Which recording goes into which shard was decided before (:mod:`shards.tasks`), so that the same shards come out whoever
packs them; :mod:`shards.merge` makes one data set of them.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from shards.errors import SourceError
from shards.index import INDEX
from shards.merge import refuse_too_many
from shards.places import Place
from shards.processes import map_in_processes
from shards.shard import ShardSettings, pack_task
from shards.tasks import EXCLUDE, TaskFile, num_recordings


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far packing is."""

    num_recordings: int
    """Done so far."""
    num_recordings_in_all: int
    seconds: float
    """Of audio in the shards so far."""
    planned_seconds: float
    """Estimated audio of what is done."""
    planned_seconds_in_all: float


def pack_tasks(
    plan: TaskFile,
    settings: ShardSettings,
    *,
    part: tuple[int, int] = (0, 1),
    max_rejected_share: float,
    processes: int,
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Pack the shards of a plan; go on where an interrupted call with the same recordings and settings ended.

    Args:
        plan: From :func:`plan_pack`. The shards are written into its folder, each with a note of what is in it.
        settings: What decides the bytes of a shard.
        part: Number and count: of so many calls, on any machines, this is the one of that number, from 0.
        max_rejected_share: More rejected recordings than this share are an error.
        processes: Packing processes; 0 is one for each core.
        progress: Called after each shard.

    Raises:
        AudioError: Too many recordings were rejected; ``rejected.jsonl`` names those found so far.
        ShardError: A tar that is to be indexed in place is damaged.
        StageError: The folder cannot be written to, or a packing process died.
    """
    (plan.folder / INDEX).unlink(missing_ok=True)  # from here on the folder does not count
    numbers = list(range(len(plan.tasks)))[part[0] :: part[1]]
    own = [plan.tasks[number] for number in numbers]
    in_all = {
        "num_recordings_in_all": num_recordings(own),
        "planned_seconds_in_all": sum(task.seconds for task in own),
    }
    num_done, num_rejected, seconds, planned = 0, 0, 0.0, 0.0
    packing = _Packing(plan=plan, settings=settings)
    with closing(
        map_in_processes(packing, numbers, processes=processes, name_of=lambda number: plan.tasks[number].name)
    ) as results:
        for number, done in results:
            task = plan.tasks[number]
            num_done += num_recordings([task])
            planned += task.seconds
            seconds += done.seconds
            num_rejected += done.num_rejected if task.kind != EXCLUDE else 0
            if progress is not None:
                progress(Progress(num_recordings=num_done, seconds=seconds, planned_seconds=planned, **in_all))
            refuse_too_many(plan, num_rejected=num_rejected, num_done=num_done, max_rejected_share=max_rejected_share)


def refuse_to_lose(plan: TaskFile, *, max_rejected_share: float) -> None:
    """Keep a finished folder when the recordings that it would be made from again are gone.

    Raises:
        SourceError: More recordings are missing than may be rejected.
    """
    if not (plan.folder / INDEX).exists():
        return
    num_missing, first = 0, ""
    for number, task in enumerate(plan.tasks):
        if task.kind == EXCLUDE:
            continue
        for recording in plan.recordings(number):
            if not Place.of(recording.path).is_remote and not Path(recording.path).exists():
                num_missing, first = num_missing + 1, first or recording.path
    if num_missing > max_rejected_share * num_recordings(plan.tasks):
        raise SourceError(
            f"pack.inputs must name recordings that exist to pack {plan.folder} again, got {num_missing} of "
            f"{num_recordings(plan.tasks)} missing, first {first}; undo the change, or remove the folder"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    """What the other process needs to know of a finished task."""

    seconds: float
    num_rejected: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Packing:
    """Packs the tasks of a plan by number, in whatever process."""

    plan: TaskFile
    settings: ShardSettings

    def __call__(self, number: int) -> _Done:
        packed = pack_task(self.plan.folder, self.plan.tasks[number], self.plan.recordings(number), self.settings)
        return _Done(seconds=packed.entry.seconds if packed.entry else 0.0, num_rejected=len(packed.rejected))
