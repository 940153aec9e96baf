"""Copies of remote shards on a local disk, shared by all processes of a node and bounded in size.

A copy is named by its sha256 and gets that name only when it has been checked, so what is there is whole and no two
contents share a name. While it is copied, its temporary file is also the lock: whoever holds it copies, the others
wait. The kernel lets go of a lock when its process ends, however that ends, so a temporary file that nobody holds is
what an interrupted copy left.
"""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shards.errors import ConfigError, ShardError, SourceError, StageError
from shards.faults import fault_point
from shards.places import Place

_SUFFIX, _TEMPORARY_SUFFIX = ".shard", ".tmp"
# Nothing else in the folder is counted or removed.
_OURS = re.compile(r"[0-9a-f]{64}\.(shard|tmp)")
_BLOCK_BYTES = 4 << 20
# Before what may have been a hiccup of the network is tried again.
_PAUSES_SECONDS = (1.0, 5.0)
_WAIT_SECONDS = 0.1


class _BrokenOffError(ShardError):
    """Less came than there should be; the next attempt may bring it all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """A folder for copies of remote shards; those that were not used for longest make room for others."""

    folder: Path
    """On a local disk."""
    max_bytes: int
    """Of all copies, those under way included."""

    def fetch(self, name: str, location: str, *, sha256: str, num_bytes: int) -> Path:
        """The local copy of a shard, made first if there is none.

        Until it is opened another process may make room with it, so open it at once, and fetch it again if it is gone.
        An open file stays readable.

        Args:
            name: Of the shard, for messages.
            location: Its address.
            sha256: Of its bytes, as the index has it.
            num_bytes: Its size, as the index has it.

        Raises:
            ShardError: It cannot be read, or is not the shard that the index describes.
            ConfigError: It is larger than the cache.
            StageError: The folder cannot be written to.
        """
        path = self.folder / f"{sha256}{_SUFFIX}"
        try:
            while not _is_whole(path, num_bytes):
                self._refuse_too_large(name, num_bytes)
                with _claimed(path.with_suffix(_TEMPORARY_SUFFIX)) as file:
                    # None: whoever had it has finished, or given up.
                    if file is not None and not _is_whole(path, num_bytes):
                        self._make_room(file, num_bytes)
                        _copy(file, name, location, sha256=sha256, num_bytes=num_bytes)
                        fault_point("cache.before_rename", shard=name)
                        os.replace(path.with_suffix(_TEMPORARY_SUFFIX), path)
        except OSError as cause:
            reason = cause.strerror or str(cause)
            raise StageError(
                f"read.cache must be a folder for {num_bytes / 2**30:.3f} GiB more, got {reason!r} in {self.folder}; "
                "mend that or name another folder"
            ) from cause
        return path

    def _refuse_too_large(self, name: str, num_bytes: int) -> None:
        if num_bytes > self.max_bytes:
            raise ConfigError(
                f"read.cache_gib must hold {name} ({num_bytes / 2**30:.3f} GiB), got {self.max_bytes / 2**30:.3f}; "
                "raise it"
            )

    def _make_room(self, file: BinaryIO, num_bytes: int) -> None:
        """Give a temporary file its size, which is then spoken for, once other copies have made room for it."""
        while not self._try_make_room(file, num_bytes):
            time.sleep(_WAIT_SECONDS)  # for another copy that is under way

    def _try_make_room(self, file: BinaryIO, num_bytes: int) -> bool:
        with (self.folder / ".lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file.truncate(0)  # an interrupted copy's
            copies, num_used = self._contents()
            for _, size, path in sorted(copies):
                if num_used + num_bytes <= self.max_bytes:
                    break
                path.unlink(missing_ok=True)
                num_used -= size
            if num_used + num_bytes > self.max_bytes:
                return False
            file.truncate(num_bytes)
        return True

    def _contents(self) -> tuple[list[tuple[int, int, Path]], int]:
        """Copies that can go, as (time of last use, bytes, path), and the bytes of all and of what is under way."""
        copies, num_used = [], 0
        for path in self.folder.iterdir():
            if not _OURS.fullmatch(path.name):
                continue
            try:
                if path.name.endswith(_TEMPORARY_SUFFIX):
                    _remove_abandoned(path)
                status = path.stat()
            except FileNotFoundError:
                continue
            num_used += status.st_size
            if path.name.endswith(_SUFFIX):
                copies.append((status.st_mtime_ns, status.st_size, path))
        return copies, num_used


@contextmanager
def _claimed(temporary: Path) -> Generator[BinaryIO | None]:
    """A temporary file that this call alone holds; removed at the end if it still has that name."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not _has_name(file, temporary):
            yield None
            return
        try:
            yield file
        finally:
            if _has_name(file, temporary):
                temporary.unlink()


def _remove_abandoned(temporary: Path) -> None:
    """Remove what an interrupted copy left: its lock is free."""
    with temporary.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if _has_name(file, temporary):
            temporary.unlink()


def _has_name(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _is_whole(path: Path, num_bytes: int) -> bool:
    """Whether a copy is there; if so, it was used now."""
    now = time.time_ns()  # finer than the kernel's own idea of now, so that the order of use is kept
    try:
        os.utime(path, ns=(now, now))
        return path.stat().st_size == num_bytes
    except FileNotFoundError:
        return False


def _copy(file: BinaryIO, name: str, location: str, *, sha256: str, num_bytes: int) -> None:
    """Copy a shard over what is in ``file`` and check it; what the network may be to blame for is tried again."""
    for pause in _PAUSES_SECONDS:
        try:
            _copy_once(file, name, location, sha256=sha256, num_bytes=num_bytes)
        except _BrokenOffError:
            time.sleep(pause)
        else:
            return
    _copy_once(file, name, location, sha256=sha256, num_bytes=num_bytes)


def _copy_once(file: BinaryIO, name: str, location: str, *, sha256: str, num_bytes: int) -> None:
    file.seek(0)
    digest, found = hashlib.sha256(), 0
    for block in _blocks(name, location):
        found += len(block)
        if found > num_bytes:
            break
        digest.update(block)
        file.write(block)
    if found != num_bytes:
        kind = _BrokenOffError if found < num_bytes else ShardError
        size = f"{found} bytes" if found < num_bytes else "more"
        raise kind(f"{location} must be {name} with {num_bytes} bytes, got {size}; it is damaged, pack again")
    if digest.hexdigest() != sha256:
        raise ShardError(
            f"{location} must be {name} with sha256 {sha256[:12]}, got {digest.hexdigest()[:12]}; "
            "it is another shard or damaged, pack again"
        )
    file.flush()
    os.fsync(file.fileno())


def _blocks(name: str, location: str) -> Iterator[bytes]:
    try:
        with Place.of(location).open(is_read_once=True) as source:
            while block := source.read(_BLOCK_BYTES):
                yield block
    except (OSError, SourceError) as cause:
        reason = _first_cause(cause)
        if isinstance(reason, SourceError | ImportError):
            raise  # it is no address that we read, or a package is missing
        # fsspec tells of a server that is gone as of a file that is; the answer 404 is of the file.
        if isinstance(reason, FileNotFoundError) or getattr(reason, "status", None) == 404:
            raise ShardError(f"{location} must be {name}, got nothing there; restore it or pack again") from cause
        raise _BrokenOffError(
            f"{location} must be readable as {name}, got {str(reason)!r}; mend the network or pack again"
        ) from cause


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
