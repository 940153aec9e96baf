"""Calibration data and a quantized student, once per session."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from qad_dist.asr.load import AsrModel
    from qad_dist.batch import Batch
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
def student(load_nano: "Callable[..., AsrModel]", batches: "list[Batch]") -> "AsrModel":
    """The embedded teacher in INT8, float32, alpha 1. Shared: nobody may change it."""
    from tests.helpers.quantized import quantize

    return quantize(load_nano(), *batches)


@pytest.fixture
def new_student(student: "AsrModel") -> "AsrModel":
    """The same, to change."""
    return replace(student, model=copy.deepcopy(student.model))
