import io
import json
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset

from shards.errors import AudioError, ConfigError, SourceError
from shards.index import INDEX, read_index, read_utterances
from shards.merge import REJECTED
from shards.read import Shards
from shards.schema import Recording
from shards.verify import verify
from tests.helpers.packing import hashes_of, pack_tones
from tests.helpers.tones import make_recordings, number_of, write_tone


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tones")
    pack_tones(make_recordings(folder / "in", 40), folder / "pack")
    return folder / "pack"


def test_the_folder_holds_shards_table_rejections_and_index_and_nothing_else(packed):
    names = set(hashes_of(packed))

    shards = {f"train-{i:06d}.tar" for i in range(4)} | {f"heldout-{i:06d}.tar" for i in range(2)}
    assert names == shards | {"utterances.parquet", "rejected.jsonl", "index.json"}


def test_every_key_has_its_own_tone_and_reference(packed):
    utterances = read_utterances(packed)

    assert sorted(u.key for u in utterances) == sorted(f"tone-{i}" for i in range(40))
    for utterance, samples in zip(utterances, Shards(packed).read(utterances), strict=True):
        number = int(utterance.key.removeprefix("tone-"))
        assert number_of(samples) == number
        assert utterance.reference == f"tone số {number}"
        assert len(samples) == utterance.duration_seconds * 16_000
        np.testing.assert_array_equal(samples, Shards(packed).read([utterance])[0])


def test_utterances_of_several_shards_are_read_in_the_order_that_was_asked_for(packed):
    utterances = read_utterances(packed)[::-3]

    numbers = [number_of(samples) for samples in Shards(packed).read(utterances)]

    assert numbers == [int(utterance.key.removeprefix("tone-")) for utterance in utterances]
    interleaved = [utterances[0], utterances[-1], utterances[1]]
    assert [number_of(samples) for samples in Shards(packed).read(interleaved)] == [numbers[0], numbers[-1], numbers[1]]


def test_plain_tarfile_reads_pairs_of_flac_and_json_where_the_table_says(packed):
    for utterance in read_utterances(packed):
        with tarfile.open(packed / utterance.shard) as tar:
            flac, about = tar.getmember(f"{utterance.key}.flac"), tar.getmember(f"{utterance.key}.json")
            assert (flac.offset_data, flac.size) == (utterance.audio_offset, utterance.audio_bytes)
            assert (about.offset_data, about.size) == (utterance.json_offset, utterance.json_bytes)
            record = json.loads(tar.extractfile(about).read())
        assert record == {
            name: getattr(utterance, name)
            for name in (
                *("key", "recording", "start_seconds", "duration_seconds"),
                *("language", "speaker", "reference", "split", "source"),
            )
        }


def test_plain_webdataset_reads_the_same_utterances_in_the_same_order(packed):
    urls = [str(packed / entry.name) for entry in read_index(packed).shards]

    samples = list(webdataset.WebDataset(urls, shardshuffle=False))

    assert [sample["__key__"] for sample in samples] == [utterance.key for utterance in read_utterances(packed)]
    for sample in samples:
        audio, rate_hz = soundfile.read(io.BytesIO(sample["flac"]), dtype="float32")
        assert (rate_hz, number_of(audio)) == (16_000, int(sample["__key__"].removeprefix("tone-")))
        assert json.loads(sample["json"])["key"] == sample["__key__"]


def test_the_index_counts_what_is_there(packed):
    index = read_index(packed)
    utterances = read_utterances(packed)

    assert index.num_utterances == len(utterances) == 40
    assert index.hours * 3600 == pytest.approx(sum(0.3 + 0.02 * (i % 8) for i in range(40)), abs=1e-9)
    assert sum(sum(hours.values()) for hours in index.hours_by_split_language.values()) == pytest.approx(index.hours)
    assert set(index.hours_by_split_language) == {"train", "heldout"}
    assert set(index.hours_by_split_language["train"]) == {"English", "Vietnamese"}
    for entry in index.shards:
        assert entry.num_utterances == sum(u.shard == entry.name for u in utterances)
        assert entry.seconds == pytest.approx(sum(entry.seconds_by_language.values()))
    verify(packed)


def test_no_speaker_is_in_train_and_held_out(packed):
    speakers = {
        split: {u.speaker for u in read_utterances(packed) if u.split == split} for split in ("train", "heldout")
    }

    assert speakers["train"] and speakers["heldout"] and not speakers["train"] & speakers["heldout"]


def test_source_splits_decide_the_shard(tmp_path):
    recordings = [
        replace(recording, split=("train", "dev", "test")[i % 3])
        for i, recording in enumerate(make_recordings(tmp_path / "in", 9))
    ]

    pack_tones(recordings, tmp_path / "pack", holdout=0)

    assert {(u.key, u.split, u.shard) for u in read_utterances(tmp_path / "pack")} == {
        (f"tone-{i}", split, f"{split}-000000.tar") for i, split in enumerate(["train", "heldout", "test"] * 3)
    }


def test_rejected_recordings_are_named_and_leave_the_other_shards_as_they_are(tmp_path):
    # Where no source tells how long a recording lasts, its header does, and decides with it what goes where.
    recordings = [replace(recording, told_seconds=0.5) for recording in make_recordings(tmp_path / "in", 40)]
    pack_tones(recordings, tmp_path / "whole")
    victim = next(u for u in read_utterances(tmp_path / "whole") if u.shard == "train-000001.tar")
    Path(f"{tmp_path}/in/{victim.key.removeprefix('tone-')}.wav").write_bytes(b"no audio")

    report = pack_tones(recordings, tmp_path / "pack", max_rejected_share=0.05)

    [rejected] = [json.loads(line) for line in (tmp_path / "pack" / REJECTED).read_text().splitlines()]
    assert (rejected["key"], rejected["reason"]) == (victim.key, "unreadable: Format not recognised")
    assert (report.num_recordings, report.num_rejected, report.rejected_by_reason) == (40, 1, {"unreadable": 1})
    before, after = hashes_of(tmp_path / "whole"), hashes_of(tmp_path / "pack")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"train-000001.tar", "utterances.parquet", "rejected.jsonl", "index.json"}
    assert victim.key not in {u.key for u in read_utterances(tmp_path / "pack")}
    verify(tmp_path / "pack")


def test_a_shard_of_which_nothing_is_left_is_not_written(tmp_path):
    recordings = make_recordings(tmp_path / "in", 4)
    for recording in recordings[:2]:
        Path(recording.path).unlink()
    tasks = {"holdout": 0.0, "utterances_per_shard": 1, "max_rejected_share": 0.5}

    pack_tones(recordings, tmp_path / "pack", **tasks)

    assert {u.key for u in read_utterances(tmp_path / "pack")} == {"tone-2", "tone-3"}
    assert len(list((tmp_path / "pack").glob("*.tar"))) == 2


def test_too_many_rejections_stop_the_pack_without_an_index(tmp_path):
    recordings = make_recordings(tmp_path / "in", 10)
    for recording in recordings[:3]:
        Path(recording.path).write_bytes(b"no audio")

    message = r"pack\.max_rejected_share must cover .* got 0\.2 and 3 of 10 recordings: tone-\d \(unreadable"
    with pytest.raises(AudioError, match=message):
        pack_tones(recordings, tmp_path / "pack", max_rejected_share=0.2, holdout=0, utterances_per_shard=10)

    assert not (tmp_path / "pack" / INDEX).exists()
    assert len((tmp_path / "pack" / REJECTED).read_text().splitlines()) == 3


def test_nothing_left_is_an_error_whatever_share_may_be_rejected(tmp_path):
    recordings = [
        Recording(path=str(write_tone(tmp_path / f"{i}.wav", i, seconds=1.5)), key=f"k{i}", source="s")
        for i in range(5)
    ]

    with pytest.raises(AudioError, match=r"pack\.inputs must hold a recording that can be used, got 5 that cannot"):
        pack_tones(recordings, tmp_path / "pack", max_rejected_share=1, max_audio_seconds=1, long_recordings="reject")

    assert not (tmp_path / "pack" / INDEX).exists()


def test_an_unknown_split_is_refused_before_the_old_index_is_touched(tmp_path):
    recordings = make_recordings(tmp_path / "in", 5)
    pack_tones(recordings, tmp_path / "pack")

    with pytest.raises(ConfigError, match=r"pack\.splits must list every split .*'odd'"):
        pack_tones([replace(recordings[0], split="odd")], tmp_path / "pack")

    verify(tmp_path / "pack")


def test_no_recordings_are_refused(tmp_path):
    with pytest.raises(SourceError, match="must hold recordings, got none"):
        pack_tones([], tmp_path / "pack")


def test_equal_keys_get_a_suffix_that_does_not_depend_on_the_order(tmp_path):
    recordings = [replace(recording, key="same") for recording in make_recordings(tmp_path / "in", 3)]

    def keys(listed):
        pack_tones(listed, tmp_path / "pack", holdout=0)
        return {u.speaker: u.key for u in read_utterances(tmp_path / "pack")}

    found = keys(recordings)

    assert found == keys(recordings[::-1])
    assert len(set(found.values())) == 3 and all(re.fullmatch(r"same-[0-9a-f]{8}(-\d)?", key) for key in found.values())
    verify(tmp_path / "pack")


def test_packing_with_other_settings_removes_the_old_shards(tmp_path):
    recordings = make_recordings(tmp_path / "in", 20)
    pack_tones(recordings, tmp_path / "pack", utterances_per_shard=2)

    pack_tones(recordings, tmp_path / "pack", utterances_per_shard=100)

    assert {path.name for path in (tmp_path / "pack").glob("*.tar")} == {"train-000000.tar", "heldout-000000.tar"}
    verify(tmp_path / "pack")


def test_progress_ends_with_all_recordings_and_seconds(tmp_path):
    calls = []

    report = pack_tones(make_recordings(tmp_path / "in", 20), tmp_path / "pack", progress=calls.append)

    done = [call.num_recordings for call in calls]
    assert done == sorted(done) and len(done) == len(report.index.shards)
    assert (calls[-1].num_recordings, calls[-1].num_recordings_in_all) == (20, 20)
    assert calls[-1].seconds == pytest.approx(report.index.hours * 3600)
    assert calls[-1].planned_seconds == calls[-1].planned_seconds_in_all == pytest.approx(calls[-1].seconds)
