from dataclasses import fields

import numpy as np
import pytest

from shards.columns import Columns, batch_of, records_of, schema_of
from shards.schema import Recording, Utterance

RECORDINGS = [
    Recording(
        path=f"/in/{number}.wav",
        key=f"k{number}",
        source="s",
        language=("Thai", None, "Czech")[number % 3],
        told_seconds=None if number % 4 == 0 else number / 4,
        offset_bytes=None if number % 2 else 512 * number,
    )
    for number in range(20_000)  # more than are made at a time
]


@pytest.fixture(scope="module")
def columns() -> Columns[Recording]:
    return Columns.of(Recording, RECORDINGS)


def test_records_come_back_one_by_one_in_slices_and_by_iteration(columns):
    assert len(columns) == 20_000
    assert list(columns) == RECORDINGS
    assert (columns[0], columns[8_192], columns[-1]) == (RECORDINGS[0], RECORDINGS[8_192], RECORDINGS[-1])
    assert list(columns[8_190:8_195]) == RECORDINGS[8_190:8_195]
    assert list(columns[::-3_000]) == RECORDINGS[::-3_000]
    assert list(columns.take([5, 5, 19_999, 0])) == [RECORDINGS[number] for number in (5, 5, 19_999, 0)]
    assert not columns[7:7] and columns[:3] == columns[:3] and columns[:3] != columns[1:4]


@pytest.mark.parametrize("place", [20_000, -20_001])
def test_a_place_beyond_the_end_is_an_error_as_of_a_list(columns, place):
    with pytest.raises(IndexError):
        columns[place]


def test_numbers_are_arrays_and_absent_ones_nan(columns):
    assert columns.numbers("told_seconds")[:6].tolist()[1:4] == [0.25, 0.5, 0.75]
    assert np.isnan(columns.numbers("told_seconds")[[0, 4]]).all()


def test_codes_are_places_in_the_alphabet_and_none_is_the_last(columns):
    codes, names = columns.codes("language")

    assert names == ["Czech", "Thai", None]
    assert [names[code] for code in codes.tolist()] == [recording.language for recording in RECORDINGS]
    assert columns[:0].codes("language")[1] == []
    assert columns.take([0, 3]).codes("language")[1] == ["Thai"]  # what is not there has no name


def test_codes_of_a_table_in_pieces_agree_over_the_pieces():
    import pyarrow as pa

    parts = [RECORDINGS[:3], RECORDINGS[2:9], RECORDINGS[1:2]]
    whole = Columns(Recording, pa.Table.from_batches([batch_of(Recording, part) for part in parts]))

    codes, names = whole.codes("language")

    assert [names[code] for code in codes.tolist()] == [recording.language for part in parts for recording in part]


def test_a_path_that_is_not_utf8_comes_back_as_it_was():
    odd = Recording(path="/in/\udcff.wav", key="k", source="s")

    assert next(records_of(Recording, batch_of(Recording, [odd]))) == odd


@pytest.mark.parametrize("kind", [Recording, Utterance])
def test_there_is_a_column_for_every_field_in_its_order(kind):
    assert schema_of(kind).names == [field.name for field in fields(kind)]
