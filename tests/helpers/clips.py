"""Clips to compare decoders on: recorded speech where there is some, spoken digits everywhere."""

import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import soundfile

from shards.audio import decode
from tests.helpers.qwen import SAMPLE_RATE_HZ, Samples, digit_mixes, digits


def clips_of_all_kinds(speech: Path | None, *, num_short: int, num_long: int, seed: int = 0) -> list[Samples]:
    """Short clips, half of them spoken digits and half recorded, and long ones of 8 to 30 s, in a random order.

    Args:
        speech: Folder of recorded speech; without it, digits and mixes of them stand for everything.
        num_short: Number of short clips.
        num_long: Number of long ones.
        seed: Of lengths and order.
    """
    random = np.random.default_rng(seed)
    num_digits = num_short - num_short // 2 if speech else num_short
    clips = digits(num_digits)
    if speech:
        clips += recorded_clips(speech, num_short=num_short // 2, num_long=num_long, seed=seed)
    else:
        clips += digit_mixes(random.uniform(8, 30, num_long).tolist())
    return [clips[i] for i in random.permutation(len(clips))]


def recorded_clips(speech: Path, *, num_short: int, num_long: int, seed: int = 0) -> list[Samples]:
    """Whole recordings of AN4, then pieces of 8 to 30 s of long recordings."""
    random = np.random.default_rng(seed)
    an4, long = _recordings(speech / "an4"), _recordings(speech / "longform")
    clips = [decode(an4[i * len(an4) // num_short]) for i in range(num_short)]
    recordings = [recording_A for path in long if len(recording_A := decode(path)) >= 30 * SAMPLE_RATE_HZ]
    for recording_A, _ in zip(cycle(recordings), range(num_long), strict=False):
        length = round(random.uniform(8, 30) * SAMPLE_RATE_HZ)
        start = int(random.integers(len(recording_A) - length + 1))
        clips.append(recording_A[start : start + length])
    return clips


def write_wavs(clips: Sequence[Samples], folder: Path) -> list[Path]:
    """Write clips as float32 WAVs, ``0000.wav`` and so on: for decoders that run as another program."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:04d}.wav" for number in range(len(clips))]
    for path, clip in zip(paths, clips, strict=True):
        soundfile.write(path, clip, SAMPLE_RATE_HZ, subtype="FLOAT")
    return paths


def _recordings(folder: Path) -> list[Path]:
    lines = (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    return [folder / json.loads(line)["audio"] for line in lines]
