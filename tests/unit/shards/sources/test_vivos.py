import pytest

from shards.errors import SourceError
from tests.helpers.corpora import make_vivos, write_lines


def test_vivos_is_vietnamese_with_the_speaker_in_the_key(tmp_path, read):
    root = make_vivos(tmp_path / "vivos")

    found = read(root)

    assert [(one.path, one.name, one.speaker, one.reference, one.split) for one in found] == [
        (f"{root}/train/waves/VIVOSSPK01/VIVOSSPK01_R000.wav", "VIVOSSPK01_R000", "VIVOSSPK01", "SỐ 0", "train"),
        (f"{root}/test/waves/VIVOSDEV01/VIVOSDEV01_R001.wav", "VIVOSDEV01_R001", "VIVOSDEV01", "SỐ 1", "test"),
    ]
    assert {(one.language, one.source) for one in found} == {("Vietnamese", "vivos")}


def test_a_split_can_be_an_input_by_itself(tmp_path, read):
    root = make_vivos(tmp_path / "vivos")

    assert [(one.name, one.split, one.source) for one in read(root / "test")] == [("VIVOSDEV01_R001", "test", "vivos")]


@pytest.mark.parametrize("key", ["VIVOSSPK01", "../../x_1"])
def test_a_line_that_is_not_of_vivos_is_named(tmp_path, read, key):
    root = make_vivos(tmp_path / "vivos")
    write_lines(root / "train" / "prompts.txt", f"{key} TEXT")

    with pytest.raises(SourceError, match=r"prompts\.txt:1 must begin with <speaker>_<number>"):
        read(root)
