"""What takes long to make is made once for all processes that test side by side."""

import fcntl
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from shards.storage import atomic_write

Made = TypeVar("Made")


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Made]) -> Made:
    """What ``make`` gives, by whichever process comes first; the others wait for it and read it.

    Args:
        factory: Of the session.
        name: Of what is made, for its files.
        make: Is given a new folder, and gives something that can be pickled.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return make(factory.mktemp(name))
    path = factory.getbasetemp().parent / f"{name}.pickle"  # each process has a folder of its own in this one
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return pickle.loads(path.read_bytes())
        made = make(factory.mktemp(name))
        with atomic_write(path) as file:
            pickle.dump(made, file)
        return made
