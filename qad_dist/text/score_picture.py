"""The error rates of a score as a picture: a panel for each section, in it a row for each language, with whiskers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qad_dist.config.score import OWN_SYSTEMS
from qad_dist.text.table import judged_student, ordered_systems
from shards.pictures import new_figure, save_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCORE_PICTURE = "score.png"
"""In the score stage's folder."""

OVERALL = "overall"
"""The row below the languages."""

# Color and marker of the run's own systems and of others. Eight colors differ for those who lack one kind of cone, the
# own systems' also in grey; markers differ without any color. With 5 and 6 of them no pair comes twice among 30 others.
_OWN_STYLES = dict(zip(OWN_SYSTEMS, (("#222222", "o"), ("#f0a63a", "s"), ("#3f6fa8", "D")), strict=True))
_OTHER_COLORS = ("#994f00", "#56b4e9", "#7fbf7b", "#555555", "#99ddff")
_OTHER_MARKERS = ("^", "v", "P", "X", "*", "<")
_MARKER_SIZES = {"o": 6.0, "s": 5.5, "D": 5.2, "P": 7.5, "X": 7.5, "*": 9.5}
_OTHER_MARKER_SIZE = 6.5

# Inches.
_PER_SYSTEM, _BETWEEN_ROWS = 0.11, 0.14
_PANEL_REST, _PANEL_WIDTH, _TALLEST = 0.95, 8.0, 28.0
# Rows between the languages and what stands for all of them.
_OVERALL_GAP = 0.5
# The scale ends at so many percent at most, and at so many times what nine of ten rates are below: one runaway system
# would leave no room for the others. What is beyond the end stands there with its number.
_MOST_PERCENT, _USUAL_SHARE, _MOST_TIMES_USUAL = 100.0, 0.9, 3.0

_SYSTEMS_PER_LEGEND_ROW, _PER_LEGEND_ROW = 5, 0.22


@dataclass(frozen=True, slots=True)
class _Panel:
    """A section: its languages from the worst to the best, and the systems that it has, in the order of all."""

    name: str
    section: Mapping[str, Any]
    systems: list[str]
    languages: list[str]

    @property
    def row_inches(self) -> float:
        return _PER_SYSTEM * len(self.systems) + _BETWEEN_ROWS

    @property
    def inches(self) -> float:
        return self.row_inches * (max(1, len(self.languages)) + 1 + _OVERALL_GAP) + _PANEL_REST


def draw_scores(score: Mapping[str, Any], path: Path) -> None:
    """Draw a PNG that grows with its rows; equal scores give equal bytes.

    Args:
        score: Content of ``score.json``: ``normalizer``, and ``sections`` by name with ``systems``, each of which has
            rows ``overall`` and ``languages``. A row without ``error_rate`` has no mark, one without ``interval`` no
            whisker.
        path: Of the PNG.

    Raises:
        ConfigError: Matplotlib is not installed.
        StageError: ``path`` cannot be written.
    """
    panels = [_panel(name, section) for name, section in score["sections"].items()]
    styles = _styles(name for panel in panels for name in panel.systems)
    columns = _in_columns(panels)
    heights = [sum(panel.inches for panel in column) for column in columns]
    tallest = max(heights, default=_PANEL_REST)
    num_columns = max(1, len(columns))
    legend = _PER_LEGEND_ROW * math.ceil(len(styles) / _SYSTEMS_PER_LEGEND_ROW) + 0.05
    figure = new_figure(path, width=_PANEL_WIDTH * num_columns, height=tallest + legend + 0.85)
    grid = figure.add_gridspec(2, num_columns, height_ratios=(legend, tallest))
    _draw_legend(figure.add_subplot(grid[0, :]), styles)
    for place, (column, height) in enumerate(zip(columns, heights, strict=True)):
        # Below a shorter column nothing, so that all rows of the picture are about equally high.
        rest = [tallest - height] if tallest - height > 0.01 else []
        parts = grid[1, place].subgridspec(
            len(column) + len(rest), 1, height_ratios=[*(panel.inches for panel in column), *rest]
        )
        for row, panel in enumerate(column):
            _draw_panel(figure.add_subplot(parts[row, 0]), panel, styles)
    figure.suptitle("Error rates by language", fontsize=14, fontweight="bold")
    has_whiskers = any(row.get("interval") for panel in panels for row in _rows(panel))
    whiskers = "Whiskers: 95 %, bootstrap. " if has_whiskers else ""
    figure.supxlabel(_literal(f"{whiskers}Text: {score['normalizer']}."), fontsize=9, color="#555555")
    save_figure(figure, path)


def _panel(name: str, section: Mapping[str, Any]) -> _Panel:
    present = section["systems"]
    systems, student = ordered_systems(present), judged_student(present)
    found = dict.fromkeys(language for system in systems for language in present[system]["languages"])

    def goodness(language: str) -> tuple[bool, float, str]:
        rate = present[student]["languages"].get(language, {}).get("error_rate")
        return rate is None, -(rate or 0.0), language

    return _Panel(name, section, systems, sorted(found, key=goodness))


def _in_columns(panels: Sequence[_Panel]) -> list[list[_Panel]]:
    """The panels below each other, in as few columns as keep the picture from growing out of every screen."""
    columns: list[list[_Panel]] = []
    free = 0.0
    for panel in panels:
        if panel.inches > free or not columns:
            columns.append([])
            free = _TALLEST
        columns[-1].append(panel)
        free -= panel.inches
    return columns


def _styles(systems: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Color and marker of every system, the same in all panels."""
    names = list(dict.fromkeys(systems))
    own = {name: _OWN_STYLES[name] for name in OWN_SYSTEMS if name in names}
    others = [name for name in names if name not in own]
    styles = zip(others, cycle(_OTHER_COLORS), cycle(_OTHER_MARKERS), strict=False)
    return own | {name: (color, marker) for name, color, marker in styles}


def _rows(panel: _Panel) -> list[Mapping[str, Any]]:
    systems = panel.section["systems"].values()
    return [row for system in systems for row in (*system["languages"].values(), system[OVERALL])]


def _draw_panel(axes: "Axes", panel: _Panel, styles: Mapping[str, tuple[str, str]]) -> None:
    """Rows from above: the languages, a gap, and all of them together."""
    bottom = len(panel.languages) + (_OVERALL_GAP if panel.languages else 0)
    heights = [*map(float, range(len(panel.languages))), bottom]
    offsets = _offsets(panel)
    end = _end_of_scale(_rows(panel))
    for system, offset in zip(panel.systems, offsets, strict=True):
        of_system = panel.section["systems"][system]
        rows = [*(of_system["languages"].get(language) for language in panel.languages), of_system[OVERALL]]
        places = [height + offset for height in heights]
        _draw_system(axes, rows, places, style=styles[system], end=end)
    for height in heights[1::2]:  # so that the eye finds the name of a row
        axes.axhspan(height - 0.5, height + 0.5, color="#f6f6f6", zorder=0, linewidth=0)
    if panel.languages:
        axes.axhline(bottom - (1 + _OVERALL_GAP) / 2, color="#999999", linewidth=0.8)
    axes.set_xlim(0, end)
    axes.set_ylim(bottom + 0.55, heights[0] - 0.55)
    axes.set_yticks(heights, [_literal(_label(panel, language)) for language in [*panel.languages, OVERALL]])
    axes.set_xlabel("error rate, %", fontsize=9)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.10g}")
    axes.set_title(_literal(_title(panel)), fontsize=11, loc="left")
    tidy(axes, "x")
    axes.get_yticklabels()[-1].set_fontweight("bold")


def _offsets(panel: _Panel) -> list[float]:
    """Of the systems within a row, the first on top."""
    step = _PER_SYSTEM / panel.row_inches
    return [step * (place - (len(panel.systems) - 1) / 2) for place in range(len(panel.systems))]


def _end_of_scale(rows: Sequence[Mapping[str, Any]]) -> float:
    """Percent: some room beyond the highest rate or whisker, if that is not too far."""
    told = [row for row in rows if row["error_rate"] is not None]
    if not told:
        return 1.0
    rates = sorted(row["error_rate"] for row in told)
    highest = max(rates[-1], *(row["interval"][1] for row in told if row.get("interval")), 0.0)
    usual = rates[math.ceil(_USUAL_SHARE * len(rates)) - 1]
    # At least a little, where most rates are 0.
    return min(105 * highest, max(100 * _MOST_TIMES_USUAL * usual, 1.0), _MOST_PERCENT) or 1.0


def _draw_system(
    axes: "Axes",
    rows: Sequence[Mapping[str, Any] | None],
    places: Sequence[float],
    *,
    style: tuple[str, str],
    end: float,
) -> None:
    """Whiskers, as far as the scale goes, and on them a mark for each rate; one beyond the scale is told at its end."""
    color, marker = style
    told = [(place, row) for place, row in zip(places, rows, strict=True) if row and row["error_rate"] is not None]
    whiskers = [(place, *row["interval"]) for place, row in told if row.get("interval")]
    axes.hlines(
        [place for place, _, _ in whiskers],
        [100 * low for _, low, _ in whiskers],
        [100 * high for _, _, high in whiskers],
        color=color,
        linewidth=1.3,
    )
    axes.plot(
        [min(100 * row["error_rate"], end) for _, row in told],
        [place for place, _ in told],
        linestyle="none",
        color=color,
        marker=marker,
        markersize=_MARKER_SIZES.get(marker, _OTHER_MARKER_SIZE),
        markeredgecolor="white",
        markeredgewidth=0.6,
        clip_on=False,
        zorder=3,
    )
    for place, row in told:
        if 100 * row["error_rate"] > end:
            axes.annotate(
                f"\u2192 {100 * row['error_rate']:,.0f}",
                (end, place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color=color,
            )


def _label(panel: _Panel, language: str) -> str:
    """The name of a row, with what is counted in it."""
    systems = panel.section["systems"].values()
    found = [system[OVERALL] if language == OVERALL else system["languages"].get(language) for system in systems]
    return f"{language} ({next(row['unit'] for row in found if row)})"


def _title(panel: _Panel) -> str:
    number = panel.section["num_utterances"]
    noun = "utterance" if number == 1 else "utterances"
    return f"{panel.name}: {number:,} {noun}, audio attention {panel.section['audio_attention']}"


def _literal(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def _draw_legend(axes: "Axes", styles: Mapping[str, tuple[str, str]]) -> None:
    """In axes of its own, because no layout keeps a figure's legend and its title apart."""
    handles = [
        axes.plot(
            [],
            [],
            color=color,
            marker=marker,
            markersize=_MARKER_SIZES.get(marker, _OTHER_MARKER_SIZE),
            markeredgecolor="white",
            linewidth=1.3,
        )[0]
        for color, marker in styles.values()
    ]
    # A legend fills its columns from above; systems are read along the rows.
    order = [
        place
        for column in range(_SYSTEMS_PER_LEGEND_ROW)
        for place in range(column, len(handles), _SYSTEMS_PER_LEGEND_ROW)
    ]
    names = [_literal(name) for name in styles]
    axes.legend(
        [handles[place] for place in order],
        [names[place] for place in order],
        loc="center",
        frameon=False,
        ncols=_SYSTEMS_PER_LEGEND_ROW,
        fontsize=9,
        borderpad=0,
    )
    axes.set_axis_off()
