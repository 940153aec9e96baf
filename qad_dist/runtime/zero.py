"""The DeepSpeed settings of a run: read in one place, without DeepSpeed."""

import json
from pathlib import Path
from typing import Any

from shards.errors import ConfigError

ZERO_STAGES = (1, 2, 3)


def zero_stage(path: str | None) -> int:
    """What ``train.deepspeed`` shards: optimizer (1), gradients too (2), weights too (3), or nothing (0, for None).

    Raises:
        ConfigError: As :func:`read_deepspeed_settings`.
    """
    return 0 if path is None else read_deepspeed_settings(path)["zero_optimization"]["stage"]


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
    for name in ("compute_grad_norm", "offload_optimizer", "offload_param", "zenflow"):
        if name in zero:
            raise ConfigError(
                f"{path}: zero_optimization.{name} must be left to the engine, got {zero[name]!r}; remove it"
            )
    data_types = settings.get("data_types")
    accumulated = data_types.get("grad_accum_dtype") if isinstance(data_types, dict) else None
    # Else gradients would be added up, over micro-batches or ranks, in the dtype of the weights.
    for name, found in (
        ("data_types.grad_accum_dtype", accumulated),
        ("communication_data_type", settings.get("communication_data_type")),
    ):
        if found != "fp32":
            raise ConfigError(f"{path}: {name} must be 'fp32', got {found!r}; see configs/deepspeed")
    return settings


def ranks_that_share(kind: str, *, zero_stage: int, world_size: int) -> int:
    """Among how many ranks one copy of the engine's tensors of a kind is divided. Pure.

    Args:
        kind: ``weights``, ``gradients``, ``masters`` or ``moments``.
        zero_stage: 0 shards nothing.
        world_size: Ranks.

    Source:
        Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1.
    """
    return world_size if zero_stage >= _SHARDED_FROM[kind] else 1


_SHARDED_FROM = {"weights": 3, "gradients": 2, "masters": 1, "moments": 1}
