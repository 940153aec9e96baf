"""Damaged and hostile tars: all of them in one process that may not take much memory or long."""

import bz2
import gzip
import io
import json
import lzma
import random
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import webdataset

from shards.errors import ShardError, SourceError
from shards.places import Place
from shards.sources.keys import Found
from shards.sources.webdataset import read
from shards.tars import Member, iterate_members

BLOCK = 512


def member(name: str, data: bytes = b"", **fields: Any) -> bytes:
    """One member with its padding; ``fields`` as tarfile.TarInfo has them."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    for field, value in fields.items():
        setattr(entry, field, value)
    return entry.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % BLOCK)


def with_size(header: bytes, field: bytes) -> bytes:
    """A member whose size is written as ``field``, with the right checksum."""
    changed = header[:124] + field.ljust(12, b"\0") + header[136:]
    checksum = sum(changed[:148]) + 8 * 32 + sum(changed[156:BLOCK])
    return changed[:148] + b"%06o\0 " % checksum + changed[156:]


def extension(kind: bytes, data: bytes, **fields: Any) -> bytes:
    return member("././@Long", data, type=kind, **fields)


def pax(records: bytes) -> bytes:
    return extension(b"x", records)


END = bytes(2 * BLOCK)
AUDIO = member("a.wav", b"audio" * 200)
RECORD = member("a.json", b"{}")
WHOLE = AUDIO + RECORD + END
ZSTD = b"\x28\xb5\x2f\xfd" + bytes(1000)


def gzip_bomb() -> bytes:
    """2 GB in about 2 MB: compressed parts of a gzip file may follow each other."""
    header = member("a.wav", b"", size=2 << 30)
    return gzip.compress(header) + gzip.compress(bytes(1 << 26)) * 32


def numbered(count: int, before: Callable[[int], bytes] = lambda number: b"") -> bytes:
    """Members `000000.wav` and so on, quickly, each behind what ``before`` makes of its number."""
    blank = with_size(member(".......wav", b"x"), b"00000000001")
    checksum = sum(blank[6:148]) + 8 * 32 + sum(blank[156:BLOCK])
    parts = []
    for number in range(count):
        digits = b"%06d" % number
        parts += [before(number), digits, blank[6:148], b"%06o\0 " % (checksum + sum(digits)), blank[156:]]
    return b"".join(parts)


# What to write, and how the error goes on behind the file's name, or the number of members if the tar is good.
NASTY: dict[str, tuple[Callable[[], bytes], str | int]] = {
    "empty": (lambda: b"", "must be a plain tar, got an empty file"),
    "100 bytes": (lambda: WHOLE[:100], "must go on to two blocks of zeros, got an end at byte 100"),
    "text": (lambda: b"hello " * 1000, "must be a plain tar, got no header of one at byte 0; is it another kind"),
    "no end": (lambda: AUDIO + RECORD, "must go on to two blocks of zeros, got an end at byte 2560 where a header"),
    "one block of end": (lambda: WHOLE[:-BLOCK], "must end in two blocks of zeros or more, got 512 bytes"),
    "end of odd length": (lambda: WHOLE + bytes(7), "must end in two blocks of zeros or more, got 1031 bytes"),
    "zeros in the middle": (
        lambda: AUDIO + bytes(BLOCK) + RECORD + END,
        "must hold nothing behind its end at byte 1536",
    ),
    "trailing garbage": (
        lambda: WHOLE + b"garbage",
        "must hold nothing behind its end at byte 2560, got more at byte 3584",
    ),
    "two archives": (lambda: WHOLE + WHOLE, "must hold nothing behind its end at byte 2560, got more at byte 3584"),
    "padded to a tape record": (lambda: WHOLE + bytes(1 << 20), 2),
    "32 MB of zeros": (lambda: WHOLE + bytes(32 << 20), "must hold nothing behind its end at byte 2560"),
    "gzip": (lambda: gzip.compress(WHOLE), "must be a plain tar, got gzip; unpack it"),
    "bzip2": (lambda: bz2.compress(WHOLE), "must be a plain tar, got bzip2; unpack it"),
    "xz": (lambda: lzma.compress(WHOLE), "must be a plain tar, got xz; unpack it"),
    "zstd": (lambda: ZSTD, "must be a plain tar, got zstd; unpack it"),
    "zip": (lambda: b"PK\3\4" + bytes(1000), "must be a plain tar, got zip; unpack it"),
    "gzip bomb": (gzip_bomb, "must be a plain tar, got gzip; unpack it"),
    "a name like a magic number": (lambda: member("BZh.wav") + END, 1),
    "negative size": (lambda: with_size(AUDIO, b"\xff" * 12), "must tell the size of a member at byte 0"),
    "octal negative size": (lambda: with_size(AUDIO, b"-0000000010"), "must tell the size of a member at byte 0"),
    "size of words": (lambda: with_size(AUDIO, b"large"), "must tell the size of a member at byte 0, got b'large"),
    "size with underscores": (lambda: with_size(AUDIO, b"1_7"), "must tell the size of a member at byte 0, got b'1_7"),
    "8 GB claimed": (
        lambda: member("a.wav", b"x", size=8 << 30) + END,
        "must hold 'a.wav' at byte 0 to its end at byte 8589935104, got 2048 bytes",
    ),
    "2^94 bytes claimed": (
        lambda: with_size(AUDIO, b"\xbf" + b"\xff" * 11) + END,
        "must hold 'a.wav' at byte 0 to its end",
    ),
    "pax of 8 GB": (lambda: extension(b"x", b"", size=8 << 30) + WHOLE, "must have headers of at most 1048576 bytes"),
    "long name of 8 GB": (lambda: extension(b"L", b"", size=8 << 30) + WHOLE, "must have headers of at most 1048576"),
    "long link of 8 GB": (lambda: extension(b"K", b"", size=8 << 30) + WHOLE, "must have headers of at most 1048576"),
    "cut long name": (
        lambda: extension(b"L", b"x" * 600)[: 2 * BLOCK],
        "must hold a header at byte 0 to its end at byte",
    ),
    "long name of nothing": (lambda: extension(b"L", b"name") + END, "must end behind a member"),
    "long names without an end": (lambda: extension(b"L", b"n") * 20_000, "must go on to two blocks of zeros"),
    "pax cut in a record": (lambda: pax(b"30 path=a.wav\n") + WHOLE, "must have readable headers, got a damaged one"),
    "pax without a length": (lambda: pax(b"path=a.wav\n") + WHOLE, "must have readable headers, got a damaged one"),
    "pax of length 0": (lambda: pax(b"0 path=a.wav\n") + WHOLE, "must have readable headers, got a damaged one"),
    "pax of length 3": (lambda: pax(b"3 path=a.wav\n") + WHOLE, "must have readable headers, got a damaged one"),
    "pax of a huge length": (lambda: pax(b"9" * 5000 + b" path=a\n") + WHOLE, "must have readable headers"),
    "pax with a negative size": (lambda: pax(b"11 size=-5\n") + WHOLE, "must tell the size of a member at byte 512"),
    "pax with a size of 5000 digits": (lambda: pax(b"5011 size=%s\n" % (b"9" * 5000)) + WHOLE, "must tell the size of"),
    "pax with the path of all": (
        lambda: extension(b"g", b"14 path=a.wav\n") + WHOLE,
        "must not tell the path of all members at once",
    ),
    "sparse of pax": (
        lambda: pax(b"22 GNU.sparse.major=1\n") + WHOLE,
        "must hold nothing but files and folders, got a sparse",
    ),
    "sparse of gnu": (
        lambda: member("s.wav", type=b"S") + END,
        "must hold nothing but files and folders, got a sparse",
    ),
    "symbolic link": (
        lambda: member("l.wav", type=tarfile.SYMTYPE, linkname="/etc/passwd") + END,
        "must hold nothing but files and folders, got a symbolic link, 'l.wav', at byte 0",
    ),
    "hard link": (
        lambda: AUDIO + member("l.wav", type=tarfile.LNKTYPE) + END,
        "must hold .* a hard link, 'l.wav', at byte 1536",
    ),
    "character device": (lambda: member("d.wav", type=tarfile.CHRTYPE) + END, "must hold .* got a device, 'd.wav'"),
    "block device": (lambda: member("d.wav", type=tarfile.BLKTYPE) + END, "must hold .* got a device, 'd.wav'"),
    "pipe": (lambda: member("p.wav", type=tarfile.FIFOTYPE) + END, "must hold .* got a pipe, 'p.wav'"),
    "a later volume": (lambda: member("m.wav", type=b"M") + END, "must hold .* got a part of another volume, 'm.wav'"),
    "unknown kind": (lambda: member("z.wav", type=b"z") + END, "must hold .* got a member of kind b'z', 'z.wav'"),
    "duplicate": (lambda: AUDIO + RECORD + WHOLE, r"must hold each member once, got 'a.wav' again at byte 2560"),
    "header for all before the end": (lambda: AUDIO + extension(b"g", b"13 comment=x\n") + END, 1),
    "member of 0 bytes": (lambda: member("a.wav") + END, 1),
    "100,000 members": (lambda: numbered(100_000) + END, 100_000),
    "100,000 long names": (
        lambda: numbered(100_000, lambda number: _LONG + b"%06d" % number + bytes(BLOCK - 206)) + END,
        100_000,
    ),
    "long names of 1 MB": (
        lambda: numbered(40, lambda number: extension(b"L", b"%d" % number + b"x" * 1_000_000)) + END,
        40,
    ),
}
_LONG = extension(b"L", b"x" * 200, size=206)[: BLOCK + 200]

_WALK_ALL = r"""
import json, re, sys, time
from pathlib import Path
from shards.errors import ShardError, SourceError
from shards.places import Place
from shards.sources.keys import Found
from shards.sources.webdataset import read
from shards.tars import iterate_members

outcomes = {}
for number, path in enumerate(sys.argv[1:]):
    started = time.process_time()
    try:
        with open(path, "rb") as file:
            outcome = sum(1 for _ in iterate_members(file, path))
    except ShardError as error:
        outcome = str(error)
    outcomes[Path(path).stem] = [outcome, time.process_time() - started]
# Not ru_maxrss, which begins with that of the process that started this one.
peak_kib = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
print(json.dumps([outcomes, peak_kib]))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> tuple[dict[str, tuple[str | int, float]], int]:
    """For each nasty tar the error or the number of members, and seconds; and the memory that all took, in KiB."""
    folder = tmp_path_factory.mktemp("nasty")
    paths = []
    for name, (build, _) in NASTY.items():
        paths.append(folder / f"{name}.tar")
        paths[-1].write_bytes(build())
    holes = folder / "holes.tar"
    with holes.open("wb") as file:
        file.truncate(1 << 40)
    command = [sys.executable, "-c", _WALK_ALL, *map(str, [*paths, holes])]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    found, peak_kib = json.loads(result.stdout)
    return found, peak_kib


@pytest.mark.parametrize("name", NASTY)
def test_every_nasty_tar_is_named_with_what_is_wrong_or_read_whole(outcomes, name):
    outcome, _ = outcomes[0][name]

    expected = NASTY[name][1]
    if isinstance(expected, int):
        assert outcome == expected
        return
    assert isinstance(outcome, str)
    path, _, message = outcome.partition(".tar ")
    assert path.endswith(f"/{name}")
    assert re.match(expected, message)
    assert len(message) < 500


def test_none_of_them_takes_much_memory(outcomes):
    assert outcomes[1] < 200 * 1024


def test_a_terabyte_of_holes_is_not_read(outcomes):
    outcome, seconds = outcomes[0]["holes"]

    assert "must hold nothing behind its end at byte 0" in outcome
    assert seconds < 10  # reading it would take minutes


class CountingFile(io.BytesIO):
    """Counts what is asked of it."""

    num_reads = num_bytes = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.num_reads += 1
        self.num_bytes += len(data)
        return data


def test_work_grows_with_the_number_of_members_and_not_with_their_bytes():
    def reads(count: int, size: int) -> tuple[int, int]:
        file = CountingFile(b"".join(member(f"{i}.wav", bytes(size)) for i in range(count)) + END)
        assert sum(1 for _ in iterate_members(file, "a.tar")) == count
        return file.num_reads, file.num_bytes

    assert reads(200, 10) == reads(200, 50_000) == (200 + 2, 201 * BLOCK + 2 * BLOCK)
    assert reads(2000, 10)[0] == 2000 + 2


@pytest.fixture(scope="module")
def small() -> tuple[bytes, list[Member]]:
    """A tar of three pairs, with a long name, and its members."""
    names = ["a.wav", "a.json", "b" * 150 + ".wav", "b" * 150 + ".json", "c.wav", "c.json"]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = 700 if name.endswith("wav") else 30
            tar.addfile(entry, io.BytesIO(b"x" * entry.size))
    data = file.getvalue()
    members = list(iterate_members(io.BytesIO(data), "small.tar"))
    assert [member.name for member in members] == names
    return data, members


def end_of(members: Sequence[Member]) -> int:
    return members[-1].offset + BLOCK


def names_of_webdataset(path: Path) -> list[str]:
    """What webdataset reads of a tar, errors left out of it."""
    return [
        f"{sample['__key__']}.{name}"
        for sample in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
        for name in sample
        if not name.startswith("__")
    ]


def test_a_tar_cut_at_any_block_is_noticed_and_webdataset_reads_on_in_silence_at_some(small, tmp_path):
    data, members = small
    silent = []
    for length in range(0, end_of(members) + 2 * BLOCK, BLOCK):
        with pytest.raises(ShardError, match=r"^small\.tar must (be a plain tar|hold|go on|end|have)"):
            list(iterate_members(io.BytesIO(data[:length]), "small.tar"))
        (tmp_path / "cut.tar").write_bytes(data[:length])
        try:
            found = names_of_webdataset(tmp_path / "cut.tar")
        except Exception:  # noqa: BLE001  whatever it raises is better than silence
            continue
        if len(found) < len(members):
            silent.append(length)

    boundaries = {member.offset - BLOCK for member in members if len(member.name) < 100} - {0}
    assert boundaries <= set(silent)  # between two members at least
    assert list(iterate_members(io.BytesIO(data[: end_of(members) + 2 * BLOCK]), "small.tar")) == members


def test_a_tar_cut_at_any_byte_is_noticed(small):
    data, members = small
    for length in random.Random(0).sample(range(end_of(members) + 2 * BLOCK), 50):
        with pytest.raises(ShardError, match=r"^small\.tar must"):
            list(iterate_members(io.BytesIO(data[:length]), "small.tar"))


def header_offsets(members: Sequence[Member]) -> list[int]:
    return [member.offset - BLOCK for member in members]


@pytest.mark.parametrize("bits", [0x01, 0x10, 0x80])
def test_no_flipped_byte_of_a_header_gives_other_members(small, bits):
    data, members = small
    unnoticed = set()
    for start in header_offsets(members):
        for offset in range(start, start + BLOCK):
            damaged = bytearray(data)
            damaged[offset] ^= bits
            try:
                found = list(iterate_members(io.BytesIO(damaged), "small.tar"))
            except ShardError:
                continue
            assert found == members
            unnoticed.add(offset - start)

    # Of the checksum itself a leading zero may be a space, and its last byte says nothing.
    assert unnoticed <= {148, 155}


def test_webdataset_ends_in_silence_at_a_damaged_header_and_at_zeros_in_the_middle(small, tmp_path):
    data, members = small
    start = header_offsets(members)[-1]
    zeroed = data[:start] + bytes(BLOCK) + data[start + BLOCK :]
    damaged = data[:start] + b"?" + data[start + 1 :]
    for broken in (zeroed, damaged):
        (tmp_path / "broken.tar").write_bytes(broken)

        assert len(names_of_webdataset(tmp_path / "broken.tar")) == len(members) - 1
        with pytest.raises(ShardError, match=rf"small\.tar must .* at byte {start}"):
            list(iterate_members(io.BytesIO(broken), "small.tar"))


def test_an_error_of_the_disk_names_the_tar(small):
    class FailingFile(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 1000:
                raise OSError(5, "Input/output error")
            return super().read(size)

    with pytest.raises(ShardError, match=r"^small\.tar must be readable, got 'Input/output error'"):
        list(iterate_members(FailingFile(small[0]), "small.tar"))


def test_a_stream_that_gives_little_at_a_time_is_read_like_any_other(small):
    class SlowFile(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(100 if size is None or size < 0 else min(size, 100))

    assert list(iterate_members(SlowFile(small[0]), "small.tar")) == small[1]


def found_in(folder: Path, *parts: bytes) -> list[Found]:
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.tar").write_bytes(b"".join(parts) + END)
    return list(read(Place.of(str(folder / "corpus" / "a.tar")), folder / "spool"))


def found_with(folder: Path, record: bytes) -> Found:
    [found] = found_in(folder, AUDIO, member("a.json", record))
    return found


MARKS = "a <|im_end|> b <asr_text> \u202e\u2066 c\u0000\u001b[2J d\u200b"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (b"\xef\xbb\xbf" + b'{"text": "with a byte order mark"}', {"reference": "with a byte order mark"}),
        (b'{"text": "one", "text": "two"}', {"reference": "two"}),
        (b'{"duration": NaN, "text": "a"}', {"told_seconds": None, "reference": "a"}),
        (b'{"duration": -Infinity}', {"told_seconds": None}),
        (b'{"duration": 1%s}' % (b"0" * 400), {"told_seconds": None}),
        (b'{"duration": 1e400}', {"told_seconds": None}),
        (json.dumps({"text": MARKS}).encode(), {"reference": MARKS}),
        (json.dumps({"text": "x" * 900_000}).encode(), {"reference": "x" * 900_000}),
        (b'{"more": %s1%s}' % (b"[" * 500, b"]" * 500), {"reference": None}),
        (b'{"lang": "VI"}', {"language": "Vietnamese"}),
        (b'{"text": "  "}', {"reference": ""}),
        (b"{}", {"reference": None, "language": None, "speaker": None}),
    ],
)
def test_a_strange_record_that_is_one_is_read_as_it_says(tmp_path, record, expected):
    found = found_with(tmp_path, record)

    assert {name: getattr(found, name) for name in expected} == expected
    assert (found.offset_bytes, found.num_bytes) == (BLOCK, 1000)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"", "must be a JSON object"),
        (b"\xff\xfe{\0}\0", "must be a JSON object"),
        (b'{"text": "\xc3("}', "must be a JSON object"),
        (b"null", "must be a JSON object, got NoneType"),
        (b'[{"text": "a"}]', "must be a JSON object, got list"),
        (b"[" * 100_000, "must be a JSON object"),
        (b'{"a":' * 100_000, "must be a JSON object"),
        (b'{"duration": %s}' % (b"9" * 5000), "must be a JSON object"),
        (b'{"text": "a"} {}', "must be a JSON object"),
        (b'{"text": "control character \x1b"}', "must be a JSON object"),
        (b'{"text": {"a": 1}}', "text must be text"),
        (b'{"text": "\\ud800"}', "text must be valid Unicode"),
        (b'{"duration": "1 s"}', "duration must be a number"),
        (b'{"duration": true}', "duration must be a number"),
        (b'{"language": "Klingon"}', "language"),
        (json.dumps({"text": "x" * (1 << 20)}).encode(), "must be below 1000000 bytes, got 1048588"),
    ],
)
def test_a_record_that_is_none_is_refused_with_its_tar_and_key(tmp_path, record, message):
    with pytest.raises(SourceError, match=rf"a\.tar: '?a'?:? .*{message}") as raised:
        found_with(tmp_path, record)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ([AUDIO], ["a"]),
        ([member("a.WAV", b"x"), member("a.JSON", b"{}")], ["a"]),
        ([member("a.wav"), member("b.wav", b"x")], ["a", "b"]),  # an empty one is rejected when it is decoded
        ([member("notes", b"x"), AUDIO, member("._a.wav", b"x")], ["a"]),
        ([AUDIO, RECORD, member("a.cls", b"3"), member("b.opus", b"x")], ["a", "b"]),
        ([member("../../etc/passwd.wav", b"x"), member("/tmp/x.wav", b"x")], ["../../etc/passwd", "/tmp/x"]),
    ],
)
def test_samples_with_audio_are_recordings_whatever_else_is_there(tmp_path, parts, names):
    assert [found.name for found in found_in(tmp_path, *parts)] == names


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ([AUDIO, member("b.json", b"{}")], SourceError, "must have audio beside json, got none"),
        ([member("a.xyz", b"x"), RECORD], SourceError, "must have audio beside xyz, json, got none"),
        ([AUDIO, member("a.flac", b"x")], ShardError, "must hold one audio member for a key"),
        ([RECORD, member("b.json", b"{}"), AUDIO], (SourceError, ShardError), "must have audio|side by side"),
        ([AUDIO, member("b.wav", b"x"), RECORD], ShardError, "must hold the members of a key side by side"),
        ([AUDIO, RECORD, AUDIO], ShardError, "must hold each member once"),
        ([member("s.1.wav", b"x"), member("s.2.wav", b"x")], ShardError, "ends at the first dot of a name"),
    ],
)
def test_samples_that_do_not_belong_together_are_refused(tmp_path, parts, error, message):
    with pytest.raises(error, match=rf"a\.tar.* ({message})"):
        found_in(tmp_path, *parts)
