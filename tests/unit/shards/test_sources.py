import json
import os
from pathlib import Path

import pytest

from shards.errors import SourceError
from shards.index import read_utterances
from shards.sources import read_sources
from shards.sources.keys import MAX_KEY_LENGTH, clean_key
from tests.helpers.packing import pack_tones
from tests.helpers.tones import write_tone


def write_manifest(path: Path, *rows: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def read_one(tmp_path: Path, row: object, *, default_language: str | None = None):
    [recording] = read_sources([write_manifest(tmp_path / "set" / "m.jsonl", row)], default_language=default_language)
    return recording


@pytest.mark.parametrize("field", ["audio", "audio_filepath", "path", "audio_path"])
def test_manifest_paths_are_relative_to_the_manifest(tmp_path, field):
    recording = read_one(tmp_path, {field: "a/b.wav"})

    assert (Path(recording.path), recording.key, recording.source) == (tmp_path / "set/a/b.wav", "a-b", "set")


def test_absolute_paths_in_a_manifest_stay_as_they_are(tmp_path):
    assert read_one(tmp_path, {"audio": "/some/where.wav"}).path == "/some/where.wav"


@pytest.mark.parametrize("reference", ["text", "reference", "transcript"])
@pytest.mark.parametrize("language", ["language", "lang"])
@pytest.mark.parametrize("speaker", ["speaker", "speaker_id"])
def test_manifest_fields_have_their_usual_names(tmp_path, reference, language, speaker):
    row = {"audio": "x.wav", reference: "xin chào", language: "vi_vn", speaker: 17, "split": "dev", "key": "My.Key"}

    found = read_one(tmp_path, row)

    assert (found.reference, found.language, found.speaker, found.split, found.key) == (
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
def test_the_tag_of_qwens_fine_tuning_files_is_taken_off(tmp_path, text, language, reference):
    found = read_one(tmp_path, {"audio": "x.wav", "text": text})

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
def test_blank_text_is_silence_and_no_text_is_no_reference(tmp_path, fields, reference):
    recording = read_one(tmp_path, {"audio": str(write_tone(tmp_path / "x.wav", 0)), **fields})
    pack_tones([recording], tmp_path / "pack", holdout=0)

    (packed,) = read_utterances(tmp_path / "pack")

    assert (recording.reference, packed.reference) == (reference, reference)


def test_the_default_language_holds_only_where_the_source_says_nothing(tmp_path):
    manifest = write_manifest(tmp_path / "m.jsonl", {"audio": "a.wav"}, {"audio": "b.wav", "lang": "de"})

    found = read_sources([manifest], default_language="vi")

    assert [recording.language for recording in found] == ["Vietnamese", "German"]


def test_a_duration_is_what_the_recording_should_last_and_one_of_zero_says_nothing(tmp_path):
    manifest = write_manifest(
        tmp_path / "m.jsonl",
        {"audio": "a.wav", "duration": 1.5, "offset": 0},
        {"audio": "b.wav", "duration": 0},
        {"audio": "c.wav", "duration": None},
    )

    found = read_sources([manifest], default_language=None)

    assert [recording.told_seconds for recording in found] == [1.5, None, None]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"audio": "a.wav", "duration": "1.5"}', r"m.jsonl:2: duration must be a number of seconds, got '1\.5'"),
        ("{", r"m.jsonl:2 must be a JSON object in UTF-8"),
        ("[" * 100_000, r"m.jsonl:2 must be a JSON object in UTF-8"),
        ("[]", r"m.jsonl:2 must be a JSON object, got list"),
        ('{"text": "x"}', r"m.jsonl:2 must name its audio as one of audio, .*got \['text'\]"),
        ('{"audio": ["a"]}', r"m.jsonl:2: audio must be text"),
        ('{"audio": "b.wav", "lang": "tlh"}', r"m.jsonl:2: language must be .* got 'tlh'"),
        ('{"audio": "b.wav", "text": "\\ud800"}', r"m.jsonl:2: text must be valid Unicode"),
        ('{"audio": "b.wav", "offset": 1.5}', r"m.jsonl:2: offset must be 0 or absent, got 1.5"),
        ('{"audio": "pipe:cat x"}', r"m.jsonl:2: audio must be a file's path, got 'pipe:cat x'"),
        ('{"audio": "sox x.wav - |"}', r"m.jsonl:2: audio must be a file's path"),
        ('{"audio": "https://host/x.wav"}', r"m.jsonl:2: audio must be a file's path"),
        ('{"audio": "FILE:///etc/x.wav"}', r"m.jsonl:2: audio must be a file's path"),
        ('{"audio": "data:audio/wav;base64,AA"}', r"m.jsonl:2: audio must be a file's path"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, message):
    manifest = write_manifest(tmp_path / "m.jsonl", {"audio": "a.wav"}, line)

    with pytest.raises(SourceError, match=message):
        read_sources([manifest], default_language=None)


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'\n{"audio": "\xff"}\n')

    with pytest.raises(SourceError, match=r"m.jsonl:2 must be a JSON object in UTF-8"):
        read_sources([str(tmp_path / "m.jsonl")], default_language=None)


def test_a_folder_gives_its_audio_in_the_order_of_paths(tmp_path):
    for name in ("b/2.WAV", "a/10.flac", "a/2.flac", "c.txt", "b/.hidden.wav", ".git/x.wav"):
        write_tone((tmp_path / "in" / name).with_suffix(".wav"), 0).rename(tmp_path / "in" / name)

    found = read_sources([str(tmp_path / "in")], default_language="English")

    assert [recording.key for recording in found] == ["a-10", "a-2", "b-2"]
    assert {(recording.source, recording.speaker, recording.language) for recording in found} == {
        ("in", None, "English")
    }
    assert all(Path(recording.path).is_file() for recording in found)


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("none", lambda path: None, r"nothing at that path"),
        ("x.wav", lambda path: path.write_bytes(b""), r"a file of another kind"),
        ("x.jsonl", make_fifo, r"a file of another kind"),
        ("x.jsonl", lambda path: path.write_bytes(b"\n \n"), r"must each hold recordings, got none"),
        ("x", lambda path: path.mkdir(), r"must each hold recordings, got none"),
        ("https://host/set.jsonl", lambda path: None, r"nothing at that path"),
    ],
)
def test_an_input_that_is_no_source_is_refused(tmp_path, monkeypatch, name, make, message):
    monkeypatch.chdir(tmp_path)
    make(Path(name))

    with pytest.raises(SourceError, match=rf"pack\.inputs.*{message}"):
        read_sources([name], default_language=None)


def test_a_recording_that_two_inputs_name_is_refused(tmp_path):
    write_tone(tmp_path / "a.wav", 0)
    manifest = write_manifest(tmp_path / "m.jsonl", {"audio": "sub/../a.wav"})

    with pytest.raises(SourceError, match=r"must name every recording once.*m\.jsonl:1 and again"):
        read_sources([manifest, str(tmp_path)], default_language=None)


def test_equal_keys_are_told_apart_alike_in_any_order(tmp_path):
    first = write_manifest(
        tmp_path / "one" / "m.jsonl", {"audio": "a b.wav"}, {"audio": "a_b.flac"}, {"audio": "c.wav"}
    )
    second = write_manifest(tmp_path / "two" / "m.jsonl", {"audio": "a_b.wav"})

    forwards = {r.path: r.key for r in read_sources([first, second], default_language=None)}
    backwards = {r.path: r.key for r in read_sources([second, first], default_language=None)}

    assert forwards == backwards
    assert len(set(forwards.values())) == 4
    assert forwards[str(tmp_path / "one/c.wav")] == "c"
    assert all(key.startswith("a_b-") for path, key in forwards.items() if not path.endswith("c.wav"))


def test_equal_names_in_sources_of_equal_names_are_told_apart_alike_in_any_order(tmp_path):
    inputs = [write_manifest(tmp_path / part / "set" / "m.jsonl", {"audio": "a.wav"}) for part in ("x", "y", "z")]

    forwards = {r.path: r.key for r in read_sources(inputs, default_language=None)}
    backwards = {r.path: r.key for r in read_sources(inputs[::-1], default_language=None)}

    assert forwards == backwards
    first, second, third = (forwards[str(tmp_path / part / "set" / "a.wav")] for part in ("x", "y", "z"))
    assert (second, third) == (f"{first}-2", f"{first}-3")


@pytest.mark.parametrize(
    "name", ["a.b.wav", "../../etc/passwd", "Ä/ö", "语音", "x\n y", "-", "", "a" * 300, "b/" * 200]
)
def test_keys_have_only_what_tars_and_webdataset_bear(name):
    key = clean_key(name)

    assert key and set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-")
    assert len(key) <= MAX_KEY_LENGTH


def test_long_names_that_end_alike_keep_different_keys():
    assert clean_key("a" * 300) != clean_key("a" * 301)
