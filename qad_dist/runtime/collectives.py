"""What ranks decide together: small objects, on the host. Every function is a no-op without a process group."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from shards.errors import QadError, WorldError

Value = TypeVar("Value")


def own_rank() -> int:
    """Of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """Of the process group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every rank."""
    all_gather_objects(None)


def all_gather_objects(value: Value) -> list[Value]:
    """The values of all ranks, in rank order. They must be picklable and small."""
    if not dist.is_initialized():
        return [value]
    values: list[Value | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # every place was filled


def run_on_main(function: Callable[[], Value]) -> Value:
    """Call ``function`` on rank 0 only and give its result to every rank.

    Raises:
        QadError: What ``function`` raised; on every rank.
        WorldError: On the other ranks, when ``function`` raised anything else (rank 0 raises that itself).
    """
    if not dist.is_initialized():
        return function()
    if dist.get_rank() == 0:
        outcome: tuple[str, object] = ("failed", None)
        try:
            outcome = ("value", function())
        except QadError as error:
            error.is_shared = True
            outcome = ("error", (type(error), str(error)))
            raise
        finally:
            # Also when an unforeseen error flies: the others must not wait for a result that never comes.
            dist.broadcast_object_list([outcome], src=0)
        return outcome[1]  # type: ignore[return-value]  # an error has left by now
    received: list[tuple[str, object]] = [("failed", None)]
    dist.broadcast_object_list(received, src=0)
    state, content = received[0]
    if state == "error":
        kind, message = content  # type: ignore[misc]  # what rank 0 put there
        shared: QadError = kind(message)
        shared.is_shared = True
        raise shared
    if state == "failed":
        raise WorldError("rank 0 must finish its part, got an error there; see its traceback")
    return content  # type: ignore[return-value]
