"""Plain data parallelism: masters, sums of gradients and optimizer states are whole on every rank.

torch's ``DistributedDataParallel`` is not used: it adds up micro-batches, and reduces, in the dtype of the parameters.
For bfloat16 weights a communication hook could reduce in float32, but what it returns is rounded to bfloat16 again, and
so is the sum over micro-batches before it. Here both are float32 (:mod:`.buckets`), and with one collective for each
bucket and step, whatever the number of micro-batches.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qad_dist.runtime.engine.base import WEIGHT, Engine, OptimizerFactory
from qad_dist.runtime.engine.buckets import BUCKET_NUMEL, GradientBuckets
from qad_dist.runtime.engine.launched import build_accelerator, join_alone
from qad_dist.runtime.engine.update import MOMENTS, Update, create_states, make_fused
from qad_dist.runtime.world import World, device_for
from shards.errors import WorldError


class DdpEngine(Engine):
    """The same weights on every rank, each with a share of the micro-batches."""

    name = "DDP"

    def __init__(
        self,
        module: nn.Module,
        make_optimizer: OptimizerFactory,
        *,
        world: World,
        dtype: torch.dtype,
        clip_norm: float,
        trackers: list[str] | None,
        tracker_folder: Path | None,
    ) -> None:
        """Build it; see :func:`qad_dist.runtime.engine.build_engine`."""
        join_alone()
        super().__init__(build_accelerator(None, trackers=trackers, tracker_folder=tracker_folder), world=world)
        device = device_for(world)
        expected = {f"MULTI_{'GPU' if device.type == 'cuda' else 'CPU'}"} | ({"NO"} if world.world_size == 1 else set())
        if self.distributed_type not in expected:
            raise WorldError(
                f"training must run under {' or '.join(sorted(expected))}, got {self.distributed_type}; start it with "
                "accelerate launch --config_file configs/accelerate/..."
            )
        self._module = module.to(device)
        self._share_weights()
        self._masters: dict[nn.Parameter, nn.Parameter] = {}
        for _, parameter in self._trained():
            assert parameter.dtype == dtype, f"the module must be {dtype} already, got {parameter.dtype}"
            # A float32 weight is its own master.
            is_master = dtype == torch.float32
            self._masters[parameter] = parameter if is_master else nn.Parameter(parameter.detach().float())
        self._buckets = GradientBuckets(list(self._masters), num_ranks=world.world_size, bucket_numel=BUCKET_NUMEL)
        self._optimizer = make_optimizer(module)
        for group in self._optimizer.param_groups:
            group["params"] = [self._masters[parameter] for parameter in group["params"]]
        make_fused(self._optimizer)
        create_states(self._optimizer, list(self._masters.values()))
        self._update = Update(
            self._optimizer, clip_norm=clip_norm, num_copies=world.world_size, num_ranks=world.world_size
        )

    @torch.no_grad()
    def _share_weights(self) -> None:
        """All ranks begin with rank 0's, as under DeepSpeed."""
        if self.world_size > 1:
            for parameter in self._module.parameters():
                dist.broadcast(parameter.data, src=0)

    @property
    def module(self) -> nn.Module:
        """The module itself."""
        return self._module

    def __call__(self, *args: Any) -> Any:
        """Forward."""
        return self._module(*args)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add this micro-batch's gradient; reduce the sums if it is the last.

        Args:
            loss: Scalar of which the gradient is the sum over ranks and micro-batches.
            is_last: Whether a :meth:`step` follows.
        """
        self._buckets.begin(is_last=is_last)
        loss.backward()
        self._buckets.finish()

    def _own_gradients(self) -> list[Tensor]:
        # Not the buckets: float32 norms of so many numbers at once are off by more than 1e-5 on the CPU.
        return list(self._buckets.of.values())

    @torch.no_grad()
    def _apply(self) -> None:
        for parameter, master in self._masters.items():
            master.grad = self._buckets.of[parameter]
        self._optimizer.step()
        for master in self._masters.values():
            master.grad = None
        self._buckets.clear()
        self._end_load()

    def full_gradients(self) -> dict[str, Tensor]:
        """Whole float32 gradients by parameter name, on the host, between the last backward and step."""
        return {name: self._buckets.of[parameter].cpu().clone() for name, parameter in self._trained()}

    def gather_weights(self) -> dict[str, Tensor]:
        """Whole weights of all parameters on the host of rank 0; empty elsewhere."""
        if not self._world.is_main:
            return {}
        return {name: parameter.detach().cpu().clone() for name, parameter in self._module.named_parameters()}

    def _place(self, parameter: nn.Parameter, key: str) -> Tensor:
        master = self._masters[parameter]
        return master.data if key == WEIGHT else self._optimizer.state[master][key]

    def _gather(self, parameter: nn.Parameter, key: str) -> Tensor:
        return self._place(parameter, key).clone()

    def _put(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        self._place(parameter, key).copy_(value)

    @torch.no_grad()
    def _end_load(self) -> None:
        rounded = [(parameter, master) for parameter, master in self._masters.items() if parameter is not master]
        if rounded:
            weights, masters = zip(*rounded, strict=True)
            torch._foreach_copy_(weights, masters)

    def held_tensors(self) -> dict[str, list[Tensor]]:
        """The tensors behind each kind on this rank; a float32 weight is its own master."""
        states = self._optimizer.state.values()
        return {
            "weights": list(self._module.parameters()),
            "gradients": [bucket.sums for bucket in self._buckets.buckets],
            "masters": list(self._masters.values()),
            "moments": [state[moment] for state in states for moment in MOMENTS],
        }
