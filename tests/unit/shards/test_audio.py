import hashlib
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

import shards.audio
from shards.audio import (
    codes_of,
    decode,
    decode_bytes,
    decode_flac,
    decode_flac_codes,
    digest,
    digest_of_flac,
    encode_flac,
    estimate_seconds,
    header_seconds,
    open_recording,
    stream,
)
from shards.errors import AudioError, SourceError
from shards.places import Place
from shards.schema import Recording
from tests.helpers.tones import make_tone, number_of, write_tone


def wav(samples, rate_hz=16_000, *, subtype="PCM_16", container="WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, subtype=subtype, format=container)
    return file.getvalue()


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".ogg", ".opus"])
@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 48_000])
def test_a_tone_is_heard_in_every_format_and_at_every_rate(tmp_path, suffix, rate_hz):
    path = write_tone(tmp_path / f"x{suffix}", 37, seconds=1.5, rate_hz=rate_hz)

    samples = decode(path)

    assert (samples.dtype, samples.ndim) == (np.float32, 1)
    assert number_of(samples) == 37
    assert len(samples) == pytest.approx(24_000, abs=1_200)  # MP3 pads to whole frames
    assert np.abs(samples).max() == pytest.approx(0.5, abs=0.1)
    np.testing.assert_array_equal(samples, decode_bytes(path.read_bytes()))


@pytest.mark.parametrize("suffix", [".flac", ".raw", ".txt", ""])
def test_contents_decide_not_the_suffix(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(wav(make_tone(5)))

    assert number_of(decode(path)) == 5


def test_sixteen_bit_samples_are_kept_exactly():
    codes = np.random.default_rng(0).integers(-32768, 32768, 20_000).astype(np.int16)
    codes[:2] = -32768, 32767

    decoded = decode_bytes(wav(codes))

    np.testing.assert_array_equal(decoded, codes.astype(np.float32) / 32768)
    np.testing.assert_array_equal(decode_flac(encode_flac(decoded)), decoded)


def test_channels_are_averaged():
    left, right = make_tone(3), make_tone(90)

    decoded = decode_bytes(wav(np.stack([left, right], axis=1), subtype="FLOAT"))

    np.testing.assert_allclose(decoded, (left + right) / 2, atol=1e-7)


def test_flac_of_equal_samples_has_equal_bytes():
    assert encode_flac(make_tone(1)) == encode_flac(make_tone(1))
    assert encode_flac(codes_of(make_tone(1))) == encode_flac(make_tone(1))


def test_codes_are_what_flac_holds():
    samples = np.random.default_rng(3).uniform(-1.1, 1.1, 5_000).astype(np.float32)

    codes, _ = soundfile.read(io.BytesIO(encode_flac(samples)), dtype="int16")

    np.testing.assert_array_equal(codes_of(samples), codes)
    np.testing.assert_array_equal(decode_flac_codes(encode_flac(samples)), codes)
    assert decode_flac_codes(encode_flac(samples)).dtype == np.int16
    assert decode_flac(encode_flac(samples)).dtype == np.float32


def test_a_digest_is_the_md5_of_the_codes_as_in_flacs_header_and_equal_for_equal_audio():
    tone = make_tone(1)
    raw = b"".join(int(code).to_bytes(2, "little", signed=True) for code in codes_of(tone))

    assert digest(codes_of(tone)) == hashlib.md5(raw).digest() == digest_of_flac(encode_flac(tone))
    assert digest(codes_of(tone)) == digest(decode_flac_codes(encode_flac(tone)))
    assert digest(codes_of(tone)) == digest(codes_of((codes_of(tone) + np.float32(0.3)) / np.float32(32768)))
    assert digest(codes_of(tone)) != digest(codes_of(tone[:-1]))


def test_samples_between_two_codes_become_the_nearest():
    samples = np.array([0.4, 0.6, -0.4, -0.6, 99.4, 99.6], np.float32) / 32768

    np.testing.assert_array_equal(decode_flac(encode_flac(samples)) * 32768, [0, 1, 0, -1, 99, 100])


def test_full_scale_is_clipped_not_wrapped():
    decoded = decode_flac(encode_flac(np.array([1.0, -1.0, 1.5, -1.5], np.float32)))

    np.testing.assert_array_equal(decoded, np.array([32767, -32768, 32767, -32768], np.float32) / 32768)


def test_decode_flac_takes_nothing_but_its_own_kind():
    file = io.BytesIO()
    soundfile.write(file, make_tone(1, rate_hz=8_000), 8_000, format="FLAC")

    with pytest.raises(AudioError, match="format: must be mono 16 kHz FLAC, got FLAC at 8000 Hz"):
        decode_flac(file.getvalue())
    with pytest.raises(AudioError, match="format: must be mono 16 kHz FLAC, got WAV"):
        decode_flac(wav(make_tone(1)))
    with pytest.raises(AudioError, match="format: .* with 1 channels of PCM_24"):
        decode_flac(wav(make_tone(1), subtype="PCM_24", container="FLAC"))
    with pytest.raises(AudioError, match="unreadable"):
        decode_flac(b"not audio")


def test_decode_flac_notices_damage():
    flac = bytearray(encode_flac(make_tone(1)))

    with pytest.raises(AudioError, match="damaged: flac decoder lost sync"):
        decode_flac(bytes(flac[: len(flac) // 2]))
    longer = flac[:22] + (int.from_bytes(flac[22:26], "big") + 1).to_bytes(4, "big") + flac[26:]
    with pytest.raises(AudioError, match="truncated: the header promises 6401 frames, got 6400|damaged: "):
        decode_flac(bytes(longer))
    flac[len(flac) // 2] ^= 1
    with pytest.raises(AudioError, match="damaged: "):
        decode_flac(bytes(flac))


def with_rate(data: bytes, rate_hz: int) -> bytes:
    return data[:24] + rate_hz.to_bytes(4, "little") + data[28:]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "unreadable: Format not recognised"),
        (b"\0", "unreadable: Format not recognised"),
        (b"<!DOCTYPE html><html></html>" * 50, "unreadable: Format not recognised"),
        (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.wav\n", "unreadable: Format not recognised"),
        (b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n", "unreadable"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "unreadable: Format not recognised"),
        (wav(np.zeros(0, np.float32)), "empty: there are no samples"),
        (with_rate(wav(make_tone(0)), 1), "sample rate: must be 4000 to 384000 Hz, got 1$"),
        (with_rate(wav(make_tone(0)), 1_000_000), "sample rate: must be"),
        (wav(np.zeros((100, 40))), "channels: must be 1 to 32, got 40"),
        (wav(np.full(999, np.nan), subtype="FLOAT"), "not finite"),
        (wav(np.r_[np.zeros(99), np.inf], subtype="FLOAT"), "not finite"),
        (wav(make_tone(0) * 32768, subtype="FLOAT"), r"out of range: .* got a peak of 1\.6.*e\+04"),
    ],
)
def test_what_is_no_speech_is_refused_with_its_reason(data, message):
    with pytest.raises(AudioError, match=message):
        decode_bytes(data)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize(
    ("container", "subtype"),
    [
        *[("WAV", "PCM_16"), ("WAV", "FLOAT"), ("AIFF", "PCM_16"), ("W64", "PCM_16"), ("AU", "PCM_16")],
        *[("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III"), ("OGG", "OPUS"), ("OGG", "VORBIS")],
    ],
)
def test_a_file_that_was_cut_is_refused(container, subtype, share):
    data = wav(make_tone(0, seconds=3), subtype=subtype, container=container)

    assert len(decode_bytes(data)) == 48_000
    with pytest.raises(AudioError, match="truncated: |damaged: |unreadable: "):
        decode_bytes(data[: int(len(data) * share)])


def test_a_cut_wav_says_how_much_is_missing():
    data = wav(make_tone(0, seconds=3))

    with pytest.raises(AudioError, match="truncated: the header promises 96000 bytes, got 47956"):
        decode_bytes(data[:48_000])


@pytest.mark.parametrize("size", [0xFFFF_FFFF, 0x7FFF_FFFF])
def test_a_wav_that_was_streamed_without_a_length_is_whole(size):
    data = bytearray(wav(make_tone(8)))
    data[40:44] = size.to_bytes(4, "little")

    assert number_of(decode_bytes(bytes(data))) == 8


def test_durations_outside_the_limits_are_refused():
    data = wav(make_tone(0, seconds=2))

    with pytest.raises(AudioError, match=r"too short: must be at least 2.1 s, got 2.000 s"):
        decode_bytes(data, min_seconds=2.1)
    with pytest.raises(AudioError, match=r"too long: must be at most 1.9 s, got 2.00 s"):
        decode_bytes(data, max_seconds=1.9)
    assert len(decode_bytes(data, min_seconds=2, max_seconds=2)) == 32_000
    # The frames of an MP3 hold more than the recording, which is not held against it.
    mp3 = wav(make_tone(0, seconds=2), container="MP3", subtype=None)
    assert len(decode_bytes(mp3, min_seconds=2, max_seconds=2.01)) == pytest.approx(32_000, abs=160)


def test_three_hours_are_refused_from_the_header_alone(tmp_path):
    path = tmp_path / "long.wav"
    num_bytes = 3 * 3600 * 16_000 * 2
    header = wav(np.zeros(1, np.int16))[:40]
    with path.open("wb") as file:
        file.write(header[:4] + (num_bytes + 36).to_bytes(4, "little") + header[8:])
        file.write(num_bytes.to_bytes(4, "little"))
        file.truncate(num_bytes + 44)  # a sparse file: reading it would take seconds, and 700 MB as float32

    with pytest.raises(AudioError, match=r"too long: must be at most 1200 s, got 10800.00 s"):
        decode(path)


def test_pipes_devices_folders_and_nothing_are_refused_at_once(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.wav")

    for path in (tmp_path / "pipe.wav", Path("/dev/zero"), tmp_path):
        with pytest.raises(AudioError, match="unreadable: must be a regular file"):
            decode(path)
    with pytest.raises(AudioError, match="unreadable: No such file"):
        decode(tmp_path / "none.wav")


def test_what_libsndfile_cannot_read_goes_to_pyav(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "x.m4a"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44_100, layout="stereo")
        samples = np.stack([make_tone(50, seconds=2, rate_hz=44_100)] * 2)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
        frame.sample_rate = 44_100
        container.mux([*stream.encode(frame), *stream.encode(None)])

    decoded = decode(path)

    assert number_of(decoded) == 50
    assert len(decoded) == pytest.approx(32_000, abs=1_600)
    with pytest.raises(AudioError, match="too long: must be at most 1.5 s"):
        decode(path, max_seconds=1.5)


def test_header_seconds_decodes_nothing(tmp_path):
    assert header_seconds(write_tone(tmp_path / "x.flac", 0, seconds=1.5)) == 1.5
    assert header_seconds(tmp_path / "none") is None


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 44_100, 96_000])
def test_a_stream_gives_block_by_block_what_resampling_at_once_gives(rate_hz):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, rate_hz * 5 + 7).astype(np.float32)

    blocks = list(stream(io.BytesIO(wav(samples, rate_hz, subtype="FLOAT"))))

    joined = np.concatenate(blocks)
    if rate_hz != 8_000:
        assert len(blocks) > 1
    np.testing.assert_array_equal(joined, soxr.resample(samples, rate_hz, 16_000, quality="HQ"))
    np.testing.assert_array_equal(joined, decode_bytes(wav(samples, rate_hz, subtype="FLOAT")))


def codes_in(container, subtype, codes):
    return io.BytesIO(wav(codes, subtype=subtype, container=container))


@pytest.mark.parametrize(
    ("container", "subtype", "tolerance"),
    [
        *[("WAV", "PCM_16", 0), ("WAV", "GSM610", 0), ("WAV", "MS_ADPCM", 0), ("FLAC", "PCM_16", 0), ("MP3", None, 0)],
        *[("OGG", "VORBIS", 0), ("OGG", "OPUS", 0.01)],  # an Opus decoder that begins later fills in other noise
    ],
)
@pytest.mark.parametrize(("start", "seconds"), [(0, 1), (0.0001, 1.00003), (2.5, 3), (6, 1.9999), (7.99, 0.01)])
def test_a_stretch_is_that_part_of_the_whole(container, subtype, tolerance, start, seconds):
    samples = np.random.default_rng(0).uniform(-0.3, 0.3, 16_000 * 8).astype(np.float32)
    data = wav(samples, subtype=subtype, container=container)
    whole = decode_bytes(data)

    part = np.concatenate(list(stream(io.BytesIO(data), start_seconds=start, num_seconds=seconds)))

    first, last = round(start * 16_000), round((start + seconds) * 16_000)
    assert len(part) == last - first
    np.testing.assert_allclose(part, whole[first:last], rtol=0, atol=tolerance)


def test_stretches_that_meet_have_no_gap_and_no_overlap():
    samples = np.random.default_rng(0).uniform(-0.3, 0.3, 16_000 * 3).astype(np.float32)
    data = wav(samples, subtype="FLOAT")

    # Ends that fall between two frames.
    parts = [
        np.concatenate(list(stream(io.BytesIO(data), start_seconds=start, num_seconds=0.10003)))
        for start in np.arange(29) * 0.10003
    ]

    np.testing.assert_array_equal(np.concatenate(parts), samples[: round(29 * 0.10003 * 16_000)])


def test_a_stretch_without_a_length_goes_to_the_end():
    data = wav(np.arange(1_000, dtype=np.int16))

    (part,) = stream(io.BytesIO(data), start_seconds=0.05)

    np.testing.assert_array_equal(part * 32768, np.arange(800, 1_000))


@pytest.mark.parametrize("container", ["WAV", "FLAC", "MP3", "OGG"])
def test_a_stretch_outside_its_recording_is_refused(container):
    data = wav(make_tone(1, seconds=3), container=container, subtype=None)

    def decode_stretch(start, seconds=None):
        return np.concatenate(list(stream(io.BytesIO(data), start_seconds=start, num_seconds=seconds)))

    assert len(decode_stretch(2, 1.05)) == pytest.approx(16_000, abs=1_700)
    for start, seconds in [(2, 1.3), (3.4, 1), (4, None), (-0.1, 1), (1, 0), (1, -1)]:
        with pytest.raises(AudioError, match="outside: a stretch must lie within its recording of 3|outside: .* 2.9"):
            decode_stretch(start, seconds)


def test_a_stretch_behind_the_end_of_a_stream_without_a_length_is_refused():
    flac = bytearray(wav(make_tone(1, seconds=3), container="FLAC"))
    flac[22:26] = bytes(4)  # the lower bits of the number of samples

    (part,) = stream(io.BytesIO(bytes(flac)), start_seconds=1, num_seconds=2)
    assert len(part) == 32_000
    with pytest.raises(AudioError, match="outside: a stretch must lie within its recording of 3.00 s, got 1.00 s to 4"):
        list(stream(io.BytesIO(bytes(flac)), start_seconds=1, num_seconds=3))


def test_limits_are_of_the_stretch():
    data = wav(make_tone(1, seconds=3))

    (part,) = stream(io.BytesIO(data), start_seconds=1, num_seconds=0.5, max_seconds=0.5, min_seconds=0.5)
    assert len(part) == 8_000
    with pytest.raises(AudioError, match="too long: must be at most 1 s, got 1.50 s"):
        next(stream(io.BytesIO(data), start_seconds=1.5, max_seconds=1))
    with pytest.raises(AudioError, match="too short: must be at least 0.6 s, got 0.500 s"):
        next(stream(io.BytesIO(data), start_seconds=1, num_seconds=0.5, min_seconds=0.6))


def recording(path, **fields):
    return Recording(path=str(path), key="x", source="x", **fields)


def read(one):
    with open_recording(one) as file:
        return np.concatenate(list(stream(file)))


def test_a_recording_is_a_file_or_a_part_of_one(tmp_path):
    first, second = wav(make_tone(1)), wav(make_tone(2), container="FLAC")
    (tmp_path / "x").write_bytes(b"?" * 77 + first + second)
    write_tone(tmp_path / "x.wav", 3)

    assert number_of(read(recording(tmp_path / "x.wav"))) == 3
    assert number_of(read(recording(tmp_path / "x", offset_bytes=77, num_bytes=len(first)))) == 1
    assert number_of(read(recording(tmp_path / "x", offset_bytes=77 + len(first), num_bytes=len(second)))) == 2
    with pytest.raises(AudioError, match=rf"truncated: must be 99999 bytes from byte 77, got {len(first + second)}"):
        read(recording(tmp_path / "x", offset_bytes=77, num_bytes=99_999))


def test_a_part_that_is_too_large_for_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.audio, "MAX_BYTES", 1_000)
    (tmp_path / "x").write_bytes(bytes(5_000))

    with pytest.raises(AudioError, match="too large: must be at most 1000 bytes, got more"):
        read(recording(tmp_path / "x", offset_bytes=0, num_bytes=5_000))


def test_opening_a_recording_waits_for_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe")

    for fields in ({}, {"offset_bytes": 0, "num_bytes": 9}):
        with pytest.raises(AudioError, match="unreadable: must be a regular file"):
            read(recording(tmp_path / "pipe", **fields))


class Remote:
    """A place that is opened once, with what comes then."""

    def __init__(self, data=b"", error=None):
        self.data, self.error = data, error

    def open(self, **_):
        if self.error:
            raise self.error
        return io.BytesIO(self.data)


def caused(error, cause):
    error.__cause__ = cause
    return error


def test_a_recording_at_an_address_is_read_whole_or_refused(monkeypatch):
    def read_remote(remote, **fields):
        monkeypatch.setattr(Place, "of", lambda url: remote if url == "https://host/x.wav" else None)
        return read(recording("https://host/x.wav", **fields))

    data = wav(make_tone(4))
    assert number_of(read_remote(Remote(data))) == 4
    assert number_of(read_remote(Remote(b"??" + data), offset_bytes=2, num_bytes=len(data))) == 4
    with pytest.raises(AudioError, match="truncated: the header promises"):
        read_remote(Remote(data[:5_000]))
    with pytest.raises(AudioError, match="unreadable: took too long"):
        read_remote(Remote(error=TimeoutError("took too long")))
    with pytest.raises(AudioError, match="unreadable: not there"):
        read_remote(Remote(error=caused(SourceError("not there"), FileNotFoundError())))
    with pytest.raises(SourceError, match="^a package$"):
        read_remote(Remote(error=caused(SourceError("a package"), ImportError())))


def test_an_estimate_takes_what_is_told_then_the_header_then_the_size(tmp_path):
    path = write_tone(tmp_path / "x.wav", 1, seconds=2)
    (tmp_path / "none.mp3").write_bytes(bytes(32_000))

    assert estimate_seconds(recording(path, told_seconds=1.25)) == 1.25
    assert estimate_seconds(recording(path)) == 2
    assert estimate_seconds(recording(path, start_seconds=0.5)) == 1.5
    assert estimate_seconds(recording(path, start_seconds=5)) == 0
    assert estimate_seconds(recording(tmp_path / "none.mp3")) == 2
    assert estimate_seconds(recording(path, offset_bytes=5, num_bytes=48_000)) == 3
    assert estimate_seconds(recording("s3://bucket/x.wav")) == 0
    for unreadable in (tmp_path / "not-there", tmp_path, "a\0b", "x" * 5_000):
        assert estimate_seconds(recording(unreadable)) >= 0


def test_without_pyav_the_error_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)

    with pytest.raises(AudioError, match=r"unreadable: .*; `pip install qad-dist\[pyav\]` adds formats"):
        decode_bytes(b"#!AMR\n" + b"\x7c" * 50)
    flac = bytearray(wav(make_tone(1), container="FLAC"))
    flac[26:42] = b"x" * 16
    with pytest.raises(AudioError, match="damaged: the samples do not have the MD5"):
        decode_bytes(bytes(flac))
    data = wav(make_tone(1), container="OGG", subtype="VORBIS")
    with pytest.raises(AudioError, match="format: must be one stream, got several"):
        decode_bytes(data + data)


def test_a_lossy_decoder_that_fails_in_the_middle_is_not_replaced_by_another(monkeypatch):
    read, calls = soundfile.SoundFile.read, []

    def fail(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise soundfile.SoundFileError("broken")
        return read(self, *arguments, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", fail)

    with pytest.raises(AudioError, match="damaged: broken"):
        decode_bytes(wav(make_tone(1, seconds=9), container="OGG", subtype="VORBIS"))


def test_a_flac_that_fails_in_the_middle_is_read_on_from_there(monkeypatch):
    pytest.importorskip("av")
    data = wav(np.random.default_rng(0).uniform(-0.3, 0.3, 300_000), container="FLAC")
    whole, read, calls = decode_bytes(data), soundfile.SoundFile.read, []

    def fail(self, *arguments, **options):
        calls.append(1)
        if len(calls) % 3 == 0:
            raise soundfile.SoundFileError("broken")
        return read(self, *arguments, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", fail)

    np.testing.assert_array_equal(decode_bytes(data), whole)
    assert len(calls) == 3
    part = np.concatenate(list(stream(io.BytesIO(data), start_seconds=1, num_seconds=15)))
    np.testing.assert_array_equal(part, whole[16_000:256_000])
    assert len(calls) == 6
