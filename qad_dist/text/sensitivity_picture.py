"""What each Linear costs when it alone is quantized, as a picture: a cell for each, and what its inputs reach."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qad_dist.linears import LINEARS
from qad_dist.text.sensitivity_table import COLUMNS, KEPT, headline_values, kl_text, layers_of
from shards.pictures import new_figure, save_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LIGHTEST, _DARKEST = (0.97, 0.97, 0.97), (0.70, 0.27, 0.43)
_BEFORE, _AFTER = "#b2456e", "#3f6fa8"
_KEPT = "#3f6fa8"
_SMALLEST_RATIO = 1e-4
"""What costs less than this share of the worst is as light as nothing."""


def draw_sensitivity(report: dict[str, Any], path: Path) -> None:
    """Draw a PNG.

    Args:
        report: From :func:`qad_dist.quant.sensitivity.as_json`.
        path: Of the PNG.

    Raises:
        ConfigError: Matplotlib is not installed.
        StageError: ``path`` cannot be written.
    """
    layers = layers_of(report)
    groups = list(dict.fromkeys(linear["group"] for layer in layers for linear in layer.values()))
    figure = new_figure(path, width=14, height=0.29 * max(3, len(layers)) + 2.2)
    grid = figure.add_gridspec(1, 1 + len(groups), width_ratios=(6.4, *(1.7 for _ in groups)))
    cells = figure.add_subplot(grid[0, 0])
    _draw_cells(cells, layers, report["worst"])
    first = None
    for place, group in enumerate(groups):
        axes = figure.add_subplot(grid[0, 1 + place], sharey=cells, sharex=first)
        first = first or axes
        _draw_inputs(axes, layers, group)
    if first is not None:
        handles, labels = first.get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, loc="outside lower right", ncols=2, fontsize=9)
    values = headline_values(report)
    title = f"KL to the teacher: {values}" if values else "KL to the teacher"
    figure.suptitle(title, fontsize=14, fontweight="bold")
    save_figure(figure, path)


def _draw_cells(axes: "Axes", layers: list[dict[str, dict[str, Any]]], worst: list[str]) -> None:
    """A cell for each Linear, darker by equal steps for equal factors; the worst are framed, what is kept is dashed."""
    measured = [linear["kl_per_token"] for layer in layers for linear in layer.values()]
    positive = [kl for kl in measured if kl is not None and kl > 0]
    top = max(positive, default=1.0)
    bottom = max(min(positive, default=1.0), top * _SMALLEST_RATIO)
    for number, layer in enumerate(layers):
        for column, name in enumerate(LINEARS):
            linear = layer[name]
            depth = 0.0
            if (kl := linear["kl_per_token"]) is not None and top > bottom:
                depth = float(np.log(max(kl, bottom) / bottom) / np.log(top / bottom))
            color = [light + depth * (dark - light) for light, dark in zip(_LIGHTEST, _DARKEST, strict=True)]
            edge = "black" if linear["name"] in worst else _KEPT if linear["is_kept"] else color
            axes.barh(
                number,
                0.94,
                left=column - 0.47,
                height=0.86,
                color=color,
                edgecolor=edge,
                linewidth=1.5,
                linestyle="--" if linear["is_kept"] else "-",
            )
            text = kl_text(kl) + ("" if kl is None or not linear["is_kept"] else f" ({KEPT})")
            axes.annotate(
                text, (column, number), ha="center", va="center", fontsize=8, color="white" if depth > 0.6 else "black"
            )
    axes.set_xlim(-0.55, len(LINEARS) - 0.45)
    axes.set_ylim(max(len(layers), 1) - 0.4, -0.6)  # the first layer on top
    axes.set_xticks(range(len(LINEARS)), COLUMNS)
    axes.set_yticks(range(len(layers)), [str(number) for number in range(len(layers))])
    axes.set_ylabel("layer", fontsize=9)
    axes.set_title("KL with one Linear quantized, 1e-6 nats per token; framed: the worst", fontsize=11, loc="left")
    tidy(axes, "x")
    axes.grid(visible=False)
    axes.tick_params(axis="x", length=0)


def _draw_inputs(axes: "Axes", layers: list[dict[str, dict[str, Any]]], group: str) -> None:
    """What the inputs of a group reach in each layer, before and after smoothing."""
    linears = [next(linear for linear in layer.values() if linear["group"] == group) for layer in layers]
    places = np.arange(len(layers))
    before, after = (np.array([linear[f"input_amax_{when}"] for linear in linears]) for when in ("before", "after"))
    axes.hlines(places, np.minimum(before, after), np.maximum(before, after), color="#cccccc", linewidth=2)
    axes.plot(before, places, "o", color=_BEFORE, markersize=5, fillstyle="none", label="before smoothing")
    axes.plot(after, places, "o", color=_AFTER, markersize=5, label="after smoothing")
    axes.set_xscale("log")
    axes.set_title(group, fontsize=11, loc="left")
    axes.set_xlabel("input amax", fontsize=9)
    tidy(axes, "x")
    axes.tick_params(axis="y", labelleft=False)
    axes.tick_params(axis="x", which="minor", length=0)
