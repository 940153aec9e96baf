"""What a packed folder holds, in numbers, as text and as a picture.

Utterances and hours per language and split, and how long the utterances last. Counting is numpy's work, column by
column; nothing here touches one utterance after the other.
"""

import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from shards.index import UNKNOWN_LANGUAGE
from shards.pictures import draw_hours, in_unit, new_figure, number_text, save_figure, tidy
from shards.schema import SPLITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PERCENTILES = (0, 5, 50, 95, 100)
"""Of durations that are told: the shortest, most of them, the median, the longest."""

_NUM_BINS, _MAX_BINS = 24, 30
_BIN_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 2.5, 5, 10, 15, 20, 30, 60)
# What lasts longer than all but these is counted in one last bin: a few hours-long ones would flatten the rest.
_BINNED_PERCENT = 99.5
_TEXT_BAR_CHARACTERS = 50
# Told apart also by those who do not see red and green alike.
_COLORS = dict(zip(SPLITS, ("#3f6fa8", "#f0a63a", "#b2456e"), strict=True))
_NEUTRAL = "#4d7f7a"


class Table(Protocol):
    """Columns of utterances, as :class:`shards.index.UtteranceTable` has them."""

    def numbers(self, name: str) -> npt.NDArray[Any]:
        """A column of numbers."""
        ...

    def codes(self, name: str) -> tuple[npt.NDArray[np.integer], list[str | None]]:
        """For each row a number, and the names that they stand for."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stats:
    """Counts of a corpus. Dimension key: L languages, S splits, D bins of durations, P percentiles."""

    languages: tuple[str, ...]
    """In alphabetical order; utterances without one as the last."""
    num_utterances_LS: npt.NDArray[np.int64]
    seconds_LS: npt.NDArray[np.float64]
    bin_seconds: float
    """Width of a bin, the first from 0; what is beyond the last one is counted in it."""
    is_last_bin_open: bool
    histogram_LD: npt.NDArray[np.int64]
    percentiles_LP: npt.NDArray[np.float64]
    """Seconds, at :data:`PERCENTILES`."""
    percentiles_P: npt.NDArray[np.float64]
    """Of all languages together; NaN if there are no utterances."""


def count(table: Table) -> Stats:
    """Count a table of utterances. Pure."""
    seconds = np.asarray(table.numbers("duration_seconds"), np.float64)
    languages, names = table.codes("language")
    splits, split_names = table.codes("split")
    place_of_split = np.array([SPLITS.index(name) for name in split_names if name is not None], np.int64)
    shape = (len(names), len(SPLITS))
    cells = languages * len(SPLITS) + (place_of_split[splits] if len(splits) else 0)
    size = shape[0] * shape[1]
    width, num_bins, is_open = _bins(seconds)
    bins = np.minimum((seconds / width).astype(np.int64), num_bins - 1)
    order = np.argsort(languages, kind="stable")
    groups = np.split(seconds[order], np.searchsorted(languages[order], np.arange(1, len(names))))
    return Stats(
        languages=tuple(name or UNKNOWN_LANGUAGE for name in names),
        num_utterances_LS=np.bincount(cells, minlength=size).reshape(shape),
        seconds_LS=np.bincount(cells, weights=seconds, minlength=size).reshape(shape),
        bin_seconds=width,
        is_last_bin_open=is_open,
        histogram_LD=np.bincount(languages * num_bins + bins, minlength=shape[0] * num_bins).reshape(-1, num_bins),
        percentiles_LP=np.array([_percentiles(group) for group in groups if names]).reshape(-1, len(PERCENTILES)),
        percentiles_P=_percentiles(seconds),
    )


def table_lines(stats: Stats, rejected_rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Text for people: the splits of each language, durations, their histogram, and what was rejected and why.

    Args:
        stats: From :func:`count`.
        rejected_rows: Each with ``language`` and ``reason``, of which the words before the first colon are counted.
    """
    reasons: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in rejected_rows:
        reasons[str(row["reason"]).partition(":")[0]][row["language"] or UNKNOWN_LANGUAGE] += 1
    lines = _split_lines(stats, sum(reasons.values(), Counter[str]()))
    if stats.languages:
        lines += ["", *_duration_lines(stats), "", *_histogram_lines(stats)]
    lines += [""] if reasons else []
    for reason, counts in sorted(reasons.items(), key=lambda item: (-item[1].total(), item[0])):
        languages = ", ".join(f"{language} {count}" for language, count in counts.most_common())
        lines.append(f"rejected: {reason}: {counts.total()}")
        lines += textwrap.wrap(languages, 110, initial_indent="  ", subsequent_indent="  ")
    return lines


def draw(stats: Stats, path: Path) -> None:
    """Draw hours per language and split, and how long utterances last, into a PNG.

    Raises:
        ConfigError: Matplotlib is not installed.
        StageError: ``path`` cannot be written.
    """
    rows = max(2, len(stats.languages))
    heights = (0.27 * rows + 0.5, 2.6)
    figure = new_figure(path, width=11, height=sum(heights) + 1.9)
    grid = figure.add_gridspec(2, 2, height_ratios=heights, width_ratios=(3, 2))
    hours_axes = figure.add_subplot(grid[0, 0])
    order = np.argsort(stats.seconds_LS.sum(axis=1), kind="stable")
    parts = {split: (_COLORS[split], stats.seconds_LS[order, number]) for number, split in enumerate(SPLITS)}
    names = [stats.languages[number] for number in order.tolist()]
    draw_hours(hours_axes, names, parts, title="Speech per language and split")
    _draw_spread(figure.add_subplot(grid[0, 1], sharey=hours_axes), stats, order)
    _draw_histogram(figure.add_subplot(grid[1, :]), stats)
    value, unit = in_unit(float(stats.seconds_LS.sum()))
    num_languages = len(set(stats.languages) - {UNKNOWN_LANGUAGE})
    languages = "1 language" if num_languages == 1 else f"{num_languages} languages"
    figure.suptitle(
        f"{number_text(value)} {unit} of speech in {stats.num_utterances_LS.sum():,} utterances, {languages}",
        fontsize=14,
        fontweight="bold",
    )
    save_figure(figure, path)


def _bins(seconds: npt.NDArray[np.float64]) -> tuple[float, int, bool]:
    """Width and number of the bins, and whether something is beyond them."""
    if not len(seconds):
        return 1.0, 1, False
    most, longest = np.percentile(seconds, [_BINNED_PERCENT, 100])
    width = float(next((width for width in _BIN_SECONDS if most <= width * _NUM_BINS), math.ceil(most / _NUM_BINS)))
    num_bins = min(_MAX_BINS, max(1, math.ceil(longest / width)))
    return width, num_bins, bool(longest > num_bins * width)


def _percentiles(seconds: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.percentile(seconds, PERCENTILES) if len(seconds) else np.full(len(PERCENTILES), np.nan)


def _split_lines(stats: Stats, rejected: Counter[str]) -> list[str]:
    """One line per language: utterances and hours in each split and altogether, and rejected recordings."""
    nothing = (np.zeros(len(SPLITS), np.int64), np.zeros(len(SPLITS)))
    counted = dict(zip(stats.languages, zip(stats.num_utterances_LS, stats.seconds_LS, strict=True), strict=True))
    rows = [(name, *counted.get(name, nothing), rejected[name]) for name in sorted({*counted, *rejected})]
    if len(rows) > 1:
        rows.append(("all", stats.num_utterances_LS.sum(axis=0), stats.seconds_LS.sum(axis=0), rejected.total()))
    lines = [["language", *(f"{split} (h)" for split in (*SPLITS, "all")), "rejected"]]
    for name, numbers, seconds, num_rejected in rows:
        cells = zip([*numbers.tolist(), numbers.sum()], [*seconds.tolist(), seconds.sum()], strict=True)
        lines.append([name, *(f"{number} ({second / 3600:.3f})" for number, second in cells), str(num_rejected)])
    widths = [12, *[20] * (len(SPLITS) + 1), 10]
    widths = [max(width, *(len(line[i]) + 2 for line in lines)) for i, width in enumerate(widths)]
    return [line[0].ljust(widths[0]) + "".join(map(str.rjust, line[1:], widths[1:])) for line in lines]


def _duration_lines(stats: Stats) -> list[str]:
    names = {0: "shortest", 50: "median", 100: "longest"}
    lines = [f"{'seconds':<12}" + "".join(f"{names.get(percent, f'{percent} %'):>10}" for percent in PERCENTILES)]
    rows = [*zip(stats.languages, stats.percentiles_LP, strict=True)]
    if len(rows) > 1:
        rows.append(("all", stats.percentiles_P))
    return lines + [f"{name:<12}" + "".join(f"{value:>10.2f}" for value in values) for name, values in rows]


def _histogram_lines(stats: Stats) -> list[str]:
    counts = stats.histogram_LD.sum(axis=0).tolist()
    lines = [f"{'seconds':<16}{'utterances':>12}"]
    for label, number in zip(_bin_labels(stats), counts, strict=True):
        bar = "#" * math.ceil(_TEXT_BAR_CHARACTERS * number / max(counts))
        lines.append(f"{label:<16}{number:>12}  {bar}".rstrip())
    return lines


def _bin_labels(stats: Stats) -> list[str]:
    num_bins = stats.histogram_LD.shape[1]
    edges = [f"{number * stats.bin_seconds:.10g}" for number in range(num_bins + 1)]
    labels = [f"{edges[number]} - {edges[number + 1]}" for number in range(num_bins)]
    return [*labels[:-1], f"{edges[-2]} and more"] if stats.is_last_bin_open else labels


def _draw_spread(axes: "Axes", stats: Stats, order: npt.NDArray[np.intp]) -> None:
    """The durations that most utterances of a language have, beside its bar."""
    shown = stats.percentiles_LP[order]
    low, median, high = (shown[:, PERCENTILES.index(percent)] for percent in (5, 50, 95))
    places = np.arange(len(order))
    axes.hlines(places, low, high, color=_NEUTRAL, linewidth=5, alpha=0.35)
    axes.plot(median, places, "o", color=_NEUTRAL, markersize=5)
    axes.tick_params(axis="y", labelleft=False)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds")
    axes.set_title("Durations: median, and 5 to 95 %", fontsize=11, loc="left")
    tidy(axes, "x")


def _draw_histogram(axes: "Axes", stats: Stats) -> None:
    counts = stats.histogram_LD.sum(axis=0)
    starts = np.arange(len(counts)) * stats.bin_seconds
    axes.bar(starts, counts, width=stats.bin_seconds * 0.94, align="edge", color=_NEUTRAL, alpha=0.85)
    if stats.is_last_bin_open:
        axes.annotate(
            f"{starts[-1]:g} s and more",
            (starts[-1] + stats.bin_seconds, counts[-1]),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
    axes.set_xlim(0, starts[-1] + stats.bin_seconds)
    axes.margins(y=0.12)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("seconds")
    axes.set_ylabel("utterances")
    axes.set_title("How long utterances last", fontsize=11, loc="left")
    tidy(axes, "y")
