import pytest

from shards.errors import SourceError
from tests.helpers.corpora import CV_COLUMNS, make_common_voice, write_lines


def test_the_tables_of_the_splits_are_read_and_quotation_marks_are_text(tmp_path, read):
    folder = make_common_voice(tmp_path / "cv-corpus-22.0" / "vi")

    found = read(folder)

    assert [(one.path, one.name, one.speaker, one.reference, one.split) for one in found] == [
        (f"{folder}/clips/common_voice_vi_{number}.mp3", f"common_voice_vi_{number}", f"speaker{number}", text, split)
        for number, (text, split) in enumerate([('Số "0', "train"), ('Số "1', "dev"), ('Số "2', "test")])
    ]
    assert {(one.language, one.source) for one in found} == {("Vietnamese", "cv-corpus-22.0-vi")}
    assert found[1].where == f"{folder}/dev.tsv:2"


def test_what_is_validated_is_read_only_where_there_are_no_splits(tmp_path, read):
    folder = make_common_voice(tmp_path / "vi")
    for name in ("train.tsv", "dev.tsv", "test.tsv"):
        (folder / name).unlink()

    assert [(one.name[-1], one.split) for one in read(folder)] == [(str(number), None) for number in range(4)]


def test_without_a_locale_the_language_is_that_of_the_folder(tmp_path, read):
    folder = make_common_voice(tmp_path / "sv-SE")
    for name in ("train", "dev", "test"):
        write_lines(folder / f"{name}.tsv", "client_id\tpath\tsentence", f"a\t{name}.mp3\thej")

    assert {one.language for one in read(folder)} == {"Swedish"}


def test_a_locale_that_the_model_lacks_is_refused(tmp_path, read):
    folder = make_common_voice(tmp_path / "nan-tw")
    write_lines(folder / "dev.tsv", CV_COLUMNS, "a\tx.mp3\tid\ttext\t2\t0\tnan-tw")

    with pytest.raises(SourceError, match=r"dev\.tsv:2: language must be one of .*, got 'nan-tw'; .*leave recordings"):
        read(folder)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["path\tsentence", "x.mp3\ta"], r"train\.tsv:1 must have a column client_id"),
        ([CV_COLUMNS, "a\tx.mp3\tid\ttext\t2\t0"], r"train\.tsv:2 must have 7 fields between tabs, got 6"),
        ([CV_COLUMNS, "a\t../x.mp3\tid\ttext\t2\t0\tvi"], r"train\.tsv:2: path must be the name of a file in clips"),
        ([CV_COLUMNS, "a\t\tid\ttext\t2\t0\tvi"], r"train\.tsv:2: path must be the name of a file in clips, got ''"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, read, lines, message):
    folder = make_common_voice(tmp_path / "vi")
    write_lines(folder / "train.tsv", *lines)

    with pytest.raises(SourceError, match=message):
        read(folder)
