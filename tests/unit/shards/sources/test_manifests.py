import json
from pathlib import Path

import pytest

from shards.errors import SourceError
from shards.sources.keys import clean_key
from tests.helpers.corpora import write_lines


@pytest.fixture
def read_one(tmp_path, read):
    """Read a manifest of one line."""

    def read_row(row: object, *, kind: str = "auto"):
        [found] = read(write_lines(tmp_path / "set" / "m.jsonl", row), kind=kind)
        return found

    return read_row


@pytest.mark.parametrize("field", ["audio", "audio_filepath", "path", "audio_path"])
def test_paths_are_relative_to_the_manifest(tmp_path, read_one, field):
    found = read_one({field: "a/b.wav"})

    assert (Path(found.path), clean_key(found.name), found.source) == (tmp_path / "set/a/b.wav", "a-b", "set")


@pytest.mark.parametrize("audio", ["/some/where.wav", "https://host/x.wav", "s3://bucket/x.wav"])
def test_absolute_paths_and_addresses_stay_as_they_are(read_one, audio):
    assert read_one({"audio": audio}).path == audio


@pytest.mark.parametrize("reference", ["text", "reference", "transcript"])
@pytest.mark.parametrize("language", ["language", "lang"])
@pytest.mark.parametrize("speaker", ["speaker", "speaker_id"])
def test_fields_have_their_usual_names(read_one, reference, language, speaker):
    row = {"audio": "x.wav", reference: "xin chào", language: "vi_vn", speaker: 17, "split": "dev", "key": "My.Key"}

    found = read_one(row)

    assert (found.reference, found.language, found.speaker, found.split, clean_key(found.name)) == (
        *("xin chào", "Vietnamese", "17", "dev", "my_key"),
    )


@pytest.mark.parametrize(
    ("text", "language", "reference"),
    [
        ("language English<asr_text>hello", "English", "hello"),
        ("language None<asr_text>", None, ""),
        ("language Chinese<asr_text>你好<asr_text>", "Chinese", "你好<asr_text>"),
        ("the language English is", None, "the language English is"),
    ],
)
def test_the_tag_of_qwens_fine_tuning_files_is_taken_off(read_one, text, language, reference):
    found = read_one({"audio": "x.wav", "text": text})

    assert (found.language, found.reference) == (language, reference)


@pytest.mark.parametrize(
    ("fields", "reference"),
    [
        ({}, None),
        ({"text": None}, None),
        ({"text": ""}, ""),
        ({"text": " \n"}, ""),
        ({"text": "", "reference": "a"}, "a"),
    ],
)
def test_blank_text_is_silence_and_no_text_is_no_reference(read_one, fields, reference):
    assert read_one({"audio": "x.wav", **fields}).reference == reference


@pytest.mark.parametrize(
    ("fields", "start", "seconds", "key"),
    [
        ({"duration": 1.5}, None, 1.5, "a"),
        ({"duration": 0}, None, None, "a"),
        ({"duration": None}, None, None, "a"),
        ({"duration": 1.5, "offset": None}, None, 1.5, "a"),
        ({"duration": 1.5, "offset": 0}, 0.0, 1.5, "a-00000000"),
        ({"duration": 1.5, "offset": 2.25}, 2.25, 1.5, "a-00002250"),
        ({"offset": 2.25}, 2.25, None, "a-00002250"),
        ({"duration": 1.5, "offset": 2.25, "key": "k"}, 2.25, 1.5, "k"),
    ],
)
@pytest.mark.parametrize("field", ["audio", "audio_filepath"])
def test_an_offset_of_0_too_makes_a_line_a_stretch_of_its_file(read_one, field, fields, start, seconds, key):
    found = read_one({field: "a.wav", **fields})

    assert (found.start_seconds, found.told_seconds, clean_key(found.name)) == (start, seconds, key)


def test_stretches_of_one_file_are_different_recordings(tmp_path, read):
    rows = [{"audio_filepath": "a.wav", "offset": start, "duration": 1.0} for start in (0, 1, 2.5)]

    found = read(write_lines(tmp_path / "m.json", *rows))

    assert [one.start_seconds for one in found] == [0.0, 1.0, 2.5]


def test_lines_that_nemo_leaves_out_are_left_out(tmp_path, read):
    rows = [{"audio_filepath": "a.wav", "_skipme": True}, {"audio_filepath": "b.wav", "_skipme": False}]

    assert [one.name for one in read(write_lines(tmp_path / "m.json", *rows))] == ["b"]


@pytest.mark.parametrize(("target", "reference"), [("en", "hello"), ("de", None)])
def test_a_translation_is_no_reference(read_one, target, reference):
    row = {"audio_filepath": "a.wav", "text": "hello", "source_lang": "en", "target_lang": target}

    found = read_one(row)

    assert (found.language, found.reference) == ("English", reference)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"audio": "a.wav", "duration": "1.5"}', r"m.jsonl:2: duration must be a number of seconds, got '1\.5'"),
        ("{", r"m.jsonl:2 must be a JSON object in UTF-8"),
        ("[" * 100_000, r"m.jsonl:2 must be a JSON object in UTF-8"),
        ("[]", r"m.jsonl:2 must be a JSON object, got list"),
        ('{"text": "x"}', r"m.jsonl:2 must name its audio as one of audio, .*got \['text'\]"),
        ('{"audio": ["a"]}', r"m.jsonl:2: audio must be text"),
        ('{"audio": "b.wav", "lang": "tlh"}', r"m.jsonl:2: language must be .* got 'tlh'; .*leave recordings in other"),
        ('{"audio": "b.wav", "text": "\\ud800"}', r"m.jsonl:2: text must be valid Unicode"),
        ('{"audio": "b.wav", "offset": -1.5}', r"m.jsonl:2: offset must be a number of seconds from 0, got -1.5"),
        ('{"audio": "b.wav", "offset": "1"}', r"m.jsonl:2: offset must be a number of seconds from 0, got '1'"),
        ('{"audio": "b.wav", "offset": 1, "duration": 0}', r"m.jsonl:2: duration of a stretch must be above 0, got 0"),
        ('{"audio": "pipe:cat x"}', r"m.jsonl:2: a place must be a path or an address, got 'pipe:cat x'"),
        ('{"audio": "sox x.wav - |"}', r"m.jsonl:2: a place must be a path or an address"),
        ('{"audio": "FILE:///etc/x.wav"}', r"m.jsonl:2: a place must be a path or an address"),
        ('{"audio": "data:audio/wav;base64,AA"}', r"m.jsonl:2: a place must be a path or an address"),
        ('{"audio": "gs://bucket/x.wav"}', r"m.jsonl:2: an address must begin with one of http, https, s3"),
        ('{"audio": "https://host/a.zip::x.wav"}', r"m.jsonl:2: an address must .*hold no '::'"),
    ],
)
@pytest.mark.parametrize("kind", ["qwen", "nemo"])
def test_a_bad_line_is_named_by_file_and_line(tmp_path, read, kind, line, message):
    manifest = write_lines(tmp_path / "m.jsonl", {"audio": "a.wav"}, line)

    with pytest.raises(SourceError, match=message):
        read(manifest, kind=kind)


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path, read):
    (tmp_path / "m.jsonl").write_bytes(b'\n{"audio": "\xff"}\n')

    with pytest.raises(SourceError, match=r"m.jsonl:2 must be a JSON object in UTF-8"):
        read(tmp_path / "m.jsonl")


def test_a_packed_manifest_is_read_as_it_is(tmp_path, read):
    manifest = write_lines(tmp_path / "m.jsonl.gz", {"audio": "a.wav"}, {"audio": "b.wav"})

    assert [one.where for one in read(manifest)] == [f"{manifest}:1", f"{manifest}:2"]


def test_a_packed_manifest_that_was_cut_is_refused(tmp_path, read):
    manifest = write_lines(tmp_path / "m.jsonl.gz", *[{"audio": f"{number * 7919}.wav"} for number in range(500)])
    manifest.write_bytes(manifest.read_bytes()[:-40])

    with pytest.raises(SourceError, match=r"m\.jsonl\.gz:\d+ must be readable, got .*copy or download it again"):
        read(manifest)


def test_names_of_files_that_are_not_utf8_can_be_read(tmp_path, read):
    name = b"\xe9.wav".decode(errors="surrogateescape")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(b"")

    [found] = read(tmp_path / "in")

    assert found.path == str(tmp_path / "in" / name)
    assert json.dumps(clean_key(found.name)) == f'"{clean_key(found.name)}"'
