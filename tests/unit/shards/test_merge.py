"""What is there twice, recordings that are cut, and tars that stay where they are."""

import hashlib
import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset

from shards.errors import ConfigError, StageError
from shards.index import INDEX, read_index, read_utterances
from shards.layout import ShardSize
from shards.merge import REJECTED, merge
from shards.pack import pack_tasks
from shards.read import Shards
from shards.schema import Recording
from shards.sources import read_found
from shards.tasks import Layout, plan_pack
from shards.verify import verify
from tests.helpers.packing import SPLITS, hashes_of, pack_tones, plan_tones, settings
from tests.helpers.tones import make_recordings, make_tone, number_of, write_tone


def rejected_of(folder: Path) -> dict[str, str]:
    return {row["key"]: row["reason"] for row in map(json.loads, (folder / REJECTED).read_text().splitlines())}


def copy_of(recording: Recording, folder: Path, *, key: str, split: str | None) -> Recording:
    path = folder / f"{key}.wav"
    shutil.copyfile(recording.path, path)
    return replace(recording, path=str(path), key=key, split=split)


@pytest.fixture
def with_copies(tmp_path) -> list[Recording]:
    """Twelve tones for training; of three there are copies, one of them in test, and one is the same but as FLAC."""
    recordings = make_recordings(tmp_path / "in", 12)
    flac = tmp_path / "in" / "5.flac"
    soundfile.write(flac, *soundfile.read(recordings[5].path))
    return [
        *recordings,
        copy_of(recordings[3], tmp_path, key="again", split=None),
        copy_of(recordings[4], tmp_path, key="tested", split="test"),
        replace(recordings[5], path=str(flac), key="held", split="dev"),
    ]


def test_of_utterances_with_the_same_samples_one_is_kept_that_of_test_before_heldout_before_train(
    with_copies, tmp_path
):
    report = pack_tones(with_copies, tmp_path / "pack", holdout=0, utterances_per_shard=4)

    kept = {utterance.key for utterance in read_utterances(tmp_path / "pack")}
    dropped = {"tone-4": "tested", "tone-5": "held"}
    assert kept & {"tone-3", "again"} and not {"tone-3", "again"} <= kept
    assert {"tested", "held"} <= kept and not dropped.keys() & kept and len(kept) == 12
    assert (report.num_copies, report.num_rejected, report.index.num_utterances) == (3, 0, 12)
    reasons = rejected_of(tmp_path / "pack")
    assert len(reasons) == 3
    for key, original in dropped.items():
        assert reasons[key] == f"duplicate: has the same samples as {original!r}"
    sounds = [samples.tobytes() for samples in Shards(tmp_path / "pack").read(read_utterances(tmp_path / "pack"))]
    assert len(set(sounds)) == 12
    verify(tmp_path / "pack")


def test_a_shard_without_its_copies_has_the_bytes_that_webdataset_writes_of_the_others(with_copies, tmp_path):
    sizes = {"holdout": 0, "utterances_per_shard": 100}
    pack_tones(with_copies, tmp_path / "all", **sizes, drop_duplicates=False)

    pack_tones(with_copies, tmp_path / "pack", **sizes)

    gone = rejected_of(tmp_path / "pack").keys()
    before = webdataset.WebDataset(str(tmp_path / "all" / "train-000000.tar"), shardshuffle=False)
    with webdataset.TarWriter(str(tmp_path / "expected.tar"), encoder=False, mtime=0) as writer:
        for sample in before:
            if sample["__key__"] not in gone:
                writer.write({name: sample[name] for name in ("__key__", "flac", "json")})
    assert len(gone) == 3
    assert (tmp_path / "pack" / "train-000000.tar").read_bytes() == (tmp_path / "expected.tar").read_bytes()
    entry = next(entry for entry in read_index(tmp_path / "pack").shards if entry.name == "train-000000.tar")
    assert entry.sha256 == hashlib.sha256((tmp_path / "expected.tar").read_bytes()).hexdigest()


def test_copies_are_kept_where_they_are_asked_for(with_copies, tmp_path):
    report = pack_tones(with_copies, tmp_path / "pack", holdout=0, drop_duplicates=False)

    assert (report.num_copies, report.index.num_utterances) == (0, 15)


def test_what_sounds_like_an_excluded_test_set_is_not_trained_on(tmp_path):
    recordings = make_recordings(tmp_path / "in", 12)
    recordings[2] = replace(recordings[2], split="test")
    excluded = [copy_of(recordings[i], tmp_path, key=f"x{i}", split=None) for i in (2, 7, 9)]

    report = pack_tones(recordings, tmp_path / "pack", holdout=0.3, excluded=excluded)

    kept = {utterance.key: utterance.split for utterance in read_utterances(tmp_path / "pack")}
    assert kept.keys() == {f"tone-{i}" for i in range(12)} - {"tone-7", "tone-9"}
    assert kept["tone-2"] == "test"
    assert (report.num_recordings, report.num_copies) == (12, 2)
    assert set(rejected_of(tmp_path / "pack").values()) == {
        "excluded: has the same samples as an utterance of pack.exclude"
    }


def test_what_is_excluded_goes_also_where_duplicates_stay(tmp_path):
    recordings = make_recordings(tmp_path / "in", 8)
    recordings += [copy_of(recordings[i], tmp_path, key=f"copy-{i}", split="test") for i in (1, 2)]
    excluded = [copy_of(recordings[i], tmp_path, key=f"x{i}", split=None) for i in (2, 5)]

    pack_tones(recordings, tmp_path / "pack", holdout=0, excluded=excluded, drop_duplicates=False)

    kept = {utterance.key for utterance in read_utterances(tmp_path / "pack")}
    assert kept == {recording.key for recording in recordings} - {"tone-2", "tone-5"}


def test_two_processes_find_the_same_copies(with_copies, tmp_path):
    pack_tones(with_copies, tmp_path / "one", holdout=0, utterances_per_shard=2)

    pack_tones(with_copies, tmp_path / "two", holdout=0, utterances_per_shard=2, processes=2)

    assert hashes_of(tmp_path / "one") == hashes_of(tmp_path / "two")


def speech_like(seconds: float, *, seed: int = 0) -> np.ndarray:
    """Noise with a pause of 0.3 s every few seconds; the pauses are quieter, not silent."""
    random = np.random.default_rng(seed)
    samples = random.uniform(-0.5, 0.5, round(seconds * 16_000))
    for start in np.arange(2.5, seconds - 0.5, 3.7):
        samples[round(start * 16_000) : round((start + 0.3) * 16_000)] *= 0.01
    return samples


@pytest.fixture
def long_recording(tmp_path) -> Recording:
    soundfile.write(tmp_path / "book.wav", speech_like(100), 16_000, subtype="PCM_16")
    return Recording(path=str(tmp_path / "book.wav"), key="book", source="s", reference="all of it", language="Thai")


def test_a_long_recording_is_cut_in_pauses_and_the_pieces_are_the_whole_of_it(long_recording, tmp_path):
    pack_tones([long_recording], tmp_path / "pack", holdout=0)

    pieces = list(read_utterances(tmp_path / "pack"))
    expected, _ = soundfile.read(long_recording.path, dtype="float32")
    samples = Shards(tmp_path / "pack").read(pieces)
    np.testing.assert_array_equal(np.concatenate(samples), expected)
    assert 4 <= len(pieces) <= 7
    assert [piece.key for piece in pieces] == [f"book__{number:04d}" for number in range(len(pieces))]
    lengths = [len(piece) for piece in samples]
    assert [piece.start_seconds for piece in pieces] == [sum(lengths[:i]) / 16_000 for i in range(len(pieces))]
    for piece in pieces:
        assert (piece.recording, piece.reference, piece.language) == ("book", None, "Thai")
        assert piece.duration_seconds <= 30
    for piece in pieces[1:]:
        phase = (piece.start_seconds - 2.5) % 3.7
        assert 0 <= phase <= 0.3  # in a pause
    verify(tmp_path / "pack")


def test_a_long_recording_is_rejected_where_that_is_asked_for(long_recording, tmp_path):
    recordings = [long_recording, *make_recordings(tmp_path / "in", 3)]

    pack_tones(recordings, tmp_path / "pack", holdout=0, long_recordings="reject", max_rejected_share=0.5)

    assert rejected_of(tmp_path / "pack") == {"book": "too long: must be at most 30 s, got 100.00 s"}


def test_stretches_of_a_file_are_exactly_those_samples(long_recording, tmp_path):
    stretches = [
        replace(long_recording, key=f"part-{i}", start_seconds=start, told_seconds=told, reference=f"part {i}")
        for i, (start, told) in enumerate([(0.0, 1.5), (10.25, 2.0), (97.5, 2.5)])
    ]

    pack_tones(stretches, tmp_path / "pack", holdout=0)

    expected, _ = soundfile.read(long_recording.path, dtype="float32")
    utterances = list(read_utterances(tmp_path / "pack"))
    assert len(utterances) == 3
    for utterance, samples in zip(utterances, Shards(tmp_path / "pack").read(utterances), strict=True):
        stretch = next(recording for recording in stretches if recording.key == utterance.key)
        begin = round(stretch.start_seconds * 16_000)
        np.testing.assert_array_equal(samples, expected[begin : begin + round(stretch.told_seconds * 16_000)])
        assert (utterance.start_seconds, utterance.reference) == (stretch.start_seconds, stretch.reference)


def test_stretches_of_one_file_are_in_one_split(long_recording, tmp_path):
    others = [
        Recording(path=str(write_tone(tmp_path / f"{i}.wav", i, seconds=4)), key=f"other-{i}", source="s")
        for i in range(6)
    ]
    stretches = [
        replace(recording, key=f"{recording.key}-{i}", start_seconds=float(i), told_seconds=1.0)
        for recording in (*others, replace(long_recording, language=None))
        for i in range(4)
    ]

    pack_tones(stretches, tmp_path / "pack", holdout=0.3)

    sides: dict[str, set[str]] = {}
    for utterance in read_utterances(tmp_path / "pack"):
        sides.setdefault(utterance.key.rpartition("-")[0], set()).add(utterance.split)
    assert len(sides) == 7 and all(len(splits) == 1 for splits in sides.values())
    assert {"train"} in sides.values() and {"heldout"} in sides.values()


@pytest.fixture
def tars(tmp_path) -> Path:
    """Two tars as webdataset's writer makes them, of FLAC and MP3, one sample of which is no audio."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for tar in range(2):
        with webdataset.TarWriter(str(folder / f"set-{tar}.tar")) as writer:
            for number in range(4 * tar, 4 * tar + 4):
                suffix = ("flac", "wav")[number % 2]
                path = write_tone(tmp_path / f"{number}.{suffix}", number, seconds=0.5, rate_hz=(16_000, 44_100)[tar])
                audio = b"no audio" if number == 6 else path.read_bytes()
                about = {"language": "vi", "speaker": f"s{number}", "text": f"số {number}"}
                writer.write({"__key__": f"a/Utt.{number}".replace(".", "_"), suffix: audio, "json": about})
    return folder


def plan_tars(folder: Path, pack_folder: Path, *, in_place: bool):
    found = read_found([str(folder)], default_language=None, kind="auto", spool=pack_folder / "spool")
    layout = Layout(
        seed=0,
        splits=SPLITS,
        holdout=0.3,
        holdout_by="speaker",
        size=ShardSize(hours=1, recordings=3),
        in_place=in_place,
    )
    return plan_pack(found, pack_folder, layout, about={})


def pack_tars(folder: Path, pack_folder: Path, *, in_place: bool, processes: int = 1):
    plan = plan_tars(folder, pack_folder, in_place=in_place)
    pack_tasks(plan, settings(), max_rejected_share=0.2, processes=processes)
    report = merge(plan, settings(), drop_duplicates=True, max_rejected_share=0.2)
    plan.remove()
    return report


@pytest.mark.parametrize("in_place", [True, False])
def test_tars_that_webdataset_wrote_are_packed_or_indexed_where_they_are(tars, tmp_path, in_place):
    before = {path: path.read_bytes() for path in sorted(tars.iterdir())}

    report = pack_tars(tars, tmp_path / "pack", in_place=in_place)

    assert {path: path.read_bytes() for path in tars.iterdir()} == before
    utterances = list(read_utterances(tmp_path / "pack"))
    assert sorted(u.reference for u in utterances) == sorted(f"số {i}" for i in range(8) if i != 6)
    for utterance, samples in zip(utterances, Shards(tmp_path / "pack").read(utterances), strict=True):
        number = int(utterance.reference.split()[1])
        assert number_of(samples[:6400]) == number
        assert (utterance.key, utterance.language, utterance.speaker) == (f"a-utt_{number}", "Vietnamese", f"s{number}")
        assert len(samples) == utterance.duration_seconds * 16_000 == 8_000
    assert report.rejected_by_reason == {"unreadable": 1}
    assert {"train", "heldout"} == {utterance.split for utterance in utterances}
    verify(tmp_path / "pack")
    own = sorted(path.name for path in (tmp_path / "pack").glob("*.tar"))
    entries = read_index(tmp_path / "pack").shards
    if in_place:
        assert own == []
        assert [entry.location for entry in entries] == [str(tars / "set-0.tar"), str(tars / "set-1.tar")]
        assert [entry.sha256 for entry in entries] == [hashlib.sha256(data).hexdigest() for data in before.values()]
    else:
        assert own == sorted(entry.name for entry in entries) and all(entry.location is None for entry in entries)


def test_two_processes_index_tars_in_place_to_the_same_bytes_as_one(tars, tmp_path):
    pack_tars(tars, tmp_path / "one", in_place=True)

    pack_tars(tars, tmp_path / "two", in_place=True, processes=2)

    assert hashes_of(tmp_path / "one") == hashes_of(tmp_path / "two")


def test_recordings_outside_tars_cannot_be_indexed_in_place(tmp_path):
    with pytest.raises(ConfigError, match=r"pack\.in_place must be false for recordings outside WebDataset tars"):
        plan_tones(make_recordings(tmp_path / "in", 2), tmp_path / "pack", in_place=True)


def test_a_member_with_a_name_that_is_not_utf8_can_be_packed_but_not_indexed_in_place(tmp_path):
    folder = tmp_path / "tars"
    folder.mkdir()
    audio = write_tone(tmp_path / "x.wav", 5).read_bytes()
    with tarfile.open(folder / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo("caf\udce9.wav")
        member.size = len(audio)
        tar.addfile(member, io.BytesIO(audio))

    pack_tars(folder, tmp_path / "pack", in_place=False)

    assert number_of(Shards(tmp_path / "pack").read(read_utterances(tmp_path / "pack"))[0]) == 5
    with pytest.raises(ConfigError, match=r"pack\.in_place must be false .* with names in UTF-8"):
        pack_tars(folder, tmp_path / "in-place", in_place=True)


@pytest.mark.parametrize("count", [2, 3, 50])
def test_jobs_of_an_array_and_a_merge_make_the_bytes_of_one_pack(with_copies, tmp_path, count):
    sizes = {"holdout": 0, "utterances_per_shard": 2}
    pack_tones(with_copies, tmp_path / "whole", **sizes)
    plan = plan_tones(with_copies, tmp_path / "pack", **sizes)

    for number in reversed(range(count)):
        assert not (tmp_path / "pack" / INDEX).exists()
        if number == 0:
            with pytest.raises(StageError, match=r"must hold all \d+ shards of its plan .*run pack, or the parts"):
                merge(plan, settings(), drop_duplicates=True, max_rejected_share=0)
        pack_tasks(plan, settings(), part=(number, count), max_rejected_share=0, processes=1)
    merge(plan, settings(), drop_duplicates=True, max_rejected_share=0)
    plan.remove()

    assert hashes_of(tmp_path / "pack") == hashes_of(tmp_path / "whole")


def test_shards_that_were_packed_with_other_settings_are_not_merged(tmp_path):
    plan = plan_tones(make_recordings(tmp_path / "in", 4), tmp_path / "pack")
    pack_tasks(plan, settings(max_audio_seconds=20), max_rejected_share=0, processes=1)

    with pytest.raises(StageError, match="must hold all 2 shards of its plan before they are merged, got 2 that are"):
        merge(plan, settings(), drop_duplicates=True, max_rejected_share=0)


def test_a_copy_comes_back_when_a_merge_goes_on_and_its_original_is_gone(tmp_path):
    recordings = make_recordings(tmp_path / "in", 6)
    recordings.append(copy_of(recordings[0], tmp_path, key="zero", split="test"))
    sizes = {"holdout": 0, "utterances_per_shard": 2}
    plan = plan_tones(recordings, tmp_path / "pack", **sizes)
    pack_tasks(plan, settings(), max_rejected_share=0, processes=1)
    merge(plan, settings(), drop_duplicates=True, max_rejected_share=0)
    assert "tone-0" not in {utterance.key for utterance in read_utterances(tmp_path / "pack")}
    pack_tasks(plan, settings(), max_rejected_share=0, processes=1)  # notes are gone: all is packed again
    merge_until_copies_are_out(plan)
    soundfile.write(recordings[-1].path, make_tone(77), 16_000)

    pack_tasks(plan, settings(), max_rejected_share=0, processes=1)
    merge(plan, settings(), drop_duplicates=True, max_rejected_share=0)

    assert {utterance.key for utterance in read_utterances(tmp_path / "pack")} == {r.key for r in recordings}
    plan.remove()
    pack_tones(recordings, tmp_path / "whole", **sizes)
    assert hashes_of(tmp_path / "pack") == hashes_of(tmp_path / "whole")


def merge_until_copies_are_out(plan) -> None:
    """As a merge that was killed then leaves the folder."""
    from shards.merge import _listen, _take_out_copies

    _take_out_copies(plan, _listen(plan, settings()), drop_duplicates=True)
