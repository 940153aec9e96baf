import os
from dataclasses import replace
from pathlib import Path

import pytest

from shards.errors import SourceError
from shards.sources import KINDS, read_found
from shards.sources.keys import Found
from shards.sources.repeats import Repeats
from tests.helpers.corpora import (
    cut,
    make_common_voice,
    make_fleurs,
    make_kaldi,
    make_librispeech,
    make_mls,
    make_nemo_tarred,
    make_shar,
    make_vivos,
    tone_bytes,
    write_lines,
    write_tar,
)
from tests.helpers.tones import write_tone


def make_parquet(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "data").mkdir(parents=True)
    table = pa.table({"audio": [{"bytes": tone_bytes(0), "path": "a.flac"}]})
    pq.write_table(table, folder / "data/train-00000-of-00001.parquet")
    return folder


def make_folder(folder: Path) -> Path:
    write_tone(folder / "a.wav", 0)
    return folder


CORPORA = {
    "folder": make_folder,
    "qwen": lambda folder: write_lines(folder / "m.jsonl", {"audio": "a.wav"}),
    "nemo": lambda folder: write_lines(folder / "train_manifest.json", {"audio_filepath": "a.wav", "duration": 1.0}),
    "lhotse": lambda folder: write_lines(folder / "cuts_train.jsonl.gz", cut(0)),
    "kaldi": make_kaldi,
    "librispeech": make_librispeech,
    "vivos": make_vivos,
    "common_voice": make_common_voice,
    "fleurs": make_fleurs,
    "parquet": make_parquet,
    "nemo_tarred": make_nemo_tarred,
    "lhotse_shar": make_shar,
    "webdataset": lambda folder: write_tar(folder / "0.tar", {"a.flac": tone_bytes(0)}).parent,
}


def test_there_is_a_corpus_for_each_kind():
    assert ("auto", *CORPORA) == KINDS


@pytest.mark.parametrize("kind", CORPORA)
def test_each_kind_is_seen_from_what_is_there(tmp_path, read, kind):
    place = CORPORA[kind](tmp_path / "vi_vn" if kind == "fleurs" else tmp_path / "in")

    found = read(place)

    assert found
    assert found == read(place, kind=kind)


@pytest.mark.parametrize(
    ("kind", "make", "name"),
    [
        ("fleurs", make_fleurs, "vi_vn"),
        ("common_voice", make_common_voice, "vi"),
        ("librispeech", make_mls, "mls_german"),
        ("librispeech", make_mls, "mls_german_opus"),
    ],
)
def test_a_folder_of_several_languages_is_read_as_all_of_them(tmp_path, read, kind, make, name):
    make(tmp_path / "in" / name)
    (tmp_path / "in" / "notes").mkdir()

    assert [one.path for one in read(tmp_path / "in")] == [one.path for one in read(tmp_path / "in" / name, kind=kind)]


@pytest.mark.parametrize("name", ["cuts.000000.jsonl.gz", "nothing.jsonl", "m.json"])
def test_a_file_that_only_looks_like_a_manifest_is_not_taken_for_another_kind(tmp_path, read, name):
    write_lines(tmp_path / name, '{"pretty":', '"printed"}')

    with pytest.raises(SourceError, match=r"a file of another kind|must be a JSON object"):
        read(tmp_path / name)


def test_a_folder_that_looks_like_two_kinds_is_refused_until_one_is_chosen(tmp_path, read):
    make_kaldi(tmp_path / "in")
    write_tar(tmp_path / "in" / "0.tar", {"a.flac": tone_bytes(0)})

    with pytest.raises(SourceError, match=r"pack\.inputs must .*looks like kaldi and webdataset; set pack\.source"):
        read(tmp_path / "in")

    assert [one.name for one in read(tmp_path / "in", kind="webdataset")] == ["a"]
    assert len(read(tmp_path / "in", kind="kaldi")) == 3


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_audio_beside_containers_is_not_left_out_in_silence(tmp_path, read, kind):
    place = CORPORA[kind](tmp_path / "in")
    write_tone(place / "loose.wav", 1)

    with pytest.raises(SourceError, match=rf"looks like {kind} and folder; set pack\.source"):
        read(place)


def test_an_unknown_kind_is_refused_with_all_that_there_are(read):
    with pytest.raises(SourceError, match=r"pack\.source must be one of auto, folder, qwen, .*, got 'espnet'"):
        read("x", kind="espnet")


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("none", lambda path: None, r"nothing at that path"),
        ("x.wav", lambda path: path.write_bytes(b""), r"folder, qwen, nemo, .*a file of another kind"),
        ("x.jsonl", make_fifo, r"a file of another kind"),
        ("x.jsonl", lambda path: path.write_bytes(b"\n \n"), r"must each hold recordings, got none"),
        ("x", lambda path: path.mkdir(), r"must each hold recordings, got none"),
        ("audio__OP_0..511_CL_.tar", lambda path: None, r"nothing at that path\); name the folder"),
        ("{000000..000007}.tar", lambda path: None, r"nothing at that path\); name the folder"),
        ("pipe:cat x", lambda path: None, r"must be a path or an address, got 'pipe:cat x'"),
        ("hf://datasets/x", lambda path: None, r"must be a path or an address, got .hf://datasets/x."),
        ("gs://bucket/x", lambda path: None, r"must begin with one of http, https, s3"),
        ("", lambda path: None, r"must be a path or an address, got ''"),
    ],
)
def test_an_input_that_is_no_source_is_refused(tmp_path, monkeypatch, read, name, make, message):
    monkeypatch.chdir(tmp_path)
    make(Path(name))

    with pytest.raises(SourceError, match=rf"pack\.inputs.*{message}"):
        read(name)


def test_messages_name_the_setting_that_the_inputs_come_from(tmp_path):
    found = read_found([str(tmp_path / "none")], default_language=None, spool=tmp_path, setting="pack.exclude")

    with pytest.raises(SourceError, match=r"^pack\.exclude must each be"):
        next(found)


def test_the_default_language_holds_only_where_the_source_says_nothing(tmp_path, read):
    manifest = write_lines(tmp_path / "m.jsonl", {"audio": "a.wav"}, {"audio": "b.wav", "lang": "de"})

    assert [one.language for one in read(manifest, language="vi")] == ["Vietnamese", "German"]


def test_a_default_language_that_is_none_of_the_models_is_named_by_its_setting(read):
    with pytest.raises(SourceError, match=r"pack\.language: language must be one of .*, got 'tlh'"):
        read("x", language="tlh")


def test_a_source_is_read_as_a_stream(tmp_path):
    manifest = write_lines(tmp_path / "m.jsonl", {"audio": "a.wav"}, "{")

    found = read_found([str(manifest)], default_language=None, spool=tmp_path)

    assert next(found).path == str(tmp_path / "a.wav")
    with pytest.raises(SourceError, match=r"m\.jsonl:2"):
        next(found)


def test_a_recording_that_two_inputs_name_is_refused(tmp_path, read):
    write_tone(tmp_path / "in" / "a.wav", 0)
    manifest = write_lines(tmp_path / "m.jsonl", {"audio": "sub/../in/a.wav"})

    with pytest.raises(SourceError, match=r"must name every recording once.*m\.jsonl:1 and again"):
        read(manifest, tmp_path / "in")


def test_the_same_tar_under_two_names_is_a_repetition(tmp_path, read):
    tar = write_tar(tmp_path / "in" / "0.tar", {"a.flac": tone_bytes(0), "b.flac": tone_bytes(1)})

    with pytest.raises(SourceError, match=r"must name every recording once"):
        read(tar, tmp_path / "in" / ".." / "in")


@pytest.mark.parametrize(
    ("changes", "is_other"),
    [
        ({"path": "/b.wav"}, True),
        ({"offset_bytes": 512}, True),
        ({"start_seconds": 1.5}, True),
        ({"start_seconds": 0.0}, False),
        ({"path": "/x/../a.wav"}, False),
        ({"name": "other", "where": "elsewhere", "speaker": "ann"}, False),
    ],
)
def test_a_recording_is_the_stretch_of_audio_and_not_its_name(changes, is_other):
    first = Found(path="/a.wav", name="a", where="m:1", source="s")
    repeats = Repeats("pack.inputs")

    repeats.add(first)
    repeats.add(replace(first, **changes))

    if is_other:
        repeats.check()
    else:
        with pytest.raises(SourceError, match=r"got '.*a\.wav' at m:1 and again at (m:1|elsewhere)"):
            repeats.check()


@pytest.mark.parametrize("place", [0, 1, 4095, 49_999])
def test_a_repetition_is_found_whatever_lies_between(monkeypatch, place):
    monkeypatch.setattr("shards.sources.repeats._AT_ONCE", 1024)
    repeats = Repeats("pack.inputs")

    for number in range(50_000):
        repeats.add(Found(path=f"/{number}", name="", where=f"m:{number}", source=""))
    repeats.add(Found(path=f"/{place}", name="", where="again", source=""))

    with pytest.raises(SourceError, match=rf"got '/{place}' (before|at m:{place}) and again at again"):
        repeats.check()
