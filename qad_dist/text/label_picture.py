"""The report on a run's labels as a picture: hours kept and dropped, and which filters object in which language."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qad_dist.text.label_report import reasons_of
from shards.pictures import draw_hours, in_unit, new_figure, number_text, save_figure, tidy
from shards.verdicts import ALL, KL_ONLY, NOTHING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart also by those who do not see red and green alike.
_USES = {ALL: ("used", "#3f6fa8"), KL_ONLY: ("KL only", "#f0a63a"), NOTHING: ("dropped", "#b2456e")}
_LIGHTEST = (1.0, 1.0, 1.0)
_DARKEST = (0.70, 0.27, 0.43)


def draw_report(summary: dict[str, Any], path: Path) -> None:
    """Draw a PNG.

    Args:
        summary: From :meth:`qad_dist.text.label_report.LabelReport.summary`.
        path: Of the PNG.

    Raises:
        ConfigError: Matplotlib is not installed.
        StageError: ``path`` cannot be written.
    """
    names = sorted(summary["languages"], key=lambda name: (summary["languages"][name]["hours"], name))
    reasons = reasons_of(summary)
    figure = new_figure(path, width=7 + 0.75 * max(4, len(reasons)), height=0.27 * max(2, len(names)) + 2.4)
    grid = figure.add_gridspec(1, 2, width_ratios=(6, 0.75 * max(4, len(reasons))))
    hours = figure.add_subplot(grid[0, 0])
    parts = {
        title: (color, np.array([3600 * summary["languages"][name]["use"][use]["hours"] for name in names]))
        for use, (title, color) in _USES.items()
    }
    draw_hours(hours, names, parts, title="Speech per language")
    _draw_reasons(figure.add_subplot(grid[0, 1], sharey=hours), summary["languages"], names, reasons)
    value, unit = in_unit(3600 * summary["hours"])
    kept = summary["hours"] - summary["use"][NOTHING]["hours"]
    share = f", {100 * kept / summary['hours']:.1f} % of it kept" if summary["hours"] else ""
    figure.suptitle(f"{number_text(value)} {unit} of labelled speech{share}", fontsize=14, fontweight="bold")
    save_figure(figure, path)


def _draw_reasons(axes: "Axes", languages: dict[str, Any], names: list[str], reasons: list[str]) -> None:
    """A cell for each language and reason: the share of its utterances, darker the higher."""
    for place, name in enumerate(names):
        group = languages[name]
        for column, reason in enumerate(reasons):
            if count := group["reasons"].get(reason, {"utterances": 0})["utterances"]:
                share = count / group["utterances"]
                # The root shows one percent and a hundred alike.
                depth = math.sqrt(share)
                color = [light + depth * (dark - light) for light, dark in zip(_LIGHTEST, _DARKEST, strict=True)]
                axes.barh(place, 0.96, left=column - 0.48, height=0.88, color=color)
                axes.annotate(
                    _percent(share),
                    (column, place),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if depth > 0.6 else "black",
                )
    axes.set_xlim(-0.5, max(len(reasons), 1) - 0.5)
    axes.set_xticks(range(len(reasons)), reasons, rotation=30, ha="right", rotation_mode="anchor")
    axes.tick_params(axis="y", labelleft=False)
    axes.set_title("Utterances that filters object to, in %", fontsize=11, loc="left")
    tidy(axes, "x")
    axes.grid(visible=False)
    axes.tick_params(axis="x", length=0)


def _percent(share: float) -> str:
    """Two digits, and never a zero for what there is."""
    percent = 100 * share
    return f"{percent:.0f}" if percent >= 9.95 else f"{percent:.1f}" if percent >= 0.1 else "<0.1"
