"""Test sets packed once, packed again when they would be others, and gone on with after a kill."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qad_dist.test_sets import missing_test_sets, open_test_sets
from shards.errors import AudioError, StageError
from tests.helpers.corpora import tone_bytes
from tests.helpers.packing import hashes_of
from tests.helpers.sets import CORPUS, make_mini_librispeech, make_set, opened, run_of, tones_of
from tests.helpers.tones import write_tone

PACKED = ["done.json", "index.json", "rejected.jsonl", "test-000000.tar", "utterances.parquet"]


def test_set_is_packed_once_and_again_when_it_would_be_another(tmp_path: Path) -> None:
    manifest = make_set(tmp_path / "a", {"text": "their"}, {"text": "x", "split": "dev"})
    folder = tmp_path / "run/score/sets/a"

    def times() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    run = run_of(tmp_path, {"a": str(manifest)})
    assert missing_test_sets(run) == ["a"]
    opened(run)
    packed = times()
    loose = run_of(tmp_path, {"a": str(manifest)}, seed=3, pack={"max_rejected_share": 0.5}, max_utterances=2)
    opened(loose)
    assert missing_test_sets(loose) == []
    assert times() == packed

    manifest.write_text(manifest.read_text().replace("their", "there"))  # as many letters
    assert missing_test_sets(run) == ["a"]
    assert {utterance.reference for utterance in opened(run)[0].utterances} == {"there", "x"}

    chosen = run_of(tmp_path, {"a": {"path": str(manifest), "splits": ["dev"]}})
    assert missing_test_sets(chosen) == ["a"]
    with pytest.raises(StageError, match=r"sets/a must hold score\.sets\.a as this config .*other settings; run `acc"):
        open_test_sets(chosen)
    assert [utterance.reference for utterance in opened(chosen)[0].utterances] == ["x"]


@pytest.mark.parametrize("change", ["transcript", "recording", "further"])
def test_change_in_a_corpus_is_seen(tmp_path: Path, change: str) -> None:
    make_mini_librispeech(tmp_path)
    run = run_of(tmp_path, {"librispeech-dev-clean-2": str(tmp_path)})
    before = opened(run)[0]
    chapter = tmp_path / CORPUS / "dev-clean-2/1272/128104"
    write_tone(tmp_path / CORPUS / "train-clean-5/19/128104/19-128104-10.flac", 7)
    assert missing_test_sets(run) == []  # nothing of this set

    if change == "transcript":
        lines = chapter / "1272-128104.trans.txt"
        lines.write_text(lines.read_text().replace("dev-clean-2 0001", "dev-clean-2 0007"))
    elif change == "recording":
        write_tone(chapter / "1272-128104-0001.flac", 5, seconds=0.5)
    else:
        write_tone(chapter / "1272-128104-0002.flac", 6)

    assert missing_test_sets(run) == ["librispeech-dev-clean-2"]
    assert opened(run)[0].fingerprint != before.fingerprint
    assert missing_test_sets(run) == []


def test_what_a_set_was_packed_from_may_be_gone(tmp_path: Path) -> None:
    make_mini_librispeech(tmp_path)
    run = run_of(tmp_path, {"librispeech-dev-clean-2": str(tmp_path)})
    before = opened(run)
    shutil.rmtree(tmp_path / CORPUS)

    assert missing_test_sets(run) == []
    assert opened(run)[0].fingerprint == before[0].fingerprint


@pytest.mark.parametrize("lost", ["done.json", "index.json", "test-000000.tar", "utterances.parquet"])
def test_set_that_lost_a_file_is_packed_again_to_the_same_bytes(tmp_path: Path, lost: str) -> None:
    run = run_of(tmp_path, {"a": str(make_set(tmp_path / "a", {"text": "x"}, {"text": "y"}))})
    folder = opened(run)[0].folder
    before = hashes_of(folder)
    (folder / lost).unlink()

    assert missing_test_sets(run) == ["a"]
    opened(run)

    after = hashes_of(folder)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} <= {"done.json"}  # which tells the time it took


def test_audio_inside_of_a_table_leaves_nothing_beside_the_shards(tmp_path: Path) -> None:
    for number, split in enumerate(["train", "test"]):
        columns = {"audio": [{"bytes": tone_bytes(number), "path": f"{number}.flac"}], "text": ["x"], "lang": ["vi"]}
        (tmp_path / "hub").mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), tmp_path / "hub" / f"{split}-00000-of-00001.parquet")
    run = run_of(tmp_path, {"a": {"path": str(tmp_path / "hub"), "splits": ["test"]}})

    (found,) = opened(run)

    assert tones_of(run, found) == [1]
    assert sorted(path.name for path in found.folder.iterdir()) == PACKED


def test_interrupted_pack_goes_on_with_the_shards_that_it_has(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"a": str(make_set(tmp_path / "a", {"text": "x"}, {"text": "y"}))})
    folder = tmp_path / "run/score/sets/a"
    (tmp_path / "run.json").write_text(run.model_dump_json())
    program = (
        "import sys; from qad_dist.config import RunConfig; from qad_dist.test_sets import prepare_test_sets as p; "
        "p(RunConfig.model_validate_json(open(sys.argv[1]).read()))"
    )
    environment = {**os.environ, "QAD_FAULT": "kill@pack.before_index"}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "run.json")], env=environment)
    assert done.returncode == -9
    tar = folder / "test-000000.tar"
    written = tar.stat().st_mtime_ns
    assert missing_test_sets(run) == ["a"]
    with pytest.raises(StageError, match=r"sets/a must hold score\.sets\.a as this config has it, got none; run `acc"):
        open_test_sets(run)

    found = opened(run)

    assert tar.stat().st_mtime_ns == written
    assert sorted(tones_of(run, found[0])) == [0, 1]
    assert sorted(path.name for path in folder.iterdir()) == PACKED


def test_set_whose_second_pack_failed_does_not_count(tmp_path: Path) -> None:
    manifest = make_set(tmp_path / "a", {"text": "x"}, {"text": "y"})
    run = run_of(tmp_path, {"a": str(manifest)})
    opened(run)
    (tmp_path / "a/bad.wav").write_bytes(b"RIFF")
    with manifest.open("a") as file:
        file.write('{"audio": "bad.wav", "text": "z"}\n')

    with pytest.raises(AudioError, match=r"^score\.sets\.a: pack\.max_rejected_share must cover"):
        opened(run)

    with pytest.raises(StageError, match=r"sets/a must hold score\.sets\.a as this config has it, got none; run `acc"):
        open_test_sets(run)
