import pytest

from shards.errors import SourceError
from tests.helpers.corpora import make_librispeech, make_mls, write_lines
from tests.helpers.tones import write_tone


def test_librispeech_is_english_with_speakers_of_folders_and_words_of_splits(tmp_path, read):
    root = make_librispeech(tmp_path / "LibriSpeech")

    found = read(root)

    assert [(one.path, one.name, one.speaker, one.reference, one.split) for one in found] == [
        (f"{root}/test-other/367/130732/367-130732-0000.flac", "367-130732-0000", "367", "TWO", "test"),
        (f"{root}/train-clean-100/103/1240/103-1240-0000.flac", "103-1240-0000", "103", "ZERO ZERO", "train"),
        (f"{root}/train-clean-100/103/1240/103-1240-0001.flac", "103-1240-0001", "103", None, "train"),
    ]
    assert {(one.language, one.source) for one in found} == {("English", "LibriSpeech")}
    assert found[1].where == f"{root}/train-clean-100/103/1240/103-1240.trans.txt:1"


def test_a_split_can_be_an_input_by_itself(tmp_path, read):
    root = make_librispeech(tmp_path / "LibriSpeech")

    assert [one.split for one in read(root / "train-clean-100")] == ["train", "train"]


def test_a_transcript_without_audio_is_named(tmp_path, read):
    root = make_librispeech(tmp_path / "LibriSpeech")
    (root / "test-other/367/130732/367-130732-0000.flac").unlink()

    with pytest.raises(SourceError, match=r"367-130732\.trans\.txt:1 must be about audio in its folder, got '367-1307"):
        read(root)


def test_mls_has_the_language_of_its_folder(tmp_path, read):
    root = make_mls(tmp_path / "mls_german")

    found = read(root)

    assert [(one.path, one.name, one.speaker, one.reference, one.split) for one in found] == [
        (f"{root}/train/audio/100/7/100_7_000000.flac", "100_7_000000", "100", "die nummer 0", "train"),
        (f"{root}/dev/audio/101/7/101_7_000000.flac", "101_7_000000", "101", "die nummer 1", "dev"),
    ][::-1]
    assert {(one.language, one.source) for one in found} == {("German", "mls_german")}


@pytest.mark.parametrize(
    ("name", "language"),
    [("mls_polish_opus", "Polish"), ("mls_portuguese", "Portuguese"), ("corpus", "Thai"), ("mls", "Thai")],
)
def test_mls_under_another_name_has_the_default_language(tmp_path, read, name, language):
    root = make_mls(tmp_path / name)

    assert {one.language for one in read(root, language="th")} == {language}
    assert {one.language for one in read(root / "train", language="th")} == {language}


def test_mls_may_be_opus(tmp_path, read):
    root = make_mls(tmp_path / "mls_german_opus")
    for split, number in (("train", 100), ("dev", 101)):
        audio = root / f"{split}/audio/{number}/7/{number}_7_000000.flac"
        audio.unlink()
        write_tone(audio.with_suffix(".opus"), number, rate_hz=16_000)

    assert [one.path[-5:] for one in read(root)] == [".opus", ".opus"]


def test_mls_of_a_language_that_the_model_lacks_is_refused(tmp_path, read):
    root = make_mls(tmp_path / "mls_basque")

    with pytest.raises(SourceError, match=r"mls_basque: language must be one of .*, got 'basque'; .*leave recordings"):
        read(root)


@pytest.mark.parametrize("key", ["100_7", "../7_0", "100_7_0_0"])
def test_a_line_that_is_not_of_mls_is_named(tmp_path, read, key):
    root = make_mls(tmp_path / "mls_german")
    write_lines(root / "dev" / "transcripts.txt", f"{key}\ttext")

    with pytest.raises(SourceError, match=r"transcripts\.txt:1 must begin with <speaker>_<book>_<number>"):
        read(root)
