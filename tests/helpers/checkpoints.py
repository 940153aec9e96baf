"""Checkpoints of an engine of two weights that all have one value."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qad_dist.distill.checkpoint import Checkpoints, TrainingState, save_best
from tests.helpers.states import PlainEngine


def engine_of(value: float = 0.0, *, moment: float = 0.0) -> PlainEngine:
    """Two weights of this value, and their moments."""
    engine = PlainEngine(
        down=nn.Parameter(torch.full((2, 3), float(value))), up=nn.Parameter(torch.full((3, 2), float(value)))
    )
    for tensor in engine.moments.values():
        tensor.fill_(moment)
    return engine


def value_of(engine: PlainEngine) -> float:
    """Of all its weights."""
    (value,) = {float(number) for weight in engine.weights.values() for number in weight.detach().flatten()}
    return value


def state_at(step: int, **changes: Any) -> TrainingState:
    values = {
        "step": step,
        "skipped": 0,
        "best_step": step,
        "best_kl": 0.5,
        "best_word_error_rate": None,
        "looks_without_better": 0,
        "fingerprint": "f" * 64,
    }
    return TrainingState(**{**values, **changes})


def save_steps(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(engine_of(step), state_at(step))  # type: ignore[arg-type]
    checkpoints.settle(wait=True)


def save_best_of(folder: Path, step: int) -> None:
    save_best(folder / "best", {"layers.0.weight": torch.full((2,), float(step))}, step=step, kl_per_token=0.25)


def load(checkpoints: Checkpoints, path: Path, *, engine: PlainEngine | None = None, **changes: Any) -> TrainingState:
    return checkpoints.load(engine or engine_of(), path, expected=state_at(0, **changes))  # type: ignore[arg-type]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
