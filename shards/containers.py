"""What the bytes of an audio file say about itself: whether they are all there, and how much audio they hold.

Decoders read a file that was cut, or has a hole, as a shorter one and say nothing. But containers tell how long their
parts are: walking from part to part, without decoding any, shows where the file ends too early. A file of no known
container passes; the decoders decide.
"""

import io
import os
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, Literal, NamedTuple

from shards.errors import AudioError
from shards.frames import count_frames, find_kind, read_at, skip_tag


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """What was found in a file that is whole."""

    kind: str
    """``wav``, ``w64``, ``aiff``, ``caf``, ``au``, ``nist``, ``flac``, ``ogg``, ``mp4``, ``webm``, ``asf``, ``mpeg``,
    ``adts``, ``amr`` or ``other``."""
    seconds: float | None = None
    """Of kinds whose frames were counted: how much audio they hold, padding included."""
    slack_seconds: float = 0.0
    """How much of that may be padding, which decoders leave out."""
    is_chained: bool = False
    """Whether several streams follow each other or run side by side: libsndfile reads only the first."""
    md5: bytes = b""
    """Of FLAC: the MD5 of the samples; empty if the writer left it out."""
    bits_per_sample: int = 0
    """Of FLAC."""


_Order = Literal["little", "big"]

# Sizes that programs write into a WAV header when they stream and cannot go back to mend it: about 2 and 4 GiB.
_STREAMED_BYTES = (range(0x7FFF_0000, 0x8001_0000), range(0xFFFF_0000, 0x1_0000_0000))
# More parts than any real file has; a file made of empty ones would be walked for ever.
_MAX_PARTS = 100_000
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def inspect(file: BinaryIO) -> Container:
    """Look through a file from its beginning; its position afterwards is the beginning again.

    Raises:
        AudioError: The file is not whole: it ends too early, or something in the middle is missing.
    """
    # One read for many small ones; a raw file would be asked by a system call each.
    reader = file if isinstance(file, io.BytesIO) else io.BufferedReader(file, 1 << 16)  # type: ignore[arg-type]
    try:
        return _inspect(reader, reader.seek(0, os.SEEK_END))
    finally:
        if isinstance(reader, io.BufferedReader):
            reader.detach()
        file.seek(0)


def _inspect(reader: BinaryIO, size: int) -> Container:
    start = skip_tag(reader, 0)
    head = read_at(reader, start, 64)
    for magic, look in _BY_MAGIC.items():
        if head.startswith(magic):
            return look(reader, start, size)
    if head[4:8] == b"ftyp":
        return _look_at_mp4(reader, start, size)
    # Behind an ID3 tag and junk there may still be an MP3.
    kind = find_kind(reader, start) or ("mpeg" if start else None)
    frames = count_frames(reader, start, size, kind) if kind else None
    if kind is None or frames is None:
        return Container(kind="other")
    return Container(kind=kind, seconds=frames.seconds, slack_seconds=frames.slack_seconds)


def _is_name(chunk: bytes) -> bool:
    return all(32 <= byte < 127 for byte in chunk)


def _refuse_short(told: int, found: int) -> None:
    if found < told:
        raise AudioError(f"truncated: the header promises {told} bytes, got {max(0, found)}")


def _look_at_wav(reader: BinaryIO, start: int, size: int) -> Container:
    order: _Order = "big" if read_at(reader, start, 4) == b"RIFX" else "little"
    position, long_size = start + 12, 0
    for _ in range(_MAX_PARTS):
        head = read_at(reader, position, 8)
        if len(head) < 8 or not _is_name(head[:4]):
            break
        told = int.from_bytes(head[4:], order)
        if head[:4] == b"ds64":
            long_size = int.from_bytes(read_at(reader, position + 16, 8), order)
        if head[:4] == b"data":
            if told == 0xFFFF_FFFF and long_size:
                told = long_size
            if not any(told in sizes for sizes in _STREAMED_BYTES):
                _refuse_short(told, size - position - 8)
                if read_at(reader, position + 8 + told + told % 2, 4) in (b"RIFF", b"RIFX", b"RF64"):
                    raise AudioError("format: must be one WAV file, got several one after the other")
            break
        position += 8 + told
        # Chunks of odd size are padded by one byte, which some writers forget.
        if told % 2 and (_is_name(read_at(reader, position + 1, 4)) or not _is_name(read_at(reader, position, 4))):
            position += 1
    return Container(kind="wav")


def _look_at_chunks(
    reader: BinaryIO, start: int, size: int, *, kind: str, head: str, name: bytes, align: int, has_head: bool
) -> Container:
    """Find the chunk of the samples among others of form ``head``, a :mod:`struct` of name and size."""
    position, length = start, struct.calcsize(head)
    for _ in range(_MAX_PARTS):
        found = read_at(reader, position, length)
        if len(found) < length:
            break
        chunk, told = struct.unpack(head, found)
        if chunk.startswith(name):
            # Of unknown length in CAF: -1.
            _refuse_short(told - (length if has_head else 0), size - position - length)
            break
        if told < (length if has_head else 0):
            break
        position += told + (0 if has_head else length)
        position += -(position - start) % align
    return Container(kind=kind)


def _look_at_w64(reader: BinaryIO, start: int, size: int) -> Container:
    return _look_at_chunks(reader, start + 40, size, kind="w64", head="<16sq", name=b"data", align=8, has_head=True)


def _look_at_aiff(reader: BinaryIO, start: int, size: int) -> Container:
    return _look_at_chunks(reader, start + 12, size, kind="aiff", head=">4sI", name=b"SSND", align=2, has_head=False)


def _look_at_caf(reader: BinaryIO, start: int, size: int) -> Container:
    return _look_at_chunks(reader, start + 8, size, kind="caf", head=">4sq", name=b"data", align=1, has_head=False)


def _look_at_au(reader: BinaryIO, start: int, size: int) -> Container:
    order: _Order = "big" if read_at(reader, start, 4) == b".snd" else "little"
    head = read_at(reader, start + 4, 8)
    offset, told = int.from_bytes(head[:4], order), int.from_bytes(head[4:], order)
    if told != 0xFFFF_FFFF:
        _refuse_short(told, size - start - offset)
    return Container(kind="au")


def _look_at_nist(reader: BinaryIO, start: int, size: int) -> Container:
    head = read_at(reader, start, 4096)
    fields = dict(re.findall(rb"(?m)^(sample_count|channel_count|sample_n_bytes|sample_coding) -\w+ (\S+)", head))
    length = re.match(rb"NIST_1A\s+(\d{1,6})\s", head)
    numbers = [fields.get(name, b"") for name in (b"sample_count", b"channel_count", b"sample_n_bytes")]
    is_packed = b"shorten" in fields.get(b"sample_coding", b"")
    if length and not is_packed and all(number.isdigit() and len(number) < 12 for number in numbers):
        count, channels, width = map(int, numbers)
        _refuse_short(count * channels * width, size - start - int(length[1]))
    return Container(kind="nist")


def _look_at_flac(reader: BinaryIO, start: int, size: int) -> Container:
    _refuse_second_flac(reader, start)
    position = start + 4
    for _ in range(_MAX_PARTS):
        head = read_at(reader, position, 4)
        if len(head) < 4:
            break
        if head[0] & 0x7F == 0:
            body = read_at(reader, position + 4, 34)
            if len(body) < 34:
                break
            info = parse_stream_info(body)
            return Container(kind="flac", md5=info.md5 if any(info.md5) else b"", bits_per_sample=info.bits_per_sample)
        if head[0] & 0x80:
            break
        position += 4 + int.from_bytes(head[1:], "big")
    return Container(kind="flac")


class StreamInfo(NamedTuple):
    """What the first block of a FLAC file says of its audio."""

    rate_hz: int
    num_channels: int
    bits_per_sample: int
    num_frames: int
    """0 if it does not say."""
    md5: bytes
    """Of the samples; zeros if it does not say."""


def parse_stream_info(body: bytes) -> StreamInfo:
    """Read the 34 bytes of that block, from byte 8 of most files."""
    packed = int.from_bytes(body[10:18], "big")  # 20 bits of rate, 3 of channels and 5 of bits less one, 36 of frames
    return StreamInfo(
        rate_hz=packed >> 44,
        num_channels=(packed >> 41 & 7) + 1,
        bits_per_sample=(packed >> 36 & 31) + 1,
        num_frames=packed & ((1 << 36) - 1),
        md5=body[18:34],
    )


def _refuse_second_flac(reader: BinaryIO, start: int) -> None:
    # With the head of its STREAMINFO: eight bytes that do not come about by chance.
    magic, tail = b"fLaC\0\0\0\x22", b""
    reader.seek(start + len(magic))
    while block := reader.read(1 << 20):
        if magic in tail + block:
            raise AudioError("format: must be one FLAC file, got several one after the other")
        tail = block[-len(magic) :]


def _look_at_ogg(reader: BinaryIO, start: int, size: int) -> Container:
    position, flags, num_beginnings, pages = start, 0, 0, {}
    while position < size:
        head = read_at(reader, position, 27)
        if not head.startswith(b"OggS"):
            raise AudioError(f"damaged: byte {position} must begin an Ogg page")
        lengths = reader.read(head[26]) if len(head) == 27 else b""
        position += 27 + len(lengths) + sum(lengths)
        if len(head) < 27 or len(lengths) < head[26] or position > size:
            raise AudioError("truncated: the last Ogg page is cut")
        # libogg leaves out a page with a wrong checksum and says nothing.
        if _ogg_checksum(head[:22] + bytes(4) + head[26:] + lengths + reader.read(sum(lengths))) != head[22:26]:
            raise AudioError(f"damaged: the Ogg page before byte {position} does not have its checksum")
        flags, (serial, number) = head[5], struct.unpack("<II", head[14:22])
        if flags & 2:
            num_beginnings += 1
        elif serial in pages and number != (pages[serial] + 1) % (1 << 32):
            raise AudioError(f"damaged: Ogg page {pages[serial] + 1} is missing")
        pages[serial] = number
    if not flags & 4:
        raise AudioError("truncated: the last Ogg page is missing")
    return Container(kind="ogg", is_chained=num_beginnings > 1)


def _ogg_checksum(page: bytes) -> bytes:
    """Ogg's CRC-32 is zlib's with the bits of every byte, and of the result, in the other order, and no inversions."""
    crc = zlib.crc32(page.translate(_REVERSED_BITS), 0xFFFF_FFFF) ^ 0xFFFF_FFFF
    return crc.to_bytes(4, "big").translate(_REVERSED_BITS)


def _look_at_mp4(reader: BinaryIO, start: int, size: int) -> Container:
    position = start
    for _ in range(_MAX_PARTS):
        head = read_at(reader, position, 16)
        if len(head) < 8 or not _is_name(head[4:8]):
            break
        told = int.from_bytes(head[:4], "big")
        told = int.from_bytes(head[8:16], "big") if told == 1 else told
        if told < 8:
            break  # 0: this box goes on to the end
        _refuse_short(told, size - position)
        position += told
    return Container(kind="mp4")


def _look_at_webm(reader: BinaryIO, start: int, size: int) -> Container:
    def read_size(position: int) -> tuple[int | None, int]:
        """A size (None: unknown, as in streams) and where it ends."""
        head = read_at(reader, position, 8)
        length = 9 - head[0].bit_length() if head and head[0] else 9
        if len(head) < length:
            return None, size
        value = int.from_bytes(head[:length], "big") & ((1 << 7 * length) - 1)
        return (None if value == (1 << 7 * length) - 1 else value), position + length

    told, position = read_size(start + 4)
    position += told or 0
    if read_at(reader, position, 4) == b"\x18\x53\x80\x67":
        told, position = read_size(position + 4)
        _refuse_short(told or 0, size - position)
    return Container(kind="webm")


def _look_at_asf(reader: BinaryIO, start: int, size: int) -> Container:
    position = start
    for _ in range(_MAX_PARTS):
        head = read_at(reader, position, 24)
        told = int.from_bytes(head[16:], "little")
        if len(head) < 24 or told < 24:
            break
        _refuse_short(told, size - position)
        position += told
    return Container(kind="asf")


_BY_MAGIC: dict[bytes, Callable[[BinaryIO, int, int], Container]] = {
    b"RIFF": _look_at_wav,
    b"RIFX": _look_at_wav,
    b"RF64": _look_at_wav,
    b"riff\x2e\x91\xcf\x11": _look_at_w64,
    b"FORM": _look_at_aiff,
    b"caff": _look_at_caf,
    b".snd": _look_at_au,
    b"dns.": _look_at_au,
    b"NIST_1A": _look_at_nist,
    b"fLaC": _look_at_flac,
    b"OggS": _look_at_ogg,
    b"\x1a\x45\xdf\xa3": _look_at_webm,
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": _look_at_asf,
}
