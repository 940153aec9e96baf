"""Run a function on several CPU processes joined by gloo."""

import multiprocessing
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Imported once, by the process that all ranks are forked from: by themselves each would take ten seconds.
_IMPORTED = ["torch.multiprocessing.spawn", "qad_dist.calibration", "qad_dist.stages.label", "qad_dist.stages.train"]


def run_on_ranks(
    function: Callable[..., None],
    *args: Any,
    world_size: int,
    tmp_path: Path,
    limit_seconds: float = 400.0,
) -> None:
    """Call ``function(rank, world_size, *args)`` in ``world_size`` fresh processes.

    The function must be at the top of its module, and should itself assert ``dist.get_world_size() == world_size``.
    Environment variables are those that this process had at the first call.

    Raises:
        ProcessRaisedException: A rank raised; its traceback is in the message and the other ranks are ended, so a rank
            that waits in a collective cannot hang the suite.
        TimeoutError: No rank failed but the function did not return within ``limit_seconds``.
    """
    multiprocessing.set_forkserver_preload(_IMPORTED)
    context = mp.start_processes(
        _worker,
        args=(world_size, str(tmp_path / f"store-{uuid.uuid4().hex}"), function, args),
        nprocs=world_size,
        join=False,
        start_method="forkserver",
    )
    deadline = time.monotonic() + limit_seconds
    while not context.join(timeout=1.0):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__} still running after {limit_seconds:.0f} s")


def _worker(rank: int, world_size: int, store: str, function: Callable[..., None], args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",  # a file, not a port: two tests can never meet
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=300),
    )
    try:
        function(rank, world_size, *args)
    finally:
        dist.destroy_process_group()
