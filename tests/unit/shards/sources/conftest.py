"""Sources read from small corpora in the layout of the real ones."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile

from shards.sources import read_found
from shards.sources.keys import Found
from tests.helpers.tones import number_of


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[Found]]:
    """Read inputs as a run would; audio in containers is spooled to ``tmp_path / "spool"``."""

    def read_all(*inputs: str | Path, kind: str = "auto", language: str | None = None) -> list[Found]:
        names = [str(value) for value in inputs]
        return list(read_found(names, default_language=language, kind=kind, spool=tmp_path / "spool"))

    return read_all


@pytest.fixture
def tone_at() -> Callable[[Found], int]:
    """The number of the tone that lies where a recording is said to be."""

    def number_at(found: Found) -> int:
        data = Path(found.path).read_bytes()
        assert found.offset_bytes is not None
        assert found.num_bytes is not None
        samples, rate_hz = soundfile.read(
            io.BytesIO(data[found.offset_bytes : found.offset_bytes + found.num_bytes]), dtype="float32"
        )
        assert rate_hz == 16_000
        return number_of(samples[:16_000])

    return number_at
