from pathlib import Path

import pytest

from shards.errors import SourceError
from tests.helpers.corpora import cut, make_shar, recording, write_lines


def test_a_cut_of_a_whole_recording_is_the_recording(tmp_path, read):
    manifest = write_lines(tmp_path / "set" / "cuts.jsonl.gz", cut(3))

    [found] = read(manifest)

    assert (found.path, found.name, found.start_seconds, found.told_seconds) == (
        *(f"{tmp_path}/set/rec3.wav", "cut.3", None, 1.0),
    )
    assert (found.language, found.speaker, found.reference, found.source, found.split) == (
        *("Vietnamese", "s3", "số 3", "set", None),
    )


@pytest.mark.parametrize(("start", "seconds"), [(0.0, 0.5), (0.25, 0.75), (0.5, 0.25), (0.5, 1.0)])
def test_any_other_cut_is_a_stretch(tmp_path, read, start, seconds):
    [found] = read(write_lines(tmp_path / "cuts.jsonl", cut(0, start=start, duration=seconds)))

    assert (found.start_seconds, found.told_seconds) == (start, seconds)


@pytest.mark.parametrize(
    ("name", "split"),
    [("librispeech_cuts_dev-clean.jsonl.gz", "dev"), ("cuts_train.jsonl", "train"), ("cuts.jsonl", None)],
)
def test_the_split_is_what_the_name_of_the_manifest_says(tmp_path, read, name, split):
    [found] = read(write_lines(tmp_path / name, cut(0)))

    assert found.split == split


def test_a_folder_with_cuts_is_their_manifest(tmp_path, read):
    write_lines(tmp_path / "in" / "cuts.jsonl.gz", cut(0), cut(1))

    assert [one.name for one in read(tmp_path / "in")] == ["cut.0", "cut.1"]


def test_supervisions_of_a_cut_are_joined_in_their_order(tmp_path, read):
    said = [{"start": 0.5, "text": "two", "speaker": "a"}, {"start": 0.1, "text": "one", "speaker": "b"}]

    [found] = read(write_lines(tmp_path / "cuts.jsonl", cut(0, supervisions=said)))

    assert (found.reference, found.speaker, found.language) == ("one two", None, None)


@pytest.mark.parametrize(
    ("supervisions", "reference"),
    [([], None), ([{"start": 0}], None), ([{"text": "a"}, {"start": 1}], None), ([{"text": " "}], "")],
)
def test_a_cut_of_which_not_all_is_transcribed_has_no_reference(tmp_path, read, supervisions, reference):
    [found] = read(write_lines(tmp_path / "cuts.jsonl", cut(0, supervisions=supervisions)))

    assert found.reference == reference


def with_source(**changes: object) -> dict[str, object]:
    return cut(0, recording=recording(0, {"type": "file", "channels": [0], "source": "a.wav", **changes}))


def with_recording(**changes: object) -> dict[str, object]:
    return cut(0, recording={**recording(0, {"type": "file", "channels": [0], "source": "a.wav"}), **changes})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            with_source(type="command", source="rm -r /"),
            r"cuts\.jsonl:1: type of a recording's source must be 'file', got 'com",
        ),
        (with_source(type="url", source="https://host/a"), r"must be 'file', got 'url'"),
        (with_source(type="memory", source="AAAA"), r"must be 'file', got 'memory'"),
        (
            with_source(type="shar", source=""),
            r"must be 'file', got 'shar'; .*name the folder if this is a Lhotse Shar",
        ),
        (with_source(source="pipe:cat x"), r"cuts\.jsonl:1: a place must be a path or an address"),
        (with_recording(sources=[]), r"a recording must have one source, got \[\]"),
        (with_recording(transforms=[{"name": "Speed"}]), r"transforms must be absent, got 'Speed'; write the audio"),
        (with_recording(channel_ids=[0, 1]), r"a recording must have one channel, got channel 0 of \[0, 1\]"),
        (cut(0, type="MixedCut"), r"type must be MonoCut with a recording, got 'MixedCut'"),
        (cut(0, recording=None), r"type must be MonoCut with a recording"),
        (cut(0, start=-1), r"start must be a number of seconds from 0, got -1"),
        (cut(0, duration=0), r"must tell start and duration of a cut"),
        (cut(0, id=""), r"must have an id"),
        (cut(0, supervisions=["a"]), r"supervisions must be a list of objects"),
        (
            recording(0, {"type": "file", "source": "a.wav"}),
            r"must be a cut, got a recording; make cuts of both: lhotse cut",
        ),
        ({"id": "s", "recording_id": "r", "start": 0}, r"must be a cut, got a supervision; make cuts of both"),
    ],
)
def test_a_cut_that_is_no_stretch_of_a_file_is_refused(tmp_path, read, row, message):
    with pytest.raises(SourceError, match=message):
        read(write_lines(tmp_path / "cuts.jsonl", row))


def test_resampling_is_left_to_this_project(tmp_path, read):
    resample = {"name": "Resample", "kwargs": {"source_sampling_rate": 8000, "target_sampling_rate": 16000}}

    assert len(read(write_lines(tmp_path / "cuts.jsonl", with_recording(transforms=[resample])))) == 1


def test_a_shar_is_read_where_its_audio_lies(tmp_path, read, tone_at):
    folder = make_shar(tmp_path / "shar_test")

    found = read(folder)

    assert [one.name for one in found] == ["cut.0", "cut.1", "cut.2"]
    assert [Path(one.path).name for one in found] == ["recording.000000.tar"] * 2 + ["recording.000001.tar"]
    assert [tone_at(one) for one in found] == [0, 1, 2]
    assert [(one.reference, one.speaker, one.language, one.split) for one in found] == [
        (f"số {number}", f"s{number}", "Vietnamese", "test") for number in range(3)
    ]
    assert {(one.start_seconds, one.told_seconds) for one in found} == {(None, 1.0)}


def test_a_shar_in_one_piece_has_no_numbers(tmp_path, read, tone_at):
    folder = make_shar(tmp_path / "shar")
    for name in ("cuts.000000.jsonl.gz", "recording.000000.tar"):
        (folder / name).rename(folder / name.replace(".000000", ""))
    for name in ("cuts.000001.jsonl.gz", "recording.000001.tar"):
        (folder / name).unlink()

    assert [tone_at(one) for one in read(folder)] == [0, 1]


def test_a_shar_without_audio_is_refused(tmp_path, read):
    folder = make_shar(tmp_path / "shar")
    (folder / "recording.000001.tar").rename(folder / "features.000001.tar")

    with pytest.raises(SourceError, match=r"cuts\.000001\.jsonl\.gz must have its audio in recording\.000001\.tar"):
        read(folder)


def test_a_cut_whose_audio_is_not_in_its_tar_is_named(tmp_path, read):
    folder = make_shar(tmp_path / "shar")
    write_lines(folder / "cuts.000001.jsonl.gz", cut(0), cut(2))

    with pytest.raises(
        SourceError, match=r"cuts\.000001\.jsonl\.gz:1: id must be that of audio in .*1\.tar, got 'cut\.0'"
    ):
        read(folder)
