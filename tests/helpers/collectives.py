"""The collectives that a block runs, as torch's dispatcher sees them: which, and how many bytes each moves."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.helpers.operators import _Watching

# Which argument is the whole of what the ranks have or get together, by operator.
WHOLE = {
    "allreduce_": 0,
    "_allgather_base_": 0,
    "allgather_": 0,
    "allgather_into_tensor_coalesced_": 0,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
    "broadcast_": 0,
    "reduce_": 0,
}


@contextmanager
def record_collectives() -> Generator[list[tuple[str, int]]]:
    """Name and bytes of every collective in the block; an unknown one is an error."""
    found: list[tuple[str, int]] = []

    def record(function: Any, arguments: Any) -> None:
        if function.namespace != "c10d":
            return
        name = function.overloadpacket.__name__
        whole = [leaf for leaf in tree_leaves(arguments[0][WHOLE[name]]) if isinstance(leaf, Tensor)]
        found.append((name, sum(tensor.numel() * tensor.element_size() for tensor in whole)))

    with _Watching(record):
        yield found


def bytes_sent(name: str, num_bytes: int, num_ranks: int) -> float:
    """What each rank sends in a ring: every byte passes all ranks but one, in a reduction to all of them twice."""
    return (2 if name == "allreduce_" else 1) * num_bytes * (num_ranks - 1) / num_ranks
