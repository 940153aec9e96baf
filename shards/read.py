"""Reading utterances by offset: no scan of the tar, and no utterance taken for another."""

import errno
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from shards.audio import Samples, decode_bytes, decode_flac_codes
from shards.cache import Cache
from shards.containers import parse_stream_info
from shards.errors import AudioError, ConfigError, ShardError
from shards.faults import fault_point
from shards.places import Place
from shards.schema import SAMPLE_RATE_HZ, Utterance

Codes = npt.NDArray[np.int16] | npt.NDArray[np.float32]
"""Decoded audio at 16 kHz, mono: 16 bits where it was packed so, which is half as much to hand on, else samples."""

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")

# Of a plain tar: the block before a member's data tells its name and size.
_HEADER_BYTES, _NAME_BYTES = 512, 100
# Other processes may evict a shard between its being fetched and its being opened.
_OPENINGS = 5
# Of the machine: whatever is read next fails as well, so that no utterance may be blamed.
_NOT_OF_A_SHARD = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


@dataclass(frozen=True, slots=True, kw_only=True)
class Damaged:
    """Stands for an utterance that cannot be read."""

    key: str
    shard: str
    reason: str
    """The text of the :class:`ShardError`."""


def decode_audio(data: bytes) -> Codes:
    """Decode a member of any tar: 16-bit mono 16 kHz FLAC to its codes, any other audio to samples.

    Raises:
        AudioError: It is no audio, or damaged.
    """
    return decode_flac_codes(data) if _is_packed_flac(data) else decode_bytes(data)


class Shards:
    """The shards of one packed folder. Holds no open files, can be pickled, and is safe to share between threads."""

    def __init__(
        self, folder: Path, *, cache: Cache | None = None, decode: Callable[[bytes], Codes] | None = None
    ) -> None:
        """Read the index.

        Args:
            folder: The packed folder.
            cache: Where remote shards are kept.
            decode: What makes 16 kHz mono of a member's bytes, and raises :class:`AudioError` if it cannot; None takes
                nothing but FLAC as this project packs it, and of a tar that is indexed in place any audio.

        Raises:
            ShardError: The index is missing or damaged.
        """
        # Not at the top: it brings pyarrow along, which would double the memory of every reading process.
        from shards.index import read_index

        self.folder = folder
        self._cache, self._decode = cache, decode
        self._tars = {e.name: _Tar(e.location, e.sha256, e.bytes) for e in read_index(folder).shards}

    def path(self, name: str) -> Path:
        """The local file of a shard; a remote one is copied into the cache first.

        Raises:
            ShardError: It is not in the index, or cannot be fetched as the index describes it.
            ConfigError: It is remote and does not fit into the cache, or there is none.
        """
        if (tar := self._tars.get(name)) is None:
            raise ShardError(f"{self.folder / name} must be in the index, got an unknown shard; pack again")
        if tar.location is None:
            return self.folder / name
        if not Place.of(tar.location).is_remote:
            return Path(tar.location)
        if self._cache is None:
            raise ConfigError(
                f"read.cache must name a folder for {tar.location}, got none; set it to one on a local disk"
            )
        return self._cache.fetch(name, tar.location, sha256=tar.sha256, num_bytes=tar.num_bytes)

    def read(self, utterances: Iterable[Utterance]) -> list[Samples]:
        """The samples of several utterances, in their order: float32 in [-1, 1], 16 kHz, mono.

        Raises:
            ShardError: A shard is missing, or does not hold an utterance where the index says.
        """
        return refuse_damaged(self.try_read(utterances))

    def try_read(self, utterances: Iterable[Utterance]) -> list[Samples | Damaged]:
        """As :meth:`read`, with a :class:`Damaged` in the place of each utterance that cannot be read."""
        return [found if isinstance(found, Damaged) else to_samples(found) for found in self.read_codes(utterances)]

    def read_codes(self, utterances: Iterable[Utterance]) -> list[Codes | Damaged]:
        """As :meth:`try_read`, but as decoded. Each shard is opened once and read forwards."""
        wanted = list(utterances)
        by_shard: defaultdict[str, list[int]] = defaultdict(list)
        for number in sorted(range(len(wanted)), key=lambda n: wanted[n].audio_offset):
            by_shard[wanted[number].shard].append(number)
        found: dict[int, Codes | Damaged] = {}
        for shard, numbers in by_shard.items():
            results = self._read_shard(shard, [wanted[number] for number in numbers])
            found.update(zip(numbers, results, strict=True))
        return [found[number] for number in range(len(wanted))]

    def _read_shard(self, shard: str, utterances: Sequence[Utterance]) -> list[Codes | Damaged]:
        fault_point("read.shard", shard=shard)
        try:
            path, file = self._open(shard)
        except ShardError as cause:
            return [_damaged(utterance, cause) for utterance in utterances]
        # Of ours no other audio is taken: a header that is damaged in the right place tells of a louder one.
        decode = self._decode or (decode_flac_codes if self._tars[shard].location is None else decode_audio)
        with file:
            return [_read(file, path, utterance, decode) for utterance in utterances]

    def _open(self, shard: str) -> tuple[Path, BinaryIO]:
        for _ in range(_OPENINGS):
            path = self.path(shard)
            try:
                return path, open(path, "rb", opener=_open_without_waiting)
            except FileNotFoundError as cause:
                if self._cache is None or not path.is_relative_to(self._cache.folder):
                    _refuse_unreadable(path, cause)
            except OSError as cause:
                _refuse_unreadable(path, cause)
        raise ConfigError(
            f"read.cache_gib must hold the shards that are read at a time, got one that makes room for others faster "
            f"than {shard} can be opened; raise it"
        )


def to_samples(codes: Codes) -> Samples:
    """Float32 in [-1, 1]; exact, since 32,768 is a power of two."""
    return codes * np.float32(1 / 32768) if codes.dtype == np.int16 else codes.astype(np.float32, copy=False)


def refuse_damaged(found: Iterable[Samples | Damaged]) -> list[Samples]:
    """What was read, if all of it could be.

    Raises:
        ShardError: For the first utterance that could not.
    """
    samples = []
    for one in found:
        if isinstance(one, Damaged):
            raise ShardError(one.reason)
        samples.append(one)
    return samples


def read_ahead(load: Callable[[Item], Loaded], batches: Iterable[Item]) -> Iterator[Loaded]:
    """What ``load`` makes of one batch after the other; the next is loaded while the present one is in use.

    What ``load`` raises comes with the batch that it is about.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as reader:
        pending: Future[Loaded] | None = None
        for batch in batches:
            present, pending = pending, reader.submit(load, batch)
            if present is not None:
                yield present.result()
        if pending is not None:
            yield pending.result()


class _Tar(NamedTuple):
    location: str | None
    sha256: str
    num_bytes: int


def _read(file: BinaryIO, path: Path, utterance: Utterance, decode: Callable[[bytes], Codes]) -> Codes | Damaged:
    try:
        return _decode_checked(_member(file, path, utterance), path, utterance, decode)
    except ShardError as cause:
        return _damaged(utterance, cause)


def _decode_checked(data: bytes, path: Path, utterance: Utterance, decode: Callable[[bytes], Codes]) -> Codes:
    where = f"{path}: utterance {utterance.key!r}"
    try:
        codes = decode(data)
    except AudioError as cause:
        raise ShardError(
            f"{where} must be {_kind(utterance)}, got {cause}; the shard is damaged, pack again"
        ) from cause
    if len(codes) != round(utterance.duration_seconds * SAMPLE_RATE_HZ):
        raise ShardError(
            f"{where} must last {utterance.duration_seconds} s, got {len(codes) / SAMPLE_RATE_HZ} s; "
            "the shard is not the one that was indexed, pack again"
        )
    return codes


def _member(file: BinaryIO, path: Path, utterance: Utterance) -> bytes:
    """The bytes of an utterance's audio, if the header before them is its own."""
    try:
        file.seek(utterance.audio_offset - _HEADER_BYTES)
        block = file.read(_HEADER_BYTES + utterance.audio_bytes)
    except OSError as cause:
        _refuse_unreadable(path, cause)
    header, data = block[:_HEADER_BYTES], block[_HEADER_BYTES:]
    where = f"{path}: utterance {utterance.key!r}"
    if len(data) != utterance.audio_bytes:
        raise ShardError(
            f"{where} must have {utterance.audio_bytes} bytes, got {len(data)}; the shard was cut, pack again"
        )
    if not _can_be_name(name := header[:_NAME_BYTES].partition(b"\0")[0], utterance.audio_name):
        raise ShardError(f"{where} must be where the index says, got {name!r} there; it is another shard, pack again")
    # A pax header may tell the size instead, and the field hold nothing.
    if (size := _stored_size(header)) not in (utterance.audio_bytes, 0):
        raise ShardError(
            f"{where} must have {utterance.audio_bytes} bytes, got {size} in its header; it is another shard, "
            "pack again"
        )
    return data


def _stored_size(header: bytes) -> int | None:
    field = header[124:136]
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return None


def _can_be_name(stored: bytes, name: str) -> bool:
    """Whether a header that holds this name can be that of the member called ``name``.

    A short ASCII name stands there as it is. Any other may be told elsewhere, and what is left here is up to the
    program that wrote it: cut off at its end, without some of its folders, with other characters for those beyond
    ASCII, or without these.
    """
    whole = name.encode(errors="surrogateescape")
    if stored == whole:
        return True
    if not stored or (len(whole) <= _NAME_BYTES and name.isascii()):
        return False
    base = stored.rpartition(b"/")[2]
    forms = (whole, name.encode("ascii", "replace"), name.encode("ascii", "ignore"))
    return any(form.startswith(stored) or (base and form.rpartition(b"/")[2].startswith(base)) for form in forms)


def _is_packed_flac(data: bytes) -> bool:
    """Whether the header of a FLAC file, its first 42 bytes, says mono, 16 kHz and 16 bits."""
    if len(data) < 42 or data[:4] != b"fLaC":
        return False
    info = parse_stream_info(data[8:42])
    return (info.rate_hz, info.num_channels, info.bits_per_sample) == (SAMPLE_RATE_HZ, 1, 16)


def _open_without_waiting(path: str, flags: int) -> int:
    # Opening a pipe that nobody writes to would wait for ever.
    return os.open(path, flags | os.O_NONBLOCK)


def _refuse_unreadable(path: Path, cause: OSError) -> NoReturn:
    if cause.errno in _NOT_OF_A_SHARD:
        raise cause
    raise ShardError(
        f"{path} must be readable, got {cause.strerror or str(cause)!r}; pack again or mend the disk"
    ) from cause


def _damaged(utterance: Utterance, cause: ShardError) -> Damaged:
    return Damaged(key=utterance.key, shard=utterance.shard, reason=str(cause))


def _kind(utterance: Utterance) -> str:
    return "FLAC" if utterance.audio_name == f"{utterance.key}.flac" else "audio"
