"""What each stage leaves behind: ``<run>/<stage>/done.json``, and what it says about the stages that follow.

A stage is finished when its record is there; it is up to date when the record was made from what it would read today:
its settings, the model, the files it begins with, and the same records of the earlier stages.
"""

import functools
import os
from importlib import metadata
from pathlib import Path
from typing import Any

from qad_dist.config import RunConfig
from qad_dist.runtime.world import command_line
from shards.errors import StageError
from shards.storage import atomic_write, fingerprint, read_json, settle_interrupted, sha256_file, write_json

STAGES = ("pack", "label", "quantize", "train", "score", "export")

DONE = "done.json"
"""Written last: a stage's folder without it is not finished."""

STUDENT = "student"
"""Folder below ``<run>/quantize`` and ``<run>/train``: a checkpoint that loads with ModelOpt's state."""

SETS = "sets"
"""Folder below ``<run>/score`` that has a packed folder for each set of ``score.sets`` that is packed for the run."""

READS = {
    "pack": (),
    "label": ("pack",),
    "quantize": ("pack", "label"),
    "train": ("pack", "label", "quantize"),
    "export": ("pack", "train"),
}
"""The earlier stages that each stage reads; score reads those that its settings ask for."""

WITHOUT_EFFECT = {
    "pack": {"processes", "max_rejected_share"},
    "label": {"stale_seconds", "vllm_url", "vllm_python"},
    "train": {"resume", "trackers", "log_every", "checkpoint_every", "keep_checkpoints", "preflight"},
}
"""Settings that change how fast, loud or strict a stage is, not what it makes when it succeeds."""

_ABSENT = object()

_MODEL_FILES = (".json", ".safetensors", ".jinja", ".txt", ".pth")
"""Suffixes of what a checkpoint loads from; a model card is nothing to it."""

_PACKAGES = (
    *("qad-dist", "torch", "transformers", "qwen-asr", "nvidia-modelopt", "accelerate", "deepspeed"),
    *("webdataset", "soundfile", "soxr", "jiwer", "whisper-normalizer", "kaldialign", "numpy", "pyarrow", "pydantic"),
)


_CONTAINERS = (".tar", ".parquet")
"""Suffixes of inputs of pack that hold audio and are too large to be hashed by every stage."""

_begun: dict[Path, dict[str, Any]] = {}
"""What stages of this process read when they began: their records are made of it, whatever changes meanwhile."""


def stage_inputs(run: RunConfig, stage: str) -> dict[str, Any]:
    """Everything that decides what ``stage`` makes, as JSON-able values.

    Raises:
        StageError: An earlier stage that it reads is not finished.
    """
    return {**_told_by_config(run, stage), "stages": _earlier(run, stage), "files": _files(run, stage)}


def stages_read(run: RunConfig, stage: str) -> tuple[str, ...]:
    """The earlier stages whose folders a stage reads."""
    if stage != "score":
        return READS[stage]
    wanted = {
        "pack": bool(run.score.splits),
        "quantize": "ptq" in run.score.students,
        "train": "qad" in run.score.students,
    }
    return tuple(name for name, is_read in wanted.items() if is_read)


def is_finished(run: RunConfig, stage: str) -> bool:
    """Whether the stage's record is there and was made from what the stage would read today."""
    if not (run.stage_folder(stage) / DONE).is_file():
        return False
    if not all(is_finished(run, earlier) for earlier in stages_read(run, stage)):
        return False
    return read_json(run.stage_folder(stage) / DONE)["fingerprint"] == fingerprint(stage_inputs(run, stage))


def begin_stage(run: RunConfig, stage: str) -> Path:
    """Make the stage's folder and take back its record; what an interrupted start left there stays. One rank only.

    Raises:
        StageError: The folder cannot be made or written to.
    """
    folder = run.stage_folder(stage)
    # The record is removed by way of the folder's permissions; a file written now also proves that there is space.
    with atomic_write(folder / ".writable") as file:
        file.write(b"\n")
    (folder / ".writable").unlink(missing_ok=True)  # another job may have begun at the same time
    (folder / DONE).unlink(missing_ok=True)
    if stage != "label":  # there another job may be writing
        settle_interrupted(folder)
    _names_and_sizes.cache_clear()
    _begun[folder] = stage_inputs(run, stage)
    return folder


def finish_stage(run: RunConfig, stage: str, results: dict[str, Any]) -> None:
    """Write the stage's record: from now on later stages may read its folder. One rank only, after everything else.

    Args:
        run: The resolved config.
        stage: One of :data:`STAGES`.
        results: What the stage has to say for itself, JSON-able: counts, seconds, fingerprints of what it wrote.
    """
    inputs = _begun.pop(run.stage_folder(stage), None) or stage_inputs(run, stage)
    record = {
        "stage": stage,
        "fingerprint": fingerprint(inputs),
        "inputs": inputs,
        "results": results,
        "config": run.model_dump(mode="json"),
        "versions": package_versions(),
        "command": command_line(),
    }
    write_json(run.stage_folder(stage) / DONE, record)
    _names_and_sizes.cache_clear()


def require_stage(run: RunConfig, stage: str) -> dict[str, Any]:
    """The record of an earlier stage, which must be finished and made with this config.

    Files outside the run folder are not looked at again: recordings may be gone once they are packed.

    Raises:
        StageError: The record is missing, or was made with other settings or other earlier stages.
    """
    folder = run.stage_folder(stage)
    if not (folder / DONE).is_file():
        raise StageError(
            f"{folder} must be finished before this stage, got no {DONE}; run `{stage_command(stage)}` first"
        )
    record = read_json(folder / DONE)
    present = _flat({**_told_by_config(run, stage), "stages": _earlier(run, stage)})
    recorded = _flat({name: value for name, value in record["inputs"].items() if name != "files"})
    names = present.keys() | recorded.keys()  # a name may have been removed, too
    changed = sorted(name for name in names if present.get(name, _ABSENT) != recorded.get(name, _ABSENT))
    if changed:
        raise StageError(
            f"{folder} must be made with this config, got other values of {', '.join(changed)}; "
            f"run `{stage_command(stage)}` again or undo the change"
        )
    return record


def stage_command(stage: str) -> str:
    """The line that a user types to run one stage."""
    return f"{'python' if stage == 'pack' else 'accelerate launch'} launch/{stage}.py --config ..."


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide results, by name; a package that is not installed is left out."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def model_fingerprint(folder: Path) -> str:
    """Hex sha256 over the names and contents of a checkpoint's files: which model it is, wherever it lies."""
    files = sorted(file for file in folder.iterdir() if file.suffix in _MODEL_FILES)
    return fingerprint([(file.name, _sha256_once(file, *_state_of(file))) for file in files])


def _told_by_config(run: RunConfig, stage: str) -> dict[str, Any]:
    section = getattr(run, stage).model_dump(mode="json", exclude=WITHOUT_EFFECT.get(stage))
    told = {"seed": run.seed, stage: section}
    return told if stage == "pack" else {**told, "model": run.model.model_dump(mode="json")}


def _earlier(run: RunConfig, stage: str) -> dict[str, str]:
    records = {}
    for earlier in stages_read(run, stage):
        path = run.stage_folder(earlier) / DONE
        if not path.is_file():
            raise StageError(f"{path} must exist, got no such file; run `{stage_command(earlier)}` first")
        records[earlier] = read_json(path)["fingerprint"]
    return records


def _files(run: RunConfig, stage: str) -> dict[str, str]:
    """Fingerprints of what lies outside the run folder."""
    if stage == "pack":
        record = run.stage_folder("pack") / DONE
        sources = [*run.pack.inputs, *run.pack.exclude]
        if not record.is_file():
            return {path: _identity(Path(path), None) for path in sources}
        packed, as_of = read_json(record)["inputs"]["files"], _state_of(record)
        # What is gone stays as it was packed: shards need no recordings.
        return {path: _identity(Path(path), as_of) or packed.get(path, "") for path in sources}
    paths = [run.model.path]
    if stage == "train":
        paths += [path for path in (run.train.deepspeed, run.train.teacher_model) if path is not None]
    if stage == "score":
        from shards.index import INDEX  # it takes its time, and programs that only tell their options come by here

        paths += run.score.systems.values()
        # The shards of each set, where they are packed or were packed to: the stage itself looks at their inputs.
        folders = {name: run.stage_folder("score") / SETS / name for name in run.score.sets}
        places = {one.path: (Path(one.path) / INDEX, folders[name] / INDEX) for name, one in run.score.sets.items()}
        sets = {path: "".join(_contents(place) for place in both) for path, both in places.items()}
        return {**sets, **{path: _contents(Path(path)) for path in paths}}
    return {path: _contents(Path(path)) for path in paths}


def _identity(path: Path, as_of: tuple[int, int] | None) -> str:
    """Of a manifest its bytes; of a folder of recordings, or a file that holds recordings, names and sizes.

    Of an address nothing: what lies behind it is taken to stay as it is.
    """
    if path.suffix in _CONTAINERS and path.is_file():
        return fingerprint([path.name, path.stat().st_size])
    if path.is_file():
        return _sha256_once(path, *_state_of(path))
    return _names_and_sizes(path, as_of) if path.is_dir() else ""  # nothing there: the stage itself says so


@functools.cache
def _names_and_sizes(folder: Path, as_of: tuple[int, int] | None) -> str:
    """Of all files below a folder (a link to nothing counts as a name).

    Millions of files take minutes to walk, and every later stage asks: the answer holds until a stage of this process
    begins or ends, or another process writes the record of pack, whose state is ``as_of``.
    """
    sizes = [
        [os.path.relpath(os.path.join(place, name), folder), os.lstat(os.path.join(place, name)).st_size]
        for place, _, names in os.walk(folder)
        for name in names
    ]
    return fingerprint(sorted(sizes))


def _contents(path: Path) -> str:
    """Of a file or a checkpoint's folder the bytes: another training of the same model has the same sizes."""
    if path.is_dir():
        return model_fingerprint(path)
    return _sha256_once(path, *_state_of(path)) if path.is_file() else ""  # a hub id, or nothing: the stage says so


def _state_of(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


@functools.cache
def _sha256_once(file: Path, size: int, modified_ns: int) -> str:
    return sha256_file(file)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat
