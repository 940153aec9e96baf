"""Files that appear whole or not at all, and the hashes that prove which ones they are."""

import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from shards.errors import CheckpointError, ShardError, StageError

MANIFEST = "manifest.json"
"""Names, sizes and sha256 of every other file of a folder; written last, so a folder without it is not finished."""


@contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Generator[BinaryIO]:
    """Open a temporary file beside ``path``; it takes that name only when the block ends without an error.

    Without ``durable`` a machine that loses its power may leave part of the file under the name: for files that are
    looked at again before they count, or synced later by :func:`sync`.

    Raises:
        StageError: The folder cannot be made or written to.
    """
    # Same folder: a rename is atomic only within one file system. The random part keeps two writers apart.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = temporary.open("xb")
    except OSError as cause:
        raise _not_writable(path, cause) from cause
    try:
        with file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        try:
            os.replace(temporary, path)
        except OSError as cause:
            raise _not_writable(path, cause) from cause
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Generator[Path]:
    """Give a temporary folder that becomes ``path`` when the block ends without an error.

    Every file in it is hashed into :data:`MANIFEST` first. An existing ``path`` is replaced only then.

    Raises:
        StageError: The parent folder cannot be made or written to.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as cause:
        raise _not_writable(path, cause) from cause
    try:
        yield temporary
        publish_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(temporary: Path, path: Path, *, hashes: Mapping[str, str] | None = None) -> None:
    """Hash ``temporary``, write its manifest, sync it to disk and rename it to ``path``, replacing what is there.

    Args:
        temporary: Beside ``path``.
        path: What it is to be called.
        hashes: Hex sha256 of files whose writers have hashed them, by name.
    """
    write_manifest(temporary, hashes=hashes)
    for file in sorted(temporary.rglob("*")):
        if file.is_file():
            sync(file)
    sync(temporary)
    retired = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
    if path.exists():
        os.replace(path, retired)
    os.replace(temporary, path)
    sync(path.parent)
    shutil.rmtree(retired, ignore_errors=True)


def settle_interrupted(folder: Path) -> None:
    """Undo what publications that were killed left in ``folder``: temporary files go, a replaced folder comes back.

    Between the two renames of :func:`publish_folder` a folder has no name but its retired one.
    """
    for retired in folder.glob(".*.old"):
        path = folder / retired.name[1:].rsplit(".", 2)[0]
        if path.exists():
            shutil.rmtree(retired)
        else:
            os.replace(retired, path)
    for temporary in folder.glob(".*.tmp"):
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink()


def write_manifest(folder: Path, *, hashes: Mapping[str, str] | None = None) -> None:
    """Write :data:`MANIFEST` with size and sha256 of every file below ``folder``; those in ``hashes`` are not read."""
    known = hashes or {}
    files = {
        (name := str(file.relative_to(folder))): {
            "bytes": file.stat().st_size,
            "sha256": known[name] if name in known else sha256_file(file),
        }
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"version": 1, "files": files})


def verify_manifest(folder: Path) -> dict[str, Any]:
    """Check every file of a published folder against its manifest, before anything in it is loaded.

    Returns:
        ``{name: {"bytes", "sha256"}}``, the manifest's entries.

    Raises:
        CheckpointError: There is no manifest, or a file is missing, extra, of another size or of another content.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} must hold a {MANIFEST}, got none; it was never finished, delete it")
    files: dict[str, Any] = read_json(path)["files"]
    found = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST}
    if unlisted := sorted(found - set(files)):
        raise CheckpointError(f"{folder / unlisted[0]} must be listed in {MANIFEST}, got an unknown file; remove it")
    for name, entry in files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            size = file.stat().st_size if file.is_file() else "no file"
            raise CheckpointError(f"{file} must have {entry['bytes']} bytes, got {size}; use another checkpoint")
        if (digest := sha256_file(file)) != entry["sha256"]:
            raise CheckpointError(
                f"{file} must have sha256 {entry['sha256'][:12]}, got {digest[:12]}; it is damaged, use another one"
            )
    return files


def write_json(path: Path, value: Any, *, indent: int | None = 2, durable: bool = True) -> None:
    """Write ``value`` as UTF-8 JSON with sorted keys, atomically: equal values give equal bytes.

    Without ``indent`` it is written several times as fast, for programs only; ``durable`` as in :func:`atomic_write`.
    """
    text = json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with atomic_write(path, durable=durable) as file:
        file.write(text.encode() + b"\n")


def read_json(path: Path) -> Any:
    """Read a JSON file of ours.

    Raises:
        ShardError: It is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as cause:
        raise ShardError(f"{path} must exist, got no such file; run the stage that writes it") from cause
    except (ValueError, OSError) as cause:
        raise ShardError(f"{path} must be a JSON file, got {cause}; run the stage that writes it again") from cause


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*parts: Any) -> str:
    """Hex sha256 over JSON-able values: the name of "what a stage read"."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()  # names of files need not be UTF-8


def folder_bytes(folder: Path, *, suffixes: Iterable[str] = ()) -> int:
    """Sum of the sizes of all files below ``folder`` (only those with one of ``suffixes``, if any are given)."""
    wanted = tuple(suffixes)
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and (not wanted or f.name.endswith(wanted)))


def open_regular(path: str | Path, *, buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading; a pipe or device is refused, since opening it could wait for ever.

    Raises:
        OSError: It is no regular file, or cannot be opened.
        ValueError: The path cannot be one.
    """
    # Without O_NONBLOCK, opening a pipe that nobody writes to waits for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("must be a regular file")
    return os.fdopen(descriptor, "rb", buffering=buffering)  # type: ignore[return-value]  # its kind depends on it


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _not_writable(path: Path, cause: OSError) -> StageError:
    reason = cause.strerror or str(cause)
    return StageError(f"{path} must be writable, got {reason!r}; choose another run folder or mend its permissions")
