import io
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from shards.audio import decode, decode_bytes, decode_flac, encode_flac, header_seconds
from shards.errors import AudioError
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
    with pytest.raises(AudioError, match="unreadable"):
        decode_flac(b"not audio")


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
