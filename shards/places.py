"""Places: a file or folder by its path or its address, looked at and read alike.

Local paths are pathlib and os. Addresses are read through fsspec, which is imported with the first one: exactly
``http://``, ``https://`` and ``s3://``. fsspec would open much more (archives in archives, commands, clones of model
hubs), so its names of protocols and its chains (``a::b``) are refused here, and only its file systems are used.
"""

import gzip
import io
import os
import posixpath
import re
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urlsplit

from shards.errors import SourceError
from shards.storage import open_regular

SCHEMES = ("http", "https", "s3")

_EXTRA = "pip install 'qad-dist[remote]'"
_ADDRESS = re.compile(r"(?i)([a-z][a-z0-9+.-]*)://")
# Not addresses by their form, but taken as such by webdataset, Kaldi, fsspec or browsers.
_OTHER_NOTATION = re.compile(r"(?i)(pipe|data|file|hf|memory|simplecache|filecache):")
# Folders that link to themselves under ever longer names would be listed for ever.
_MAX_DEPTH = 32
_CONNECT_SECONDS, _READ_SECONDS = 30, 120


_QUERY = re.compile(rf"(?i)((?:{'|'.join(SCHEMES)})://[^\s?'\"]*)\?[^\s'\"]*")


def without_queries(text: str) -> str:
    """A text for people, in which addresses are told without what follows their ``?``: it may be a signature."""
    return _QUERY.sub(r"\1?...", text)


@dataclass(frozen=True, slots=True)
class Place:
    """A file or folder, which need not exist. Made by :meth:`of`, which refuses what is neither path nor address."""

    url: str
    """The path or address as it was given."""

    @classmethod
    def of(cls, text: str) -> "Place":
        """Take a path or an address.

        Raises:
            SourceError: It is an address of another scheme, holds a password, or would be a command elsewhere.
        """
        if not text or "\0" in text or text.startswith("|") or text.endswith("|") or _OTHER_NOTATION.match(text):
            raise SourceError(
                f"a place must be a path or an address, got {text!r}; download it or write its output first"
            )
        if (match := _ADDRESS.match(text)) is None:
            return cls(text)
        scheme = match[1].lower()
        parts = urlsplit(text)
        if scheme not in SCHEMES or "::" in text.replace(parts.netloc, "", 1):  # `[::1]` is a host
            raise SourceError(
                f"an address must begin with one of {', '.join(SCHEMES)} and hold no '::', got {text!r}; "
                "download what is there first"
            )
        if not parts.netloc or "@" in parts.netloc:
            raise SourceError(
                f"an address must name a host or bucket, and no password, got "
                f"{scheme}://{parts.netloc.rpartition('@')[2]}; keep credentials in the environment or the home folder"
            )
        return cls(f"{scheme}{text[len(scheme) :]}")

    @property
    def is_remote(self) -> bool:
        """Whether it is an address."""
        return _ADDRESS.match(self.url) is not None

    @property
    def full(self) -> str:
        """The address, or the absolute path without dots: the same for a file that is named in two ways."""
        if self.is_remote:
            return self.url
        # Asked of every recording of a corpus, and a Path costs more than all else here.
        return os.path.normpath(self.url if self.url.startswith("/") else Path(self.url).absolute())

    @property
    def name(self) -> str:
        """Last part of the path or address."""
        if not self.is_remote:
            return Path(self.url).absolute().name
        parts = urlsplit(self.url)
        return self._readable(posixpath.basename(parts.path.rstrip("/"))) or parts.netloc

    @property
    def stem(self) -> str:
        """The name without its suffix, and without the one before ``.gz``."""
        return Path(self.name.removesuffix(".gz")).stem

    @property
    def suffix(self) -> str:
        """The name's suffix in lower case, with the one before ``.gz``: ``.jsonl.gz``."""
        name = self.name.lower()
        gz = ".gz" if name.endswith(".gz") else ""
        return Path(name.removesuffix(".gz")).suffix + gz

    @property
    def parent(self) -> "Place":
        """The folder that it is in."""
        if not self.is_remote:
            return Place(os.fspath(Path(self.url).parent))
        root = f"{urlsplit(self.url).scheme}://{urlsplit(self.url).netloc}"
        path = urlsplit(self.url).path
        return Place(root + posixpath.dirname(path.rstrip("/")).rstrip("/"))

    def child(self, relative: str) -> "Place":
        """A place named relative to this folder, as manifests do.

        What a manifest behind an address says is data of others: it may name only what lies below that address. A local
        one may name any path and any address.

        Raises:
            SourceError: It leads out of a remote folder, or is no path.
        """
        if not self.is_remote:
            place = Place.of(relative)
            return place if place.is_remote else Place(os.path.join(self.url, relative))
        place = Place.of(relative)
        path = posixpath.normpath(relative)
        if place.is_remote or path.startswith("/") or path.split("/")[0] == ".." or "?" in self.url or "#" in self.url:
            raise SourceError(
                f"a path must lead to something below {self.url}, got {relative!r}; make it relative, or copy the "
                "corpus to a local folder"
            )
        if not self.url.startswith("s3:"):
            path = quote(path, errors="surrogateescape")
        return Place(f"{self.url.rstrip('/')}/{path}")

    def is_file(self) -> bool:
        """Whether a regular file is there."""
        return self._kind() == "file"

    def is_folder(self) -> bool:
        """Whether a folder is there. One behind ``http`` is known by the slash that its server puts behind its name."""
        return self._kind() == "folder"

    def exists(self) -> bool:
        """Whether anything is there."""
        return os.path.lexists(self.url) if not self.is_remote else self._kind() is not None

    def names(self) -> list[str]:
        """Names of the files and folders in this folder, sorted; hidden ones are left out.

        Raises:
            SourceError: The folder cannot be read.
        """
        return [name for name, _ in self._entries()]

    def folders(self) -> list[str]:
        """Names of the folders in this folder, sorted; hidden ones are left out.

        Raises:
            SourceError: The folder cannot be read.
        """
        return [name for name, is_folder in self._entries() if is_folder]

    def walk(self) -> list[str]:
        """Paths of all files below this folder, relative to it with ``/``, sorted.

        What is hidden, and folders behind links, are left out.

        Raises:
            SourceError: A folder cannot be read.
        """
        found: list[str] = []
        if self.is_remote:
            found = self._walk_remote()
        else:
            with self._told():
                for folder, _, names in os.walk(self.url, onerror=_raise):
                    # Once a folder: a Path for each of millions of files costs more than finding them.
                    relative = os.path.relpath(folder, self.url)
                    found += names if relative == os.curdir else [f"{relative}/{name}" for name in names]
        return sorted(name for name in found if not any(part.startswith(".") for part in name.split("/")))

    def open(self, *, is_read_once: bool = False) -> BinaryIO:
        """Open a regular file for reading; a pipe or device is refused, since opening it could wait for ever.

        What reading raises is an :class:`OSError`, of a remote file too.

        Args:
            is_read_once: From beginning to end, without seeking: the server of a remote file need not know ranges.

        Raises:
            SourceError: It cannot be opened.
        """
        with self._told():
            if not self.is_remote:
                return open_regular(self.url)
            options = {"block_size": 0} if is_read_once and not self.url.startswith("s3:") else {}
            file = self._file_system().open(self.url, "rb", **options)
            return io.BufferedReader(_RemoteFile(file, self._errors()), buffer_size=1 << 16)

    def lines(self, max_bytes: int = 1_000_000) -> Iterator[tuple[int, bytes]]:
        """Lines with their number from 1, unpacked on the way if the name ends in ``.gz``.

        Raises:
            SourceError: The file cannot be read, is cut, or has a longer line.
        """
        number = 0
        with self.open(is_read_once=True) as raw:
            # Closing the packed file would leave the one below it open.
            file: BinaryIO = gzip.GzipFile(fileobj=raw) if self.name.lower().endswith(".gz") else raw  # type: ignore[assignment]
            try:
                while line := file.readline(max_bytes + 1):
                    number += 1
                    if len(line) > max_bytes:
                        raise SourceError(
                            f"{self.url}:{number} must be shorter than {max_bytes} bytes, got more; is it a text file?"
                        )
                    yield number, line
            except (OSError, EOFError, zlib.error) as cause:
                raise SourceError(
                    f"{self.url}:{number + 1} must be readable, got {_reason(cause)!r}; copy or download it again"
                ) from cause

    def state(self) -> str:
        """Changes when the file does: size and time, or what the server says of it.

        Raises:
            SourceError: It cannot be asked.
        """
        with self._told():
            if not self.is_remote:
                status = Path(self.url).stat()
                return f"{status.st_size} {status.st_mtime_ns}"
            found = self._file_system().info(self.url)
            return " ".join(str(found.get(name)) for name in ("size", "ETag", "Last-Modified", "LastModified"))

    def _kind(self) -> str | None:
        if not self.is_remote:
            with self._told():
                path = Path(self.url)
                return "file" if path.is_file() else "folder" if path.is_dir() else None
        try:
            with self._told():
                found = self._file_system().info(self.url)
        except SourceError as error:
            if _is_absent(error.__cause__):
                return None
            raise
        if found["type"] == "directory" or urlsplit(found.get("url", self.url)).path.endswith("/"):
            return "folder"
        return "file"

    def _entries(self) -> list[tuple[str, bool]]:
        with self._told():
            if not self.is_remote:
                with os.scandir(self.url) as entries:
                    found = [(entry.name, entry.is_dir()) for entry in entries]
            else:
                found = self._list_remote()
        return sorted((name, is_folder) for name, is_folder in found if not name.startswith("."))

    def _list_remote(self) -> list[tuple[str, bool]]:
        is_s3 = self.url.startswith("s3:")
        base = self.url.rstrip("/") + "/"
        prefix = base.removeprefix("s3://") if is_s3 else base
        found = []
        for entry in self._file_system().ls(base.rstrip("/") if is_s3 else base, detail=True):
            name = entry["name"].removeprefix(prefix)
            is_folder = entry["type"] == "directory"
            # A page also links to itself in another order (`?C=N`), to its parent, and to the rest of the world.
            if entry["name"].startswith(prefix) and name and (is_s3 or not re.search(r"[?#]", name)):
                found.append((self._readable(name.rstrip("/")), is_folder))
        return [entry for entry in found if entry[0] and "/" not in entry[0]]

    def _walk_remote(self) -> list[str]:
        if self.url.startswith("s3:"):
            prefix = self.url.removeprefix("s3://").rstrip("/") + "/"
            with self._told():
                found = [name.removeprefix(prefix) for name in self._file_system().find(self.url)]
            return [name for name in found if name and not name.endswith("/")]  # a marker of an empty folder
        found: list[str] = []
        folders = [("", 0)]
        while folders:
            folder, depth = folders.pop()
            if depth > _MAX_DEPTH:
                raise SourceError(f"{self.url} must hold folders at most {_MAX_DEPTH} deep, got more; is it a loop?")
            for name, is_folder in (self.child(folder) if folder else self)._entries():
                path = f"{folder}/{name}" if folder else name
                if is_folder:
                    folders.append((path, depth + 1))
                else:
                    found.append(path)
        return found

    def _readable(self, name: str) -> str:
        return name if self.url.startswith("s3:") else unquote(name, errors="surrogateescape")

    def _file_system(self) -> Any:
        scheme = urlsplit(self.url).scheme
        try:
            import fsspec

            if scheme == "s3":
                return fsspec.filesystem("s3")
            import aiohttp
        except ImportError as cause:
            raise SourceError(
                f"{self.url} must be read with the packages fsspec, aiohttp and s3fs, got {cause}; {_EXTRA}"
            ) from cause
        # aiohttp's own limit of five minutes is for a whole file.
        limits = aiohttp.ClientTimeout(total=None, connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
        return fsspec.filesystem(scheme, simple_links=False, encoded=True, client_kwargs={"timeout": limits})

    def _errors(self) -> tuple[type[Exception], ...]:
        """What may go wrong in reading this place."""
        errors: tuple[type[Exception], ...] = (OSError, ValueError, TimeoutError)
        if not self.is_remote:
            return errors
        if self.url.startswith("s3:"):
            from botocore.exceptions import BotoCoreError, ClientError

            return (*errors, BotoCoreError, ClientError)
        import aiohttp

        return (*errors, aiohttp.ClientError)

    @contextmanager
    def _told(self) -> Generator[None]:
        """Turn what the file system or the network says into an error that a user can mend."""
        if self.is_remote:
            self._file_system()  # so that the packages are there
        try:
            yield
        except self._errors() as cause:
            if isinstance(cause, SourceError):
                raise
            remedy = "mend the address or the credentials" if self.is_remote else "mend the path or its permissions"
            raise SourceError(f"{self.url!r} must be readable, got {_reason(cause)!r}; {remedy}") from cause


class _RemoteFile(io.RawIOBase):
    """A file of fsspec whose errors are those of a local one."""

    def __init__(self, file: Any, errors: tuple[type[Exception], ...]) -> None:
        self._file, self._errors = file, errors

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.size is not None

    def readinto(self, buffer: Any) -> int:
        with self._as_os_error():
            block = self._file.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with self._as_os_error():
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    @contextmanager
    def _as_os_error(self) -> Generator[None]:
        try:
            yield
        except self._errors as cause:
            if isinstance(cause, OSError):
                raise
            raise OSError(_reason(cause)) from cause


def _is_absent(cause: BaseException | None) -> bool:
    """Whether a server says that nothing is there; fsspec says so whatever happened, and hides the reason behind it."""
    if not isinstance(cause, FileNotFoundError):
        return False
    reason = cause.__cause__
    return reason is None or getattr(reason, "status", None) in (404, 410)


def _reason(cause: BaseException) -> str:
    if isinstance(cause, FileNotFoundError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if (status := getattr(cause, "status", None)) is not None:  # the whole text repeats the address
        return f"{status} {getattr(cause, 'message', '')}".strip()
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


def _raise(error: OSError) -> None:
    raise error
