import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import webdataset

from shards.audio import encode_flac
from shards.cache import Cache
from shards.errors import ConfigError, ShardError
from shards.index import INDEX, UTTERANCES, IndexWriter, make_entry, read_index, read_utterances
from shards.schema import Utterance
from shards.storage import sha256_file
from shards.verify import MAX_TOLD, Verified, verify
from tests.helpers.reading import serve
from tests.helpers.tones import make_tone

RECORD = (
    "key",
    "recording",
    "start_seconds",
    "duration_seconds",
    "split",
    "language",
    "speaker",
    "reference",
    "source",
)
SECONDS = 0.1
FLACS = [encode_flac(make_tone(number, seconds=SECONDS)) for number in range(4)]

Change = Callable[[Utterance], Utterance]


def make_utterance(number: int, shard: str, split: str = "train") -> Utterance:
    return Utterance(
        key=f"tone-{number}",
        shard=shard,
        audio_name=f"tone-{number}.flac",
        audio_offset=0,
        audio_bytes=0,
        json_offset=0,
        json_bytes=0,
        duration_seconds=SECONDS,
        start_seconds=0.0,
        recording=f"tone-{number}",
        split=split,
        language=(None, "Vietnamese", "English")[number % 3],
        speaker=None,
        reference=f"tone số {number}",
        source="tones",
    )


def write_tar(
    path: Path, utterances: list[Utterance], *, records: dict[str, bytes] | None = None, flacs: list[bytes] = FLACS
) -> list[Utterance]:
    """Write a shard with tarfile alone; gives the utterances with the places of their members."""
    with tarfile.open(path, "w") as tar:
        for number, utterance in enumerate(utterances):
            record = json.dumps({name: getattr(utterance, name) for name in RECORD}).encode()
            record = (records or {}).get(utterance.key, record)
            for name, data in ((utterance.audio_name, flacs[number % len(flacs)]), (f"{utterance.key}.json", record)):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    with tarfile.open(path) as tar:
        places = {member.name: (member.offset_data, member.size) for member in tar}
    return [
        replace(
            utterance,
            audio_offset=places[utterance.audio_name][0],
            audio_bytes=places[utterance.audio_name][1],
            json_offset=places[f"{utterance.key}.json"][0],
            json_bytes=places[f"{utterance.key}.json"][1],
        )
        for utterance in utterances
    ]


def make_folder(
    folder: Path,
    *,
    num_shards: int = 3,
    per_shard: int = 4,
    change: Change = lambda u: u,
    extra: Callable[[Path], None] | None = None,
    **tar: Any,
) -> Path:
    """A packed folder of tones. ``change`` makes the table differ from the tars, ``extra`` the tars from the table."""
    folder.mkdir()
    with IndexWriter(folder) as index:
        for number in range(num_shards):
            split = "heldout" if number == 0 else "train"
            name = f"{split}-{number:06d}.tar"
            utterances = [make_utterance(per_shard * number + i, name, split) for i in range(per_shard)]
            utterances = [change(utterance) for utterance in write_tar(folder / name, utterances, **tar)]
            if extra is not None:
                extra(folder / name)
            path = folder / name
            index.add(
                make_entry(utterances, name=name, num_bytes=path.stat().st_size, sha256=sha256_file(path)), utterances
            )
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_folder(tmp_path / "pack")


def damage(path: Path, offset: int, bits: int = 0x10) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ bits]))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_whole_folder_is_verified_and_counted(folder, threads):
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.tar"))
    hours = 12 * SECONDS / 3600

    for settings, num_decoded in (({"quick": True}, 0), ({}, 0), ({"deep": True}, 12)):
        verified = verify(folder, threads=threads, **settings)
        assert verified == Verified(
            num_shards=3, num_bytes=num_bytes, num_utterances=12, hours=pytest.approx(hours), num_decoded=num_decoded
        )


@pytest.mark.parametrize("threads", [1, 3])
def test_all_damaged_shards_are_told_in_their_order_each_with_its_reason(folder, threads):
    first, second, third = (folder / entry.name for entry in read_index(folder).shards)
    first.unlink()
    damage(second, 700)
    third.write_bytes(third.read_bytes()[:-1])

    with pytest.raises(ShardError, match=r"pack must hold whole shards, got 3 of 3 damaged; pack again") as raised:
        verify(folder, threads=threads)
    lines = str(raised.value).splitlines()
    assert [line.strip().partition(", got")[0] for line in lines[1:]] == [
        f"{first} must exist",
        f"{second} must have sha256 {read_index(folder).shards[1].sha256[:12]}",
        f"{third} must have {third.stat().st_size + 1} bytes",
    ]
    with pytest.raises(ShardError, match="got 2 of 3 damaged"):
        verify(folder, quick=True, threads=threads)


def test_of_many_damaged_shards_the_first_are_told_and_the_rest_is_counted(tmp_path):
    folder = make_folder(tmp_path / "pack", num_shards=MAX_TOLD + 5)
    for path in folder.glob("train-*.tar"):
        path.write_bytes(b"")

    with pytest.raises(ShardError, match=f"got {MAX_TOLD + 4} of {MAX_TOLD + 5} damaged") as raised:
        verify(folder, quick=True)
    lines = str(raised.value).splitlines()
    assert len(lines) == 1 + MAX_TOLD + 1
    assert "train-000001.tar must have" in lines[1]
    assert lines[-1] == "  and 4 more"


def test_every_flipped_byte_of_every_header_and_50_others_are_found(tmp_path):
    folder = make_folder(tmp_path / "pack", num_shards=2, per_shard=1)
    path = folder / "train-000001.tar"
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar.getmembers()]
    offsets = [start + i for start in headers for i in range(512)]
    offsets += random.Random(0).sample(range(path.stat().st_size), 50)

    for offset in offsets:
        damage(path, offset)
        with pytest.raises(ShardError, match=r"got 1 of 2 damaged.*\n.*train-000001\.tar must have sha256"):
            verify(folder)
        damage(path, offset)
    verify(folder)


def test_a_cut_at_any_block_is_found_by_size_and_webdataset_says_nothing_between_two_members(folder):
    path = folder / "train-000002.tar"
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        boundaries = [member.offset for member in tar.getmembers()][2::2]

    for length in range(0, len(data), 512):
        path.write_bytes(data[:length])
        with pytest.raises(ShardError, match=rf"train-000002\.tar must have {len(data)} bytes, got {length}"):
            verify(folder, quick=True)
    for number, length in enumerate(boundaries):
        path.write_bytes(data[:length])
        assert len(list(webdataset.WebDataset(str(path), shardshuffle=False))) == number + 1


def test_a_shard_in_the_place_of_another_of_its_size_is_found(folder):
    first, second = folder / "train-000001.tar", folder / "train-000002.tar"
    assert first.stat().st_size == second.stat().st_size
    second.write_bytes(first.read_bytes())

    verify(folder, quick=True)
    with pytest.raises(ShardError, match=r"train-000002\.tar must have sha256"):
        verify(folder)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["folder", "pipe", "loop"])
def test_what_is_no_file_is_not_waited_for(folder, kind):
    path = folder / "train-000001.tar"
    path.unlink()
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "loop": lambda: path.symlink_to(path)}[kind]()

    for quick in (True, False):
        with pytest.raises(ShardError, match=r"train-000001\.tar must (exist|be readable)"):
            verify(folder, quick=quick)


def test_tars_that_the_index_does_not_list_are_named(folder):
    (folder / "train-000099.tar").write_bytes(b"")
    (folder / "train-000098.tar").write_bytes(b"")

    for quick in (True, False):
        with pytest.raises(ShardError, match=r"train-000098\.tar and 1 more must be listed in index\.json"):
            verify(folder, quick=quick)


@pytest.mark.parametrize("quick", [True, False])
def test_a_damaged_or_missing_table_is_found(folder, quick):
    damage(folder / UTTERANCES, 200)
    with pytest.raises(ShardError, match=r"utterances\.parquet must have sha256"):
        verify(folder, quick=quick)

    (folder / UTTERANCES).unlink()
    with pytest.raises(ShardError, match=r"utterances\.parquet must .*no such file"):
        verify(folder, quick=quick)


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda index: index["shards"][1].update(seconds=9.0),
            r"the seconds per language of index\.json in train-000001",
        ),
        (
            lambda index: index["shards"][1]["seconds_by_language"].update(Thai=0.1),
            r"the seconds per language of index\.json in train-000001",
        ),
        (
            lambda index: [index["shards"][i].update(num_utterances=n) for i, n in ((1, 5), (2, 3))],
            r"must list the shards of index\.json in its order",
        ),
        (
            lambda index: index["hours_by_split_language"]["train"].update(English=1.0),
            r"the hours per language of index\.json in train",
        ),
        (lambda index: index["hours_by_split_language"].update(test={"Thai": 1.0}), "must hold utterances of test"),
        (lambda index: index["hours_by_split_language"].pop("heldout"), "hours per language .* in heldout"),
        (lambda index: index.update(hours=2.0), r"the hours of index\.json"),
    ],
)
def test_counts_and_seconds_of_the_index_must_be_those_of_the_table(folder, edit, message):
    edit_index(folder, edit)

    verify(folder, quick=True)
    with pytest.raises(ShardError, match=message):
        verify(folder)


def test_a_table_with_a_key_twice_is_refused(tmp_path):
    folder = make_folder(tmp_path / "pack", change=lambda u: replace(u, key=u.key.replace("tone-9", "tone-2")))

    with pytest.raises(ShardError, match=r"utterances\.parquet must hold each key once, got 'tone-2' twice"):
        verify(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda u: replace(u, audio_offset=u.audio_offset + 512 * (u.key == "tone-5")),
        lambda u: replace(u, audio_bytes=u.audio_bytes - (u.key == "tone-5")),
        lambda u: replace(u, json_offset=u.json_offset - 512 * (u.key == "tone-5")),
        lambda u: replace(u, audio_name=u.audio_name.replace("tone-5", "tone-6")),
    ],
)
def test_a_table_that_places_a_member_elsewhere_is_refused_though_all_hashes_are_right(tmp_path, change):
    folder = make_folder(tmp_path / "pack", change=change)

    with pytest.raises(ShardError, match=r"train-000001\.tar must hold the members .*, got 'tone-[56]\.\w+' elsewhere"):
        verify(folder)


def test_a_member_that_the_table_does_not_list_is_named(tmp_path):
    def add(path: Path) -> None:
        with tarfile.open(path, "a") as tar:
            tar.addfile(tarfile.TarInfo("more.txt"))

    folder = make_folder(tmp_path / "pack", extra=add)

    with pytest.raises(
        ShardError, match=r"got 3 of 3 damaged.*\n.*000000\.tar must hold .*, got 'more\.txt' elsewhere"
    ):
        verify(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("language", "German"),
        ("language", None),
        ("speaker", "somebody"),
        ("reference", "another text"),
        ("split", "test"),
        ("source", "elsewhere"),
        ("recording", "other"),
        ("start_seconds", 1.5),
    ],
)
def test_a_record_that_says_something_else_than_the_table_is_refused(tmp_path, field, value):
    folder = make_folder(tmp_path / "pack", change=lambda u: replace(u, **{field: value}) if u.key == "tone-4" else u)

    with pytest.raises(ShardError, match=rf"train-000001\.tar: tone-4\.json must have {field} {value!r} of utterances"):
        verify(folder)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"", "must be a JSON object, got Expecting value"),
        (b"\xff\xfe", "must be a JSON object, got"),
        (b"[" * 100_000, "must be a JSON object, got"),
        (b"null", "must tell key, .*, got NoneType"),
        (b'["key"]', "must tell key, .*, got list"),
        (b'{"key": "tone-4"}', r"must tell key, .*, got \['key'\]"),
    ],
)
def test_a_record_that_is_none_is_refused(tmp_path, record, message):
    folder = make_folder(tmp_path / "pack", records={"tone-4": record})

    with pytest.raises(ShardError, match=rf"got 1 of 3 damaged.*\n.*tone-4\.json {message}"):
        verify(folder)


@pytest.mark.parametrize(
    ("flac", "message"),
    [
        (FLACS[1][:-40], r"'tone-\d' must (be FLAC|last)"),
        (FLACS[1][:200] + b"\x55" * 60 + FLACS[1][260:], r"'tone-\d' must (be FLAC|last)"),
        (encode_flac(make_tone(1, seconds=0.2)), r"'tone-\d' must last 0\.1 s, got 0\.2 s"),
        (b"no audio", r"'tone-\d' must be FLAC"),
    ],
)
def test_what_was_damaged_before_it_was_hashed_is_found_by_decoding(tmp_path, flac, message):
    folder = make_folder(tmp_path / "pack", flacs=[FLACS[0], flac, FLACS[2], FLACS[3]])

    verify(folder)
    with pytest.raises(ShardError, match=rf"got 3 of 3 damaged.*\n.*{message}"):
        verify(folder, deep=True)


def make_in_place(tmp_path: Path, change: Change = lambda u: u, *, address: str | None = None) -> tuple[Path, Path]:
    """The folder of an index, and a tar elsewhere of which half is in it, at an ``address`` if there is one."""
    tar = tmp_path / "elsewhere" / "corpus.tar"
    tar.parent.mkdir()
    utterances = write_tar(tar, [make_utterance(number, "corpus") for number in range(4)])
    listed = [change(replace(u, json_offset=0, json_bytes=0) if u.key == "tone-3" else u) for u in utterances[1::2]]
    folder = tmp_path / "pack"
    folder.mkdir()
    with IndexWriter(folder) as index:
        size, digest = tar.stat().st_size, sha256_file(tar)
        index.add(
            make_entry(listed, name="corpus", num_bytes=size, sha256=digest, location=address or str(tar)), listed
        )
    return folder, tar


def test_a_tar_that_is_indexed_in_place_may_hold_more_than_is_listed(tmp_path):
    folder, tar = make_in_place(tmp_path)

    assert verify(folder, deep=True).num_decoded == 2
    assert [utterance.key for utterance in read_utterances(folder)] == ["tone-1", "tone-3"]
    damage(tar, 600)
    with pytest.raises(ShardError, match=rf"{tar} must have sha256"):
        verify(folder)
    tar.unlink()
    with pytest.raises(ShardError, match=rf"{tar} must be readable"):
        verify(folder, quick=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda u: replace(u, audio_offset=u.audio_offset + 512),
        lambda u: replace(u, audio_name=f"./{u.audio_name}"),
        lambda u: replace(u, json_bytes=u.json_bytes and u.json_bytes + 1),
    ],
)
def test_a_member_that_is_not_in_place_is_named(tmp_path, change):
    folder, tar = make_in_place(tmp_path, change)

    with pytest.raises(ShardError, match=rf"{tar} must hold the members .*, got none for 'tone-1' there"):
        verify(folder)


def test_a_tar_at_an_address_is_read_for_its_hash_and_decoded_from_a_cache(tmp_path):
    with serve(tmp_path / "elsewhere") as web:
        address = f"{web.address}/corpus.tar"
        folder, tar = make_in_place(tmp_path, address=address)

        assert verify(folder).num_utterances == verify(folder, quick=True).num_utterances == 2
        with pytest.raises(ConfigError, match=r"read\.cache must name a folder"):
            verify(folder, deep=True)
        cache = Cache(folder=tmp_path / "cache", max_bytes=1 << 30)
        assert verify(folder, deep=True, cache=cache).num_decoded == 2

        damage(tar, 600)
        with pytest.raises(ShardError, match=rf"{address} must have sha256"):
            verify(folder)
        tar.write_bytes(tar.read_bytes()[:-512])
        for quick in (True, False):
            with pytest.raises(ShardError, match=rf"{address} must have \d+ bytes, got \d+"):
                verify(folder, quick=quick)
        tar.unlink()
        for quick in (True, False):
            with pytest.raises(ShardError, match=rf"'?{address}'? must be readable"):
                verify(folder, quick=quick)
