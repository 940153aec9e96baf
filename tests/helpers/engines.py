"""Small real engines of every kind: a module with trained, frozen and buffered parts, and global batches for it.

Nothing divides evenly, there are two groups of the optimizer, and under ZeRO-3 some weights stay whole and several
sub-groups are updated one after another.
"""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from qad_dist.distill.optim import parameter_groups
from qad_dist.runtime.engine import Engine, build_engine, ddp
from qad_dist.runtime.world import World
from tests.helpers.launching import ROOT

KINDS = ("zero1", "zero2", "zero3", "ddp")
NAMES = {"zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "ddp": "DDP"}
DTYPES = ("float32", "bfloat16")

WIDTH = 7
ROWS = (3, 8, 1, 5)
"""Of the micro-batches of a global batch."""
RATE = 1e-2
CLIP_NORM = 0.05


class Layers(nn.Module):
    """Linear layers with a bias; a norm that is frozen; a buffer. The gradient can be multiplied on its way back."""

    def __init__(self, width: int = WIDTH, num_layers: int = 3) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=random)
        self.norm.requires_grad_(False)
        self.register_buffer("scale", torch.tensor([1.25]))

    def forward(self, states: Tensor, factor: float = 1.0) -> Tensor:
        for layer in self.layers:
            states = torch.tanh(layer(states))
        if states.requires_grad:
            states.register_hook(lambda gradient: gradient * factor)
        return self.norm(states) * self.scale


def settings_path(kind: str, folder: Path, **changes: Any) -> str | None:
    """The project's DeepSpeed settings with changes to ``zero_optimization``; None for DDP."""
    if kind == "ddp":
        return None
    settings = json.loads((ROOT / "configs" / "deepspeed" / f"{kind}.json").read_text())
    settings["zero_optimization"].update({k: v for k, v in changes.items() if kind == "zero3" or "stage3" not in k})
    path = folder / f"{kind}.json"
    path.write_text(json.dumps(settings))
    return str(path)


def make_optimizer(module: nn.Module) -> torch.optim.Optimizer:
    groups = parameter_groups(module.parameters(), weight_decay=0.1)
    return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))


def build(
    kind: str, dtype: torch.dtype, world: World, folder: Path, module: nn.Module | None = None, **changes: Any
) -> Engine:
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate allows one plugin in a process
    GradientState._reset_state()
    small = {"reduce_bucket_size": 60, "sub_group_size": 60, "stage3_param_persistence_threshold": 20}
    ddp.BUCKET_NUMEL = changes.get("reduce_bucket_size", 60)  # one layer has 56
    folder.mkdir(parents=True, exist_ok=True)
    return build_engine(
        (module or Layers()).to(dtype),
        make_optimizer,
        deepspeed=settings_path(kind, folder, **{**small, **changes}),
        world=world,
        dtype=dtype,
        clip_norm=CLIP_NORM,
    )


def micro_batch(step: int, index: int, dtype: torch.dtype = torch.float32, width: int = WIDTH) -> Tensor:
    random = torch.Generator().manual_seed(100 * step + index)
    return torch.randn(ROWS[index], width, generator=random).to(dtype)


def loss_of(output: Tensor) -> Tensor:
    """Its part of the mean over all rows of the global batch."""
    return (output.float() - 0.5).pow(2).sum() / sum(ROWS)


def accumulate(engine: Engine, step: int, dtype: torch.dtype, *, value: float = 0.0, factor: float = 1.0) -> Tensor:
    """Backward through this rank's micro-batches; a value is added to the first, a factor to its gradient."""
    rank, num_ranks = torch.distributed.get_rank(), engine.world_size
    indices = range(rank, len(ROWS), num_ranks)
    is_finite = torch.tensor(True)
    for index in indices:
        is_first = index == indices[0]
        states = micro_batch(step, index, dtype) + (value if is_first else 0.0)
        loss = loss_of(engine(states, factor if is_first else 1.0))
        engine.backward(loss, is_last=index == indices[-1])
        is_finite &= torch.isfinite(loss.detach())
    return is_finite


def train_step(engine: Engine, step: int, dtype: torch.dtype, **bad: float) -> None:
    is_finite = accumulate(engine, step, dtype, **bad)
    engine.step(learning_rate=RATE, is_finite=is_finite)


def flat_state(engine: Engine) -> dict[str, Tensor]:
    """``<parameter>/<key>``: what the engine gives away."""
    return {f"{name}/{key}": value for name, state in engine.trained_state() for key, value in state.items()}


def step_counters(engine: Engine) -> list[float]:
    return [float(state["step"]) for state in engine._optimizer.state.values()]
