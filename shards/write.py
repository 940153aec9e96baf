"""Utterances into a tar, as webdataset's own writer would put them there, byte for byte.

That writer would bring torch into every packing process, and not tell where in the tar a member's bytes are.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from shards.index import ShardEntry, make_entry
from shards.schema import Utterance
from shards.storage import atomic_write

RECORD_FIELDS = (
    *("key", "recording", "start_seconds", "duration_seconds", "split"),
    *("language", "speaker", "reference", "source"),
)
"""What the JSON member of an utterance tells, as fields of :class:`~shards.schema.Utterance`."""

_BLOCK_BYTES = 512
# An archive ends with two blocks of zeros and is filled up to a whole number of records.
_RECORD_BYTES = 20 * _BLOCK_BYTES
_NAME_BYTES = 100


def _template() -> bytes:
    """What webdataset's writer says of every member."""
    header = tarfile.TarInfo("")
    header.mode, header.uname, header.gname = 0o444, "bigdata", "bigdata"
    return header.tobuf(tarfile.USTAR_FORMAT)


_TEMPLATE = _template()


def write_shard(path: Path, found: Iterator[tuple[Utterance, bytes]]) -> tuple[ShardEntry, list[Utterance]] | None:
    """Write a tar that appears whole or not at all, in bounded memory.

    It need not be on disk yet: whoever makes it count syncs it first.

    Args:
        path: Of the tar.
        found: Utterances and their FLAC; where the bytes are is filled in.

    Returns:
        The shard as the index lists it, and its utterances; nothing, and no tar, if there are none.

    Raises:
        StageError: The folder cannot be written to.
    """
    if (first := next(found, None)) is None:
        return None
    with atomic_write(path, durable=False) as file:
        tar = _Tar(file)
        utterances = [tar.add(utterance, flac) for utterance, flac in chain([first], found)]
        tar.end()
    entry = make_entry(utterances, name=path.name, num_bytes=tar.num_bytes, sha256=tar.digest.hexdigest())
    return entry, utterances


def record_of(utterance: Utterance) -> bytes:
    """The JSON member: what is known of the utterance, but for where its bytes are."""
    record = {name: getattr(utterance, name) for name in RECORD_FIELDS}
    return json.dumps(record, sort_keys=True, ensure_ascii=False).encode()


class _Tar:
    """A tar that is hashed as it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest: Any = hashlib.sha256()
        self.num_bytes = 0

    def add(self, utterance: Utterance, flac: bytes) -> Utterance:
        """Write both members; returns the utterance with their places."""
        record = record_of(utterance)
        places = [
            self._member(f"{utterance.key}.{suffix}", data) for suffix, data in (("flac", flac), ("json", record))
        ]
        return replace(
            utterance,
            audio_offset=places[0],
            audio_bytes=len(flac),
            json_offset=places[1],
            json_bytes=len(record),
        )

    def end(self) -> None:
        """Write what follows the last member."""
        end = self.num_bytes + 2 * _BLOCK_BYTES
        self._write(bytes(-(-end // _RECORD_BYTES) * _RECORD_BYTES - self.num_bytes))

    def _member(self, name: str, data: bytes) -> int:
        self._write(_header(name, len(data)))
        offset = self.num_bytes
        self._write(data)
        self._write(bytes(-len(data) % _BLOCK_BYTES))
        return offset

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.num_bytes += len(data)


def _header(name: str, size: int) -> bytes:
    """The block before a member: only name, size and checksum differ from one to the next, and are put in by hand."""
    header = bytearray(_TEMPLATE)
    encoded = name.encode()
    assert len(encoded) <= _NAME_BYTES and size < 8**11
    header[: len(encoded)] = encoded
    header[124:135] = b"%011o" % size
    header[148:155] = b"%06o\0" % sum(header[:148] + b" " * 8 + header[156:])
    return bytes(header)
