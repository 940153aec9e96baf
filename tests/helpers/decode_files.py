"""Decode audio files one after the other, whatever they are, as a program or in a process of one's own.

    python tests/helpers/decode_files.py PATHS ANSWER

PATHS is a JSON list; ANSWER gets ``{"outcomes", "peak_bytes"}``: for each path ``[seconds, samples' sha256]`` or
``[kind, text]`` of its AudioError, and the most memory that this process ever had. Anything else ends the program.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from shards.audio import open_recording, stream
from shards.errors import AudioError
from shards.schema import Recording

ROOT = Path(__file__).parent.parent.parent


def decode_in_fresh_process(folder: Path, paths: Iterable[Path]) -> tuple[dict[str, list[float | str]], int]:
    """Outcomes and peak memory of a process that decodes these files; a crash or hang of it fails the test."""
    (folder / "paths.json").write_text(json.dumps([str(path) for path in paths]))
    subprocess.run(
        [sys.executable, __file__, folder / "paths.json", folder / "answer.json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,  # libmpg123's own messages
        timeout=600,
        check=True,
    )
    answer = json.loads((folder / "answer.json").read_text())
    return answer["outcomes"], answer["peak_bytes"]


def decode_file(path: str) -> list[float | str]:
    digest, count = hashlib.sha256(), 0
    try:
        with open_recording(Recording(path=path, key="x", source="x")) as file:
            for samples in stream(file, max_seconds=3600):
                assert samples.dtype == np.float32
                assert samples.ndim == 1
                assert np.abs(samples).max() <= 1
                digest.update(samples)
                count += len(samples)
    except AudioError as error:
        kind, _, text = str(error).partition(": ")
        return [kind, text]
    return [count / 16_000, digest.hexdigest()]


def peak_bytes() -> int:
    # Not getrusage: that keeps the peak of the process that started this one.
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    paths = json.loads(Path(sys.argv[1]).read_text())
    outcomes = {path: decode_file(path) for path in paths}
    Path(sys.argv[2]).write_text(json.dumps({"outcomes": outcomes, "peak_bytes": peak_bytes()}))
