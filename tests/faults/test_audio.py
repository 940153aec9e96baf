"""Audio that is odd, damaged or hostile: decoded in full or refused with its kind, never shortened in silence.

Codecs without checksums (PCM, MP3, AAC) cannot tell samples that were changed; only that something is missing.
"""

import hashlib
import io
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile

from shards.audio import decode_bytes, stream
from shards.errors import AudioError
from tests.helpers.decode_files import decode_in_fresh_process
from tests.helpers.tones import make_tone, number_of

av = pytest.importorskip("av")

SECONDS = 3
# Of all kinds: what lossy codecs put in front and behind.
PADDING = 0.1


@cache
def tone(rate_hz=16_000):
    return make_tone(40, seconds=SECONDS, rate_hz=rate_hz)


def by_soundfile(container, subtype=None, *, rate_hz=16_000, endian=None, **options):
    file = io.BytesIO()
    soundfile.write(file, tone(rate_hz), rate_hz, subtype, endian, container, **options)
    return file.getvalue()


def by_av(container, codec, *, rate_hz=16_000, **options):
    # In a folder: some muxers come back to the beginning of the file by opening it again.
    with tempfile.TemporaryDirectory() as folder:
        with av.open(f"{folder}/audio", "w", format=container, options=options) as target:
            encoder = target.add_stream(codec, rate=rate_hz, layout="mono")
            encoder.bit_rate = 12_200 if container == "amr" else 64_000
            frame = av.AudioFrame.from_ndarray(tone(rate_hz)[None], format="fltp", layout="mono")
            frame.sample_rate = rate_hz
            converted = av.AudioResampler(format=encoder.format).resample(frame)
            target.mux([packet for part in converted for packet in encoder.encode(part)] + list(encoder.encode(None)))
        return Path(folder, "audio").read_bytes()


def without_its_first_frame(mp3):
    """The frame that holds the number of frames."""
    return mp3[mp3.index(mp3[:2], 100) :]


KINDS = {
    "wav 8 bit": lambda: by_soundfile("WAV", "PCM_U8"),
    "wav 16 bit": lambda: by_soundfile("WAV", "PCM_16"),
    "wav 24 bit": lambda: by_soundfile("WAV", "PCM_24"),
    "wav 32 bit": lambda: by_soundfile("WAV", "PCM_32"),
    "wav float": lambda: by_soundfile("WAV", "FLOAT"),
    "wav double": lambda: by_soundfile("WAV", "DOUBLE"),
    "wav mu-law": lambda: by_soundfile("WAV", "ULAW"),
    "wav a-law": lambda: by_soundfile("WAV", "ALAW"),
    "wav ima adpcm": lambda: by_soundfile("WAV", "IMA_ADPCM"),
    "wav ms adpcm": lambda: by_soundfile("WAV", "MS_ADPCM"),
    "wav gsm": lambda: by_soundfile("WAV", "GSM610"),
    "wavex": lambda: by_soundfile("WAVEX", "PCM_24"),
    "rifx": lambda: by_soundfile("WAV", "PCM_16", endian="BIG"),
    "rf64": lambda: by_soundfile("RF64", "PCM_16"),
    "w64": lambda: by_soundfile("W64", "PCM_16"),
    "aiff": lambda: by_soundfile("AIFF", "PCM_16"),
    "au": lambda: by_soundfile("AU", "PCM_16"),
    "au little-endian": lambda: by_soundfile("AU", "PCM_16", endian="LITTLE"),
    "caf": lambda: by_soundfile("CAF", "PCM_16"),
    "caf alac": lambda: by_soundfile("CAF", "ALAC_16"),
    "nist": lambda: by_soundfile("NIST", "PCM_16"),
    "flac": lambda: by_soundfile("FLAC", "PCM_16"),
    "flac 8 bit": lambda: by_soundfile("FLAC", "PCM_S8"),
    "flac 24 bit": lambda: by_soundfile("FLAC", "PCM_24"),
    "vorbis": lambda: by_soundfile("OGG", "VORBIS"),
    "opus": lambda: by_soundfile("OGG", "OPUS"),
    "mp3": lambda: by_soundfile("MP3", "MPEG_LAYER_III"),
    "mp3 vbr": lambda: by_soundfile("MP3", "MPEG_LAYER_III", bitrate_mode="VARIABLE"),
    "mp3 vbr, no header": lambda: without_its_first_frame(KINDS["mp3 vbr"]()),
    "mp3 44.1 kHz": lambda: by_soundfile("MP3", "MPEG_LAYER_III", rate_hz=44_100),
    # The tag's size is in four times seven bits.
    "mp3, tag of 16 MB": lambda: b"ID3\x04\0\0\x08\0\0\0" + bytes(8 << 21) + KINDS["mp3"](),
    "aac": lambda: by_av("adts", "aac"),
    "m4a": lambda: by_av("mp4", "aac"),
    "m4a, index first": lambda: by_av("mp4", "aac", movflags="faststart"),
    "m4a alac": lambda: by_av("ipod", "alac"),
    "webm": lambda: by_av("webm", "libopus", rate_hz=48_000),
    "mka": lambda: by_av("matroska", "aac"),
    "wma": lambda: by_av("asf", "wmav2", rate_hz=44_100),
    "amr": lambda: by_av("amr", "libopencore_amrnb", rate_hz=8_000),
}


@cache
def example(kind):
    try:
        return KINDS[kind]()
    except av.error.FFmpegError:
        pytest.skip("this PyAV has no such encoder")


@pytest.mark.parametrize("kind", KINDS)
def test_a_tone_is_heard_whole(kind):
    samples = decode_bytes(example(kind))

    assert number_of(samples) == 40
    assert len(samples) / 16_000 == pytest.approx(SECONDS, abs=PADDING)
    assert np.quantile(np.abs(samples), 0.99) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("sixteenths", range(1, 16))
@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_file_is_refused(kind, sixteenths):
    data = example(kind)
    size = len(data) * sixteenths // 16
    if kind == "amr" and (size - 6) % 32 == 0:
        size += 1  # frames of 32 bytes and nothing else: cut between two of them it is a shorter file, and whole

    with pytest.raises(AudioError, match="^(truncated|damaged|unreadable|empty|format): "):
        decode_bytes(data[:size])


@pytest.mark.parametrize("missing", [1, 2, 3, 40, 400])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_whose_last_bytes_are_missing_is_refused_or_lost_none_of_its_samples(kind, missing):
    data = example(kind)

    try:
        samples = decode_bytes(data[:-missing])
    except AudioError:
        return
    # What follows the samples may be missing: tags, padding, an index for seeking.
    np.testing.assert_array_equal(samples, decode_bytes(data))


@pytest.mark.parametrize("kind", ["flac", "vorbis", "opus", "mp3", "mp3 vbr, no header", "aac"])
def test_a_file_with_a_hole_is_refused(kind):
    data = example(kind)
    middle, width = len(data) // 2, min(len(data) // 4, 16_384)

    with pytest.raises(AudioError, match="^(truncated|damaged): "):
        decode_bytes(data[:middle] + bytes(width) + data[middle + width :])
    with pytest.raises(AudioError, match="^(truncated|damaged): "):
        decode_bytes(data[:middle] + data[middle + width :])


@pytest.mark.parametrize("kind", ["vorbis", "opus", "mp3", "mp3 vbr, no header", "aac"])
def test_two_files_one_after_the_other_are_heard_both(kind):
    data = example(kind)

    samples = decode_bytes(data + data)

    assert len(samples) / 16_000 == pytest.approx(2 * SECONDS, abs=3 * PADDING)
    assert number_of(samples[-40_000:]) == 40


@pytest.mark.parametrize("kind", ["wav 16 bit", "flac"])
def test_two_files_one_after_the_other_are_refused_where_decoders_hear_one(kind):
    with pytest.raises(AudioError, match="^format: must be one .* file, got several one after the other"):
        decode_bytes(example(kind) + example(kind))


@pytest.mark.parametrize("kind", ["vorbis", "opus", "flac"])
def test_a_flipped_bit_is_noticed_where_the_codec_has_checksums(kind):
    data = example(kind)

    for position in np.linspace(len(data) // 3, len(data) - 100, 15).astype(int):
        changed = bytearray(data)
        changed[position] ^= 4
        with pytest.raises(AudioError, match="^(truncated|damaged): "):
            decode_bytes(bytes(changed))


@pytest.mark.parametrize("container", ["VOC", "IRCAM", "PVF", "PAF", "MAT5", "AVR"])
def test_formats_that_do_not_show_whether_they_are_whole_are_refused(container):
    with pytest.raises(AudioError, match=f"^format: must be one of WAV, .*, got {container}"):
        decode_bytes(by_soundfile(container, "PCM_16"))


def with_streaminfo(flac, *, frames=None, md5=None, bits=None):
    """A FLAC whose header tells something else."""
    head, changed = int.from_bytes(flac[18:26], "big"), bytearray(flac)
    if frames is not None:
        head = head >> 36 << 36 | frames
    if bits is not None:
        head = head & ~(31 << 36) | (bits - 1) << 36
    changed[18:26] = head.to_bytes(8, "big")
    changed[26:42] = flac[26:42] if md5 is None else md5
    return bytes(changed)


def test_the_header_of_a_flac_is_checked_against_its_samples():
    data, whole = example("flac"), decode_bytes(example("flac"))

    np.testing.assert_array_equal(decode_bytes(with_streaminfo(data, md5=bytes(16))), whole)
    # Fewer samples than there are: libsndfile stops there.
    np.testing.assert_array_equal(decode_bytes(with_streaminfo(data, frames=16_000)), whole)
    np.testing.assert_array_equal(decode_bytes(with_streaminfo(data, frames=0)), whole)
    with pytest.raises(AudioError, match="truncated: the header promises 50000 frames, got 48000"):
        decode_bytes(with_streaminfo(data, frames=50_000, md5=bytes(16)))
    with pytest.raises(AudioError, match="damaged: the samples do not have the MD5 that the header tells"):
        decode_bytes(with_streaminfo(data, md5=b"x" * 16))
    # Would be 256 times too quiet.
    with pytest.raises(AudioError, match="damaged: "):
        decode_bytes(with_streaminfo(data, bits=24))


@pytest.mark.parametrize("kind", ["flac", "flac 8 bit", "flac 24 bit"])
def test_a_flac_tells_the_md5_of_what_was_written(kind):
    data = example(kind)
    bits = {"flac": 16, "flac 8 bit": 8, "flac 24 bit": 24}[kind]
    codes, _ = soundfile.read(io.BytesIO(data), dtype="int32")
    raw = b"".join((int(code) >> (32 - bits)).to_bytes(bits // 8, "little", signed=True) for code in codes)

    assert hashlib.md5(raw).digest() == data[26:42]
    np.testing.assert_array_equal(decode_bytes(data), codes.astype(np.float64) / 2**31)


@pytest.mark.parametrize("seconds", [0.01, 0.49])
def test_the_shortest_recordings_are_decoded(seconds):
    samples = make_tone(1, seconds=seconds)
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, "FLOAT", format="WAV")

    np.testing.assert_array_equal(decode_bytes(file.getvalue()), samples)


@pytest.mark.parametrize("rate_hz", [4_000, 8_000, 11_025, 22_050, 44_100, 96_000, 192_000, 384_000])
def test_every_rate_gives_the_same_tone(rate_hz):
    samples = decode_bytes(by_soundfile("WAV", "PCM_16", rate_hz=rate_hz))

    assert number_of(samples) == 40
    assert len(samples) == SECONDS * 16_000
    np.testing.assert_allclose(samples[4_000:-4_000], tone()[4_000:-4_000], atol=2e-4)


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros(20_000, np.float32),
        np.full(20_000, 0.25, np.float32),
        np.where(np.arange(20_000) // 40 % 2, 1, -1).astype(np.float32),
    ],
    ids=["silence", "direct current", "full-scale square"],
)
def test_what_is_no_speech_but_no_damage_either_is_kept_as_it_is(samples):
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, "FLOAT", format="WAV")

    np.testing.assert_array_equal(decode_bytes(file.getvalue()), samples)


def wav_of_channels(*channels):
    file = io.BytesIO()
    soundfile.write(file, np.stack(channels, axis=1), 16_000, "FLOAT", format="WAV")
    return file.getvalue()


def test_channels_that_cancel_each_other_give_one_of_them():
    samples = np.tile(make_tone(9), 40)  # more than one block
    hiss = np.random.default_rng(0).standard_normal(len(samples)).astype(np.float32) * 1e-3

    np.testing.assert_array_equal(decode_bytes(wav_of_channels(samples, -samples)), samples)
    np.testing.assert_array_equal(decode_bytes(wav_of_channels(-samples, samples)), -samples)
    np.testing.assert_array_equal(decode_bytes(wav_of_channels(hiss * 0, samples, -samples - hiss)), -samples - hiss)


def test_channels_that_only_nearly_cancel_each_other_are_averaged():
    left, right = make_tone(9), make_tone(9) * np.float32(-0.8)

    np.testing.assert_array_equal(decode_bytes(wav_of_channels(left, right)), (left + right) / 2)


def test_silence_before_channels_cancel_is_no_reason_to_choose():
    samples = np.concatenate([np.zeros(70_000, np.float32), np.tile(make_tone(9), 20)])

    decoded = decode_bytes(wav_of_channels(samples, -samples))

    # From the block on in which they cancel; within the first one there is only silence.
    np.testing.assert_array_equal(decoded, samples)


def test_eight_channels_are_averaged():
    channels = [make_tone(number) / 8 for number in range(8)]

    np.testing.assert_allclose(decode_bytes(wav_of_channels(*channels)), np.mean(channels, axis=0), atol=1e-7)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, 5.0])
def test_one_senseless_sample_near_the_end_is_enough_to_refuse(value):
    samples = np.zeros(200_000, np.float32)
    samples[-5] = value
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, "FLOAT", format="WAV")

    with pytest.raises(AudioError, match="^(not finite|out of range): samples must be"):
        decode_bytes(file.getvalue())


def test_encrypted_audio_is_refused():
    data = bytearray(example("m4a").replace(b"mp4a", b"drms"))
    start = data.index(b"mdat") + 4
    end = start - 8 + int.from_bytes(data[start - 8 : start - 4], "big")
    data[start:end] = np.random.default_rng(0).bytes(end - start)

    with pytest.raises(AudioError, match="^damaged: "):
        decode_bytes(bytes(data))


def test_a_header_that_promises_three_hours_in_a_kilobyte_is_refused():
    data = bytearray(by_soundfile("WAV", "PCM_16")[:1024])
    data[40:44] = (3 * 3600 * 32_000).to_bytes(4, "little")

    with pytest.raises(AudioError, match="truncated: the header promises 345600000 bytes, got 980"):
        decode_bytes(bytes(data))


def test_errors_that_are_known_only_at_the_end_come_after_the_blocks():
    data = bytearray(with_streaminfo(example("flac"), md5=b"x" * 16))
    blocks = stream(io.BytesIO(bytes(data)))

    assert len(next(blocks)) > 0
    with pytest.raises(AudioError, match="damaged: the samples do not have the MD5"):
        list(blocks)


def test_half_an_hour_takes_no_more_memory_than_a_minute(tmp_path):
    peaks = {}
    for minutes in (1, 30):
        num_bytes = minutes * 60 * 2 * 48_000 * 2
        head = io.BytesIO()
        soundfile.write(head, np.zeros((1, 2)), 48_000, "PCM_16", format="WAV")
        with (tmp_path / f"{minutes}.wav").open("wb") as file:
            file.write(head.getvalue()[:40] + num_bytes.to_bytes(4, "little"))
            file.truncate(44 + num_bytes)  # a sparse file
        with soundfile.SoundFile(tmp_path / f"{minutes}.flac", "w", 48_000, 1) as flac:
            for _ in range(minutes * 6):
                flac.write(np.zeros(480_000, np.int16))
        paths = [tmp_path / f"{minutes}.wav", tmp_path / f"{minutes}.flac"]
        outcomes, peaks[minutes] = decode_in_fresh_process(tmp_path, paths)
        assert [seconds for seconds, _ in outcomes.values()] == [minutes * 60] * 2

    assert peaks[30] < peaks[1] + 32 * 2**20


def mutate(data, rng):
    """The same file with some bytes changed, removed, doubled or cleared."""
    start = int(rng.integers(len(data)))
    width = int(rng.integers(1, 2_000))
    match int(rng.integers(4)):
        case 0:
            changed = bytearray(data)
            for position in rng.integers(0, min(len(data), 200 if rng.random() < 0.5 else len(data)), 5):
                changed[position] = rng.integers(256)
            return bytes(changed)
        case 1:
            return data[:start] + data[start + width :]
        case 2:
            return data[: start + width] + data[start:]
        case _:
            return data[:start] + bytes(width) + data[start + width :]


def test_damaged_files_neither_crash_nor_hang_nor_eat_memory(tmp_path):
    rng, paths = np.random.default_rng(5), []
    for kind in KINDS:
        if kind == "mp3, tag of 16 MB":
            continue
        for number in range(12):
            paths.append(tmp_path / f"{kind.replace(' ', '-')}-{number}")
            paths[-1].write_bytes(mutate(example(kind), rng))

    outcomes, peak_bytes = decode_in_fresh_process(tmp_path, paths)

    assert len(outcomes) == len(paths)
    assert peak_bytes < 2**30
    kinds = {outcome[0] for outcome in outcomes.values() if isinstance(outcome[0], str)}
    assert kinds <= {
        *["truncated", "damaged", "unreadable", "format", "empty", "sample rate", "channels", "too long"],
        *["not finite", "out of range"],
    }


@pytest.mark.speech
def test_a_flac_that_only_ffmpeg_reads_is_checked_against_its_header_too(speech):
    data = (speech / "odd_audio/flac_test_files/62 - predictor overflow check, 20-bit.flac").read_bytes()
    last = data.rindex(data[data.index(b"\xff\xf8") :][:4])
    assert len(data) - last < 20_000
    # The last frame is missing, less than a tenth of a second, and no MD5 tells.
    cut = with_streaminfo(data, md5=bytes(16))[:last]

    with pytest.raises(AudioError, match="truncated: the header promises 227247 frames, got 22[0-7]"):
        decode_bytes(cut)
    for position in range(len(data) // 3, len(data) // 2, 5_000):
        flipped = bytearray(with_streaminfo(data, md5=bytes(16)))
        flipped[position] ^= 4
        with pytest.raises(AudioError, match="^(damaged|truncated): "):
            decode_bytes(bytes(flipped))
