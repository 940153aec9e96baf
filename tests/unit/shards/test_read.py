"""Reading by offset: what was packed, in the order asked for, and no other member taken for an utterance."""

import io
import os
import pickle
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from shards import read as module
from shards.audio import decode_bytes, encode_flac
from shards.errors import ConfigError, ShardError
from shards.index import read_utterances
from shards.read import Damaged, Shards, read_ahead
from tests.helpers.reading import same_tones, tone_of, write_shards, write_tones
from tests.helpers.tones import make_tone


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    write_tones(tmp_path / "pack", 12, per_shard=5)
    return tmp_path / "pack"


def test_samples_are_those_that_were_packed_in_the_order_asked_for(packed):
    utterances = read_utterances(packed)
    numbers = [11, 0, 7, 3, 3, 10, 1]

    found = Shards(packed).read([utterances[number] for number in numbers])

    assert same_tones(found, numbers)
    assert same_tones(Shards(packed).read(utterances), range(12))
    assert Shards(packed).read([]) == []


def test_codes_are_16_bits_and_the_samples_are_exactly_their_share_of_32768(packed):
    utterances = read_utterances(packed)

    codes = Shards(packed).read_codes(utterances[:2])

    assert [one.dtype for one in codes] == [np.int16, np.int16]
    np.testing.assert_array_equal(codes[1].astype(np.float64) / 32768, tone_of(1).astype(np.float64))


def test_each_shard_is_opened_once_and_read_forwards(packed, monkeypatch):
    utterances = read_utterances(packed)
    opened, offsets = [], []
    open_file, member = module._open_without_waiting, module._member

    def count(path, flags):
        opened.append(Path(path).name)
        return open_file(path, flags)

    def note(file, path, utterance):
        offsets.append((path.name, utterance.audio_offset))
        return member(file, path, utterance)

    monkeypatch.setattr(module, "_open_without_waiting", count)
    monkeypatch.setattr(module, "_member", note)

    Shards(packed).read([utterances[number] for number in (9, 2, 8, 0, 1, 6)])

    assert sorted(opened) == ["train-000000.tar", "train-000001.tar"]
    for name in set(opened):
        of_shard = [offset for shard, offset in offsets if shard == name]
        assert of_shard == sorted(of_shard)


def test_a_pickled_copy_reads_the_same_without_the_index(packed):
    utterances = read_utterances(packed)[:]
    copy = pickle.loads(pickle.dumps(Shards(packed)))
    utterances = list(utterances)
    (packed / "index.json").unlink()

    assert same_tones(copy.read(utterances), range(12))
    assert copy.folder == packed


def test_an_unreadable_utterance_is_an_error_or_damaged_in_its_place(packed):
    utterances = list(read_utterances(packed)[:3])
    utterances[1] = replace(utterances[1], audio_offset=utterances[2].audio_offset)

    with pytest.raises(ShardError, match=r"utterance 'tone-1' must be where the index says, got b'tone-2\.flac' there"):
        Shards(packed).read(utterances)
    first, second, third = Shards(packed).try_read(utterances)

    assert same_tones([first, third], [0, 2])
    assert isinstance(second, Damaged)
    assert (second.key, second.shard) == ("tone-1", "train-000000.tar")
    assert second.reason.startswith(f"{packed / 'train-000000.tar'}: utterance 'tone-1' must be where the index says")


def test_a_member_of_another_size_or_duration_is_refused(packed):
    (utterance,) = read_utterances(packed)[:1]
    shards = Shards(packed)

    with pytest.raises(ShardError, match=r"'tone-0' must have \d+ bytes, got \d+ in its header; it is another shard"):
        shards.read([replace(utterance, audio_bytes=utterance.audio_bytes - 1)])
    with pytest.raises(ShardError, match=r"'tone-0' must last 0\.4 s, got 0\.3 s; the shard is not the one that was"):
        shards.read([replace(utterance, duration_seconds=0.4)])
    with pytest.raises(ShardError, match=r"'tone-0' must have \d+ bytes, got 0; the shard was cut"):
        shards.read([replace(utterance, audio_offset=1 << 40)])
    with pytest.raises(ShardError, match=r"train-000000\.tar must be readable, got 'Invalid argument'"):
        shards.read([replace(utterance, audio_offset=0)])


def test_a_shard_that_the_index_does_not_know_is_named(packed):
    utterance = replace(read_utterances(packed)[0], shard="train-000009.tar")

    with pytest.raises(ShardError, match=r"train-000009\.tar must be in the index, got an unknown shard"):
        Shards(packed).read([utterance])


def test_a_shard_of_ours_that_holds_other_audio_is_refused(tmp_path):
    file = io.BytesIO()
    soundfile.write(file, make_tone(3, seconds=0.3), 16_000, format="FLAC", subtype="PCM_24")
    utterances = write_shards(tmp_path, {"a.tar": {"tone-3.flac": file.getvalue()}}, seconds={"tone-3": 0.3})

    with pytest.raises(ShardError, match=r"'tone-3' must be FLAC, got format: .*; the shard is damaged"):
        Shards(tmp_path).read(utterances)


def encode(samples: np.ndarray, rate_hz: int, **kwargs: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, **kwargs)
    return file.getvalue()


def test_a_tar_in_place_may_hold_any_audio(tmp_path):
    tone = make_tone(5, seconds=0.5)
    members = {
        "a/x.flac": encode_flac(tone),
        "a/y.flac": encode(tone, 16_000, format="FLAC", subtype="PCM_24"),
        "a/z.wav": encode(make_tone(5, seconds=0.5, rate_hz=8_000), 8_000, format="WAV"),
        "b/v.WAV": encode(np.stack([tone, tone], axis=1), 16_000, format="WAV", subtype="FLOAT"),
        "b/w.ogg": encode(make_tone(5, seconds=0.5, rate_hz=48_000), 48_000, format="OGG", subtype="OPUS"),
    }
    home = tmp_path / "elsewhere"
    utterances = write_shards(home, {"a.tar": members}, seconds=dict.fromkeys("xyzvw", 0.5), address=str(home))

    found = Shards(home).read(utterances)

    for samples, data in zip(found, members.values(), strict=True):
        np.testing.assert_array_equal(samples, decode_bytes(data))
        assert samples.dtype == np.float32
    assert np.abs(found[1] - tone).max() < 2**-22  # not cut down to 16 bits
    np.testing.assert_array_equal(found[3], tone)
    codes = Shards(home).read_codes(utterances)
    assert [one.dtype == np.int16 for one in codes] == [True, False, False, False, False]


LONG = "corpus/speaker-0042/" + "chapter-with-a-long-name/" * 5
NAMES = (
    "plain.flac",
    "./with/folders.flac",
    LONG + "k.flac",
    "k" * 95 + ".flac",
    "k" * 97 + ".flac",
    "k" * 150 + ".flac",
    "tiếng việt/một.flac",
    LONG + "số-một-" + "dài" * 40 + ".flac",
)
FORMATS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}
TOO_LONG_FOR_USTAR = (NAMES[4], NAMES[5], NAMES[7])


@pytest.mark.parametrize(
    ("tar_format", "name"),
    [(form, name) for form in FORMATS for name in NAMES if form != "ustar" or name not in TOO_LONG_FOR_USTAR],
)
def test_no_name_of_a_member_is_taken_for_another_however_it_is_stored(tmp_path, tar_format, name):
    key = name.rpartition("/")[2].partition(".")[0]
    utterances = write_shards(
        tmp_path,
        {"a.tar": {"first.flac": encode_flac(tone_of(1)), name: encode_flac(tone_of(2))}},
        seconds={"first": len(tone_of(1)) / 16_000, key: len(tone_of(2)) / 16_000},
        tar_format=FORMATS[tar_format],
    )

    assert same_tones(Shards(tmp_path).read(utterances), [1, 2])
    with pytest.raises(ShardError, match="must be where the index says"):
        Shards(tmp_path).read([replace(utterances[1], audio_name="other.flac")])
    with pytest.raises(ShardError, match="must be where the index says"):
        Shards(tmp_path).read([replace(utterances[1], audio_name="ñandú/" + "other" * 30 + ".flac")])


@pytest.mark.parametrize(
    "stored",
    [
        "tiếng".encode(),  # cut off anywhere
        "tiếng việt/một.fla".encode(),
        b"ti?ng vi?t/m?t.flac",  # Python's tarfile
        b"ting vit/mt.flac",  # Go
        "t/một.flac".encode(),  # libarchive: folders shortened
    ],
)
def test_names_beyond_ascii_may_be_shortened_in_the_header(stored):
    assert module._can_be_name(stored, "tiếng việt/một.flac")


def test_names_that_are_not_utf8_are_compared_byte_by_byte():
    assert module._can_be_name(b"caf\xe9.flac", "caf\udce9.flac")
    assert not module._can_be_name(b"caf\xe8.flac", "caf\udce9.flac")


@pytest.mark.parametrize("stored", [b"", b"tone-1.fla", b"tone-1.flac2", b"x/tone-1.flac", b"tone-2.flac"])
def test_a_short_ascii_name_must_stand_there_as_it_is(stored):
    assert not module._can_be_name(stored, "tone-1.flac")


def test_a_pipe_in_the_place_of_a_shard_is_refused_and_not_waited_for(packed):
    utterances = list(read_utterances(packed))
    (packed / "train-000000.tar").unlink()
    os.mkfifo(packed / "train-000000.tar")

    with pytest.raises(ShardError, match=r"train-000000\.tar must be readable, got 'File or stream is not seekable"):
        Shards(packed).read(utterances[:1])


def test_a_shard_behind_an_address_needs_a_cache(tmp_path):
    utterances = write_tones(tmp_path, 2, per_shard=2, address="https://example.org/corpus")

    with pytest.raises(ConfigError, match=r"read\.cache must name a folder for https://example\.org/corpus/train-0000"):
        Shards(tmp_path).try_read(utterances)


def test_batches_come_in_order_with_their_own_samples(packed):
    utterances = read_utterances(packed)
    batches = [utterances[5:8], utterances[:5], utterances[8:]]

    found = list(read_ahead(Shards(packed).read, batches))

    assert same_tones(found[0], [5, 6, 7])
    assert same_tones(found[1], range(5))
    assert same_tones(found[2], range(8, 12))
    assert list(read_ahead(Shards(packed).read, [])) == []


def test_next_batch_is_loaded_while_the_present_one_is_in_use_and_no_later_one():
    begun = [threading.Event() for _ in range(4)]

    def load(number: int) -> int:
        begun[number].set()
        return number

    batches = read_ahead(load, range(4))

    for number in range(4):
        assert next(batches) == number
        assert begun[min(number + 1, 3)].wait(timeout=30)
        assert not any(event.is_set() for event in begun[number + 2 :])


def test_damage_is_told_with_the_batch_that_it_is_about(packed):
    utterances = read_utterances(packed)
    (packed / utterances[-1].shard).unlink()
    batches = read_ahead(Shards(packed).read, [utterances[:1], utterances[11:]])

    assert same_tones(next(batches), [0])
    with pytest.raises(ShardError, match=rf"{utterances[-1].shard} must be readable, got 'No such file"):
        next(batches)
