"""A program: packing against the least that it could cost, which is to decode, resample and encode each recording.

    python tests/benchmarks/pack.py [--recordings FOLDER] [--rounds 3]

The other side reads the same files with soundfile, resamples with soxr and encodes FLAC, and does nothing else: no
checks, no hashes, no shards, nothing on disk. Both are timed in turn, on one process and on two, with the start of
processes included. The lines of JSON on stdout have the seconds of audio for each second of wall time, and the other
side's time for each second of ours, of which the median over the rounds is to be at least 0.8.

Without ``--recordings`` noise of the length of speech is written first, 16-bit at 44.1 and at 16 kHz, as WAV and FLAC.
"""

import argparse
import io
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import soxr

from shards.layout import ShardSize
from shards.merge import merge
from shards.pack import pack_tasks
from shards.shard import ShardSettings
from shards.sources import read_found
from shards.tasks import Layout, plan_pack

NOISE_RECORDINGS, NOISE_SECONDS = 3_000, (2.0, 16.0)
SETTINGS = ShardSettings(
    min_audio_seconds=0.1, max_audio_seconds=30, long_recordings="energy", max_recording_seconds=6 * 3600
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--recordings", type=Path, help="a folder of audio")
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recordings = options.recordings or make_noise(Path(folder) / "noise")
        paths = [str(path) for path in sorted(recordings.rglob("*")) if path.is_file()]
        for processes in (1, 2):
            ratios = []
            for number in range(options.rounds):
                os.sync()  # what the last round wrote is not to be paid for in this one
                least, seconds = bare(paths, processes)
                pack_folder = Path(folder) / f"pack-{number}"
                ours, packed_seconds = packed(recordings, pack_folder, processes)
                shutil.rmtree(pack_folder)
                assert abs(seconds - packed_seconds) < 0.01 * seconds, (seconds, packed_seconds)
                ratios.append(least / ours)
            line = {
                "processes": processes,
                "audio_hours": round(seconds / 3600, 3),
                "bare_x_real_time": round(seconds / least),
                "pack_x_real_time": round(seconds / ours),
                "speed_of_pack": {
                    "min": round(min(ratios), 3),
                    "median": round(float(np.median(ratios)), 3),
                    "max": round(max(ratios), 3),
                },
            }
            print(json.dumps(line), flush=True)


def make_noise(folder: Path) -> Path:
    """Write recordings as they come from the world: of several lengths, rates and formats."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(NOISE_RECORDINGS):
        rate_hz, suffix = ((44_100, "wav"), (16_000, "flac"), (16_000, "wav"))[number % 3]
        seconds = random.uniform(*NOISE_SECONDS)
        envelope = np.repeat(random.uniform(0.001, 0.2, round(seconds * 10) + 1), rate_hz // 10)
        samples = envelope * random.standard_normal(len(envelope))
        soundfile.write(folder / f"{number}.{suffix}", samples.clip(-1, 1), rate_hz, subtype="PCM_16")
    return folder


def packed(recordings: Path, folder: Path, processes: int) -> tuple[float, float]:
    """Wall seconds of a pack, from the source to the index, and the seconds of audio in it."""
    begun = time.perf_counter()
    found = read_found([str(recordings)], default_language=None, kind="folder", spool=folder / "spool")
    size = ShardSize(hours=0.1, recordings=10_000)
    layout = Layout(seed=0, splits={}, holdout=0.05, holdout_by="speaker", size=size)
    plan = plan_pack(found, folder, layout, about={})
    pack_tasks(plan, SETTINGS, max_rejected_share=0.1, processes=processes)
    report = merge(plan, SETTINGS, drop_duplicates=False, max_rejected_share=0.1)
    return time.perf_counter() - begun, report.index.hours * 3600


def bare(paths: Sequence[str], processes: int) -> tuple[float, float]:
    """Wall seconds of the least work, and the seconds of audio that went through it."""
    begun = time.perf_counter()
    if processes == 1:
        seconds = transform(paths)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as executor:
            chunks = [paths[start : start + 20] for start in range(0, len(paths), 20)]
            seconds = sum(executor.map(transform, chunks))
    return time.perf_counter() - begun, seconds


def transform(paths: Sequence[str]) -> float:
    """Decode, resample and encode files; returns their seconds."""
    seconds = 0.0
    for path in paths:
        samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
        mono = samples.mean(axis=1)
        if rate_hz != 16_000:
            mono = soxr.resample(mono, rate_hz, 16_000, quality="HQ")
        soundfile.write(io.BytesIO(), mono, 16_000, format="FLAC", subtype="PCM_16")
        seconds += len(mono) / 16_000
    return seconds


if __name__ == "__main__":
    main()
