"""Checkpoints: written aside, hashed, published by rename, pruned afterwards; verified before anything is unpickled.

``<run>/train/step-000123/`` holds the engine's files, ``state.json`` and ``manifest.json``. A folder without its
manifest does not count. ``<run>/train/best/`` holds the student that was nearest to the teacher.

What rank 0 reads, publishes or removes fails on every rank. A rank that cannot write its own part fails alone: the
others wait for it inside the engine, out of reach, until its launcher ends them.
"""

import logging
import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from qad_dist.runtime.collectives import barrier, run_on_main
from qad_dist.runtime.engine import Engine
from shards.errors import CheckpointError, StageError
from shards.storage import (
    MANIFEST,
    atomic_folder,
    publish_folder,
    read_json,
    verify_manifest,
    write_json,
)

log = logging.getLogger(__name__)

BEST = "best"
STATE = "state.json"
WEIGHTS = "decoder.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """Where training stands; everything else is a function of it and of the config."""

    step: int
    """Updates done; also the position in the data."""
    best_step: int
    """Step of the best evaluation so far; 0 is the student before training, -1 none yet."""
    best_kl: float
    """Its KL per token on the held-out set."""
    world_size: int
    zero_stage: int
    fingerprint: str
    """Of settings, data and student that this run trains with."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """Look after ``folder/step-*``.

        Args:
            folder: ``<run>/train``.
            keep: Newest complete checkpoints that pruning leaves.
        """
        self._folder, self._keep = folder, keep
        self._resumed_from: Path | None = None

    def save(self, engine: Engine, state: TrainingState) -> None:
        """Write and publish a checkpoint; all ranks together.

        Raises:
            StageError: On the rank that could not write its part; on every rank when rank 0 cannot publish.
        """
        final = self._folder / f"step-{state.step:06d}"
        temporary = final.with_name(f".{final.name}.tmp")
        run_on_main(lambda: _fresh_folder(temporary))
        try:
            engine.save(temporary)
        except (OSError, RuntimeError) as cause:
            if isinstance(cause, RuntimeError) and "PytorchStreamWriter" not in str(cause):
                raise  # not torch's word for a full disk
            reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
            raise StageError(f"{temporary} must be writable, got {reason!r}; make room and start again") from cause
        barrier()
        run_on_main(lambda: self._publish(temporary, final, state))
        log.info("event=checkpoint step=%d path=%s", state.step, final)

    def _publish(self, temporary: Path, final: Path, state: TrainingState) -> None:
        write_json(temporary / STATE, asdict(state))
        publish_folder(temporary, final)
        complete = self.complete()
        for old in complete[: -self._keep]:
            if old.resolve() != self._resumed_from:
                shutil.rmtree(old)

    def complete(self) -> list[Path]:
        """Published checkpoints, oldest first."""
        return [path for path in self._numbered() if (path / MANIFEST).is_file()]

    def choose(self, resume: str) -> Path | None:
        """The checkpoint that ``train.resume`` names: ``auto``, ``none`` or a path.

        Raises:
            CheckpointError: A named path is not a checkpoint.
        """
        if resume == "none":
            return None
        if resume != "auto":
            if not (Path(resume) / MANIFEST).is_file():
                raise CheckpointError(f"train.resume must be auto, none or a complete checkpoint, got {resume!r}")
            return Path(resume)
        complete = self.complete()
        return complete[-1] if complete else None

    def load(self, engine: Engine, path: Path, *, expected: TrainingState) -> TrainingState:
        """Verify a checkpoint, see that it belongs to this run, load it; all ranks together.

        Args:
            engine: Receives weights and optimizer.
            path: From :meth:`choose`.
            expected: This run's fingerprint, world size and ZeRO stage.

        Raises:
            CheckpointError: It is damaged or from another run, world size or ZeRO stage.
        """
        state = run_on_main(lambda: _verified_state(path, expected))
        engine.load(path)
        barrier()
        self._resumed_from = path.resolve()
        return state

    def make_agree(self, state: TrainingState, *, is_sent_back: bool) -> TrainingState:
        """Remove what does not belong to the state that training goes on from, once it has loaded; rank 0 only.

        Args:
            state: As loaded, or of step 0.
            is_sent_back: Whether ``train.resume`` said where: then all later checkpoints go, else pruning and ``auto``
                would take them for the newest. Otherwise a best student of a later step may stay: training was killed
                before it came to that checkpoint, and will come there again.

        Returns:
            The state; without a best step where its best student is not on disk any more.
        """
        best = self._folder / BEST
        step = read_json(best / STATE)["step"] if best.is_dir() else -1
        if step != state.best_step and (is_sent_back or step <= state.step):
            state = replace(state, best_step=-1, best_kl=math.inf)
            if best.is_dir():
                shutil.rmtree(best)
        if is_sent_back:
            for path in self._numbered():
                if _step_of(path) > state.step:
                    shutil.rmtree(path)
        return state

    def _numbered(self) -> list[Path]:
        folders = (path for path in self._folder.glob("step-*") if path.name.removeprefix("step-").isdigit())
        return sorted(folders, key=_step_of)


def save_best(folder: Path, weights: dict[str, Tensor], *, step: int, kl_per_token: float) -> None:
    """Keep the best decoder so far, whole; one rank only."""
    with atomic_folder(folder) as temporary:
        save_file(weights, temporary / WEIGHTS)
        write_json(temporary / STATE, {"step": step, "kl_per_token": kl_per_token})


def load_best(folder: Path) -> dict[str, Tensor]:
    """The weights that :func:`save_best` kept, after a look at their hashes."""
    verify_manifest(folder)
    return load_file(folder / WEIGHTS)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as cause:
        raise StageError(f"{folder} must be writable, got {cause.strerror!r}; mend its permissions") from cause


def _verified_state(path: Path, expected: TrainingState) -> TrainingState:
    verify_manifest(path)
    state = TrainingState(**read_json(path / STATE))
    if state.fingerprint != expected.fingerprint:
        raise CheckpointError(
            f"{path} must come from this run's settings and data ({expected.fingerprint[:12]}), got "
            f"{state.fingerprint[:12]}; undo the change, or start anew with --set train.resume=none"
        )
    for name in ("world_size", "zero_stage"):
        found, wanted = getattr(state, name), getattr(expected, name)
        if found != wanted:
            raise CheckpointError(
                f"{path} must be resumed with {name} {found}, got {wanted}; start as many ranks as before with the "
                "same train.deepspeed, or start anew with --set train.resume=none"
            )
    return state
