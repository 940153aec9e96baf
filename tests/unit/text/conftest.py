"""Pictures that tests draw, to be looked at as matplotlib has them."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved in the test."""
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save: Callable[..., None] = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: figures.append(self) or save(self, *args, **kwargs)
    )
    return figures
