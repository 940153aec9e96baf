"""The course of training as a picture: how KL falls in training and on the held-out split, and what the steps were."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shards.pictures import new_figure, number_text, save_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOSS_PICTURE = "loss.png"
"""In the train stage's folder."""

_TRAINING, _HELDOUT, _PLAIN = "#3f6fa8", "#b2456e", "#555555"
_PER_NAT = 1e6
_WORDS = "heldout_word_error_rate"
# Value, what it is called, and the factor to what it is told in.
_SMALL = (
    (_WORDS, "held-out\nword errors, %", 100),
    ("lr", "learning rate, 1e-6", 1e6),
    ("gradient_norm", "gradient norm", 1),
)
# A curve of more values is too rough to be read; with it comes its mean over one part in so many.
_LONG, _PARTS = 100, 40

Lines = Sequence[Mapping[str, Any]]
Floats = npt.NDArray[np.float64]


def draw_losses(lines: Lines, path: Path) -> None:
    """Draw a PNG, of whatever the lines tell.

    Args:
        lines: Of ``metrics.jsonl``, in their order; none give empty axes.
        path: Of the PNG.

    Raises:
        ConfigError: Matplotlib is not installed.
        StageError: ``path`` cannot be written.
    """
    small = _SMALL if any(_WORDS in line for line in lines) else _SMALL[1:]
    heights = [3.4, *(1.1 for _ in small)]
    figure = new_figure(path, width=9, height=sum(heights) + 1.4)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    kl = figure.add_subplot(grid[0, 0])
    figure.suptitle(_draw_kl(kl, lines), fontsize=14, fontweight="bold")
    panels = [kl]
    for name, label, factor in small:
        axes = figure.add_subplot(grid[len(panels), 0], sharex=kl)
        style = {"marker": "o", "markersize": 4, "color": _HELDOUT} if name == _WORDS else {"color": _PLAIN}
        axes.plot(*_curve(lines, name, factor=factor), linewidth=1.2, **style)
        axes.set_ylabel(label, fontsize=9)
        panels.append(axes)
    _scale_by_factors(panels[-1])
    _finish(panels)
    kl.set_xlim(*_limits(lines))
    figure.align_ylabels(panels)
    save_figure(figure, path)


def _finish(panels: Sequence["Axes"]) -> None:
    """Frames, ticks, and steps below the last panel alone."""
    for axes in panels:
        tidy(axes, "y")
        axes.tick_params(axis="x", labelbottom=axes is panels[-1])
        axes.tick_params(axis="y", which="minor", length=0)
        if not any(len(line.get_xdata()) for line in axes.lines):
            axes.set_yticks([])
    panels[-1].set_xlabel("step", fontsize=9)
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    panels[-1].xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")


def _draw_kl(axes: "Axes", lines: Lines) -> str:
    """KL over the steps; in words, what came of that on the held-out split."""
    steps, kl = _curve(lines, "kl", factor=_PER_NAT)
    is_long = len(steps) > _LONG
    style = {"linewidth": 0.8, "alpha": 0.35} if is_long else {"linewidth": 1.4}
    axes.plot(steps, kl, color=_TRAINING, label="training", **style)
    if is_long:
        size = len(steps) // _PARTS
        means = np.convolve(kl, np.full(size, 1 / size), mode="valid")
        places = slice((size - 1) // 2, (size - 1) // 2 + len(means))
        axes.plot(steps[places], means, color=_TRAINING, linewidth=1.8, label=f"training, mean of {size} values")
    steps, heldout = _curve(lines, "heldout_kl_per_token", factor=_PER_NAT)
    title = "KL to the teacher"
    if len(steps):
        axes.plot(steps, heldout, "o-", color=_HELDOUT, markersize=4, linewidth=1.6, label="held-out split")
        best = int(heldout.argmin())
        text = f"best: step {steps[best]:,.0f}"
        axes.plot(steps[best : best + 1], heldout[best : best + 1], "*", color=_HELDOUT, markersize=14, label=text)
        title += f" on the held-out split: {number_text(heldout[0])} at first, {number_text(heldout[best])} at best"
    _scale_by_factors(axes)
    axes.set_ylabel("1e-6 nats per response token", fontsize=9)
    # Above the axes, where no curve can be behind it.
    curves = [curve for curve in axes.lines if len(curve.get_xdata())]
    axes.legend(handles=curves, frameon=False, loc="lower right", bbox_to_anchor=(1, 0.99), ncols=4, fontsize=9)
    return title


def _scale_by_factors(axes: "Axes") -> None:
    """Equal lengths for equal factors, if there is anything above 0."""
    if not any((line.get_ydata() > 0).any() for line in axes.lines):
        return
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: number_text(value))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _curve(lines: Lines, name: str, *, factor: float = 1) -> tuple[Floats, Floats]:
    """Steps that have a value of this name, and the values."""
    found = [(line["step"], factor * line[name]) for line in lines if line.get(name) is not None]
    steps, values = np.array(found, np.float64).reshape(-1, 2).T
    return steps, values


def _limits(lines: Lines) -> tuple[float, float]:
    """Some room beside the first and the last step."""
    steps = [line["step"] for line in lines] or [0]
    room = max(1.0, 0.02 * (max(steps) - min(steps)))
    return min(steps) - room, max(steps) + room
