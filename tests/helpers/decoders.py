"""What a reading process may be given instead of its own way to decode. Imports nothing that it would not import."""

import os
import sys
import time
from pathlib import Path

import numpy as np

from shards.errors import AudioError
from shards.read import Codes, decode_audio

MEETING_SECONDS = 60.0


def decode_slowly(seconds: float, data: bytes) -> Codes:
    """Decode, some time later."""
    time.sleep(seconds)
    return decode_audio(data)


def decode_in_company(folder: Path, count: int, data: bytes) -> Codes:
    """Decode once ``count`` processes have come here, each of which leaves a file named by its number in ``folder``."""
    (folder / str(os.getpid())).touch()
    deadline = time.monotonic() + MEETING_SECONDS
    while len(list(folder.iterdir())) < count:
        if time.monotonic() > deadline:
            raise AudioError("alone: the others never came")
        time.sleep(0.01)
    return decode_audio(data)


def decode_after_removing(path: Path, data: bytes) -> Codes:
    """Decode, and let a shard disappear in the meantime."""
    path.unlink(missing_ok=True)
    return decode_audio(data)


def count_heavy_modules(data: bytes) -> Codes:
    """As many zeros as this process has imported packages that a reading process must do without, and one more."""
    return np.zeros(1 + len({"torch", "transformers", "pyarrow", "webdataset"} & set(sys.modules)), np.int16)
