import io
import tarfile
from collections.abc import Sequence

import pytest
import webdataset

from shards.errors import ShardError
from shards.tars import Member, group_samples, iterate_members

SUFFIXES = {".wav", ".flac"}

NAMES = [
    "a.wav",
    "folder/a.wav",
    "/absolute/a.wav",
    "../../etc/passwd",
    "with space and \t tab\nand line end.wav",
    "right \u202eto left, giữa, 語, 🎧.wav",
    "caf\u00e9.wav",
    "cafe\u0301.wav",
    "x" * 100,
    "x" * 101 + ".wav",
    "/".join(["folder" * 8] * 4) + "/utterance.wav",
    "y" * 5000,
    "not utf-8 \udcff\udcfe.wav",
    "shards/{000..999}::pipe:true.wav",
]


def make_tar(names: Sequence[str], *, format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar whose member of each name holds that name and ``!``."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name in names:
            data = content_of(name)
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 1.5  # a fraction of a second makes a header of its own in pax
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def content_of(name: str) -> bytes:
    return name.encode(errors="surrogateescape") + b"!"


def members_of(data: bytes) -> list[Member]:
    return list(iterate_members(io.BytesIO(data), "a.tar"))


def samples_of(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    members = [Member(name=name, offset=512 * (i + 1), num_bytes=1) for i, name in enumerate(names)]
    return [(sample.key, list(sample.members)) for sample in group_samples(members, "a.tar", audio_suffixes=SUFFIXES)]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_names_of_all_kinds_come_as_they_are_with_the_place_of_their_bytes(format):
    data = make_tar(NAMES, format=format)

    members = members_of(data)

    assert [member.name for member in members] == NAMES
    for member in members:
        assert data[member.offset : member.offset + member.num_bytes] == content_of(member.name)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(m.offset_data, m.size) for m in tar.getmembers()] == [(m.offset, m.num_bytes) for m in members]


def test_the_two_fields_of_a_posix_name_are_joined():
    name = "folder/" * 20 + "utterance.wav"

    [member] = members_of(make_tar([name], format=tarfile.USTAR_FORMAT))

    assert member.name == name


def test_a_name_with_a_zero_byte_is_kept_where_the_format_can_hold_it():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        member = tarfile.TarInfo("short")
        member.pax_headers = {"path": "null\0byte.wav"}
        tar.addfile(member)

    assert [member.name for member in members_of(file.getvalue())] == ["null\0byte.wav"]


def test_the_size_of_a_long_header_overrides_the_plain_one():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        member = tarfile.TarInfo("a.wav")
        member.pax_headers = {"size": "700"}
        tar.addfile(member)  # with a plain size of 0
        file.write(b"x" * 700 + bytes(324))
        tar.offset += 1024
        tar.addfile(tarfile.TarInfo("b.wav"))

    assert [(member.name, member.num_bytes) for member in members_of(file.getvalue())] == [("a.wav", 700), ("b.wav", 0)]


def test_sizes_beyond_eight_digits_are_read_as_gnu_writes_them():
    """Stands in the header only: a member of 9 GB is refused for its end, not for its number."""
    member = tarfile.TarInfo("a.wav")
    member.size = 9 << 30
    header = member.tobuf(tarfile.GNU_FORMAT)
    assert header[124] == 0x80

    with pytest.raises(
        ShardError, match=rf"must hold 'a\.wav' at byte 0 to its end at byte {(9 << 30) + 512}, got 512"
    ):
        members_of(header)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_folders_and_headers_for_all_are_left_out(format):
    file = io.BytesIO()
    options = {"pax_headers": {"comment": "made by git"}} if format == tarfile.PAX_FORMAT else {}
    with tarfile.open(fileobj=file, mode="w", format=format, **options) as tar:
        folder = tarfile.TarInfo("folder/")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        old = tarfile.TarInfo("old/")
        old.type = tarfile.AREGTYPE
        tar.addfile(old)
        tar.addfile(tarfile.TarInfo("folder/empty.wav"))

    assert [(member.name, member.num_bytes) for member in members_of(file.getvalue())] == [("folder/empty.wav", 0)]


def test_a_tar_of_nothing_but_its_end_has_no_members():
    assert members_of(bytes(10_240)) == members_of(bytes(1024)) == []


def test_a_member_may_be_read_while_the_tar_is_walked():
    data = make_tar(NAMES)
    file = io.BytesIO(data)

    found = []
    for member in iterate_members(file, "a.tar"):
        file.seek(member.offset)
        found.append(file.read(member.num_bytes))

    assert found == [content_of(name) for name in NAMES]


def test_samples_are_those_of_webdataset(tmp_path):
    names = [
        "a.wav",
        "a.json",
        "b.seg.JSON",
        "b.FLAC",
        "with space.flac",
        "__meta__/x.json",
        "__about__.json",
        "folder.v1/c.txt",
        "folder.v1/c.wav",
        "folder.v2/c.wav",
        "no_extension",
        "../../d.wav",
        "/e.wav",
        "f.json",
    ]
    (tmp_path / "a.tar").write_bytes(make_tar(names))

    expected = [
        (sample["__key__"], [name for name in sample if not name.startswith("__")])
        for sample in webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    ]

    assert samples_of(names) == expected
    assert ("folder.v1/c", ["txt", "wav"]) in expected and ("b", ["seg.json", "flac"]) in expected


def test_hidden_files_belong_to_no_sample():
    assert samples_of(["a.wav", "._a.wav", "folder/.DS_Store", ".json", "b.wav"]) == [("a", ["wav"]), ("b", ["wav"])]


def test_members_of_a_sample_keep_their_place():
    members = members_of(make_tar(["a.wav", "a.json", "b.wav"]))

    samples = list(group_samples(members, "a.tar", audio_suffixes=SUFFIXES))

    assert [list(sample.members.values()) for sample in samples] == [members[:2], members[2:]]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.json", "b.json", "a.wav", "b.wav"], r"the members of a key side by side, got 'a\.wav' apart"),
        (["a.wav", "b.wav", "a.wav"], r"the members of a key side by side, got 'a\.wav' apart"),
        (["a.wav", "a.WAV"], r"one member of each extension for a key, got 'a\.wav' and 'a\.WAV'"),
        (["a.wav", "a.json", "a.flac"], r"one audio member for a key, .*got 'a\.wav' and 'a\.flac'"),
        (
            ["speaker1.001.wav", "speaker1.002.wav"],
            r"one .* ends at the first dot of a name, got 'speaker1\.001\.wav' and",
        ),
        (["x" * 5000 + ".wav", "x" * 5000 + ".flac"], r"one .*, got 'x{115}\.\.\.' and 'x{115}\.\.\.'; rename"),
        (["a\n\x1b[2J\u202e.wav", "a\n\x1b[2J\u202e.flac"], r"one .*, got 'a\\n\\x1b\[2J\\u202e\.wav' and"),
    ],
)
def test_what_webdataset_would_take_apart_or_mix_up_is_refused(names, message):
    with pytest.raises(ShardError, match=rf"^a\.tar must hold {message}"):
        samples_of(names)


def test_keys_that_differ_in_case_or_normal_form_are_different():
    names = ["a.wav", "A.wav", "caf\u00e9.wav", "cafe\u0301.wav"]

    assert [key for key, _ in samples_of(names)] == [name.removesuffix(".wav") for name in names]
