"""What every picture must do where it cannot be drawn or written."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.errors import ConfigError, StageError


def check_that_matplotlib_is_named(draw: Callable[[Path], None], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without matplotlib an error says what to install, and nothing is left in the folder of ``path``."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = rf"{re.escape(path.name)} must be drawn by matplotlib, .* pip install 'qad-dist\[plots\]'"

    with pytest.raises(ConfigError, match=message):
        draw(path)
    assert not list(path.parent.iterdir())


def check_that_it_must_be_writable(draw: Callable[[Path], None], path: Path) -> None:
    """Where the folder of ``path`` is a file, the error is one of the stage."""
    path.parent.write_text("in the way of a folder")

    with pytest.raises(StageError, match=rf"{re.escape(path.name)} must be writable"):
        draw(path)
