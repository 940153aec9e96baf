"""The training engine: accelerate builds it, DeepSpeed shards it, and this project drives it.

accelerate's own ``backward`` also calls ``engine.step()``, so nobody could look at the loss of all ranks first. Here
:class:`Engine` makes the four DeepSpeed calls itself: boundary, forward, backward, step; and where DeepSpeed leaves out
an update without a word, it raises.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from accelerate.tracking import get_available_trackers
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn

from qad_dist.runtime.world import World, device_for
from shards.errors import CheckpointError, ConfigError, NonFiniteError, WorldError

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]


class Engine:
    """A module under ZeRO: forward it, add gradients of micro-batches, step.

    One step is ``backward`` for each micro-batch of this rank, ``is_last`` true for the final one, then ``step``.
    """

    def __init__(
        self,
        module: nn.Module,
        make_optimizer: OptimizerFactory,
        *,
        settings: dict[str, Any],
        world: World,
        dtype: torch.dtype,
        clip_norm: float,
        trackers: list[str] | None = None,
        tracker_folder: Path | None = None,
    ) -> None:
        """Build the DeepSpeed engine.

        Args:
            module: What is trained; only it is sharded. Parameters that need no gradient stay as they are.
            make_optimizer: Called with the module once its parameters are final.
            settings: From :func:`qad_dist.runtime.zero.read_deepspeed_settings`.
            world: This rank; its process group exists already when there is more than one.
            dtype: What the module computes in. Masters and optimizer states are float32 either way.
            clip_norm: Largest global gradient norm.
            trackers: Names of accelerate trackers.
            tracker_folder: Where file-based trackers write.

        Raises:
            ConfigError: A tracker's package is not installed.
            WorldError: accelerate did not build what was asked for.
        """
        _check_trackers(trackers or [])
        _prepare_environment(world)
        self.stage: int = settings["zero_optimization"]["stage"]
        plugin = DeepSpeedPlugin(
            hf_ds_config={
                **settings,
                "gradient_clipping": clip_norm,
                "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True},
                "gradient_accumulation_steps": 1,
                "train_micro_batch_size_per_gpu": 1,
            }
        )
        self._accelerator = accelerate.Accelerator(
            deepspeed_plugin=plugin, log_with=[*trackers] if trackers else None, project_dir=tracker_folder
        )
        module.to(device_for(world))
        self._engine, self._optimizer = self._accelerator.prepare(module, make_optimizer(module))
        self.world_size = dist.get_world_size()
        if self.world_size != world.world_size or self.distributed_type != "DEEPSPEED":
            raise WorldError(
                f"training needs {world.world_size} ranks under DeepSpeed, got {self.world_size} under "
                f"{self.distributed_type}; start it with accelerate launch --config_file configs/accelerate/..."
            )
        if self._engine.zero_optimization_stage() != self.stage:
            raise WorldError(f"ZeRO stage must be {self.stage}, got {self._engine.zero_optimization_stage()}")

    @property
    def distributed_type(self) -> str:
        """Accelerate's name for what it built."""
        return str(self._accelerator.distributed_type.value)

    @property
    def module(self) -> nn.Module:
        """The module inside."""
        return self._engine.module

    def __call__(self, *args: Any) -> Any:
        """Forward."""
        return self._engine(*args)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add this micro-batch's gradient.

        Args:
            loss: Scalar of which the gradient is the sum over ranks and micro-batches. ZeRO averages over ranks, which
                is undone here.
            is_last: Whether a :meth:`step` follows.
        """
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, *, learning_rate: float, is_finite: Tensor) -> None:
        """Clip and update.

        Args:
            learning_rate: For this update.
            is_finite: bool scalar: whether this rank's losses were numbers.

        Raises:
            NonFiniteError: On every rank, when a loss of any rank or the gradient's norm is not finite; nothing has
                been updated then.
        """
        flag = is_finite.to(torch.int32)
        if self.world_size > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        if not flag.item():
            raise self._not_finite("the loss of every rank")
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        # DeepSpeed leaves out the update when the norm of the whole gradient is not finite, and knows so on the host.
        if not self._engine.was_step_applied():
            raise self._not_finite("the gradient")

    def _not_finite(self, what: str) -> NonFiniteError:
        error = NonFiniteError(f"{what} must be finite, got nan or inf; lower train.learning_rate")
        error.is_shared = self.world_size > 1
        return error

    def gradient_norm(self) -> float:
        """Global norm of the last step's gradient before clipping."""
        return float(self._engine.get_global_grad_norm())

    def full_gradients(self) -> dict[str, Tensor]:
        """Whole float32 gradients by parameter name, between the last ``backward`` and ``step``; it gathers."""
        from deepspeed.utils import safe_get_full_grad

        named = ((n, p) for n, p in self.module.named_parameters() if p.requires_grad)
        gradients = {name: safe_get_full_grad(parameter) for name, parameter in named}
        return {name: gradient.float().cpu() for name, gradient in gradients.items() if gradient is not None}

    def gather_weights(self) -> dict[str, Tensor]:
        """Whole weights of all parameters on the host of rank 0 (empty elsewhere), gathered one layer at a time."""
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        weights: dict[str, Tensor] = {}
        is_main = dist.get_rank() == 0
        for prefix, part in _parts(self.module):
            parameters = dict(part.named_parameters())
            with GatheredParameters(list(parameters.values()), enabled=self.stage == 3):
                if is_main:
                    for name, parameter in parameters.items():
                        weights[f"{prefix}.{name}"] = parameter.detach().cpu().clone()
        return weights

    def save(self, folder: Path) -> None:
        """Write weights, masters and optimizer states below ``folder``; every rank its part, all together."""
        self._engine.save_checkpoint(str(folder), tag="engine", save_latest=False)

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote. Verify the folder's manifest first: this unpickles.

        Raises:
            CheckpointError: DeepSpeed finds nothing to load.
        """
        path, _ = self._engine.load_checkpoint(str(folder), tag="engine")
        if path is None:
            raise CheckpointError(f"{folder} must hold a DeepSpeed checkpoint, got nothing that loads; use another one")

    def start_trackers(self, name: str, settings: dict[str, Any]) -> None:
        """Open the trackers, if any were named."""
        self._accelerator.init_trackers(name, config=settings)

    def track(self, values: dict[str, float], *, step: int) -> None:
        """Send values to the trackers."""
        self._accelerator.log(values, step=step)

    def close(self) -> None:
        """End the trackers."""
        self._accelerator.end_training()


def _check_trackers(trackers: list[str]) -> None:
    """Accelerate leaves out a tracker whose package is missing, without a word."""
    available = {str(tracker.value) for tracker in get_available_trackers()}
    for name in trackers:
        if name not in available:
            raise ConfigError(
                f"train.trackers must be installed, got {name!r} without its package; pip install {name} or remove it"
            )


def _parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Children one level below lists: the pieces that are gathered one at a time."""
    parts: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            parts += [(f"{name}.{inner}", part) for inner, part in child.named_children()]
        else:
            parts.append((name, child))
    return parts


def _prepare_environment(world: World) -> None:
    """What accelerate and DeepSpeed read from the environment when no launcher has set it."""
    os.environ.setdefault("RANK", str(world.rank))
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    os.environ.setdefault("WORLD_SIZE", str(world.world_size))
    if not dist.is_initialized():  # alone, without a launcher: a store in this process, and no port to collide on
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if torch.cuda.is_available():
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401  so that the module below exists

    # DeepSpeed compiles a shared-memory operator on the CPU (over a minute), and a process killed meanwhile leaves a
    # lock on which every later run hangs. gloo does the same job. Seen with deepspeed 0.19.8.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
