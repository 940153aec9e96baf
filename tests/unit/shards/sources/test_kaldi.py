import pytest

from shards.errors import SourceError
from tests.helpers.corpora import make_kaldi, write_lines


def test_segments_are_stretches_of_recordings_with_what_the_other_files_say(tmp_path, read):
    folder = make_kaldi(tmp_path / "train_si284")

    found = read(folder)

    assert [(one.name, one.path, one.start_seconds, one.told_seconds) for one in found] == [
        ("ann-0", f"{folder}/wav/rec0.wav", 0.0, 0.4),
        ("ann-1", f"{folder}/wav/rec0.wav", 0.4, 0.6),
        ("bob-0", f"{folder}/wav/rec1.wav", 0.25, None),  # -1: to the end
    ]
    assert [(one.language, one.speaker, one.reference, one.split) for one in found] == [
        ("Vietnamese", "ann", "số không", "train"),
        (None, "ann", "", "train"),
        ("English", None, None, "train"),
    ]
    assert found[2].where == f"{folder}/segments:3"


def test_without_segments_the_recordings_are_the_utterances(tmp_path, read):
    folder = make_kaldi(tmp_path / "data")
    (folder / "segments").unlink()
    write_lines(folder / "text", "rec0 zero", "rec1 one")
    write_lines(folder / "utt2spk", "rec0 ann", "rec1 bob")

    found = read(folder)

    assert [(one.name, one.start_seconds, one.told_seconds, one.reference, one.speaker) for one in found] == [
        ("rec0", None, None, "zero", "ann"),
        ("rec1", None, None, "one", "bob"),
    ]


@pytest.mark.parametrize(
    ("folder", "split"),
    [
        ("dev_other", "dev"),
        ("test", "test"),
        ("eval2000", "test"),
        ("train_dev", None),
        ("data", None),
        ("trainer", None),
    ],
)
def test_the_split_is_what_the_folder_says(tmp_path, read, folder, split):
    assert {one.split for one in read(make_kaldi(tmp_path / folder))} == {split}


def test_keys_are_in_the_order_of_bytes_and_not_of_letters(tmp_path, read):
    folder = make_kaldi(tmp_path / "data")
    (folder / "segments").unlink()
    keys = sorted(["Z", "a", "a-b", "aB", "a_", "é", "語"], key=str.encode)
    write_lines(folder / "wav.scp", *[f"{key} {key}.wav" for key in keys])
    write_lines(folder / "text", *[f"{key} text of {key}" for key in keys if key != "aB"], "語語 of nothing")
    (folder / "utt2spk").unlink()

    found = read(folder, language="vi")

    assert [(one.name, one.reference) for one in found] == [
        (key, None if key == "aB" else f"text of {key}") for key in keys
    ]


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        (
            "wav.scp",
            ["rec0 a.wav", "rec1 sph2pipe a.sph |"],
            r"wav\.scp:2 must name a file, got a shell command",
        ),
        ("wav.scp", ["rec0 a.ark:4813", "rec1 a.wav"], r"wav\.scp:1 must name a file, got 'a\.ark:4813'"),
        ("wav.scp", ["rec0 -", "rec1 a.wav"], r"wav\.scp:1 must name a file, got '-'"),
        ("wav.scp", ["rec0", "rec1 a.wav"], r"wav\.scp:1 must name a file, got ''"),
        ("wav.scp", ["rec0 gs://a/b.wav"], r"wav\.scp:1: an address must begin with one of"),
        ("segments", ["ann-0 rec9 0 1"], r"segments:1 must be an utterance, a recording of wav\.scp"),
        ("segments", ["ann-0 rec0 0 1 0"], r"segments:1 must be an utterance, .*got 'rec0 0 1 0'"),
        ("segments", ["ann-0 rec0 zero 1"], r"segments:1 must tell seconds as numbers, got 'zero'"),
        ("segments", ["ann-0 rec0 1 1"], r"segments:1 must end behind its beginning at 1 s, got 1;"),
        ("segments", ["ann-0 rec0 0 nan"], r"segments:1 must tell seconds as numbers, got 'nan'"),
        ("segments", ["ann-0 rec0 -1 1"], r"segments:1: the beginning of a segment must be .*from 0, got -1"),
        (
            "segments",
            ["b rec0 0 1", "a rec0 0 1"],
            r"segments:2 must follow in the order of bytes on 'b', got 'a'; so",
        ),
        ("segments", ["a rec0 0 1", "a rec0 0 1"], r"segments:2 must follow in the order of bytes on 'a', got 'a'"),
        ("text", ["bob-0 x", "ann-1 y"], r"text:2 must follow in the order of bytes on 'bob-0'"),
        ("utt2lang", ["ann-0 sw_ke"], r"segments:1: language must be one of .*, got 'sw_ke'"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, read, name, lines, message):
    folder = make_kaldi(tmp_path / "data")
    write_lines(folder / name, *lines)

    with pytest.raises(SourceError, match=message):
        read(folder)


def test_a_line_that_is_not_utf8_is_named(tmp_path, read):
    folder = make_kaldi(tmp_path / "data")
    (folder / "text").write_bytes(b"ann-0 \xff\n")

    with pytest.raises(SourceError, match=r"text:1 must be in UTF-8"):
        read(folder)
