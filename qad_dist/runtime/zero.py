"""The DeepSpeed settings of a run: read in one place, without DeepSpeed."""

import json
from pathlib import Path
from typing import Any

from shards.errors import ConfigError

ZERO_STAGES = (1, 2, 3)


def read_deepspeed_settings(path: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON and check what the engine relies on.

    Raises:
        ConfigError: It cannot be read, or its ZeRO stage is not 1, 2 or 3, or it sets what the run's YAML decides.
    """
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise ConfigError(
            f"train.deepspeed must be a DeepSpeed JSON file, got {path!r} ({cause}); see configs/deepspeed"
        ) from cause
    zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if type(stage) is not int or stage not in ZERO_STAGES:
        raise ConfigError(f"{path}: zero_optimization.stage must be 1, 2 or 3, got {stage!r}; see configs/deepspeed")
    for name in ("bf16", "fp16", "gradient_clipping", "optimizer", "scheduler", "train_batch_size"):
        if name in settings:
            raise ConfigError(f"{path}: {name} must be left to the run's YAML, got {settings[name]!r}; remove it")
    return settings
