"""Which audio the check transcribes: the first recording that holds an utterance, of a long one its beginning."""

from pathlib import Path

import numpy as np
import pytest

from qad_dist.config import RunConfig
from qad_dist.stages.check import _recording
from shards.errors import AudioError
from tests.helpers.tones import make_tone, write_tone


def run_of(folder: Path, **pack: object) -> RunConfig:
    values = {"inputs": [str(folder)], "max_audio_seconds": 2.0, "min_audio_seconds": 0.1, **pack}
    return RunConfig.model_validate({"run": "unused", "model": {"path": "unused"}, "pack": values})


def test_recording_that_cannot_be_decoded_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"RIFF and nothing else")
    write_tone(tmp_path / "b.wav", 7, seconds=0.5)

    key, audio_A = _recording(run_of(tmp_path))

    assert key == "b"
    np.testing.assert_allclose(audio_A, make_tone(7, seconds=0.5), atol=1e-4)  # 16 bits in the file


def test_of_a_recording_that_pack_would_cut_the_beginning_is_taken(tmp_path: Path) -> None:
    write_tone(tmp_path / "long.wav", 7, seconds=5.0)

    _, audio_A = _recording(run_of(tmp_path))

    np.testing.assert_allclose(audio_A, make_tone(7, seconds=2.0), atol=1e-4)


def test_recording_that_pack_would_reject_for_its_length_is_named(tmp_path: Path) -> None:
    write_tone(tmp_path / "long.wav", 7, seconds=5.0)

    with pytest.raises(
        AudioError, match=r"must hold an utterance to transcribe among its first 1 recordings, .*long\.wav"
    ):
        _recording(run_of(tmp_path, long_recordings="reject"))
