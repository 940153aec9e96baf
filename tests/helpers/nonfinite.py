"""A program: steps of the engine of which the last must not be made, under each ZeRO stage in float32 and bfloat16.

    accelerate launch ... tests/helpers/nonfinite.py REPORT

REPORT gets, from rank 0, what the ranks saw of each case. The last rank alone has what is no number.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from qad_dist.runtime.collectives import all_gather_objects
from qad_dist.runtime.engine import Engine
from qad_dist.runtime.logs import configure_logging
from qad_dist.runtime.world import World, current_world, exit_rank, join_world
from qad_dist.runtime.zero import read_deepspeed_settings
from shards.errors import NonFiniteError
from tests.helpers.launching import ROOT

WIDTH = 8

# Value that goes in, and factor of a gradient on its way back; the loss stays finite in the last two.
FAULTS = {"loss": (torch.nan, 1.0), "gradient": (0.5, torch.nan), "infinite gradient": (0.5, torch.inf)}


class Layers(nn.Module):
    """Two Linear layers; between them the gradient is multiplied by a factor."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)])
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=random)

    def forward(self, states: Tensor, factor: float) -> Tensor:
        first, second = self.layers
        hidden = torch.tanh(first(states))
        hidden.register_hook(lambda gradient: gradient * factor)
        return second(hidden)


def main(report: str) -> None:
    world = current_world()
    configure_logging(world)
    join_world(world, 600)
    seen = {
        f"zero{stage} {dtype} {fault}": see(world, stage, getattr(torch, dtype), *bad)
        for stage in (1, 2, 3)
        for dtype in ("float32", "bfloat16")
        for fault, bad in FAULTS.items()
    }
    if world.is_main:
        Path(report).write_text(json.dumps(seen))
    exit_rank(0)


def see(world: World, stage: int, dtype: torch.dtype, bad_value: float, bad_factor: float) -> dict[str, Any]:
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate allows one plugin in a process
    GradientState._reset_state()
    engine = Engine(
        Layers().to(dtype),
        lambda module: torch.optim.AdamW(module.parameters()),
        settings=read_deepspeed_settings(str(ROOT / "configs" / "deepspeed" / f"zero{stage}.json")),
        world=world,
        dtype=dtype,
        clip_norm=1.0,
    )
    start = masters(engine)
    step(engine, dtype, 0.5, 1.0)
    norm, before = engine.gradient_norm(), masters(engine)
    told: list[object] = []
    try:
        step(engine, dtype, *((bad_value, bad_factor) if world.rank == world.world_size - 1 else (0.5, 1.0)))
    except NonFiniteError as error:
        told = [str(error), error.is_shared]
    after = masters(engine)
    return {
        "engine": [engine.distributed_type, engine.stage, engine.world_size],
        "gradient_norm": norm,
        "moved_by_the_good_step": sum(not torch.equal(*pair) for pair in zip(start, before, strict=True)),
        "moved_by_the_bad_step": sum(not torch.equal(*pair) for pair in zip(before, after, strict=True)),
        "told": all_gather_objects(told),
    }


def step(engine: Engine, dtype: torch.dtype, value: float, factor: float) -> None:
    loss = engine(torch.full((3, WIDTH), value, dtype=dtype), factor).float().pow(2).mean()
    engine.backward(loss, is_last=True)
    engine.step(learning_rate=1e-2, is_finite=torch.isfinite(loss.detach()))


def masters(engine: Engine) -> list[Tensor]:
    return [safe_get_full_fp32_param(parameter).clone() for parameter in engine.module.parameters()]


if __name__ == "__main__":
    main(*sys.argv[1:])
