"""A program: what every engine holds on a rank between micro-batches, and what it sends in a step of two.

    accelerate launch ... tests/helpers/held.py FOLDER

``held-<ranks>.json`` gets, from rank 0, what each rank counted.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from qad_dist.runtime.collectives import all_gather_objects
from qad_dist.runtime.engine.memory import measured_memory
from qad_dist.runtime.logs import configure_logging
from qad_dist.runtime.world import World, current_world, exit_rank, join_world
from tests.helpers.collectives import bytes_sent, record_collectives
from tests.helpers.engines import DTYPES, KINDS, RATE, Layers, build, loss_of, micro_batch

WIDTH, NUM_LAYERS = 64, 40
LARGE = {"reduce_bucket_size": 50_000, "sub_group_size": 10**9, "stage3_param_persistence_threshold": 100}
"""Sizes between a bias and a matrix, or above all."""
LET_GO = {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0}
"""ZeRO-3 keeps no gathered weight between forward and backward."""


def main(folder: str) -> None:
    world = current_world()
    configure_logging(world)
    join_world(world, 600)
    own = Path(folder) / f"rank{world.rank}"
    report = {}
    for dtype in DTYPES:
        for kind in KINDS:
            report[f"{kind}-{dtype}"] = see(world, kind, getattr(torch, dtype), own, LARGE)
        report[f"zero3 let go-{dtype}"] = see(world, "zero3", getattr(torch, dtype), own, {**LARGE, **LET_GO})
    if world.is_main:
        (Path(folder) / f"held-{world.world_size}.json").write_text(json.dumps(report, indent=1))
    exit_rank(0)


def see(world: World, kind: str, dtype: torch.dtype, folder: Path, settings: dict[str, int]) -> dict[str, Any]:
    module = Layers(WIDTH, NUM_LAYERS)
    counts = {"trained": 0, "frozen": 0}
    for parameter in module.parameters():
        counts["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
    engine = build(kind, dtype, world, folder, module, **settings)
    for step in range(3):  # ZeRO-3 learns the order of its weights in the first
        with record_collectives() as collectives:
            for index in range(2):
                output = engine(micro_batch(step, index, dtype, WIDTH))
                engine.backward(loss_of(output), is_last=index == 1)
                if index == 0:
                    memory = measured_memory(engine)._asdict()
            engine.step(learning_rate=RATE, is_finite=torch.tensor(True))
    return {
        "engine": [engine.name, engine.world_size],
        "counts": counts,
        "memory": all_gather_objects(memory),
        "sent": all_gather_objects(sum(bytes_sent(*collective, world.world_size) for collective in collectives)),
        "collectives": collectives,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
