"""Where DeepSpeed 0.19.8 keeps a rank's part of masters and gradients: in three classes, by three sets of names.

Each also computes a norm of its own in its step and fetches it to the host, stopping it until the device has caught up;
:mod:`.update` has measured by then. The first class can be told not to, the step of the second is short enough to be
made here, and the third is given a constant of the host, which it looks at, finds finite and goes on.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qad_dist.runtime.engine.base import WEIGHT

_PIECE_NUMEL = 2**20


class Partitions(ABC):
    """What the engine needs to know of DeepSpeed's optimizer."""

    def __init__(self, engine: Any) -> None:
        """Look into a DeepSpeed engine."""
        self._engine = engine
        self._zero, self._module = engine.optimizer, engine.module

    @property
    @abstractmethod
    def masters(self) -> list[Tensor]:
        """Flat float32 parts of this rank, which the optimizer updates."""

    @abstractmethod
    def own_gradients(self) -> list[Tensor]:
        """This rank's part of the gradient, after the last backward."""

    @abstractmethod
    def held_gradients(self) -> list[Tensor]:
        """What this rank keeps of gradients between two micro-batches."""

    @abstractmethod
    def held_weights(self) -> list[Tensor]:
        """What this rank keeps of weights between two steps."""

    def after_backward(self) -> None:  # noqa: B027  most have nothing to do
        """Let go of what DeepSpeed keeps longer than it needs."""

    def step(self) -> None:
        """Call the optimizer, bring its masters to the weights, forget the gradients."""
        self._engine.step()
        assert self._engine.was_step_applied(), "DeepSpeed left out an update by itself"

    @abstractmethod
    def whole_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Of a parameter that may be in parts."""

    @abstractmethod
    def put(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Take this rank's part of a whole master (``weight``) or moment."""

    def begin_load(self) -> None:  # noqa: B027  most have nothing to do
        """Before the first :meth:`put`."""

    @abstractmethod
    def end_load(self) -> None:
        """Bring the masters to the weights that the module computes with."""

    def _held_by_parameters(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._module.parameters() if parameter.grad is not None]


def partitions_of(engine: Any) -> Partitions:
    """The right one for a DeepSpeed engine."""
    for has, kind in _BY_MASTERS.items():
        if hasattr(engine.optimizer, has):
            return kind(engine)
    raise AssertionError(f"DeepSpeed has another optimizer now: {type(engine.optimizer).__name__}")


class _Whole(Partitions):
    """Weights are whole on every rank."""

    def held_weights(self) -> list[Tensor]:
        return [parameter.data for parameter in self._module.parameters()]

    def whole_shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.shape

    def put(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key == WEIGHT:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def end_load(self) -> None:
        self._zero.update_lp_params()


class _Zero12(_Whole):
    """``DeepSpeedZeroOptimizer``: ZeRO-1 of float32 weights, ZeRO-2."""

    @property
    def masters(self) -> list[Tensor]:
        return self._zero.single_partition_of_fp32_groups

    def own_gradients(self) -> list[Tensor]:
        return [gradient for part in self._zero.averaged_gradients.values() for gradient in part]

    def held_gradients(self) -> list[Tensor]:
        kept = (self._zero.averaged_gradients, self._zero.all_grad_tensors)
        sums = [gradient for groups in kept for part in groups.values() if part is not None for gradient in part]
        return self._held_by_parameters() + sums


class _Bf16(_Whole):
    """``BF16_Optimizer``: ZeRO-1 of bfloat16 weights. Float32 sums are whole, and reduced after the last backward."""

    @property
    def masters(self) -> list[Tensor]:
        return self._zero.fp32_groups_flat_partition

    def own_gradients(self) -> list[Tensor]:
        # In pieces: float32 norms of too many numbers at once are inexact.
        return [piece for flat in self._zero.fp32_groups_gradient_flat_partition for piece in flat.split(_PIECE_NUMEL)]

    def held_gradients(self) -> list[Tensor]:
        return self._held_by_parameters() + self._zero.fp32_groups_gradients_flat

    def after_backward(self) -> None:
        self._zero.clear_lp_grads(set_to_none=True)  # they have been added to the sums

    def step(self) -> None:
        for master, gradient in zip(self.masters, self._zero.fp32_groups_gradient_flat_partition, strict=True):
            master.grad = gradient
        self._zero.optimizer.step()
        for master in self.masters:
            master.grad = None
        self._zero.update_lp_params()
        self._zero.clear_hp_grads()


class _Zero3(Partitions):
    """``DeepSpeedZeroOptimizer_Stage3``: weights are in parts too, but for those below the persistence threshold."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._zero._get_norm_groups = lambda: [torch.zeros(())]

    @property
    def masters(self) -> list[Tensor]:
        return self._zero.fp32_partitioned_groups_flat

    def own_gradients(self) -> list[Tensor]:
        return [gradient for part in self._zero.averaged_gradients.values() for gradient in part]

    def held_gradients(self) -> list[Tensor]:
        return [*self._held_by_parameters(), self._zero.grad_partitions_flat_buffer]

    def held_weights(self) -> list[Tensor]:
        return [t for parameter in self._module.parameters() for t in (parameter.data, parameter.ds_tensor)]

    def whole_shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.ds_shape

    def put(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        # DeepSpeed's functions for whole values fail where ranks cannot share them evenly.
        numel = parameter.ds_tensor.numel()
        rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        part = F.pad(value.flatten(), (0, numel * num_ranks - value.numel()))[numel * rank :][:numel]
        if key == WEIGHT:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, key)

    def begin_load(self) -> None:
        self._zero.checkpoint_event_prologue()  # lets go of weights that are whole

    def end_load(self) -> None:
        for index in range(len(self.masters)):
            self._zero._reassign_or_swap_out_partitioned_parameters(index)
        self._zero.checkpoint_event_epilogue()  # gathers the small weights that are always whole


_BY_MASTERS: dict[str, type[Partitions]] = {
    "single_partition_of_fp32_groups": _Zero12,
    "fp32_groups_flat_partition": _Bf16,
    "fp32_partitioned_groups_flat": _Zero3,
}
