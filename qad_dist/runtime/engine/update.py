"""Whether an update is made, decided on the device; and the states of the AdamW that makes it.

torch's fused AdamW reads two scalars from the device: it divides every gradient by ``grad_scale``, and with
``found_inf`` at 1 it touches nothing, step counters included. So the global norm, clipping and leaving out an update
cost one pass over the gradients and one collective of two numbers, and the host need not know.
"""

import torch
import torch.distributed as dist
from torch import Tensor

STEP = "step"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's names for a parameter's update counter and its two running means."""

# As torch.nn.utils.clip_grad_norm_ and DeepSpeed have it.
_CLIP_EPSILON = 1e-6


class Update:
    """Tells an optimizer, before each of its steps, what to do with the gradient. The same on all ranks."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, clip_norm: float, num_copies: int, num_ranks: int) -> None:
        """Take an optimizer whose states exist.

        Args:
            optimizer: From :func:`make_fused` and :func:`create_states`.
            clip_norm: Largest global gradient norm.
            num_copies: On how many ranks each element of the gradient is: 1 where it is sharded.
            num_ranks: That step together.
        """
        self._optimizer = optimizer
        self._clip_norm, self._num_copies, self._num_ranks = clip_norm, num_copies, num_ranks
        self.device = next(iter(optimizer.state.values()))[STEP].device
        self.num_skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        """Updates left out so far."""
        self.norm = torch.zeros((), dtype=torch.float64, device=self.device)
        """Global norm of the last gradient before clipping."""

    @torch.no_grad()
    def decide(self, gradients: list[Tensor], *, is_finite: Tensor) -> None:
        """Set ``grad_scale`` and ``found_inf`` of the optimizer; collective.

        Args:
            gradients: This rank's.
            is_finite: bool scalar on the device: whether this rank's losses were numbers.
        """
        norm = torch.nn.utils.get_total_norm(gradients).to(self.device)
        # float64: squares of a float32 norm would overflow from 1.8e19 on.
        sums = torch.stack([norm.double().square() / self._num_copies, (~is_finite).to(self.device).double()])
        if self._num_ranks > 1:
            dist.all_reduce(sums)
        square, num_bad = sums.unbind()
        is_left_out = ~torch.isfinite(square) | (num_bad > 0)
        self.norm = square.sqrt()
        self.num_skipped += is_left_out
        # An attribute of the optimizer object, not of a group: DeepSpeed calls it once for each part of the weights.
        self._optimizer.grad_scale = ((self.norm + _CLIP_EPSILON) / self._clip_norm).clamp(min=1.0).float()
        self._optimizer.found_inf = is_left_out.float()


def make_fused(optimizer: torch.optim.Optimizer) -> None:
    """Let an ``AdamW`` compute in one kernel that honours ``grad_scale`` and ``found_inf``."""
    assert isinstance(optimizer, torch.optim.AdamW), f"the engine needs AdamW, got {type(optimizer).__name__}"
    for group in optimizer.param_groups:
        assert not group["amsgrad"], "amsgrad has a state that checkpoints do not know"
        group["fused"], group["foreach"] = True, False


def create_states(optimizer: torch.optim.Optimizer, masters: list[Tensor]) -> None:
    """Give every master the states that AdamW would make at its first step: so they can be read and set before it."""
    for master in masters:
        optimizer.state[master] = {
            STEP: torch.zeros((), dtype=torch.float32, device=master.device),
            **{moment: torch.zeros_like(master, requires_grad=False) for moment in MOMENTS},
        }
