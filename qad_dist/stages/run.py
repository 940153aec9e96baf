"""The whole run on this machine: each stage's program in its turn, finished ones skipped, the first failure ends it.

Programs are started as a user would start them; this file holds no stage's work. ``--dry-run`` says what would be
started, and what it needs.
"""

import json
import logging
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qad_dist.config import RunConfig
from qad_dist.config.score import is_predictions
from qad_dist.runtime.estimate import MEMORY_FORMULA, ModelSize, disk_of_stages, memory_per_rank, model_size
from qad_dist.runtime.record import STAGES, is_finished
from qad_dist.runtime.world import count_gpus, program_environment
from qad_dist.runtime.zero import zero_stage
from qad_dist.text.table import SCORE, SPEED, score_table
from qad_dist.text.usage import usage
from shards.audio import estimate_seconds
from shards.corpus import recording_of
from shards.errors import ConfigError, ModelError, StageError
from shards.index import INDEX, read_index
from shards.schema import Recording
from shards.sources import read_found
from shards.storage import read_json

log = logging.getLogger(__name__)

# One process each: pack brings its own, and export writes one folder.
SINGLE_PROCESS = ("pack", "export")
CPU_RANKS = 2

# Headers read for the hours of a run that is not packed yet; of more recordings, evenly spread ones.
_HEADERS = 2000


class StageFailedError(StageError):
    """A stage's program ended with an error, which it has told itself."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code if code > 0 else 128 - code  # below 0: ended by that signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How the programs of a run are started on this machine."""

    programs: Path
    """The folder of ``X.py``."""
    config: str
    overrides: tuple[str, ...] = ()
    num_gpus: int = 0
    micro_batches_per_step: int
    """Of training, which has work for no more ranks than that."""

    def num_ranks(self, stage: str) -> int:
        """One for each GPU, or two on the CPU; one for a stage that brings its own processes."""
        if stage in SINGLE_PROCESS:
            return 1
        ranks = self.num_gpus or CPU_RANKS
        return min(ranks, self.micro_batches_per_step) if stage == "train" else ranks

    def command(self, stage: str) -> list[str]:
        """The words of a stage's command line, beginning with ``python`` or ``accelerate``."""
        options = ["--config", self.config, *(["--set", *self.overrides] if self.overrides else [])]
        program = [str(self.programs / f"{stage}.py"), *options]
        if stage in SINGLE_PROCESS:
            return ["python", *program]
        num_ranks = self.num_ranks(stage)
        machine = "cpu" if self.num_gpus == 0 else "one_gpu" if num_ranks == 1 else "one_node"
        file = self.programs.parent / "configs" / "accelerate" / f"{machine}.yaml"
        ranks = ["--config_file", str(file), "--num_processes", str(num_ranks)]
        return ["accelerate", "launch", *ranks, *program]


def chosen_stages(first: str, last: str) -> list[str]:
    """The stages from ``first`` to ``last``, in the order of the pipeline.

    Raises:
        ConfigError: ``last`` comes before ``first``.
    """
    begin, end = STAGES.index(first), STAGES.index(last)
    if end < begin:
        raise ConfigError(f"--to must not come before --from ({first}), got {last}; the order is {', '.join(STAGES)}")
    return list(STAGES[begin : end + 1])


def run(config: RunConfig, launch: Launch, stages: Sequence[str]) -> None:
    """Start the programs of ``stages`` one after the other.

    Raises:
        StageFailedError: A program ended with another code than 0; the stages behind it were not started.
    """
    models = [path for path in config.score.systems.values() if not is_predictions(path)]
    offline = all(Path(path).is_dir() for path in (config.model.path, *models))
    environment = program_environment(config.folder, on_cpu=launch.num_gpus == 0, offline=offline)
    for stage in stages:
        if is_finished(config, stage):
            log.info("event=skipped stage=%s reason=finished", stage)
            continue
        if stage not in SINGLE_PROCESS and (idle := launch.num_gpus - launch.num_ranks(stage)) > 0:
            log.warning("event=idle_gpus stage=%s gpus=%d remedy='raise train.micro_batches_per_step'", stage, idle)
        log.info("event=started stage=%s command=%s", stage, shlex.join(launch.command(stage)))
        begin = time.monotonic()
        code = _call(launch.command(stage), environment)
        seconds = time.monotonic() - begin
        if code != 0:
            raise StageFailedError(
                f"stage {stage} must end with exit code 0, got {code} after {seconds:.0f} s; "
                f"mend what it says above, then start again: finished stages are skipped",
                code,
            )
        log.info("event=ended stage=%s seconds=%.1f", stage, seconds)


def dry_run(config: RunConfig, launch: Launch, stages: Sequence[str]) -> str:
    """What :func:`run` would start, and what it would need, as text."""
    hours, told_by = _hours(config)
    size = _model_size(config)
    lines = ["commands:"]
    for stage in stages:
        state = "  # finished, would be skipped" if is_finished(config, stage) else ""
        lines.append(f"  {shlex.join(launch.command(stage))}{state}")
    lines += ["", f"audio: {'unknown' if hours is None else f'{hours:.2f} hours'} ({told_by})"]
    steps, micro_batches = config.train.steps, config.train.micro_batches_per_step
    tokens, num_ranks = config.train.micro_batch_tokens, launch.num_ranks("train")
    lines += [f"training: {steps} steps of {micro_batches} micro-batches of up to {tokens} tokens on {num_ranks} ranks"]
    lines += ["", *_memory_lines(config, size, num_ranks), "", "disk:"]
    disk = disk_of_stages(config, size, hours=hours)
    lines += [f"  {stage}: {'unknown' if disk[stage] is None else _readable(disk[stage])}" for stage in stages]
    return "\n".join(lines) + "\n"


def summary(config: RunConfig) -> str:
    """The table of the scores and how to use the export, as far as these stages are finished."""
    parts = []
    if is_finished(config, "score"):
        folder = config.stage_folder("score")
        parts.append(score_table(read_json(folder / SCORE), read_json(folder / SPEED)))
    if is_finished(config, "export"):
        parts.append(usage(config.stage_folder("export") / config.export.format))
    return "".join(f"\n{part}" for part in parts)


def _call(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a program to its end; a SIGTERM to us is passed on, so that no rank is left behind."""
    # accelerate as a module of this interpreter: its script may not be on the path.
    module = ["-m", "accelerate.commands.launch"] if command[0] == "accelerate" else []
    words = [sys.executable, *module, *command[2 if module else 1 :]]
    with subprocess.Popen(words, env=environment) as process:
        previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            return process.wait()
        finally:
            signal.signal(signal.SIGTERM, previous)


def _hours(config: RunConfig) -> tuple[float | None, str]:
    if (config.stage_folder("pack") / INDEX).is_file():
        return read_index(config.stage_folder("pack")).hours, "from the index"
    looked_at, num_recordings = _some_recordings(config)
    seconds = [estimate_seconds(recording) for recording in looked_at]
    hours = sum(seconds) / len(seconds) * num_recordings / 3600
    return hours, f"from what {len(seconds)} of {num_recordings} recordings or their sources tell"


def _some_recordings(config: RunConfig) -> tuple[list[Recording], int]:
    """Recordings at equal distances, and how many there are."""
    kept: list[Recording] = []
    every, count = 1, 0
    for found in read_found(
        config.pack.inputs, default_language=config.pack.language, kind=config.pack.source, spool=None
    ):
        if count % every == 0:
            kept.append(recording_of(found))
        count += 1
        if len(kept) == 2 * _HEADERS:
            kept, every = kept[::2], 2 * every
    return kept, count


def _model_size(config: RunConfig) -> ModelSize | None:
    """Read ``config.json`` of the model folder, or of the hub id if it was downloaded before."""
    folder = Path(config.model.path)
    path = folder / "config.json"
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(config.model.path, "config.json", revision=config.model.revision)
        except HFValidationError as cause:
            raise ModelError(
                f"model.path must be a folder or a hub id, got {config.model.path!r}; correct the path"
            ) from cause
        if not isinstance(cached, str):
            return None
        path = Path(cached)
    try:
        return model_size(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as cause:
        if isinstance(cause, ModelError):
            raise
        raise ModelError(f"{path} must be a readable JSON file, got {cause}; check model.path") from cause


def _memory_lines(config: RunConfig, size: ModelSize | None, world_size: int) -> list[str]:
    if size is None:
        return [f"memory of a rank: unknown until {config.model.path} is downloaded"]
    stage = zero_stage(config.train.deepspeed)
    parts = memory_per_rank(config, size, zero_stage=stage, world_size=world_size)
    told = [f"  {name}: {_readable(value)}" for name, value in parts.items()]
    total = _readable(sum(parts.values()))
    sharding = f"ZeRO-{stage}" if stage else "nothing sharded"
    head = f"memory of a rank in training: {total} ({world_size} ranks, {sharding}, {config.model.dtype})"
    return [head, f"  = {MEMORY_FORMULA}", *told]


def _readable(size: float | None) -> str:
    size = size or 0.0
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def launch_for(programs: Path, path: str, overrides: Sequence[str], config: RunConfig) -> Launch:
    """How to start programs on this machine with the config at ``path``, which the overrides make ``config``."""
    return Launch(
        programs=programs,
        config=path,
        overrides=tuple(overrides),
        num_gpus=count_gpus(),
        micro_batches_per_step=config.train.micro_batches_per_step,
    )
