"""The DeepSpeed settings of a run: read in one place, without DeepSpeed."""

import json
from pathlib import Path
from typing import Any

from shards.errors import ConfigError

ZERO_STAGES = (1, 2, 3)


def read_deepspeed_settings(path: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON and check what the engine relies on.

    Raises:
        ConfigError: It cannot be read, or its ZeRO stage is not 1, 2 or 3, or it sets what the run's YAML decides, or
            something that the engine does not do.
    """
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise ConfigError(
            f"train.deepspeed must be a DeepSpeed JSON file, got {path!r} ({cause}); see configs/deepspeed"
        ) from cause
    found = settings.get("zero_optimization") if isinstance(settings, dict) else None
    zero = found if isinstance(found, dict) else {}
    stage = zero.get("stage")
    if type(stage) is not int or stage not in ZERO_STAGES:
        raise ConfigError(f"{path}: zero_optimization.stage must be 1, 2 or 3, got {stage!r}; see configs/deepspeed")
    for name in ("bf16", "fp16", "gradient_clipping", "optimizer", "scheduler", "train_batch_size"):
        if name in settings:
            raise ConfigError(f"{path}: {name} must be left to the run's YAML, got {settings[name]!r}; remove it")
    for name in ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu"):
        if settings.get(name, 1) != 1:
            remedy = "remove it and set train.micro_batches_per_step and train.micro_batch_tokens"
            raise ConfigError(f"{path}: {name} must be 1, got {settings[name]!r}; {remedy}")
    if zero.get("compute_grad_norm", True) is not True:
        raise ConfigError(
            f"{path}: zero_optimization.compute_grad_norm must be true, got {zero['compute_grad_norm']!r}; remove it"
        )
    return settings
