import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from shards.errors import ShardError
from shards.index import INDEX, UTTERANCES, read_index, read_utterances
from shards.schema import Utterance
from shards.verify import verify
from tests.helpers.packing import pack_tones
from tests.helpers.tones import make_recordings


@pytest.fixture
def folder(tmp_path) -> Path:
    pack_tones(make_recordings(tmp_path / "in", 12), tmp_path / "pack", utterances_per_shard=4)
    return tmp_path / "pack"


def test_the_table_has_one_column_for_each_field_in_shard_then_tar_order(folder):
    table = pq.read_table(folder / UTTERANCES)
    utterances = read_utterances(folder)

    assert table.column_names == list(Utterance.__dataclass_fields__)
    shards = [entry.name for entry in read_index(folder).shards]
    places = [(shards.index(utterance.shard), utterance.audio_offset) for utterance in utterances]
    assert places == sorted(places)


def test_utterances_of_some_splits_are_those_of_all_in_their_order(folder):
    everything = read_utterances(folder)

    for splits in (["train"], ["heldout"], ["heldout", "train"], ["test"]):
        found = read_utterances(folder, splits=splits)
        assert list(found) == [utterance for utterance in everything if utterance.split in splits]


def test_columns_are_those_of_the_utterances(folder):
    everything = read_utterances(folder)

    assert everything.numbers("duration_seconds").tolist() == [u.duration_seconds for u in everything]
    for name in ("shard", "language", "speaker", "key"):
        codes, names = everything.codes(name)
        assert [names[code] for code in codes.tolist()] == [getattr(u, name) for u in everything]
    assert [u.key for u in everything.take([3, 0, 3])] == [everything[i].key for i in (3, 0, 3)]


def test_a_table_written_in_many_groups_is_read_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr("shards.index._ROWS_OF_A_GROUP", 5)
    pack_tones(make_recordings(tmp_path / "in", 30), tmp_path / "pack", utterances_per_shard=4)

    table = read_utterances(tmp_path / "pack")

    assert pq.ParquetFile(tmp_path / "pack" / UTTERANCES).num_row_groups > 3
    assert len(table) == len(set(table.texts("key"))) == 30
    assert table.codes("language")[1] == ["English", "Vietnamese"]
    assert [u.shard for u in table] == [
        e.name for e in read_index(tmp_path / "pack").shards for _ in range(e.num_utterances)
    ]


def test_the_fingerprint_tells_other_audio_and_not_another_folder(folder, tmp_path):
    pack_tones(make_recordings(tmp_path / "elsewhere", 12), tmp_path / "same", utterances_per_shard=4)
    pack_tones(make_recordings(tmp_path / "more", 13), tmp_path / "other", utterances_per_shard=4)

    assert read_index(tmp_path / "same").fingerprint == read_index(folder).fingerprint
    assert read_index(tmp_path / "other").fingerprint != read_index(folder).fingerprint


def change(folder: Path, **values: object) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": 1}, "must be of version 2, got 1"),
        ({"num_utterances": 11}, "must agree with its own fingerprint and count"),
        ({"shards": []}, "must agree with its own fingerprint and count"),
        ({"shards": [{"name": "x"}]}, "must be an index of shards"),
        ({"more": 1}, "must be an index of shards"),
    ],
)
def test_an_index_that_was_edited_is_refused(folder, values, message):
    change(folder, **values)

    with pytest.raises(ShardError, match=rf"index\.json {message}"):
        read_index(folder)


def test_an_index_with_the_hash_of_another_shard_is_refused(folder):
    shards = json.loads((folder / INDEX).read_text())["shards"]
    shards[0]["sha256"] = shards[1]["sha256"]
    change(folder, shards=shards)

    with pytest.raises(ShardError, match="must agree with its own fingerprint"):
        read_index(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}"])
def test_an_index_that_is_none_is_refused(folder, text):
    (folder / INDEX).write_text(text)

    with pytest.raises(ShardError, match=r"index\.json must be"):
        read_index(folder)


def test_a_table_of_another_pack_is_refused(folder, tmp_path):
    pack_tones(make_recordings(tmp_path / "in", 11), tmp_path / "other")
    (folder / UTTERANCES).write_bytes((tmp_path / "other" / UTTERANCES).read_bytes())

    with pytest.raises(ShardError, match=r"utterances\.parquet must have sha256"):
        read_utterances(folder)


def test_a_shard_that_the_index_does_not_list_is_named(folder):
    (folder / "train-000099.tar").write_bytes(b"")

    with pytest.raises(ShardError, match=r"train-000099\.tar must be listed in index\.json"):
        verify(folder, quick=True)
