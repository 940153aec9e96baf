"""Rules of the test suite: a time limit for each kind of test, a GPU or recorded speech only where there is one."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.digits import DigitsRun, FinishedRun, make_digits, run_on_one_rank, run_on_two_ranks
from tests.helpers.forking import ForkServer
from tests.helpers.sharing import made_once

ROOT = Path(__file__).parent.parent

# Seconds of one test with the fixtures that it is the first to need, such as whole runs: against hangs, on a machine
# that is loaded. A test folder that is not listed fails collection.
LIMITS = {
    "unit": 120,
    "architecture": 240,
    "determinism": 2400,
    "distributed": 2400,
    "faults": 2400,
    "integration": 900,
    "end_to_end": 2400,
    "gpu": 900,
    "benchmarks": 3600,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        kind = item.path.relative_to(ROOT / "tests").parts[0]
        if kind not in LIMITS:
            raise pytest.UsageError(f"tests/{kind} must be a kind of test, got a folder unknown to {__file__}; add it")
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(LIMITS[kind]))
        if kind == "gpu" and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if item.get_closest_marker("speech") is not None and "QAD_SPEECH_DIR" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="needs recorded speech: set QAD_SPEECH_DIR to its folder"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def speech() -> Path:
    """The folder of recorded speech; for tests marked ``speech``."""
    return Path(os.environ["QAD_SPEECH_DIR"])


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> DigitsRun:
    """A config on a few spoken digits, packed, for tests of later stages; copy what they would change."""
    return made_once(tmp_path_factory, "digits", make_digits)


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """A process that starts programs quickly."""
    with ForkServer(tmp_path_factory.mktemp("forks")) as forks:
        yield forks


@pytest.fixture(scope="session")
def two_rank_run(digits: DigitsRun, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Label, quantize, train and score of that config on two ranks with ZeRO-2; to be read only."""
    return made_once(tmp_path_factory, "two-ranks", lambda folder: run_on_two_ranks(digits, folder))


@pytest.fixture(scope="session")
def one_rank_run(digits: DigitsRun, two_rank_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Label, quantize and score on one rank, of the student that two ranks trained; to be read only."""
    return made_once(tmp_path_factory, "one-rank", lambda folder: run_on_one_rank(digits, two_rank_run, folder))
