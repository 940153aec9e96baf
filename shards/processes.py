"""Processes that work for this one: they leave Ctrl-C to it and end with it, also if it is killed."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from shards.errors import StageError

T = TypeVar("T")

_work: Callable[[int], Any]
"""In a process of :func:`map_in_processes`."""


def begin_worker() -> None:
    """Of a spawned process: leave Ctrl-C to the parent, and end with it. Orphans would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def map_in_processes(
    work: Callable[[int], T], numbers: Sequence[int], *, processes: int, name_of: Callable[[int], str]
) -> Generator[tuple[int, T], None, None]:
    """Do the work of each number in one of several processes; with one process, in this one.

    Args:
        work: What is done with a number; pickled once for each process.
        numbers: In the order in which they are begun.
        processes: How many; 0 is one for each core. More than there are numbers are not started.
        name_of: What a number is called where its process dies.

    Yields:
        Numbers with what their work gave, as they come, in any order.

    Raises:
        StageError: A process died.
    """
    processes = min(processes or len(os.sched_getaffinity(0)), len(numbers))
    if processes <= 1:
        for number in numbers:
            yield number, work(number)
        return
    # Spawned, not forked: a fork copies the locks of threads that do not exist in the child.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=(work,))
    try:
        futures = {executor.submit(_call, number): number for number in numbers}
        for future in as_completed(futures):
            result = future.result()
            yield futures.pop(future), result
    except BrokenProcessPool as cause:
        unfinished = [name_of(number) for future, number in futures.items() if future.exception() is not None]
        raise StageError(
            f"pack.processes must all live, got one that died in one of {', '.join(unfinished[:processes])}; "
            "if it ran out of memory set pack.processes or pack.max_recording_hours lower; finished shards are kept"
        ) from cause
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _begin(work: Callable[[int], Any]) -> None:
    global _work  # a process has one work
    begin_worker()
    _work = work


def _call(number: int) -> Any:
    return _work(number)
