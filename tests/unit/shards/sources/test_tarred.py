import json

import pytest
import webdataset

from shards.errors import ShardError, SourceError
from tests.helpers.corpora import make_nemo_tarred, tone_bytes, write_lines, write_tar


@pytest.mark.parametrize("is_sharded", [False, True])
def test_nemos_tars_are_read_where_their_audio_lies(tmp_path, read, tone_at, is_sharded):
    folder = make_nemo_tarred(tmp_path / "set", is_sharded=is_sharded)

    found = read(folder)

    assert [tone_at(one) for one in found] == [0, 0, 1, 2, 3]
    assert [(one.name, one.start_seconds, one.told_seconds, one.reference) for one in found] == [
        ("data_0", 0.0, 0.5, "number 0"),
        ("data_0-sub1", 0.5, 0.5, "again"),
        ("data_1", None, 1.0, "number 1"),
        ("data_2", None, 1.0, "number 2"),
        ("data_3", None, 1.0, "number 3"),
    ]
    assert [one.path for one in found] == [f"{folder}/audio_{number}.tar" for number in (0, 0, 0, 1, 1)]


@pytest.mark.parametrize("name", ["tarred_audio_manifest.json", "sharded_manifests/manifest_1.json"])
def test_one_manifest_of_nemo_can_be_an_input_by_itself(tmp_path, read, tone_at, name):
    folder = make_nemo_tarred(tmp_path / "set", is_sharded=True)

    found = read(folder / name, kind="nemo_tarred")

    assert [tone_at(one) for one in found] == ([2, 3] if "1" in name else [0, 0, 1, 2, 3])


def test_sharded_manifests_are_read_in_the_order_of_their_numbers(tmp_path, read, tone_at):
    for number in (0, 2, 10):
        row = {"audio_filepath": "a.wav", "duration": 0.4, "key": f"k{number}"}
        write_tar(tmp_path / "set" / f"audio_{number}.tar", {"a.wav": tone_bytes(number, kind="WAV")})
        write_lines(tmp_path / "set" / "sharded_manifests" / f"manifest_{number}.json", row)

    assert [(one.name, tone_at(one)) for one in read(tmp_path / "set")] == [("k0", 0), ("k2", 2), ("k10", 10)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"audio_filepath": "data_9.wav", "shard_id": 0}, r"json:1: audio_filepath must be a member of .*audio_0\.tar"),
        (
            {"audio_filepath": "data_0.wav", "shard_id": 7},
            r"json:1: shard_id must be the number of an audio_<num",
        ),
        ({"audio_filepath": "data_0.wav", "shard_id": "0"}, r"json:1: shard_id must be the number of a tar, got '0'"),
    ],
)
def test_a_line_about_what_is_not_in_its_tar_is_named(tmp_path, read, row, message):
    folder = make_nemo_tarred(tmp_path / "set")
    write_lines(folder / "tarred_audio_manifest.json", row)

    with pytest.raises(SourceError, match=message):
        read(folder)


def test_what_webdatasets_own_writer_wrote_is_read(tmp_path, read, tone_at):
    (tmp_path / "in").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "in" / "train-%06d.tar"), maxcount=2, verbose=0) as writer:
        for number in range(5):
            about = {"text": f"số {number}", "language": "vi", "speaker": number, "duration": 0.4}
            writer.write({"__key__": f"clips/{number:03d}", "flac": tone_bytes(number), "json": about})

    found = read(tmp_path / "in")

    assert [tone_at(one) for one in found] == [0, 1, 2, 3, 4]
    assert [one.path for one in found] == [f"{tmp_path}/in/train-00000{shard}.tar" for shard in (0, 0, 1, 1, 2)]
    assert [(one.name, one.audio_name, one.reference, one.speaker) for one in found] == [
        (f"clips/{number:03d}", f"clips/{number:03d}.flac", f"số {number}", str(number)) for number in range(5)
    ]
    assert {(one.language, one.split, one.told_seconds, one.source) for one in found} == {
        ("Vietnamese", "train", 0.4, "in")
    }


def test_the_record_beside_the_audio_is_found_by_offset(tmp_path, read):
    about = {"transcript": "a", "split": "test", "key": "mine"}
    tar = write_tar(tmp_path / "0.tar", {"x.json": json.dumps(about).encode(), "x.wav": tone_bytes(0, kind="WAV")})

    [found] = read(tar)

    data = tar.read_bytes()
    assert json.loads(data[found.json_offset : found.json_offset + found.json_bytes]) == about
    assert data[found.offset_bytes : found.offset_bytes + found.num_bytes] == tone_bytes(0, kind="WAV")
    assert (found.name, found.reference, found.split) == ("mine", "a", "test")


@pytest.mark.parametrize(("told", "source"), [("phone", "phone"), ("", "in"), (7, "in"), ({"url": "x"}, "in")])
def test_the_source_is_what_the_record_says_if_that_is_a_name(tmp_path, read, told, source):
    members = {"x.json": json.dumps({"source": told}).encode(), "x.wav": tone_bytes(0, kind="WAV")}
    write_tar(tmp_path / "in" / "0.tar", members)

    assert [one.source for one in read(tmp_path / "in")] == [source]


@pytest.mark.parametrize(
    ("others", "reference"),
    [
        ({}, None),
        ({"x.txt": "xin chào\n".encode()}, "xin chào"),
        ({"x.txt": b""}, ""),
        ({"x.txt": b"a", "x.json": b'{"text": "b"}'}, "b"),
        ({"x.txt": b"a", "x.json": b"{}"}, "a"),
        ({"x.cls": b"7"}, None),
    ],
)
def test_the_reference_is_in_the_record_or_in_plain_text(tmp_path, read, others, reference):
    [found] = read(write_tar(tmp_path / "0.tar", {"x.flac": tone_bytes(0), **others}))

    assert found.reference == reference
    assert (found.json_offset is None) == ("x.json" not in others)


@pytest.mark.parametrize(
    ("name", "split"),
    [("dev-0001.tar", "dev"), ("test/0.tar", "test"), ("train/dev_0.tar", "dev"), ("0.tar", None)],
)
def test_the_split_is_what_the_tar_or_its_folder_says(tmp_path, read, name, split):
    write_tar(tmp_path / "in" / name, {"x.flac": tone_bytes(0)})

    [found] = read(tmp_path / "in")

    assert found.split == split


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"x.json": b"{}"}, r"0\.tar: 'x' must have audio beside json, got none"),
        ({"x.flac": tone_bytes(0), "x.json": b"[]"}, r"0\.tar: 'x' must be a JSON object, got list"),
        ({"x.flac": tone_bytes(0), "x.json": b"{"}, r"0\.tar: 'x' must be a JSON object in UTF-8"),
        ({"x.flac": tone_bytes(0), "x.json": b'{"lang": "sw"}'}, r"0\.tar: 'x': language must be one of .*, got 'sw'"),
        ({"x.flac": tone_bytes(0), "x.txt": b"\xff"}, r"0\.tar: 'x': text must be in UTF-8"),
        ({"x.flac": tone_bytes(0), "x.json": b" " * 1_000_001}, r"0\.tar: 'x': a record must be below 1000000 bytes"),
    ],
)
def test_a_record_that_breaks_a_rule_is_named_by_tar_and_key(tmp_path, read, members, message):
    with pytest.raises(SourceError, match=message):
        read(write_tar(tmp_path / "0.tar", members))


def test_a_damaged_tar_is_refused(tmp_path, read):
    tar = write_tar(tmp_path / "0.tar", {f"{number}.flac": tone_bytes(number) for number in range(3)})
    tar.write_bytes(tar.read_bytes()[:-12_000])

    with pytest.raises(ShardError, match=r"0\.tar"):
        read(tar)


def test_names_of_members_are_never_taken_as_paths(tmp_path, read):
    tar = write_tar(tmp_path / "0.tar", {"../../etc/passwd.flac": tone_bytes(0), "/root/x.flac": tone_bytes(1)})

    assert [(one.path, one.name) for one in read(tar)] == [(str(tar), "../../etc/passwd"), (str(tar), "/root/x")]
