"""Splices: what they are made of, that it is drawn fairly and by number alone, and what a tar of them holds."""

import io
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import webdataset

from shards.errors import StageError
from shards.index import UtteranceTable, read_utterances
from shards.read import Shards
from shards.schema import Utterance
from shards.splice import Pool, Splicing, join, write_splices
from tests.helpers.packing import hashes_of
from tests.helpers.reading import tone_of, write_tones

SETTINGS = Splicing(max_pieces=3, piece_seconds=(0.1, 0.35), speeds=(0.8, 1.25), within="all")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    write_tones(tmp_path / "pack", 12, per_shard=5)
    return tmp_path / "pack"


def of_languages(packed: Path):
    """The packed tones; the even ones are English of speaker a or b, the odd ones of no known language or speaker."""
    utterances = [
        replace(one, language=None if number % 2 else "English", speaker=None if number % 2 else "ab"[number // 2 % 2])
        for number, one in enumerate(read_utterances(packed))
    ]
    return UtteranceTable.of(Utterance, utterances)


def test_a_splice_depends_on_number_seed_and_pool_alone(packed):
    utterances = read_utterances(packed)[:]
    pool = Pool(utterances, SETTINGS)
    drawn = [pool.draw(number, seed=3) for number in range(50)]

    again = Pool(utterances, SETTINGS)
    assert [again.draw(number, seed=3) for number in reversed(range(50))] == drawn[::-1]
    assert [pool.draw(number, seed=4) for number in range(50)] != drawn
    assert len({one.pieces for one in drawn}) == 50


def test_pieces_lie_in_their_utterances_and_keep_the_bounds(packed):
    pool = Pool(read_utterances(packed)[:], SETTINGS)
    splices = [pool.draw(number, seed=0) for number in range(2000)]

    pieces = [piece for one in splices for piece in one.pieces]
    there = np.array([round(piece.utterance.duration_seconds * 16_000) for piece in pieces])
    starts, lengths = (np.array([getattr(piece, name) for piece in pieces]) for name in ("start", "length"))
    assert (starts >= 0).all() and (starts + lengths <= there).all()
    assert lengths.min() >= 1600 and lengths.max() <= 5600
    assert (starts[lengths == there] == 0).all() and (lengths == there).sum() > 100  # short ones are taken whole
    assert (starts + lengths == there).sum() > 100 and ((starts + lengths < there) & (starts > 0)).sum() > 1000
    assert Counter(len(one.pieces) for one in splices).keys() == {1, 2, 3}
    speeds = [one.speed for one in splices]
    assert 0.8 <= min(speeds) < 0.81 and 1.24 < max(speeds) <= 1.25


def test_each_second_of_speech_is_as_likely_as_any_other(packed):
    utterances = [replace(one, duration_seconds=float(number)) for number, one in enumerate(read_utterances(packed), 1)]
    pool = Pool(UtteranceTable.of(Utterance, utterances), SETTINGS)

    found = Counter(piece.utterance.key for n in range(6000) for piece in pool.draw(n, seed=1).pieces)

    expected = np.array([one.duration_seconds for one in utterances])
    expected *= found.total() / expected.sum()
    counts = np.array([found[one.key] for one in utterances])
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 31.3  # 11 degrees of freedom: one seed in a thousand


@pytest.mark.parametrize("within", ["language", "speaker"])
def test_pieces_have_in_common_what_was_asked_for(packed, within):
    pool = Pool(of_languages(packed), replace(SETTINGS, within=within))
    mixed = Pool(of_languages(packed), SETTINGS)

    drawn, any_drawn = ([one.draw(number, seed=0) for number in range(300)] for one in (pool, mixed))

    groups = [{getattr(piece.utterance, within) for piece in one.pieces} for one in drawn]
    assert all(len(group) == 1 for group in groups)
    assert set().union(*groups) == {getattr(one, within) for one in of_languages(packed)}
    assert any(len({getattr(piece.utterance, within) for piece in one.pieces}) > 1 for one in any_drawn)


def test_joined_audio_is_the_pieces_faded_where_they_were_cut_and_resampled(packed):
    pool = Pool(read_utterances(packed)[:], SETTINGS)
    splice = next(one for n in range(100) if len((one := pool.draw(n, seed=0)).pieces) == 3 and one.speed > 1.1)
    audios = [tone_of(int(piece.utterance.key.split("-")[1])) for piece in splice.pieces]

    joined = join(splice, audios)
    plain = join(replace(splice, speed=1.0), audios)

    place = 0
    for piece, audio in zip(splice.pieces, audios, strict=True):
        part, whole = plain[place : place + piece.length], audio[piece.start : piece.start + piece.length]
        np.testing.assert_array_equal(part[80:-80], whole[80:-80])
        assert (part[0] == 0) == (piece.start > 0) or whole[0] == 0
        assert np.abs(part[:80]).max() <= np.abs(whole[:80]).max()
        place += piece.length
    assert place == len(plain)
    assert len(joined) == pytest.approx(len(plain) / splice.speed, abs=1)
    np.testing.assert_array_equal(
        joined, np.clip(soxr.resample(plain, round(16_000 * splice.speed), 16_000, quality="HQ"), -1, 1)
    )


def write(packed: Path, folder: Path, *, num_splices: int = 9, about: str = "a", **more: Any) -> None:
    pool = Pool(of_languages(packed), replace(SETTINGS, within="speaker"))
    write_splices(pool, folder, Shards(packed), num_splices=num_splices, seed=5, about=about, per_shard=4, **more)


def test_webdataset_reads_the_tars(packed, tmp_path):
    told: list[int] = []
    write(packed, tmp_path / "out", progress=told.append)

    assert told == [4, 8, 9]
    tars = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    assert [Path(tar).name for tar in tars] == [f"splice-00000{number}.tar" for number in range(3)]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"splice-{number:08d}" for number in range(9)]
    pool = Pool(of_languages(packed), replace(SETTINGS, within="speaker"))
    for number, sample in enumerate(samples):
        splice, record = pool.draw(number, seed=5), json.loads(sample["json"])
        audio, rate_hz = soundfile.read(io.BytesIO(sample["flac"]), dtype="float32")
        tones = [tone_of(int(piece.utterance.key.split("-")[1])) for piece in splice.pieces]
        np.testing.assert_allclose(audio, join(splice, tones), atol=1 / 32768)
        speaker = splice.pieces[0].utterance.speaker
        assert (rate_hz, record["split"], record["speaker"], record["reference"]) == (16_000, "train", speaker, None)
        assert record["language"] == (None if speaker is None else "English")
        assert record["duration_seconds"] == len(audio) / 16_000


def test_splices_of_other_settings_are_neither_mixed_nor_overwritten(packed, tmp_path, monkeypatch):
    write(packed, tmp_path / "out", num_splices=2)
    before = hashes_of(tmp_path / "out")

    with pytest.raises(StageError, match="remove it to splice again"):
        write(packed, tmp_path / "out", num_splices=2, about="b")
    monkeypatch.setattr(soxr, "__version__", "0.0.1")
    with pytest.raises(StageError, match="or of another soxr or libsndfile; remove it to splice again"):
        write(packed, tmp_path / "out", num_splices=2)

    assert hashes_of(tmp_path / "out") == before


def test_any_number_of_processes_makes_the_same_bytes(packed, tmp_path):
    told: list[int] = []
    write(packed, tmp_path / "one")

    write(packed, tmp_path / "two", processes=2, progress=told.append)

    assert sorted(np.diff([0, *told])) == [1, 4, 4]
    assert hashes_of(tmp_path / "two") == hashes_of(tmp_path / "one")


SCRIPT = """
import sys
from pathlib import Path
from shards import splice
from shards.index import read_utterances
from shards.read import Shards
if __name__ == "__main__":
    packed, folder, processes = *map(Path, sys.argv[1:3]), int(sys.argv[3])
    settings = splice.Splicing(max_pieces=3, piece_seconds=(0.1, 0.35), speeds=(0.8, 1.25), within="all")
    pool = splice.Pool(read_utterances(packed)[:], settings)
    about = {"num_splices": 9, "seed": 5, "about": "a", "per_shard": 4}
    splice.write_splices(pool, folder, Shards(packed), processes=processes, **about)
"""


def start(packed: Path, folder: Path, *, fault: str = "", processes: int = 1) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, str(packed), str(folder), str(processes)]
    environment = {"QAD_FAULT": fault, "PYTHONPATH": "."}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_killed_between_two_tars_it_goes_on_to_the_same_bytes(packed, tmp_path):
    killed = start(packed, tmp_path / "killed", fault="kill@splice.after_tar,shard=splice-000001.tar")
    assert killed.returncode == -9
    assert sorted(path.name for path in (tmp_path / "killed").glob("*.tar")) == [
        "splice-000000.tar",
        "splice-000001.tar",
    ]
    first = (tmp_path / "killed" / "splice-000000.tar").stat().st_mtime_ns

    assert start(packed, tmp_path / "killed").returncode == 0
    assert start(packed, tmp_path / "whole").returncode == 0

    assert hashes_of(tmp_path / "killed") == hashes_of(tmp_path / "whole")
    assert (tmp_path / "killed" / "splice-000000.tar").stat().st_mtime_ns == first


def test_a_process_that_dies_is_an_error_that_names_what_it_was_at(packed, tmp_path):
    died = start(packed, tmp_path / "out", fault="kill@splice.after_tar,shard=splice-000001.tar", processes=2)

    assert died.returncode == 1
    assert "StageError: pack.processes must all live, got one that died in one of splice-00000" in died.stderr
    assert start(packed, tmp_path / "out", processes=2).returncode == 0
    assert start(packed, tmp_path / "whole").returncode == 0
    assert hashes_of(tmp_path / "out") == hashes_of(tmp_path / "whole")
