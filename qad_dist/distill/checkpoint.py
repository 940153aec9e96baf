"""Checkpoints: gathered at a step, written beside the next ones, hashed, published by rename, pruned afterwards.

``<run>/train/step-000123/`` holds ``rank-000.safetensors`` and so on (masters and both moments of whole parameters,
shared out among the ranks that wrote), ``state.json`` and ``manifest.json``. A folder without its manifest does not
count. Nothing in it depends on the number of ranks or on what they shard, and nothing is unpickled: any engine on any
number of ranks goes on from it. ``<run>/train/best/`` holds the student that was nearest to the teacher.

Training draws no random numbers: data, their order and their alteration are functions of seed and step.
"""

import logging
import math
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qad_dist.runtime.collectives import all_gather_objects, num_ranks, own_rank, run_on_main
from qad_dist.runtime.engine import Engine
from shards.errors import CheckpointError, QadError, StageError
from shards.faults import fault_point
from shards.storage import (
    MANIFEST,
    atomic_folder,
    publish_folder,
    read_json,
    sha256_file,
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

    step: int = 0
    """Steps done; also the position in the data."""
    skipped: int = 0
    """Of these, steps that were left out because a loss or gradient was no finite number."""
    best_step: int = -1
    """Step of the best evaluation so far; 0 is the student before training, -1 none yet."""
    best_kl: float = math.inf
    """Its KL per token on the held-out set."""
    best_word_error_rate: float | None = None
    """Its held-out word error rate, if it was decoded."""
    looks_without_better: int = 0
    """Evaluations since then."""
    fingerprint: str
    """Of settings, data and student that this run trains with."""

    @property
    def updates(self) -> int:
        """Steps that changed the student."""
        return self.step - self.skipped


@dataclass(frozen=True, slots=True)
class _Writing:
    """A checkpoint on its way to the disk."""

    state: TrainingState
    temporary: Path
    hash: "Future[str]"
    """Of this rank's file, once it is written."""


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
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: _Writing | None = None

    def save(self, engine: Engine, state: TrainingState) -> None:
        """Take a checkpoint; all ranks together. It is written while training goes on, and counts once settled.

        Raises:
            QadError: As :meth:`settle`, of the checkpoint before.
        """
        self.settle(wait=True)
        if (self._folder / _name_of(state.step) / MANIFEST).is_file():
            return  # behind the last step of a training that had ended
        temporary = self._folder / f".{_name_of(state.step)}.tmp"
        run_on_main(lambda: _fresh_folder(temporary))
        own: dict[str, Tensor] = {}
        for number, (name, tensors) in enumerate(engine.trained_state()):
            if number % num_ranks() == own_rank():
                own |= {f"{name}/{key}": tensor.cpu() for key, tensor in tensors.items()}
        fault_point("checkpoint.after_gather", step=state.step, rank=own_rank())
        hashed = self._writer.submit(_write_part, temporary / _part_of(own_rank()), own, step=state.step)
        self._writing = _Writing(state, temporary, hashed)

    def settle(self, *, wait: bool) -> None:
        """Publish the checkpoint that is being written; all ranks together. No effect without one.

        Args:
            wait: Until it is; otherwise only if all ranks have written their parts.

        Raises:
            QadError: On every rank, when one could not write its part or rank 0 cannot publish.
        """
        if self._writing is None:
            return
        writing = self._writing
        if not wait and not all(all_gather_objects(writing.hash.done())):
            return
        self._writing = None
        hashes, failures = _gather_hashes(writing.hash)
        if failures:
            error = StageError(failures[0])
            error.is_shared = True
            raise error
        final = self._folder / _name_of(writing.state.step)
        run_on_main(lambda: self._publish(writing.temporary, final, writing.state, hashes))
        log.info("event=checkpoint step=%d path=%s", writing.state.step, final)

    def _publish(self, temporary: Path, final: Path, state: TrainingState, hashes: dict[str, str]) -> None:
        try:
            write_json(temporary / STATE, asdict(state))
            fault_point("checkpoint.before_publish", step=state.step)
            publish_folder(temporary, final, hashes=hashes)
        except OSError as cause:
            raise StageError(f"{final} must be writable, got {cause.strerror!r}; make room and start again") from cause
        fault_point("checkpoint.after_publish", step=state.step)
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
            engine: Receives masters and optimizer states; it may be another one than wrote them, on other ranks.
            path: From :meth:`choose`.
            expected: This run's fingerprint.

        Raises:
            CheckpointError: It is damaged, or from another run.
        """
        state = run_on_main(lambda: _verified_state(path, expected))
        engine.load_trained_state(partial(_read_parameter, _places(path), path), updates=state.updates)
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
            state = TrainingState(step=state.step, skipped=state.skipped, fingerprint=state.fingerprint)
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


def _write_part(path: Path, tensors: dict[str, Tensor], *, step: int) -> str:
    """Write this rank's share; returns its hex sha256."""
    try:
        fault_point("checkpoint.before_part", step=step, rank=own_rank())
        save_file(tensors, path)
    except (OSError, SafetensorError) as cause:
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        raise StageError(f"{path} must be writable, got {reason!r}; make room and start again") from cause
    fault_point("checkpoint.after_part", step=step, rank=own_rank())
    return sha256_file(path)


def _gather_hashes(hashed: "Future[str]") -> tuple[dict[str, str], list[str]]:
    """Hashes of all ranks' files by name, and what went wrong; collective, so a rank that failed tells the others."""
    bug: Exception | None = None
    try:
        own: tuple[str, str] = ("hash", hashed.result())
    except Exception as error:  # noqa: BLE001  whatever it is, the other ranks must not wait for this one
        own = ("error", str(error))
        bug = None if isinstance(error, QadError) else error
    everywhere = all_gather_objects(own)
    if bug is not None:
        raise bug
    hashes = {_part_of(rank): text for rank, (kind, text) in enumerate(everywhere) if kind == "hash"}
    return hashes, [text for kind, text in everywhere if kind == "error"]


def _places(path: Path) -> dict[str, list[tuple[str, Path]]]:
    """By name of a parameter: the tensors of its state, and which file holds each."""
    places: dict[str, list[tuple[str, Path]]] = {}
    for file in sorted(path.glob("rank-*.safetensors")):
        with safe_open(file, "pt") as part:
            for key in part.keys():  # noqa: SIM118  not a dict
                places.setdefault(key.rpartition("/")[0], []).append((key, file))
    return places


def _read_parameter(places: dict[str, list[tuple[str, Path]]], path: Path, name: str) -> dict[str, Tensor]:
    if name not in places:
        raise CheckpointError(f"{path} must hold the decoder weight {name}, got none; use a checkpoint of this model")
    tensors = {}
    for key, file in places[name]:
        with safe_open(file, "pt") as part:
            tensors[key.rpartition("/")[2]] = part.get_tensor(key)
    return tensors


def _name_of(step: int) -> str:
    return f"step-{step:06d}"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _part_of(rank: int) -> str:
    return f"rank-{rank:03d}.safetensors"


def _fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as cause:
        raise StageError(f"{folder} must be writable, got {cause.strerror!r}; mend its permissions") from cause


def _verified_state(path: Path, expected: TrainingState) -> TrainingState:
    verify_manifest(path)
    found = read_json(path / STATE)
    names = TrainingState.__dataclass_fields__
    if set(found) != set(names):
        raise CheckpointError(
            f"{path / STATE} must have the entries {', '.join(sorted(names))}, got {', '.join(sorted(found))}; another "
            "version wrote it, start anew with --set train.resume=none"
        )
    state = TrainingState(**found)
    if state.fingerprint != expected.fingerprint:
        raise CheckpointError(
            f"{path} must come from this run's settings and data ({expected.fingerprint[:12]}), got "
            f"{state.fingerprint[:12]}; undo the change, or start anew with --set train.resume=none"
        )
    return state
