"""How much memory a pack takes, each time in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

_PACK = """
import resource
import sys
from pathlib import Path
from shards.schema import Recording
from tests.helpers.packing import pack_tones

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    paths = sorted((folder / "in").glob("*.wav"))
    recordings = [Recording(path=str(path), key=path.stem, source="s") for path in paths]
    report = pack_tones(recordings, folder / "pack", holdout=0, hours_per_shard=1 / 60, drop_duplicates=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(len(report.index.shards), round(report.index.hours * 60), peak)
"""


def peak_mib(folder: Path) -> tuple[int, int, float]:
    """Shards, minutes of audio, and the most memory while packing them."""
    script = folder / "script.py"
    script.write_text(_PACK)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, folder]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    return int(told[0]), int(told[1]), float(told[2])


def write_recordings(folder: Path, *, count: int, seconds: int) -> Path:
    (folder / "in").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(-3000, 3000, 16_000, dtype=np.int16)
    for number in range(count):
        with soundfile.SoundFile(folder / "in" / f"{number:03d}.wav", "w", 16_000, 1, "PCM_16") as file:
            for _ in range(seconds):
                file.write(noise)
    return folder


@pytest.mark.timeout(300)
def test_memory_does_not_grow_with_the_number_of_shards(tmp_path):
    few = peak_mib(write_recordings(tmp_path / "few", count=9, seconds=20))
    many = peak_mib(write_recordings(tmp_path / "many", count=120, seconds=20))

    assert (few[:2], many[:2]) == ((3, 3), (40, 40))
    # 37 minutes more are 142 MB as samples, and 50 MB as the FLAC of this noise.
    assert many[2] - few[2] < 10


@pytest.mark.timeout(300)
def test_of_a_long_recording_only_its_flac_is_in_memory(tmp_path):
    short = peak_mib(write_recordings(tmp_path / "short", count=1, seconds=60))
    long = peak_mib(write_recordings(tmp_path / "long", count=1, seconds=40 * 60))

    assert (short[:2], long[:2]) == ((1, 1), (1, 40))
    flac = sum(path.stat().st_size for path in (tmp_path / "long" / "pack").glob("*.tar")) / 2**20
    assert 30 < flac < 70
    assert long[2] - short[2] < 1.5 * flac  # as samples it would be 154 MB
