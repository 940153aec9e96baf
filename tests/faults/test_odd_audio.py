"""Real recordings, odd and broken ones among them: each ends as listed, and as two other programs read it."""

import json
from pathlib import Path

import pytest

from shards.audio import decode
from tests.helpers.decode_files import decode_in_fresh_process

pytest.importorskip("av")

# Decoded by one of the two decoders of the manifest at least, and refused here all the same.
REFUSED = {
    "asterisk_gsm/agent-alreadyon.gsm": "has no header, only a suffix",
    "asterisk_gsm/agent-incorrect.gsm": "has no header, only a suffix",
    "asterisk_gsm/agent-loggedoff.gsm": "has no header, only a suffix",
    "flac_test_files/01 - changing samplerate.flac": "one resampler per file",
    "flac_test_files/03 - wrong bit depth.flac": "libsndfile scales by the header: 256 times too quiet",
    "flac_test_files/11 - incorrect metadata block length.flac": "FFmpeg decodes no sample of it",
    "mutagen/apev2-lyricsv2.mp3": "the first 75 of 8,076 frames",
    "mutagen/bad-xing.mp3": "cut within its last frame",
    "mutagen/id3v1v2-combined.mp3": "cut within its last frame",
    "mutagen/id3v22-test.mp3": "cut within its last frame",
    "mutagen/vbri.mp3": "cut within its last frame",
    "mutagen/xing.mp3": "cut within its last frame",
    "scipy/test-44100Hz-le-1ch-4bytes-early-eof.wav": "236 of 4,410 frames",
}
# Kinds of refusal that say nothing about the decoders: the samples are there, but are no speech.
SENSELESS = ("rejected empty", "rejected sample rate", "rejected out of range")
# Both decoders read these, to different ends; ours is FFmpeg's, as the others are of a length that was estimated from
# the size of the file, tags included, or ended at the number in a header that is wrong.
FFMPEG_IS_RIGHT = {
    "flac_test_files/05 - wrong total number of samples.flac",
    "mutagen/97-unknown-23-update.mp3",
    "mutagen/audacious-trailing-id32-id31.mp3",
    "mutagen/bad-TYER-frame.mp3",
    "mutagen/silence-44-s-v1.mp3",
    "mutagen/silence-44-s.mp3",
}


def odd_files(speech):
    lines = (speech / "odd_audio/manifest.jsonl").read_text().splitlines()
    return {row["audio"]: row for row in map(json.loads, lines)}


def read_table():
    lines = Path(__file__).with_name("odd_audio.tsv").read_text().splitlines()
    return dict(line.split("\t") for line in lines)


@pytest.mark.speech
def test_odd_files_end_as_the_table_says(speech, tmp_path):
    table, paths = read_table(), {name: speech / "odd_audio" / name for name in odd_files(speech)}

    outcomes, peak_bytes = decode_in_fresh_process(tmp_path, paths.values())

    assert peak_bytes < 2**30
    assert sorted(table) == sorted(paths)
    for name, path in paths.items():
        first, second = outcomes[str(path)]
        kind, value = table[name].split(" ", 1)
        if kind == "decoded":
            assert isinstance(first, float), f"{name}: {first}: {second}"
            # PyAV's versions may differ in the padding of lossy codecs.
            assert first == pytest.approx(float(value), abs=0.01), name
        else:
            assert first == value, f"{name}: {first} {second}"


@pytest.mark.speech
def test_odd_files_end_as_two_other_programs_read_them(speech):
    table = read_table()
    for name, row in odd_files(speech).items():
        lengths = {
            reader: row[reader]["duration"]
            for reader in ("libsndfile", "ffmpeg")
            if "error" not in row[reader] and row[reader]["duration"] is not None
        }
        outcome = table[name]
        if name in REFUSED or outcome.startswith(SENSELESS):
            assert outcome.startswith("rejected"), name
            assert lengths, f"{name} is read by neither: no reason to list it"
        elif not lengths:
            assert outcome.startswith("rejected "), name
        else:
            expected = {"ffmpeg"} if name in FFMPEG_IS_RIGHT else set(lengths)
            for reader in expected:
                assert outcome.startswith("decoded "), name
                assert float(outcome.split()[1]) == pytest.approx(lengths[reader], abs=0.01), f"{name}: {reader}"


@pytest.mark.speech
def test_every_recorded_file_is_decoded_to_the_length_of_its_manifest(speech):
    for folder in ("longform", "samples_en", "samples_multilingual"):
        for line in (speech / folder / "manifest.jsonl").read_text().splitlines():
            row = json.loads(line)
            path = next(p for p in (speech / folder / row["audio"], speech / row["audio"]) if p.is_file())
            assert len(decode(path)) / 16_000 == pytest.approx(row["duration"], abs=0.05), row["audio"]
