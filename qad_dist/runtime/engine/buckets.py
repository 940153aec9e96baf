"""Float32 sums of gradients over micro-batches, in buckets that are reduced over ranks while backward still runs."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_NUMEL = 2**24
"""Gradients of one collective, 64 MiB: large enough for the link, small enough that the last one is soon done."""


@dataclass(slots=True)
class Bucket:
    """Sums of neighbouring parameters in one piece of memory."""

    sums: Tensor
    """float32, flat."""
    parameters: list[nn.Parameter]
    num_missing: int = 0
    """Parameters whose gradient of the last micro-batch is still to come."""
    work: dist.Work | None = field(default=None)
    """The reduction that runs."""


class GradientBuckets:
    """Takes each gradient as autograd finishes it; whole sums on every rank after :meth:`finish`.

    Buckets are reduced in one order on all ranks, as collectives must be: against the module's order, in which
    backward comes to them.
    """

    def __init__(self, parameters: list[nn.Parameter], *, num_ranks: int, bucket_numel: int) -> None:
        """Hook into the backward of ``parameters``; a single one above ``bucket_numel`` has a bucket of its own."""
        self._num_ranks = num_ranks
        self._is_last = False
        self.buckets = [_bucket(part) for part in _parts(parameters[::-1], bucket_numel)]
        self.of: dict[nn.Parameter, Tensor] = {}
        """Sum of each parameter's gradients, of its shape, in the memory of its bucket."""
        for bucket in self.buckets:
            pieces = bucket.sums.split([parameter.numel() for parameter in bucket.parameters])
            for parameter, piece in zip(bucket.parameters, pieces, strict=True):
                self.of[parameter] = piece.view_as(parameter)
                parameter.register_post_accumulate_grad_hook(self._hook(bucket))

    def begin(self, *, is_last: bool) -> None:
        """Before a backward; with ``is_last`` its sums are reduced."""
        self._is_last = is_last
        self._num_started = 0
        for bucket in self.buckets:
            bucket.num_missing = len(bucket.parameters)

    def finish(self) -> None:
        """After a backward: on the last, no later operation of the device sees sums that are not whole."""
        if not self._is_last:
            return
        for bucket in self.buckets:
            bucket.num_missing = 0  # a parameter that took no part has no hook called
        self._start_ready()
        for bucket in self.buckets:
            if bucket.work is not None:
                bucket.work.wait()  # with NCCL the stream waits, not the host
                bucket.work = None

    def clear(self) -> None:
        """Forget the sums."""
        for bucket in self.buckets:
            bucket.sums.zero_()

    def _hook(self, bucket: Bucket):  # noqa: ANN202  a closure for autograd
        def add(parameter: nn.Parameter) -> None:
            assert parameter.grad is not None
            self.of[parameter].add_(parameter.grad)
            parameter.grad = None
            bucket.num_missing -= 1
            if self._is_last:
                self._start_ready()

        return add

    def _start_ready(self) -> None:
        while self._num_started < len(self.buckets) and self.buckets[self._num_started].num_missing == 0:
            bucket = self.buckets[self._num_started]
            if self._num_ranks > 1:
                bucket.work = dist.all_reduce(bucket.sums, async_op=True)
            self._num_started += 1


def _bucket(parameters: list[nn.Parameter]) -> Bucket:
    numel = sum(parameter.numel() for parameter in parameters)
    return Bucket(torch.zeros(numel, dtype=torch.float32, device=parameters[0].device), parameters)


def _parts(parameters: list[nn.Parameter], bucket_numel: int) -> list[list[nn.Parameter]]:
    """Neighbours of together at most ``bucket_numel``."""
    parts: list[list[nn.Parameter]] = []
    free = 0
    for parameter in parameters:
        if parameter.numel() > free:
            parts.append([])
            free = bucket_numel
        parts[-1].append(parameter)
        free -= parameter.numel()
    return parts
