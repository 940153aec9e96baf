"""A program: steps of every engine of which some must not be made, in float32 and bfloat16.

    accelerate launch ... tests/helpers/nonfinite.py REPORT

REPORT gets, from rank 0, what the ranks saw of each case. The last rank alone has what is no number, in the first of
its two micro-batches. A twin sees the good steps only.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qad_dist.runtime.collectives import all_gather_objects
from qad_dist.runtime.engine import Engine
from qad_dist.runtime.logs import configure_logging
from qad_dist.runtime.world import World, current_world, exit_rank, join_world
from tests.helpers.engines import DTYPES, KINDS, RATE, accumulate, build, flat_state, step_counters, train_step
from tests.helpers.operators import WAITING, count_operators

# Value that goes in, and factor of a gradient on its way back; the loss stays finite in the second and third.
FAULTS: dict[str, dict[str, float]] = {
    "loss": {"value": torch.nan},
    "gradient": {"factor": torch.nan},
    "infinite gradient": {"factor": torch.inf},
    "loss alone": {},  # its gradient is finite
}


def main(report: str) -> None:
    world = current_world()
    configure_logging(world)
    join_world(world, 600)
    folder = Path(report).parent / f"rank{world.rank}"
    seen = {f"{kind} {dtype}": see(world, kind, getattr(torch, dtype), folder) for kind in KINDS for dtype in DTYPES}
    if world.is_main:
        Path(report).write_text(json.dumps(seen))
    exit_rank(0)


def see(world: World, kind: str, dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    engine = build(kind, dtype, world, folder)
    train_step(engine, 0, dtype)
    before, norm = seen_state(engine), engine.gradient_norm()
    faults = {name: bad_step(engine, name, dtype, before) for name in FAULTS}
    train_step(engine, 1, dtype)
    after = seen_state(engine)
    with count_operators() as counted:
        train_step(engine, 2, dtype)
    twin = build(kind, dtype, world, folder)
    for step in range(2):
        train_step(twin, step, dtype)
    return {
        "engine": [engine.name, engine.distributed_type, engine.world_size],
        "good_norm": norm,
        "faults": faults,
        "moved_by_the_good_step": num_unequal(before, after),
        "unlike_its_twin": all_gather_objects(num_unequal(after, seen_state(twin))),
        "num_tensors": len(after),
        "waits": {name: counted[name] for name in WAITING if counted[name]},
        "operators": sum(counted.values()),
    }


def bad_step(engine: Engine, fault: str, dtype: torch.dtype, before: list[Tensor]) -> dict[str, Any]:
    is_bad_rank = torch.distributed.get_rank() == engine.world_size - 1
    num_skipped = engine.num_skipped()
    is_finite = accumulate(engine, 7, dtype, **(FAULTS[fault] if is_bad_rank else {}))
    if fault == "loss alone" and is_bad_rank:
        is_finite = torch.tensor(False)
    engine.step(learning_rate=RATE, is_finite=is_finite)
    return {
        "losses_are_finite": all_gather_objects(bool(is_finite)),
        "moved": all_gather_objects(num_unequal(before, seen_state(engine))),
        "skipped": all_gather_objects(engine.num_skipped() - num_skipped),
        "norm_is_finite": all_gather_objects(bool(torch.isfinite(torch.tensor(engine.gradient_norm())))),
    }


def seen_state(engine: Engine) -> list[Tensor]:
    """Masters, moments and step counters; on rank 0 the weights too."""
    weights = engine.gather_weights().values()
    return [*flat_state(engine).values(), torch.tensor(step_counters(engine)), *weights]


def num_unequal(first: list[Tensor], second: list[Tensor]) -> int:
    return sum(not torch.equal(*pair) for pair in zip(first, second, strict=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
