import pytest

from shards.errors import SourceError
from tests.helpers.corpora import make_fleurs, write_lines


def test_fleurs_has_the_language_of_its_folder_and_durations_in_samples(tmp_path, read):
    folder = make_fleurs(tmp_path / "fleurs" / "vi_vn")

    found = read(folder)

    assert [(one.path, one.name, one.reference, one.split) for one in found] == [
        (f"{folder}/audio/{split}/98{number}.wav", f"vi_vn/98{number}", f"số {number}", split)
        for number, split in enumerate(["train", "dev", "test"])
    ]
    assert {(one.language, one.source, one.speaker, one.told_seconds) for one in found} == {
        ("Vietnamese", "fleurs-vi_vn", None, 0.5)
    }


def test_several_languages_are_told_apart(tmp_path, read):
    for name in ("cmn_hans_cn", "yue_hant_hk", "fil_ph"):
        make_fleurs(tmp_path / "fleurs" / name, splits=("test",))

    found = read(tmp_path / "fleurs")

    assert [(one.language, one.name) for one in found] == [
        *[("Chinese", "cmn_hans_cn/980"), ("Filipino", "fil_ph/980"), ("Cantonese", "yue_hant_hk/980")]
    ]


@pytest.mark.parametrize("name", ["nb_no", "sw_ke"])
def test_a_language_that_the_model_lacks_is_refused_by_name(tmp_path, read, name):
    make_fleurs(tmp_path / "fleurs" / "vi_vn")
    make_fleurs(tmp_path / "fleurs" / name)

    with pytest.raises(
        SourceError, match=rf"{name}: language must be one of .*, got '{name}'; .*leave recordings in other"
    ):
        read(tmp_path / "fleurs", language="vi")


def test_audio_that_is_still_packed_is_told(tmp_path, read):
    folder = make_fleurs(tmp_path / "vi_vn")
    (folder / "audio" / "dev").rename(folder / "audio" / "dev.tar.gz")

    with pytest.raises(SourceError, match=r"audio must have a folder dev, got none; unpack dev\.tar\.gz there"):
        read(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1\tx.wav\tA\ta\ta |\tMALE", r"dev\.tsv:1 must have 7 fields between tabs"),
        ("1\tx.wav\tA\ta\ta |\tmany\tMALE", r"dev\.tsv:1 must have 7 fields between tabs, the sixth a number"),
        ("1\t../x.wav\tA\ta\ta |\t8000\tMALE", r"dev\.tsv:1 must name a file in .*, got '\.\./x\.wav'"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, read, line, message):
    folder = make_fleurs(tmp_path / "vi_vn")
    write_lines(folder / "dev.tsv", line)

    with pytest.raises(SourceError, match=message):
        read(folder)
