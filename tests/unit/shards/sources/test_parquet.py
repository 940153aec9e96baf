import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.errors import SourceError
from shards.sources.keys import Found
from tests.helpers.corpora import tone_bytes


def audio(*numbers: int, with_path: bool = True) -> list[dict[str, object]]:
    return [{"bytes": tone_bytes(number), "path": f"clip{number}.flac" if with_path else None} for number in numbers]


def write_table(path: Path, columns: dict[str, object], **settings: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **settings)
    return path


def test_audio_is_read_from_the_spool_by_offset(tmp_path, read, tone_at):
    numbers = list(range(40))
    columns = {
        "audio": audio(*numbers),
        "sentence": [f"số {number}" for number in numbers],
        "client_id": [f"s{number % 3}" for number in numbers],
        "locale": ["vi"] * 40,
        "duration": [0.4] * 40,
        "gender": ["female"] * 40,
    }
    table = write_table(tmp_path / "set" / "train-00000-of-00004.parquet", columns, row_group_size=7)

    found = read(table)

    assert [tone_at(one) for one in found] == numbers
    assert [(one.name, one.reference, one.speaker) for one in found] == [
        (f"clip{number}", f"số {number}", f"s{number % 3}") for number in numbers
    ]
    assert {(one.language, one.split, one.told_seconds, one.source) for one in found} == {
        ("Vietnamese", "train", 0.4, "set")
    }
    assert {Path(one.path).parent for one in found} == {tmp_path / "spool"}
    assert found[7].where == f"{table}: row 8"


def test_plain_bytes_are_audio_too_and_rows_get_numbers(tmp_path, read, tone_at):
    table = write_table(tmp_path / "a.parquet", {"audio": pa.array([tone_bytes(0), tone_bytes(1)], pa.large_binary())})

    found = read(table)

    assert [(one.name, tone_at(one)) for one in found] == [("a-000000", 0), ("a-000001", 1)]


def test_a_folder_is_read_in_the_order_of_paths_with_split_and_language_of_folders(tmp_path, read):
    for name in ("german/validation-00000-of-00001", "polish/test/0000", "german/train-00000-of-00001"):
        write_table(tmp_path / "in" / f"{name}.parquet", {"audio": audio(len(name), with_path=False)})

    found = read(tmp_path / "in", language="vi")

    assert [(one.language, one.split) for one in found] == [("German", "train"), ("German", "dev"), ("Polish", "test")]


def test_a_language_column_counts_more_than_a_folder(tmp_path, read):
    write_table(tmp_path / "in" / "german" / "a.parquet", {"audio": audio(0, 1), "language": ["English", None]})

    assert [one.language for one in read(tmp_path / "in", language="vi")] == ["English", "Vietnamese"]


def test_numbers_of_class_labels_are_names(tmp_path, read):
    features = {"lang_id": {"names": ["af_za", "vi_vn"], "_type": "ClassLabel"}, "text": {"_type": "Value"}}
    table = pa.table({"audio": audio(0, 1), "lang_id": [1, 1], "text": ["a", None]})
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(about), tmp_path / "a.parquet")

    found = read(tmp_path / "a.parquet")

    assert [(one.language, one.reference) for one in found] == [("Vietnamese", "a"), ("Vietnamese", None)]


def spooled(found: list[Found]) -> dict[str, int]:
    return {path: os.stat(path).st_mtime_ns for path in {one.path for one in found}}


def test_the_spool_is_written_once(tmp_path, read):
    table = write_table(tmp_path / "a.parquet", {"audio": audio(0, 1)})

    first, second = read(table), read(table)

    assert first == second
    assert spooled(first) == spooled(second)
    assert sorted(path.suffix for path in (tmp_path / "spool").iterdir()) == [".bin", ".sizes"]


def test_another_file_of_the_same_name_is_spooled_anew(tmp_path, read, tone_at):
    first = read(write_table(tmp_path / "a.parquet", {"audio": audio(0, 1)}))
    second = read(write_table(tmp_path / "a.parquet", {"audio": audio(2, 3, 4)}))

    assert first[0].path != second[0].path
    assert [tone_at(one) for one in second] == [2, 3, 4]


@pytest.mark.parametrize("suffix", [".bin", ".sizes"])
def test_a_spool_that_was_cut_is_written_anew(tmp_path, read, tone_at, suffix):
    table = write_table(tmp_path / "a.parquet", {"audio": audio(0, 1)})
    [path] = {one.path for one in read(table)}
    Path(path).with_suffix(suffix).write_bytes(b"")

    assert [tone_at(one) for one in read(table)] == [0, 1]


def test_an_interrupted_spool_has_no_name(tmp_path, read):
    columns = {"audio": [*audio(0), {"bytes": None, "path": "/home/me/a.flac"}]}

    with pytest.raises(SourceError, match=r"a\.parquet: row 2 must hold a file's bytes, got none; embed the audio"):
        read(write_table(tmp_path / "a.parquet", columns))

    assert list((tmp_path / "spool").iterdir()) == []


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"]}, r"a\.parquet must have a column audio of files, .*got \['text'\]"),
        ({"audio": ["a.wav"]}, r"must have a column audio of files, .*got string"),
        ({"audio": [{"array": [0.0], "sampling_rate": 16000}]}, r"must have a column audio of files, .*got struct"),
        ({"audio": audio(0), "language": ["sw_ke"]}, r"a\.parquet: row 1: language must be one of .*, got 'sw_ke'"),
        ({"audio": audio(0), "text": [["a"]]}, r"a\.parquet: row 1: text must be text, got \['a'\]"),
    ],
)
def test_a_table_that_breaks_a_rule_is_refused_by_name(tmp_path, read, columns, message):
    with pytest.raises(SourceError, match=message):
        read(write_table(tmp_path / "a.parquet", columns))


@pytest.mark.parametrize("size", [0, 100, -100])
def test_a_table_that_was_cut_is_refused(tmp_path, read, size):
    table = write_table(tmp_path / "a.parquet", {"audio": audio(0, 1)})
    table.write_bytes(table.read_bytes()[:size])

    with pytest.raises(SourceError, match=r"a\.parquet must be a parquet file, got .*copy or download it again"):
        read(table)
