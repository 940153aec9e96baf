"""The embedded teacher, once per session. torch and transformers load with the first test that asks for it."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from qad_dist.asr.load import AsrModel
    from tests.helpers.qwen import Samples


@pytest.fixture(scope="session")
def nano_folder(root: Path) -> Path:
    """The embedded teacher's checkpoint."""
    return root / "tests" / "assets" / "nano-teacher"


@pytest.fixture(scope="session")
def load_nano() -> "Callable[..., AsrModel]":
    """Load the embedded teacher anew: for tests that change it."""
    import torch

    from tests.helpers.qwen import load

    torch.set_num_threads(1)
    return load


@pytest.fixture(scope="session")
def nano(load_nano: "Callable[..., AsrModel]") -> "AsrModel":
    """The embedded teacher in float32, windowed. Shared: nobody may change it."""
    return load_nano()


@pytest.fixture(scope="session")
def reference(nano: "AsrModel") -> Any:
    """The same checkpoint as qwen-asr runs it, in float32. Shared: nobody may change it."""
    from tests.helpers.qwen import load_reference

    return load_reference(nano.folder)


@pytest.fixture(scope="session")
def clips() -> "list[Samples]":
    """24 clips of spoken digits, over all languages."""
    from tests.helpers.qwen import digits

    return digits(24)
