"""The operators that a block runs: how often each, on what shapes."""

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_consecutive")
"""What makes a host wait for a device: a value or a shape is asked for."""


@contextmanager
def count_operators() -> Generator[Counter[str]]:
    """The names of all aten operators that run in the block, with how often each did; views do nothing."""
    found: Counter[str] = Counter()

    def count(function: Any, _: Any) -> None:
        found[function.overloadpacket.__name__] += not function.is_view

    with _Watching(count):
        yield found


@contextmanager
def record_shapes() -> Generator[list[tuple[str, Any]]]:
    """All operators that run in the block, in their order, with their arguments: of tensors the shapes."""
    found: list[tuple[str, Any]] = []

    def record(function: Any, arguments: Any) -> None:
        found.append((str(function), tree_map_only(Tensor, lambda tensor: tuple(tensor.shape), arguments)))

    with _Watching(record):
        yield found


class _Watching(TorchDispatchMode):
    """Tells of every operator before it runs."""

    def __init__(self, tell: Callable[[Any, Any], None]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._tell(function, (args, kwargs or {}))
        return function(*args, **(kwargs or {}))
