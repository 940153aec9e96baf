"""What every engine does: forward, add gradients of micro-batches, step, and give its state away whole.

One step is ``backward`` for each micro-batch of this rank, ``is_last`` true for the final one, then ``step``. Neither
waits for the device: whether an update is made is decided there, equally on all ranks (:mod:`.update`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qad_dist.runtime.engine.update import MOMENTS, STEP, Update
from qad_dist.runtime.world import World
from shards.errors import CheckpointError, WorldError

if TYPE_CHECKING:
    from accelerate import Accelerator

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]

WEIGHT = "weight"
"""Of :meth:`Engine.trained_state`: the float32 master."""

HELD = ("weights", "gradients", "masters", "moments")
"""What an engine holds on a rank between two micro-batches; see :mod:`.memory`."""


class Engine(ABC):
    """A module in training, on this rank and on all others alike."""

    name: str
    """``ZeRO-1``, ``ZeRO-2``, ``ZeRO-3`` or ``DDP``."""

    def __init__(self, accelerator: "Accelerator", *, world: World) -> None:
        """Keep what accelerate built; subclasses set ``name``, ``_update`` and ``_optimizer``."""
        self._accelerator = accelerator
        self._world = world
        self._update: Update
        self._optimizer: torch.optim.Optimizer
        if accelerator.num_processes != world.world_size:
            raise WorldError(
                f"training needs {world.world_size} ranks, got {accelerator.num_processes} under "
                f"{self.distributed_type}; start it with accelerate launch --config_file configs/accelerate/..."
            )

    @property
    def world_size(self) -> int:
        """Ranks that train together."""
        return self._world.world_size

    @property
    def distributed_type(self) -> str:
        """Accelerate's name for what it built."""
        return str(self._accelerator.distributed_type.value)

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The module inside."""

    @abstractmethod
    def __call__(self, *args: Any) -> Any:
        """Forward."""

    @abstractmethod
    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add this micro-batch's gradient.

        Args:
            loss: Scalar of which the gradient is the sum over ranks and micro-batches.
            is_last: Whether a :meth:`step` follows.
        """

    def step(self, *, learning_rate: float, is_finite: Tensor) -> None:
        """Clip and update; or leave out the update, on all ranks, where a loss or the gradient of any is not finite.

        Then weights, moments and step counters stay as they are to the bit, the gradient is dropped, and
        :meth:`num_skipped` counts it. No rank waits for its device to learn about that.

        Args:
            learning_rate: For this update.
            is_finite: bool scalar on the device: whether this rank's losses were numbers.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._update.decide(self._own_gradients(), is_finite=is_finite)
        self._apply()

    @abstractmethod
    def _own_gradients(self) -> list[Tensor]:
        """This rank's part of the whole gradient, float32, after the last backward; every rank's together are it."""

    @abstractmethod
    def _apply(self) -> None:
        """Call the optimizer with what was decided, bring its masters to the weights, forget the gradients."""

    def num_skipped(self) -> int:
        """Updates left out since the engine was built, the same on all ranks; waits for the device."""
        return int(self._update.num_skipped)

    def gradient_norm(self) -> float:
        """Global norm of the last step's gradient before clipping; waits for the device.

        It is inf or nan if the step was left out for it.
        """
        return float(self._update.norm)

    @abstractmethod
    def full_gradients(self) -> dict[str, Tensor]:
        """Whole float32 gradients by parameter name, on the host, between the last backward and step; collective."""

    @abstractmethod
    def gather_weights(self) -> dict[str, Tensor]:
        """Whole weights of all parameters on the host of rank 0 (empty elsewhere), one layer at a time; collective."""

    def trained_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """What training has changed, whole on every rank, one parameter at a time; collective.

        It does not depend on how many ranks there are and what they share, so every engine loads it.

        Yields:
            Name of a trained parameter, in the module's order, and its ``weight`` (the master), ``exp_avg`` and
            ``exp_avg_sq``: float32, of the parameter's whole shape, on the device. Moments are 0 before an update.
        """
        for name, parameter in self._trained():
            yield name, {key: self._gather(parameter, key) for key in (WEIGHT, *MOMENTS)}

    def trained_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and master of each trained parameter, as :meth:`trained_state`, without its moments; collective."""
        for name, parameter in self._trained():
            yield name, self._gather(parameter, WEIGHT)

    @torch.no_grad()
    def load_trained_state(self, read: Callable[[str], dict[str, Tensor]], *, updates: int) -> None:
        """Put back what :meth:`trained_state` gave; all ranks together.

        Frozen parameters and buffers stay as they are. Gradients must not wait for a step.

        Args:
            read: Gives the tensors of a parameter by its name, whole, on any device.
            updates: Those that the state has behind it: what the optimizer's step counters are set to.

        Raises:
            CheckpointError: A tensor is missing, or of another shape or dtype.
        """
        self._begin_load()
        for name, parameter in self._trained():
            state = read(name)
            for key in (WEIGHT, *MOMENTS):
                value = _checked(name, state, key, self._whole_shape(parameter))
                self._put(parameter, key, value.to(self._update.device))
        for state in self._optimizer.state.values():
            state[STEP].fill_(updates)
        self._end_load()

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad)

    def _whole_shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.shape

    @abstractmethod
    def _gather(self, parameter: nn.Parameter, key: str) -> Tensor:
        """The whole master (``weight``) or moment of a parameter, float32; the caller may keep it."""

    @abstractmethod
    def _put(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Take this rank's part of a whole master or moment."""

    def _begin_load(self) -> None:  # noqa: B027  most have nothing to do
        """Before the first :meth:`_put`."""

    @abstractmethod
    def _end_load(self) -> None:
        """Bring the masters to the weights that the module computes with."""

    @abstractmethod
    def held_tensors(self) -> dict[str, list[Tensor]]:
        """The tensors behind each of :data:`HELD` on this rank; two may share their memory."""

    def start_trackers(self, name: str, settings: dict[str, Any]) -> None:
        """Open the trackers, if any were named."""
        self._accelerator.init_trackers(name, config=settings)

    def track(self, values: dict[str, float], *, step: int) -> None:
        """Send values to the trackers."""
        self._accelerator.log(values, step=step)

    def close(self) -> None:
        """End the trackers. What accelerate calls the end of training would also end the group of ranks."""
        for tracker in self._accelerator.trackers:
            tracker.finish()


def _checked(name: str, state: dict[str, Tensor], key: str, shape: torch.Size) -> Tensor:
    value = state.get(key)
    if value is None or value.shape != shape or value.dtype != torch.float32:
        found = "nothing" if value is None else f"{value.dtype} of shape {list(value.shape)}"
        raise CheckpointError(
            f"{key} of {name} must be torch.float32 of shape {list(shape)}, got {found}; use a checkpoint of this model"
        )
    return value
