"""Plain tars, member by member: where each one's bytes lie, and no damage that goes unnoticed.

Python's tarfile, and webdataset on top of it, end quietly at a header that is damaged, at a block of zeros in the
middle, and where a tar was cut between two members: a data set is smaller and nobody is told. Here a tar is members,
two blocks of zeros, and nothing but zeros behind them; everything else is refused, with the offset of what is wrong.
Nothing is decompressed and no member's bytes are read, so neither bombs nor absurd sizes cost anything.
"""

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

from shards.errors import ShardError

MAX_HEADER_BYTES = 1 << 20
"""Of the headers that hold long names: a name needs a few hundred bytes, and what is read must fit into memory."""

_BLOCK_BYTES = 512
_ZEROS = bytes(_BLOCK_BYTES)
# Writers fill up to a tape record, 10 KiB as a rule; what is beyond this is no padding.
_MAX_PADDING_BYTES = 16 << 20
_SHOWN_CHARACTERS = 120

_REGULAR = frozenset(b"0\x007")
_DIRECTORY, _PAX, _GLOBAL_PAX, _SOLARIS_PAX, _GNU_NAME, _GNU_LINK = b"5xgXLK"
_EXTENSIONS = frozenset((_PAX, _GLOBAL_PAX, _SOLARIS_PAX, _GNU_NAME, _GNU_LINK))
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}
_KINDS |= {b"S": "a sparse file", b"M": "a part of another volume"}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}
_OCTAL = re.compile(rb" *([0-7]*)(?:[ \0].*)?", re.DOTALL)
_DAMAGED = "it is damaged or was cut, copy or download it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One file in a tar."""

    name: str
    """As the tar says it; bytes that are not UTF-8 are escaped as the file system's are. Never the name of a file."""
    offset: int
    """Of its first byte in the tar."""
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Members that belong together, as webdataset groups them."""

    key: str
    """Folder and base name up to its first dot."""
    members: dict[str, Member]
    """By what follows that dot, in lower case."""


def iterate_members(file: BinaryIO, where: str) -> Iterator[Member]:
    """The regular files of a plain tar, in its order; folders are left out.

    Names are data: absolute ones, ``..``, line ends and all else come as they are, so nobody may open or write a file
    by them. A member may be empty, and a whole tar may hold none; whoever needs audio says so. Memory grows by about
    100 bytes a member, for the names that were seen.

    Args:
        file: Can seek; the caller may read members between two steps.
        where: The tar's path or address, for messages.

    Raises:
        ShardError: It is compressed, cut, damaged, or goes on behind its end; a member is neither file nor folder, or
            has the name of an earlier one; or it cannot be read.
    """
    tar = _Tar(file, where)
    seen: set[int] = set()
    offset, told = 0, _Told()
    while (header := tar.read_header(offset)) is not None:
        data_offset, kind = offset + _BLOCK_BYTES, header[156]
        num_bytes = tar.parse_size(header, offset)
        if kind in _EXTENSIONS:
            tar.read_extension(kind, data_offset, num_bytes, told)
        else:
            name = _name(header) if told.name is None else told.name
            num_bytes = num_bytes if told.num_bytes is None else told.num_bytes
            # Before there was a kind for folders, a slash told them.
            if kind == _DIRECTORY or (kind == 0 and name.endswith("/")):
                num_bytes = 0
            else:
                tar.refuse_other_kinds(kind, told, name, offset)
                tar.refuse_cut(data_offset + num_bytes, f"{_shown(name)} at byte {offset}")
                tar.refuse_repeated(name, offset, seen)
                yield Member(name=name, offset=data_offset, num_bytes=num_bytes)
            told = _Told()
        offset = data_offset + num_bytes + -num_bytes % _BLOCK_BYTES
    if told.is_pending:
        tar.refuse(f"must end behind a member, got the end behind a header of one at byte {offset}; {_DAMAGED}")
    tar.refuse_beyond_end(offset)


def group_samples(members: Iterable[Member], where: str, *, audio_suffixes: Collection[str]) -> Iterator[Sample]:
    """Group members into samples as webdataset does, and refuse what it would take apart or mix up.

    Left out, as there: names that begin with a dot, have none, or look like ``__this__``.

    Args:
        members: In the order of the tar.
        where: The tar's path or address, for messages.
        audio_suffixes: Such as ``.wav``, in lower case: a sample may hold one of these.

    Raises:
        ShardError: The members of one key are not side by side, two have the same extension or two are audio.
    """
    closed: set[int] = set()
    key, found = "", dict[str, Member]()
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot or re.match(r"__[^/]*__(/|$)", member.name):
            continue
        if (next_key := folder + slash + stem) != key:
            if found:
                yield Sample(key=key, members=found)
                closed.add(_digest(key))
            key, found = next_key, {}
            if _digest(key) in closed:
                raise ShardError(
                    f"{where} must hold the members of a key side by side, got {_shown(member.name)} apart from the "
                    "others; sort the members by name"
                )
        _add(found, extension.lower(), member, where, audio_suffixes)
    if found:
        yield Sample(key=key, members=found)


def _add(found: dict[str, Member], extension: str, member: Member, where: str, audio_suffixes: Collection[str]) -> None:
    if (first := found.setdefault(extension, member)) is not member:
        raise ShardError(
            f"{where} must hold one member of each extension for a key, got {_shown(first.name)} and "
            f"{_shown(member.name)}; rename one"
        )
    audio = [name for name in found if f".{name.rpartition('.')[2]}" in audio_suffixes]
    if len(audio) > 1:
        names = " and ".join(_shown(found[name].name) for name in audio)
        raise ShardError(
            f"{where} must hold one audio member for a key, which ends at the first dot of a name, got {names}; "
            "rename them or remove one"
        )


@dataclass(slots=True, kw_only=True)
class _Told:
    """What headers before a member's own say about it."""

    name: str | None = None
    num_bytes: int | None = None
    is_sparse: bool = False
    is_pending: bool = False


class _Tar:
    """An open tar, of which blocks are read by offset."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file, self._where = file, where
        try:
            self._size = file.seek(0, os.SEEK_END)
        except (OSError, ValueError) as cause:
            self._refuse_unreadable(cause)
        if self._size == 0:
            self.refuse("must be a plain tar, got an empty file; copy or download it again")

    def refuse(self, message: str) -> NoReturn:
        raise ShardError(f"{self._where} {message}")

    def read_header(self, offset: int) -> bytes | None:
        """The header at ``offset``, or None for the zeros at the end."""
        header = self._read(offset, _BLOCK_BYTES)
        if header == _ZEROS:
            return None
        if len(header) < _BLOCK_BYTES or not _has_its_checksum(header):
            self._refuse_header(header, offset)
        return header

    def parse_size(self, header: bytes, offset: int) -> int:
        text = header[124:136]
        if text[0] & 0x80:  # GNU's way to write what octal digits cannot hold
            size = int.from_bytes(text, "big", signed=True) if text[0] & 0x40 else int.from_bytes(text[1:], "big")
        else:
            size = _octal(text)
        if size is None or size < 0:
            self.refuse(f"must tell the size of a member at byte {offset}, got {text!r}; {_DAMAGED}")
        return size

    def read_extension(self, kind: int, offset: int, num_bytes: int, told: _Told) -> None:
        """Read a header that says something about the next member, or about all."""
        if num_bytes > MAX_HEADER_BYTES:
            self.refuse(
                f"must have headers of at most {MAX_HEADER_BYTES} bytes, got {num_bytes} at byte {offset}; {_DAMAGED}"
            )
        told.is_pending |= kind != _GLOBAL_PAX
        self.refuse_cut(offset + num_bytes, f"a header at byte {offset - _BLOCK_BYTES}")
        text = self._read(offset, num_bytes)
        if kind in (_GNU_NAME, _GNU_LINK):
            if kind == _GNU_NAME:
                told.name = _decode(text.partition(b"\0")[0])
            return
        for name, value in self._pax_records(text, offset):
            self._note(name, value, offset, told, is_global=kind == _GLOBAL_PAX)

    def refuse_cut(self, end: int, what: str) -> None:
        if end > self._size:
            self.refuse(f"must hold {what} to its end at byte {end}, got {self._size} bytes; {_DAMAGED}")

    def refuse_other_kinds(self, kind: int, told: _Told, name: str, offset: int) -> None:
        if told.is_sparse:
            kind = ord("S")
        if kind not in _REGULAR:
            what = _KINDS.get(bytes([kind]), f"a member of kind {bytes([kind])!r}")
            self.refuse(
                f"must hold nothing but files and folders, got {what}, {_shown(name)}, at byte {offset}; "
                "make the tar again with the files themselves"
            )

    def refuse_repeated(self, name: str, offset: int, seen: set[int]) -> None:
        digest = _digest(name)
        if digest in seen:
            self.refuse(f"must hold each member once, got {_shown(name)} again at byte {offset}; rename or remove one")
        seen.add(digest)

    def refuse_beyond_end(self, offset: int) -> None:
        """Whatever follows the first block of zeros must be zeros too, and at least one block of them."""
        left = self._size - offset
        padding = self._read(offset, min(left, _MAX_PADDING_BYTES))
        num_zeros = len(padding) - len(padding.lstrip(b"\0"))
        if num_zeros < len(padding) or left > _MAX_PADDING_BYTES:
            self.refuse(
                f"must hold nothing behind its end at byte {offset}, got more at byte {offset + num_zeros}; members "
                "there would be lost: is it several tars in one, or damaged?"
            )
        if left < 2 * _BLOCK_BYTES or left % _BLOCK_BYTES:
            self.refuse(
                f"must end in two blocks of zeros or more, got {left} bytes of zeros at byte {offset}; {_DAMAGED}"
            )

    def _pax_records(self, text: bytes, offset: int) -> Iterator[tuple[str, bytes]]:
        position = 0
        while position < len(text):
            # A record is `<its own length> <name>=<value>\n`.
            length = re.compile(rb"([0-9]{1,9}) ").match(text, position)
            end = position + int(length[1]) if length else 0
            name, equals, value = text[length.end() : end - 1].partition(b"=") if length else (b"", b"", b"")
            if not equals or text[end - 1 : end] != b"\n":
                self.refuse(f"must have readable headers, got a damaged one at byte {offset + position}; {_DAMAGED}")
            yield _decode(name), value
            position = end

    def _note(self, name: str, value: bytes, offset: int, told: _Told, *, is_global: bool) -> None:
        is_sparse = name.startswith("GNU.sparse.")
        if is_global and (is_sparse or name in ("path", "size")):
            self.refuse(f"must not tell the {name} of all members at once, got that at byte {offset}; make it again")
        told.is_sparse |= is_sparse
        if name == "path":
            told.name = _decode(value)
        elif name == "size":
            if not re.fullmatch(rb"[0-9]{1,20}", value):
                self.refuse(f"must tell the size of a member at byte {offset}, got {value[:20]!r}; {_DAMAGED}")
            told.num_bytes = int(value)

    def _read(self, offset: int, num_bytes: int) -> bytes:
        """Fewer bytes only where the tar ends."""
        try:
            self._file.seek(offset)
            found = self._file.read(num_bytes)
            while len(found) < num_bytes and (more := self._file.read(num_bytes - len(found))):
                found += more
        except (OSError, ValueError) as cause:
            self._refuse_unreadable(cause)
        return found

    def _refuse_header(self, header: bytes, offset: int) -> NoReturn:
        if offset == 0:
            for magic, kind in _COMPRESSED.items():
                if header.startswith(magic):
                    self.refuse(f"must be a plain tar, got {kind}; unpack it, audio does not get smaller by it")
        if len(header) < _BLOCK_BYTES:
            self.refuse(
                f"must go on to two blocks of zeros, got an end at byte {self._size} where a header at byte {offset} "
                f"should be; {_DAMAGED}"
            )
        if offset == 0:
            self.refuse("must be a plain tar, got no header of one at byte 0; is it another kind of file?")
        self.refuse(f"must have a header with its checksum at byte {offset}, got another; {_DAMAGED}")

    def _refuse_unreadable(self, cause: Exception) -> NoReturn:
        reason = getattr(cause, "strerror", None) or str(cause)
        raise ShardError(f"{self._where} must be readable, got {reason!r}; mend it or copy it again") from cause


def _has_its_checksum(header: bytes) -> bool:
    """The sum of all bytes, those of the sum itself taken as spaces; some old programs added signed bytes."""
    told = _octal(header[148:156])
    unsigned = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if told == unsigned:
        return True
    return told == unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:])


def _octal(text: bytes) -> int | None:
    match = _OCTAL.fullmatch(text)
    return None if match is None else int(match[1] or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    # Only POSIX tars have the field; GNU's own format keeps times there.
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return _decode(prefix + b"/" + name if prefix else name)


def _decode(name: bytes) -> str:
    return name.decode(errors="surrogateescape")


def _shown(name: str) -> str:
    text = repr(name)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 4]}...'"


def _digest(name: str) -> int:
    """Stands for a name: two of a million names are alike in one of 10^7 tars."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest())
