"""ZeRO: accelerate builds DeepSpeed's engine, DeepSpeed shards, and this project drives it.

accelerate's own ``backward`` also calls ``engine.step()``, so nobody could look at the loss of all ranks first. Here
the DeepSpeed calls are made one by one: boundary, forward, backward, step. Norm, clipping and the decision to leave out
an update are :mod:`.update`'s; DeepSpeed is told neither to measure nor to clip (:mod:`.partitions`).

On a GPU the host still waits for the device, without fetching anything, where DeepSpeed ends the overlap of reduction
and backward: with ``overlap_comm``, in the last backward of a step under ZeRO-1 and in every one under ZeRO-2; under
ZeRO-3 in every one, and within it where more than two reductions are on their way. ZeRO-1 of bfloat16 weights reduces
after the last backward, with nothing to overlap and no wait.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn

from qad_dist.runtime.engine.base import WEIGHT, Engine, OptimizerFactory
from qad_dist.runtime.engine.launched import build_accelerator, join_alone, prepare_deepspeed
from qad_dist.runtime.engine.partitions import partitions_of
from qad_dist.runtime.engine.update import MOMENTS, Update, create_states, make_fused
from qad_dist.runtime.world import World, device_for
from shards.errors import WorldError


class ZeroEngine(Engine):
    """A module under ZeRO-1, 2 or 3."""

    def __init__(
        self,
        module: nn.Module,
        make_optimizer: OptimizerFactory,
        *,
        settings: dict[str, Any],
        world: World,
        dtype: torch.dtype,
        clip_norm: float,
        trackers: list[str] | None,
        tracker_folder: Path | None,
    ) -> None:
        """Build it; see :func:`qad_dist.runtime.engine.build_engine`.

        Args:
            settings: From :func:`qad_dist.runtime.zero.read_deepspeed_settings`.
        """
        prepare_deepspeed(world)
        join_alone()
        plugin = DeepSpeedPlugin(hf_ds_config=_deepspeed_config(settings, dtype))
        super().__init__(build_accelerator(plugin, trackers=trackers, tracker_folder=tracker_folder), world=world)
        if self.distributed_type != "DEEPSPEED":
            raise WorldError(
                f"training must run under DEEPSPEED, got {self.distributed_type}; start it with accelerate launch "
                "--config_file configs/accelerate/..."
            )
        module.to(device_for(world))
        optimizer = make_optimizer(module)
        make_fused(optimizer)
        self._engine, _ = self._accelerator.prepare(module, optimizer)
        self._stage: int = settings["zero_optimization"]["stage"]
        if self._engine.zero_optimization_stage() != self._stage:
            raise WorldError(f"ZeRO stage must be {self._stage}, got {self._engine.zero_optimization_stage()}")
        self.name = f"ZeRO-{self._stage}"
        self._zero = self._engine.optimizer
        self._optimizer = self._zero.optimizer
        assert self._optimizer is optimizer, f"DeepSpeed took another optimizer: {type(self._optimizer).__name__}"
        self._parts = partitions_of(self._engine)
        create_states(optimizer, self._parts.masters)
        if self._stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()  # each parameter learns where its moments are
        self._update = Update(optimizer, clip_norm=clip_norm, num_copies=1, num_ranks=world.world_size)

    @property
    def module(self) -> nn.Module:
        """The module inside."""
        return self._engine.module

    def __call__(self, *args: Any) -> Any:
        """Forward."""
        return self._engine(*args)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add this micro-batch's gradient; ZeRO averages over ranks, which is undone here.

        Args:
            loss: Scalar of which the gradient is the sum over ranks and micro-batches.
            is_last: Whether a :meth:`step` follows.
        """
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)
        self._parts.after_backward()

    def _own_gradients(self) -> list[Tensor]:
        return self._parts.own_gradients()

    def _apply(self) -> None:
        self._parts.step()

    def full_gradients(self) -> dict[str, Tensor]:
        """Whole float32 gradients by parameter name, on the host, between the last backward and step; collective."""
        from deepspeed.utils import safe_get_full_grad

        gradients = {name: safe_get_full_grad(parameter) for name, parameter in self._trained()}
        return {name: gradient.float().cpu() for name, gradient in gradients.items() if gradient is not None}

    def gather_weights(self) -> dict[str, Tensor]:
        """Whole weights of all parameters on the host of rank 0 (empty elsewhere), one layer at a time; collective."""
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        weights: dict[str, Tensor] = {}
        for prefix, part in _pieces(self.module):
            parameters = dict(part.named_parameters())
            with GatheredParameters(list(parameters.values()), enabled=self._stage == 3):
                if self._world.is_main:
                    for name, parameter in parameters.items():
                        weights[f"{prefix}.{name}"] = parameter.detach().cpu().clone()
        return weights

    def _whole_shape(self, parameter: nn.Parameter) -> torch.Size:
        return self._parts.whole_shape(parameter)

    def _gather(self, parameter: nn.Parameter, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        is_weight = key == WEIGHT
        whole = safe_get_full_fp32_param(parameter) if is_weight else safe_get_full_optimizer_state(parameter, key)
        assert whole is not None, "DeepSpeed must know a trained parameter"
        return whole.detach()

    def _put(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        self._parts.put(parameter, key, value)

    def _begin_load(self) -> None:
        self._parts.begin_load()

    def _end_load(self) -> None:
        self._parts.end_load()

    def held_tensors(self) -> dict[str, list[Tensor]]:
        """The tensors behind each kind on this rank."""
        states = self._optimizer.state.values()
        return {
            "weights": self._parts.held_weights(),
            "gradients": self._parts.held_gradients(),
            "masters": self._parts.masters,
            "moments": [state[moment] for state in states for moment in MOMENTS],
        }


def _deepspeed_config(settings: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    zero = dict(settings["zero_optimization"])
    if zero["stage"] == 2 or (dtype == torch.float32 and zero["stage"] == 1):
        zero["compute_grad_norm"] = False
    return {
        **settings,
        "zero_optimization": zero,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": False},
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": 1,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device at both ends of every step
    }


def _pieces(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children one level below lists: the pieces that are gathered one at a time."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{inner}", part) for inner, part in child.named_children())
        else:
            yield name, child
