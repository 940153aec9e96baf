"""What the pictures of this project have in common: how they are made, how they look, and how they get to disk."""

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from shards.errors import ConfigError
from shards.storage import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@contextmanager
def drawn_if_possible(path: Path, logger: logging.Logger) -> Generator[None]:
    """Inside, a picture is drawn; where matplotlib, an extra, is missing, a line of the log says so and all goes on."""
    try:
        yield
    except ConfigError as reason:
        logger.warning("event=no_picture path=%s reason=%r", path, str(reason))


def new_figure(path: Path, *, width: float, height: float) -> "Figure":
    """An empty figure of this size in inches, whose parts find their places by themselves.

    Raises:
        ConfigError: Matplotlib is not installed; names the file of ``path``.
    """
    try:
        # Without pyplot: no state outside this figure, no display.
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as cause:
        raise ConfigError(
            f"{path.name} must be drawn by matplotlib, got {cause}; install it: pip install 'qad-dist[plots]'"
        ) from cause
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12, hspace=0.04)
    return Figure(figsize=(width, height), dpi=150, layout=layout)


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG atomically; equal figures give equal bytes.

    Raises:
        StageError: ``path`` cannot be written.
    """
    with atomic_write(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})


def draw_hours(
    axes: "Axes", names: Sequence[str], parts: Mapping[str, tuple[str, npt.NDArray[np.float64]]], *, title: str
) -> None:
    """A bar for each language, as long as its speech, in parts.

    Args:
        axes: Where.
        names: Of the languages, from below.
        parts: From the left: what each is called, its color, and its seconds in each language.
        title: Above the bars.
    """
    totals = np.sum([seconds for _, seconds in parts.values()], axis=0)
    longest, unit = in_unit(float(totals.max(initial=0)))
    factor = longest / totals.max(initial=0) if longest else 1.0
    left = np.zeros(len(names))
    places = np.arange(len(names))
    for label, (color, seconds) in parts.items():
        axes.barh(places, seconds * factor, left=left, height=0.72, color=color, label=label)
        left += seconds * factor
    for place, total in zip(places.tolist(), left.tolist(), strict=True):
        axes.annotate(
            number_text(total), (total, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(places, names, fontsize=9)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.margins(x=0.1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=11, loc="left")
    # Above the axes, where no bar can be behind it.
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.99), ncols=len(parts), fontsize=9)
    tidy(axes, "x")


def tidy(axes: "Axes", along: Literal["x", "y"]) -> None:
    """Leave of frame and ticks what is needed, with lines ``along`` which values are read."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(color="#999999", labelsize=9)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis=along, color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)


def in_unit(seconds: float) -> tuple[float, str]:
    """A duration in the largest of hours, minutes and seconds that it has at least one of."""
    for length, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= length:
            return seconds / length, unit
    return seconds, "seconds"


def number_text(value: float) -> str:
    """About three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
