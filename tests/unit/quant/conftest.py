"""Calibration data and a quantized student, once per session."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from qad_dist.asr.load import AsrModel
    from qad_dist.batch import Batch
    from tests.helpers.quantized import Calibrated
    from tests.helpers.qwen import Samples


@pytest.fixture(scope="session")
def batches(nano: "AsrModel", clips: "list[Samples]") -> "list[Batch]":
    """Three batches of three clips each, with the teacher's responses."""
    from tests.helpers.quantized import pack_with_own_responses

    return [pack_with_own_responses(nano, clips[start : start + 3]) for start in (0, 3, 6)]


@pytest.fixture(scope="session")
def unseen(nano: "AsrModel", clips: "list[Samples]") -> "Batch":
    """A batch of clips that calibration does not see."""
    from tests.helpers.quantized import pack_with_own_responses

    return pack_with_own_responses(nano, clips[12:18])


@pytest.fixture(scope="session")
def calibrated(nano: "AsrModel", batches: "list[Batch]") -> "Callable[..., Calibrated]":
    """The embedded teacher, calibrated with these settings. Made once each, and shared: nobody may change it."""
    from tests.helpers.quantized import calibrate, copied

    made: dict[str, Calibrated] = {}

    def make(**settings: Any) -> "Calibrated":
        settings = {"research": True, "format": "int8", **settings}
        name = repr(sorted(settings.items()))
        if name not in made:
            made[name] = calibrate(copied(nano), *batches, **settings)
        return made[name]

    return make


@pytest.fixture(scope="session")
def student(calibrated: "Callable[..., Calibrated]") -> "AsrModel":
    """The embedded teacher in INT8, float32, alpha 1. Shared: nobody may change it."""
    return calibrated(alpha=1.0).student


@pytest.fixture
def new_student(student: "AsrModel") -> "AsrModel":
    """The same, to change."""
    from tests.helpers.quantized import copied

    return copied(student)
