"""What accelerate and DeepSpeed find in the environment, and trackers that can be opened."""

import os
import sys
from pathlib import Path

import accelerate
import torch
import torch.distributed as dist
from accelerate.tracking import get_available_trackers
from accelerate.utils import DeepSpeedPlugin

from qad_dist.runtime.world import World
from shards.errors import ConfigError


def build_accelerator(
    plugin: DeepSpeedPlugin | None, *, trackers: list[str] | None, tracker_folder: Path | None
) -> accelerate.Accelerator:
    """An ``Accelerator`` with DeepSpeed behind it if a plugin is given, else without, whatever the launcher was told.

    Raises:
        ConfigError: A tracker's package is not installed.
    """
    _check_trackers(trackers or [])
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(plugin is not None).lower()
    # Without DeepSpeed, accelerate must be told of the CPU; with it, that would leave DeepSpeed out without a word.
    on_cpu = plugin is None and not torch.cuda.is_available()
    return accelerate.Accelerator(
        cpu=on_cpu,
        deepspeed_plugin=plugin,
        log_with=[*trackers] if trackers else None,
        project_dir=tracker_folder,
    )


def join_alone() -> None:
    """Make a process group of one rank where there is none: a store in this process, and no port to collide on."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def prepare_deepspeed(world: World) -> None:
    """What DeepSpeed reads from the environment when no launcher has set it; imports it."""
    os.environ.setdefault("RANK", str(world.rank))
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    os.environ.setdefault("WORLD_SIZE", str(world.world_size))
    if torch.cuda.is_available():
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401  so that the module below exists

    # DeepSpeed compiles a shared-memory operator on the CPU (over a minute), and a process killed meanwhile leaves a
    # lock on which every later run hangs. gloo does the same job. Seen with deepspeed 0.19.8.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]


def _check_trackers(trackers: list[str]) -> None:
    """Accelerate leaves out a tracker whose package is missing, without a word."""
    available = {str(tracker.value) for tracker in get_available_trackers()}
    for name in trackers:
        if name not in available:
            raise ConfigError(
                f"train.trackers must be installed, got {name!r} without its package; pip install {name} or remove it"
            )
