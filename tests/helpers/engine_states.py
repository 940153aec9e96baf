"""A program: six steps under every engine, its state after three, and the same from any state of any engine.

    accelerate launch ... tests/helpers/engine_states.py save|load FOLDER

``save`` trains six steps in one go and leaves ``<case>-<ranks>-3.safetensors`` and ``-6``, and ``plain.safetensors``,
which torch's AdamW makes of the same global batches without any engine. ``load`` takes up every state after three steps
that is there, whoever made it. ``<phase>-<ranks>.json`` gets, from rank 0, what was seen.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qad_dist.runtime.engine import Engine
from qad_dist.runtime.logs import configure_logging
from qad_dist.runtime.world import World, current_world, exit_rank, join_world
from shards.errors import CheckpointError
from tests.helpers.engines import (
    CLIP_NORM,
    DTYPES,
    KINDS,
    ROWS,
    Layers,
    build,
    flat_state,
    loss_of,
    make_optimizer,
    micro_batch,
    step_counters,
    train_step,
)


def main(phase: str, folder: str) -> None:
    world = current_world()
    configure_logging(world)
    join_world(world, 600)
    report = {}
    for dtype in DTYPES:
        for kind in KINDS:
            own = Path(folder) / f"rank{world.rank}-of-{world.world_size}"
            engine = build(kind, getattr(torch, dtype), world, own)
            see = save if phase == "save" else load
            report[f"{kind}-{dtype}"] = see(engine, f"{kind}-{dtype}", Path(folder), world)
    if world.is_main:
        if phase == "save":
            save_file(train_plain(), Path(folder) / "plain.safetensors")
        (Path(folder) / f"{phase}-{world.world_size}.json").write_text(json.dumps(report, indent=1))
    exit_rank(0)


def save(engine: Engine, case: str, folder: Path, world: World) -> dict[str, Any]:
    dtype = getattr(torch, case.split("-")[1])
    fresh = flat_state(engine)
    norms = []
    for step in range(6):
        train_step(engine, step, dtype)
        norms.append(engine.gradient_norm())
        if step in (2, 5):
            state = flat_state(engine)
            if world.is_main:
                save_file(state, folder / f"{case}-{world.world_size}-{step + 1}.safetensors")
    start = {name: parameter for name, parameter in Layers().to(dtype).named_parameters() if parameter.requires_grad}
    return {
        "engine": [engine.name, engine.distributed_type, engine.world_size],
        "names": list(dict.fromkeys(key.split("/")[0] for key in fresh)),
        "fresh_is_the_start": all(torch.equal(fresh[f"{n}/weight"], p.float()) for n, p in start.items()),
        "fresh_moments": sum(float(fresh[key].abs().sum()) for key in fresh if not key.endswith("/weight")),
        "dtypes": sorted({str(value.dtype) for value in fresh.values()}),
        "norms": norms,
        "counters": step_counters(engine),
        "skipped": engine.num_skipped(),
    }


def load(engine: Engine, case: str, folder: Path, world: World) -> dict[str, Any]:
    """Every state into the same engine: whatever it held before must not matter."""
    dtype = getattr(torch, case.split("-")[1])
    expected = load_file(folder / f"{case}-{world.world_size}-6.safetensors")
    untouched = _untouched(engine)
    seen: dict[str, Any] = {}
    for path in sorted(folder.glob(f"*-{case.split('-')[1]}-*-3.safetensors")):
        stored = load_file(path)
        engine.load_trained_state(_reader(stored), updates=3)
        again, counters, weights = flat_state(engine), step_counters(engine), engine.gather_weights()
        for step in range(3, 6):
            train_step(engine, step, dtype)
        trained = flat_state(engine)
        seen[path.name.removesuffix("-3.safetensors")] = {
            "counters": counters,
            "read_back_is_equal": all(torch.equal(again[key], stored[key]) for key in stored),
            "num_tensors": len(again),
            "weights_that_are_not_their_master": sum(
                not torch.equal(weights[name], stored[f"{name}/weight"].to(dtype))
                for name in weights
                if f"{name}/weight" in stored
            ),
            "is_equal": all(torch.equal(trained[key], expected[key]) for key in expected),
            "error": max(_relative_error(trained[key], expected[key]) for key in expected),
        }
    return {
        "engine": [engine.name, engine.distributed_type, engine.world_size],
        "untouched_is_equal": all(torch.equal(a, b) for a, b in zip(untouched, _untouched(engine), strict=True)),
        "num_untouched": len(untouched),
        "refused": [_refused(engine, stored, change) for change in (_without, _reshaped, _halved)],
        "from": seen,
    }


def train_plain() -> dict[str, Tensor]:
    """Masters after six steps of float32: no engine, no ranks, no fused kernel."""
    module = Layers()
    optimizer = make_optimizer(module)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    norms = []
    for step in range(6):
        optimizer.zero_grad()
        sum(loss_of(module(micro_batch(step, index))) for index in range(len(ROWS))).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM))
        optimizer.step()
    state = {f"{n}/weight": p.detach() for n, p in module.named_parameters() if p.requires_grad}
    return {**state, "norms": torch.stack(norms)}


def _reader(stored: dict[str, Tensor]):
    def read(name: str) -> dict[str, Tensor]:
        return {key.split("/")[1]: value for key, value in stored.items() if key.split("/")[0] == name}

    return read


def _refused(engine: Engine, stored: dict[str, Tensor], change) -> str:
    try:
        engine.load_trained_state(lambda name: change(_reader(stored)(name)), updates=3)
    except CheckpointError as error:
        return str(error)
    return ""


def _without(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != "exp_avg"}


def _reshaped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.flatten()[1:] for key, value in state.items()}


def _halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.bfloat16() for key, value in state.items()}


def _untouched(engine: Engine) -> list[Tensor]:
    """Frozen parameters and buffers, on rank 0."""
    trained = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    frozen = [weight for name, weight in engine.gather_weights().items() if name not in trained]
    return [*frozen, *(buffer.clone() for buffer in engine.module.buffers())]


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


if __name__ == "__main__":
    main(*sys.argv[1:])
