"""Audio that is frames and nothing else, MP3, AAC and AMR: counted from header to header, decoding none.

Every frame tells in its first bytes how long it is. What lies between frames is a tag, or is missing audio.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, Literal

from shards.errors import AudioError

FrameKind = Literal["mpeg", "adts", "amr"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """What was counted in a file that is whole."""

    seconds: float
    """Padding included."""
    slack_seconds: float
    """How much of that may be padding, which decoders leave out."""


@dataclass(frozen=True, slots=True)
class _Frame:
    num_bytes: int
    num_samples: int
    rate_hz: int
    kind: object
    """Equal for all frames of one stream."""


@dataclass(slots=True)
class _Walk:
    """Sums over the frames of a stream without an index."""

    frames: int = 0
    seconds: float = 0.0
    first: int = 0
    last: _Frame | None = None


_Parse = Callable[[bytes], _Frame | None]

# A hole of one frame is where two MP3 files were joined; a larger one is lost audio.
_MAX_HOLE_FRAMES = 2
# What encoders put around MP3 and AAC at most, and tell decoders to leave out: LAME's delay of 576 and padding of 1727.
_PADDING_SAMPLES = 2304
_MPEG_KBPS = {
    # By (is MPEG-1, layer bits of the header: 3 is layer I).
    (True, 3): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 1): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 3): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 1): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_MPEG_RATES_HZ = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_AAC_RATES_HZ = (96_000, 88_200, 64_000, 48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000, 7_350)
_AMR_BYTES = {
    b"#!AMR\n": (12, 13, 15, 17, 19, 20, 26, 31, 5),
    b"#!AMR-WB\n": (17, 23, 32, 36, 40, 46, 50, 58, 60, 5),
}


def find_kind(reader: BinaryIO, start: int) -> FrameKind | None:
    """Which frames begin at ``start``.

    Any file may hold two bytes that look like a frame: only a second one right behind it makes the kind.
    """
    head = read_at(reader, start, 16)
    if any(head.startswith(magic) for magic in _AMR_BYTES):
        return "amr"
    for kind, parse in _PARSERS.items():
        frame = parse(head)
        if frame is not None and _is_same(parse(read_at(reader, start + frame.num_bytes, 16)), frame):
            return kind
    return None


def count_frames(reader: BinaryIO, start: int, size: int, kind: FrameKind) -> Frames | None:
    """Walk over all frames of a file of ``size`` bytes; None if there are none.

    Raises:
        AudioError: The last frame is cut, some are missing, or there are fewer than the first one tells.
    """
    if kind == "amr":
        return _count_amr(reader, start, size)
    walk = _walk_frames(reader, start, size, _PARSERS[kind])
    if walk.last is None:
        return None
    told = _read_xing(read_at(reader, walk.first, 64)) if kind == "mpeg" else None
    if told is not None:
        walk.frames -= 1
        walk.seconds -= walk.last.num_samples / walk.last.rate_hz
        if walk.frames < told:
            raise AudioError(f"truncated: the header promises {told} frames, got {walk.frames}")
    return Frames(seconds=walk.seconds, slack_seconds=_PADDING_SAMPLES / walk.last.rate_hz)


def read_at(reader: BinaryIO, position: int, count: int) -> bytes:
    """Up to ``count`` bytes from ``position``."""
    reader.seek(position)
    return reader.read(count)


def skip_tag(reader: BinaryIO, position: int) -> int:
    """Where the audio begins behind ID3v2 tags at ``position``."""
    while (head := read_at(reader, position, 10)).startswith(b"ID3") and len(head) == 10:
        size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        position += 10 + size + (10 if head[5] & 0x10 else 0)
    return position


def _count_amr(reader: BinaryIO, start: int, size: int) -> Frames:
    head = read_at(reader, start, 9)
    magic, sizes = next((magic, sizes) for magic, sizes in _AMR_BYTES.items() if head.startswith(magic))
    position, frames = start + len(magic), 0
    while head := read_at(reader, position, 1):
        mode = head[0] >> 3 & 15
        position += 1 + (sizes[mode] if mode < len(sizes) else 0)
        frames += 1
    if position > size:
        raise AudioError(f"truncated: the last frame ends at byte {position}, got {size} bytes")
    return Frames(seconds=frames * 0.02, slack_seconds=0.0)


def _parse_mpeg(head: bytes) -> _Frame | None:
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3
    bit_rate, rate, padding = head[2] >> 4, head[2] >> 2 & 3, head[2] >> 1 & 1
    if version == 1 or layer == 0 or bit_rate in (0, 15) or rate == 3:
        return None
    rate_hz, bits = _MPEG_RATES_HZ[version][rate], 1000 * _MPEG_KBPS[version == 3, layer][bit_rate]
    if layer == 3:
        return _Frame((12 * bits // rate_hz + padding) * 4, 384, rate_hz, (version, layer, rate))
    samples = 1152 if version == 3 or layer == 2 else 576
    return _Frame(samples // 8 * bits // rate_hz + padding, samples, rate_hz, (version, layer, rate))


def _parse_adts(head: bytes) -> _Frame | None:
    if len(head) < 7 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0 or head[2] >> 2 & 15 >= len(_AAC_RATES_HZ):
        return None
    rate = head[2] >> 2 & 15
    num_bytes = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    return _Frame(num_bytes, 1024 * ((head[6] & 3) + 1), _AAC_RATES_HZ[rate], rate) if num_bytes > 7 else None


_PARSERS: dict[FrameKind, _Parse] = {"adts": _parse_adts, "mpeg": _parse_mpeg}


def _is_same(one: _Frame | None, other: _Frame) -> bool:
    return one is not None and one.kind == other.kind


def _walk_frames(reader: BinaryIO, start: int, size: int, parse: _Parse) -> _Walk:
    walk, position = _Walk(), start
    while (head := read_at(reader, position, 16)) and len(head) >= 4:
        frame = parse(head)
        if frame is not None and (walk.last is None or _is_same(frame, walk.last)):
            if position + frame.num_bytes > size:
                raise AudioError(f"truncated: the last frame has {frame.num_bytes} bytes, got {size - position}")
            walk.first = position if walk.last is None else walk.first
            walk.last = frame
            walk.frames += 1
            walk.seconds += frame.num_samples / frame.rate_hz
            position += frame.num_bytes
            continue
        position = _skip_between(reader, position, head, size, walk, parse)
    return walk


def _skip_between(reader: BinaryIO, position: int, head: bytes, size: int, walk: _Walk, parse: _Parse) -> int:
    """Where to read on behind what is no frame: a tag, padding at the end, or a hole."""
    if head.startswith(b"ID3") and (end := skip_tag(reader, position)) > position:
        return end
    if head.startswith(b"TAG") and size - position <= 128 + 227:
        return position + 128
    if head.startswith(b"APETAGEX"):
        return position + 32 + int.from_bytes(head[12:16], "little")
    if head.startswith(b"LYRICSBEGIN"):
        end = read_at(reader, position, 1 << 20).find(b"LYRICS200")
        return position + end + 9 if end >= 0 else size
    found, is_empty = _find_frame(reader, position + 1, walk.last, parse)
    num_bytes = (size if found is None else found) - position
    if walk.last is not None and num_bytes > _MAX_HOLE_FRAMES * walk.last.num_bytes and (found or not is_empty):
        raise AudioError(f"damaged: {num_bytes} bytes from byte {position} are no frames of this stream")
    return size if found is None else found


def _find_frame(reader: BinaryIO, position: int, like: _Frame | None, parse: _Parse) -> tuple[int | None, bool]:
    """The next two frames in a row, and whether there is nothing but zeros up to there."""
    is_empty = True
    while block := read_at(reader, position, 1 << 16):
        for match in re.finditer(rb"\xff[\xe0-\xff]", block):
            head = read_at(reader, position + match.start(), 16)
            frame = parse(head)
            if frame is None or (like is not None and not _is_same(frame, like)):
                continue
            if _is_same(parse(read_at(reader, position + match.start() + frame.num_bytes, 16)), frame):
                return position + match.start(), False
        is_empty = is_empty and not block.strip(b"\0")
        # The first byte of a frame may be the last one of a block.
        position += len(block) - 1 if len(block) == 1 << 16 else len(block)
    return None, is_empty


def _read_xing(frame: bytes) -> int | None:
    """The number of frames that the first, silent one of an MP3 tells; None if it is a frame like any other."""
    match = re.search(rb"Xing|Info", frame[:48])
    if match is None or len(frame) < match.end() + 8:
        return None
    flags, told = struct.unpack(">II", frame[match.end() : match.end() + 8])
    return told if flags & 1 else 0
