"""Where am I, who else is there: rank, world size, device and process group of this program.

The only module (beside ``launch/``) that reads the environment or the command line for that.
"""

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from shards.errors import WorldError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among the processes of the program."""

    rank: int
    local_rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes what is written once."""
        return self.rank == 0


def current_world() -> World:
    """The world that the launcher made: rank 0 of 1 when there was none.

    Raises:
        WorldError: The launcher's variables are no numbers or contradict each other.
    """
    rank, local_rank = _environment_int("RANK", default=0), _environment_int("LOCAL_RANK", default=0)
    world_size = _environment_int("WORLD_SIZE", default=1)
    if not (0 <= rank < world_size and 0 <= local_rank <= rank):
        raise WorldError(
            f"RANK, LOCAL_RANK and WORLD_SIZE must fit together, got {rank}, {local_rank} and {world_size}; "
            "start the program with `accelerate launch`, or unset them to run one process"
        )
    return World(rank=rank, local_rank=local_rank, world_size=world_size)


def device_for(world: World) -> "torch.device":
    """This rank's GPU, or the CPU where there is none.

    Raises:
        WorldError: This machine has GPUs, but fewer than ranks, or torch cannot use them.
    """
    import torch

    if not torch.cuda.is_available():
        if num_gpus := count_gpus():
            raise WorldError(
                f"torch must be able to use the GPUs of this machine ({num_gpus}), got {torch.__version__}; "
                "remove .venv and set up on this machine, or set CUDA_VISIBLE_DEVICES= to compute on the CPU"
            )
        return torch.device("cpu")
    if world.local_rank >= torch.cuda.device_count():
        raise WorldError(
            f"--num_processes must be at most the number of GPUs of a machine ({torch.cuda.device_count()}), "
            f"got a local rank of {world.local_rank}; start fewer ranks"
        )
    return torch.device("cuda", world.local_rank)


def join_world(world: World, timeout_seconds: float) -> None:
    """Meet the other ranks: gloo on the CPU, gloo and NCCL on GPUs. No effect alone, or when joined already.

    Args:
        world: From :func:`current_world`.
        timeout_seconds: How long a collective waits for a missing rank before it raises.
    """
    import datetime

    import torch
    import torch.distributed as dist

    device = device_for(world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world.world_size == 1 or dist.is_initialized():
        return
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_seconds))


@contextmanager
def joined_world(timeout_seconds: float) -> Generator[World]:
    """Join the other ranks for a stage, and leave them when it is done.

    A rank that fails does not leave the group: with NCCL that waits for ranks that are waiting for this one. It goes
    straight to :func:`exit_rank`, and the launcher ends the others.
    """
    world = current_world()
    join_world(world, timeout_seconds)
    try:
        yield world
    except BaseException:
        if world.world_size == 1:
            leave_world()
        raise
    leave_world()


def check_enough_work(world: World, num_utterances: int, *, stage: str) -> None:
    """See that no rank would be left without an utterance.

    Raises:
        WorldError: There are more ranks than utterances.
    """
    if num_utterances < world.world_size:
        raise WorldError(
            f"{stage} needs at least one utterance for each rank, got {num_utterances} for {world.world_size} ranks; "
            "start fewer with --num_processes"
        )


def check_micro_batches(world: World, micro_batches_per_step: int) -> None:
    """See that every rank has a micro-batch in each step; say so where some have fewer than others.

    Raises:
        WorldError: There are more ranks than micro-batches: the others would compute for nothing.
    """
    if micro_batches_per_step < world.world_size:
        raise WorldError(
            f"train.micro_batches_per_step must be at least the number of ranks ({world.world_size}), got "
            f"{micro_batches_per_step}; raise it or start fewer with --num_processes"
        )
    if world.is_main and (left := micro_batches_per_step % world.world_size):
        log.warning(
            "event=uneven_steps ranks=%d micro_batches_per_step=%d remedy='make it a multiple of the ranks: %d of them "
            "have one micro-batch less than the others in each step'",
            *(world.world_size, micro_batches_per_step, world.world_size - left),
        )


def leave_world() -> None:
    """End the process group, if there is one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def exit_rank(code: int) -> NoReturn:
    """End this process at once, after a group of ranks was used.

    An ordinary exit aborts now and then ("terminate called without an active exception", seen in 3 of 14 starts with
    torch 2.13 and DeepSpeed 0.19): a gloo thread that lets go of a tensor while Python shuts down is killed in C++ code
    that must not be left that way. What would run at exit is done here or by the stage itself.
    """
    if code == 0 and "torch.distributed" in sys.modules:
        leave_world()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def count_gpus() -> int:
    """GPUs that a program started here would see, asked of the driver: importing torch takes seconds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def program_environment(folder: Path, *, on_cpu: bool, offline: bool) -> dict[str, str]:
    """The environment for the programs of a run.

    Args:
        folder: The run's folder. DeepSpeed's compiled parts go there: in the common cache, a lock left by a process
            that was killed while compiling lets every later run hang.
        on_cpu: Whether the ranks compute on the CPU.
        offline: Whether everything needed is on this machine, so that no hub is asked.
    """
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str((folder / ".torch_extensions").absolute())}
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    environment.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    if offline:
        environment.setdefault("HF_HUB_OFFLINE", "1")
    if on_cpu:
        environment["DS_ACCELERATOR"] = "cpu"
        environment.setdefault("OMP_NUM_THREADS", "1")
        environment.pop("ACCELERATE_USE_CPU", None)  # it leaves DeepSpeed out without a word
    return environment


def program_name() -> str:
    """Which of ``launch/X.py`` this process is: ``X``."""
    return Path(sys.argv[0]).stem


def command_line() -> str:
    """How this program was started, for the record of a run."""
    return shlex.join([sys.executable, *sys.argv])


def _environment_int(name: str, *, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError as cause:
        raise WorldError(f"{name} must be a whole number, got {text!r}; unset it or use `accelerate launch`") from cause
