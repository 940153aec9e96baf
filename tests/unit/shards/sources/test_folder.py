from pathlib import Path

import pytest

from shards.errors import SourceError
from shards.sources.keys import clean_key
from tests.helpers.tones import write_tone


def test_a_folder_gives_its_audio_in_the_order_of_paths(tmp_path, read):
    for name in ("b/2.WAV", "a/10.flac", "a/2.flac", "c.txt", "b/.hidden.wav", ".git/x.wav"):
        write_tone((tmp_path / "in" / name).with_suffix(".wav"), 0).rename(tmp_path / "in" / name)

    found = read(tmp_path / "in", language="English")

    assert [clean_key(one.name) for one in found] == ["a-10", "a-2", "b-2"]
    assert {(one.source, one.speaker, one.language, one.split) for one in found} == {("in", None, "English", None)}
    assert all(Path(one.path).is_file() for one in found)


def test_a_folder_behind_a_link_is_not_entered(tmp_path, read):
    write_tone(tmp_path / "in" / "a" / "x.wav", 0)
    (tmp_path / "in" / "a" / "loop").symlink_to(tmp_path / "in")

    assert [one.name for one in read(tmp_path / "in")] == ["a/x"]


def test_a_folder_without_audio_is_told_with_the_suffixes_that_are_known(tmp_path, read):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("")

    with pytest.raises(SourceError, match=r"must each hold recordings, got none in .*; known suffixes: .*\.flac"):
        read(tmp_path / "in")
