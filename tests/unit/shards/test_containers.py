import io
import struct

import numpy as np
import pytest
import soundfile

from shards.containers import inspect
from shards.errors import AudioError
from tests.helpers.tones import make_tone


def written(container, subtype=None, *, seconds=3.0, **options):
    file = io.BytesIO()
    soundfile.write(file, make_tone(1, seconds=seconds), 16_000, subtype, None, container, **options)
    return file.getvalue()


def look(data):
    return inspect(io.BytesIO(data))


@pytest.mark.parametrize(
    ("container", "subtype", "kind"),
    [
        *[
            ("WAV", None, "wav"),
            ("RF64", None, "wav"),
            ("W64", None, "w64"),
            ("AIFF", None, "aiff"),
            ("AU", None, "au"),
        ],
        *[("CAF", None, "caf"), ("NIST", None, "nist"), ("FLAC", None, "flac"), ("OGG", "OPUS", "ogg")],
        *[("MP3", None, "mpeg"), ("VOC", None, "other")],
    ],
)
def test_a_container_is_known_by_its_first_bytes_and_the_file_is_at_its_beginning_again(container, subtype, kind):
    file = io.BytesIO(written(container, subtype))

    assert inspect(file).kind == kind
    assert file.tell() == 0


def test_files_are_looked_through_as_bytes_are(tmp_path):
    (tmp_path / "x").write_bytes(written("MP3"))

    with (tmp_path / "x").open("rb", buffering=0) as file:
        assert inspect(file) == look(written("MP3"))
        assert file.read(2) == written("MP3")[:2]


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"OggS", b"RIFF", b"ID3\x04", b"\xff\xfb", b"fLaC", b"NIST_1A", b"#!AMR\n"]
)
def test_a_beginning_of_a_file_is_nothing_worse_than_truncated(data):
    try:
        found = look(data)
    except AudioError as error:
        assert str(error).startswith("truncated: ")  # noqa: PT017  either is right
    else:
        assert found.seconds in (None, 0)


def wav(*chunks):
    body = b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WAVE" + body


def chunk(name, body, *, told=None, pad=True):
    return name + struct.pack("<I", len(body) if told is None else told) + body + b"\0" * (len(body) % 2 and pad)


FORMAT = chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16))


@pytest.mark.parametrize("pad", [True, False])
def test_the_samples_of_a_wav_are_found_behind_other_chunks(pad):
    others = FORMAT + chunk(b"LIST", b"x" * 4_001, pad=pad) + chunk(b"junk", b"\0" * 6) + chunk(b"odd ", b"1", pad=pad)

    assert look(wav(others, chunk(b"data", bytes(1_000)))).kind == "wav"
    with pytest.raises(AudioError, match="truncated: the header promises 1000 bytes, got 998"):
        look(wav(others, chunk(b"data", bytes(998), told=1_000)))


@pytest.mark.parametrize("told", [0, 0x7FFF_FFFF, 0x8000_0000, 0x7FFF_F000, 0xFFFF_FFFF, 0xFFFF_FFDB])
def test_sizes_of_a_stream_promise_nothing(told):
    assert look(wav(FORMAT, chunk(b"data", bytes(1_000), told=told))).kind == "wav"


@pytest.mark.parametrize("told", [0x7000_0000, 0x9000_0000, 0xF000_0000])
def test_sizes_of_gigabytes_are_promises(told):
    with pytest.raises(AudioError, match=f"truncated: the header promises {told} bytes, got 1000"):
        look(wav(FORMAT, chunk(b"data", bytes(1_000), told=told)))


def test_a_file_of_empty_chunks_is_not_walked_for_ever():
    assert look(wav(*[chunk(b"none", b"")] * 300_000)).kind == "wav"


def pages_of(ogg):
    starts = [at for at in range(len(ogg)) if ogg.startswith(b"OggS", at)]
    return [ogg[start:end] for start, end in zip(starts, [*starts[1:], len(ogg)], strict=True)]


@pytest.mark.parametrize("subtype", ["OPUS", "VORBIS"])
def test_every_page_of_an_ogg_must_be_there(subtype):
    pages = pages_of(written("OGG", subtype, seconds=20))
    assert len(pages) > 4

    with pytest.raises(AudioError, match="truncated: the last Ogg page is missing"):
        look(b"".join(pages[:-1]))
    with pytest.raises(AudioError, match="truncated: the last Ogg page is cut"):
        look(b"".join(pages)[:-1])
    with pytest.raises(AudioError, match="damaged: Ogg page 3 is missing"):
        look(b"".join(pages[:3] + pages[4:]))
    with pytest.raises(AudioError, match="damaged: byte .* must begin an Ogg page"):
        look(b"".join([*pages[:3], b"??", *pages[3:]]))
    with pytest.raises(
        AudioError, match=rf"damaged: the Ogg page before byte {len(b''.join(pages[:4]))} does not have"
    ):
        look(b"".join([*pages[:3], pages[3][:-1] + b"?", *pages[4:]]))
    assert not look(b"".join(pages)).is_chained
    assert look(b"".join(pages + pages)).is_chained


def test_a_flac_tells_its_md5_behind_other_blocks_too():
    flac = written("FLAC", "PCM_24")
    with_another = b"fLaC" + b"\x01\0\0\x05" + b"?" * 5 + flac[4:]

    assert look(flac).md5 == look(with_another).md5 == flac[26:42]
    assert look(flac).bits_per_sample == look(with_another).bits_per_sample == 24
    assert look(flac[:26] + bytes(16) + flac[42:]).md5 == b""


@pytest.mark.parametrize("position", [50, (1 << 20) + 4, (1 << 20) + 8, 5 << 20])
def test_a_second_flac_behind_the_first_is_found(position):
    data = b"fLaC\0\0\0\x22".ljust(position, b"?")

    assert look(data).kind == "flac"
    with pytest.raises(AudioError, match="format: must be one FLAC file, got several one after the other"):
        look(data + b"fLaC\0\0\0\x22" + bytes(99))


def mpeg_frames(count):
    """Layer III at 32 kHz: 1,152 samples in 288 bytes."""
    return (b"\xff\xfb\x58\xc4" + bytes(284)) * count


def adts_frames(count):
    """1,024 samples at 16 kHz in 200 bytes."""
    head = bytes([0xFF, 0xF1, 0x60, 0x40 | 200 >> 11, 200 >> 3 & 255, (200 & 7) << 5, 0xFC])
    return (head + b"\x21" * 193) * count


ID3V1 = b"TAG" + b" " * 125
ID3V2 = b"ID3\x04\0\0\0\0\x02\x00" + b"\xff\xfb\x58\xc4" * 64
APE = b"APETAGEX" + struct.pack("<IIII", 2000, 50 + 32, 1, 0) + bytes(8) + b"x" * 50 + b"x" * 32


@pytest.mark.parametrize("before", [b"", ID3V2, ID3V2 * 2, b"\0" * 500])
@pytest.mark.parametrize("behind", [b"", ID3V1, ID3V2, APE + ID3V1, bytes(5_000)])
def test_frames_of_an_mp3_are_counted_between_its_tags(before, behind):
    if before.startswith(b"\0"):
        before = ID3V2 + before  # zeros first make it no MP3
    found = look(before + mpeg_frames(100) + behind)

    assert found.kind == "mpeg"
    assert found.seconds == pytest.approx(100 * 1152 / 32_000)


def test_frames_of_aac_and_amr_are_counted():
    assert look(adts_frames(50)).kind == "adts"
    assert look(adts_frames(50)).seconds == pytest.approx(50 * 1024 / 16_000)
    assert look(b"#!AMR\n" + b"\x3c" + bytes(31) + b"\x7c" * 9).seconds == pytest.approx(0.2)
    assert look(b"#!AMR-WB\n" + b"\x44" + bytes(60)).seconds == pytest.approx(0.02)


@pytest.mark.parametrize("data", [mpeg_frames(20), adts_frames(20), b"#!AMR\n" + (b"\x3c" + bytes(31)) * 20])
def test_a_last_frame_that_is_cut_is_noticed(data):
    for missing in (1, 50 if len(data) > 2_000 else 20):
        with pytest.raises(AudioError, match="truncated: "):
            look(data[:-missing])


@pytest.mark.parametrize("frames", [mpeg_frames, adts_frames])
def test_a_hole_between_frames_is_noticed_but_a_torn_frame_is_not_one(frames):
    size = len(frames(1))

    assert look(frames(10) + frames(1)[: size // 2] + frames(10)).seconds == pytest.approx(look(frames(20)).seconds)
    with pytest.raises(AudioError, match=rf"damaged: {3 * size} bytes from byte {10 * size} are no frames"):
        look(frames(10) + bytes(3 * size) + frames(10))
    with pytest.raises(AudioError, match=rf"damaged: {3 * size} bytes from byte {10 * size} are no frames"):
        look(frames(10) + b"?" * (3 * size))


@pytest.mark.parametrize("junk", [1, 500, 65_535, 65_536, 65_537, 200_000])
def test_the_first_frame_is_found_behind_whatever_follows_the_tag(junk):
    assert look(ID3V2 + b"?" * junk + mpeg_frames(5)).seconds == pytest.approx(5 * 1152 / 32_000)


def test_an_mp3_has_the_frames_that_its_first_one_promises():
    first = bytearray(mpeg_frames(1))

    def promising(told, flags=1):
        first[36:48] = b"Xing" + struct.pack(">II", flags, told)
        return bytes(first)

    assert look(promising(100) + mpeg_frames(100)).seconds == pytest.approx(100 * 1152 / 32_000)
    assert look(promising(99) + mpeg_frames(100)).seconds == pytest.approx(100 * 1152 / 32_000)
    assert look(promising(10**6, flags=2) + mpeg_frames(100)).seconds == pytest.approx(100 * 1152 / 32_000)
    with pytest.raises(AudioError, match="truncated: the header promises 101 frames, got 100"):
        look(promising(101) + mpeg_frames(100))


def test_random_bytes_are_looked_through_quickly_and_without_an_error_of_ours():
    rng = np.random.default_rng(0)
    for magic in (
        b"",
        b"ID3\x04\0\0\0\0\0\0",
        b"\xff" * 3,
        b"RIFF",
        b"OggS",
        b"fLaC",
        b"\x1a\x45\xdf\xa3",
        b"FORM",
        b"caff",
    ):
        for data in (rng.bytes(200_000), b"\xff" * 200_000, b"\xff\xfb" * 100_000, b"A" * 200_000, bytes(200_000)):
            try:
                look(magic + data)
            except AudioError as error:
                assert ": " in str(error)  # noqa: PT017
