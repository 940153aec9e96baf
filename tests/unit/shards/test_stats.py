import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from shards.languages import LANGUAGES
from shards.stats import count, draw, table_lines
from tests.helpers.pictures import check_that_it_must_be_writable, check_that_matplotlib_is_named


@dataclass
class Rows:
    """A table of a few utterances: duration, language, split."""

    rows: Sequence[tuple[float, str | None, str]]

    def numbers(self, name: str) -> Any:
        assert name == "duration_seconds"
        return np.array([row[0] for row in self.rows], np.float64)

    def codes(self, name: str) -> tuple[Any, list[str | None]]:
        values = [row[{"language": 1, "split": 2}[name]] for row in self.rows]
        names = sorted(set(values), key=lambda value: (value is None, value or ""))
        return np.array([names.index(value) for value in values], np.int64), names


FEW = Rows(
    [
        (3600.0, "Vietnamese", "train"),
        (1.5, "English", "test"),
        (5.0, None, "heldout"),
        (2.5, "English", "train"),
        (1800.0, "Vietnamese", "train"),
        (3.5, "English", "train"),
    ]
)


def test_utterances_and_seconds_are_counted_by_language_and_split():
    stats = count(FEW)

    assert stats.languages == ("English", "Vietnamese", "unknown")
    np.testing.assert_array_equal(stats.num_utterances_LS, [[2, 0, 1], [2, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(stats.seconds_LS, [[6, 0, 1.5], [5400, 0, 0], [0, 5, 0]])


def test_percentiles_of_a_language_are_those_of_its_own_utterances():
    seconds = np.random.default_rng(0).uniform(0.1, 30, 999).round(2)
    names = ("German", "Thai", None)

    stats = count(Rows([(value, names[i % 3], "train") for i, value in enumerate(seconds.tolist())]))

    for place in range(3):
        own = np.sort(seconds[place::3])  # 333: every 5 % falls between two of them
        expected = [own[0], np.quantile(own, 0.05), own[166], np.quantile(own, 0.95), own[-1]]
        np.testing.assert_allclose(stats.percentiles_LP[place], expected, rtol=1e-12)
    assert stats.percentiles_P[[0, -1]].tolist() == [seconds.min(), seconds.max()]


@pytest.mark.parametrize(
    ("seconds", "width", "counts", "is_open"),
    [
        ([0.5, 1.5, 1.75, 23.5], 1.0, {0: 1, 1: 2, 23: 1}, False),
        ([0.001, 30.0, 30.0], 2.0, {0: 1, 14: 2}, False),  # the edge of the last bin belongs to it
        ([0.25] * 999 + [7200.0], 0.02, {12: 999, 29: 1}, True),  # one of hours does not flatten the others
        ([2400.0], 100.0, {23: 1}, False),
        ([1.0], 0.05, {19: 1}, False),
    ],
)
def test_bins_have_a_round_width_and_hold_every_utterance(seconds, width, counts, is_open):
    stats = count(Rows([(value, "Thai", "train") for value in seconds]))

    histogram = stats.histogram_LD.sum(axis=0)
    assert (stats.bin_seconds, stats.is_last_bin_open) == (width, is_open)
    assert {place: number for place, number in enumerate(histogram.tolist()) if number} == counts
    assert len(histogram) == max(counts) + 1


def test_every_language_has_its_own_histogram():
    rows = [(0.5 + number, name, "train") for number, name in enumerate(["Thai", "Malay", "Thai", "Thai"])]

    stats = count(Rows(rows))

    width = stats.bin_seconds
    assert stats.languages == ("Malay", "Thai")
    for language, expected in zip(stats.histogram_LD, ([1.5], [0.5, 2.5, 3.5]), strict=True):
        assert np.flatnonzero(language).tolist() == [-(-value // width) - 1 for value in expected]


def test_the_lines_tell_languages_splits_rejections_and_durations():
    rejected = [
        {"language": "German", "reason": "too short: must be at least 0.1 s"},
        {"language": "English", "reason": "truncated: the header promises more"},
        {"language": None, "reason": "too short: must be at least 0.1 s, got 0.05: what"},
    ]

    lines = table_lines(count(FEW), rejected)

    assert lines[:6] == [
        "language               train (h)         heldout (h)            test (h)             all (h)  rejected",
        "English                2 (0.002)           0 (0.000)           1 (0.000)           3 (0.002)         1",
        "German                 0 (0.000)           0 (0.000)           0 (0.000)           0 (0.000)         1",
        "Vietnamese             2 (1.500)           0 (0.000)           0 (0.000)           2 (1.500)         0",
        "unknown                0 (0.000)           1 (0.001)           0 (0.000)           1 (0.001)         1",
        "all                    4 (1.502)           1 (0.001)           1 (0.000)           6 (1.503)         3",
    ]
    assert lines[6:12] == [
        "",
        "seconds       shortest       5 %    median      95 %   longest",
        "English           1.50      1.60      2.50      3.40      3.50",
        "Vietnamese     1800.00   1890.00   2700.00   3510.00   3600.00",
        "unknown           5.00      5.00      5.00      5.00      5.00",
        f"{'all':<12}{1.5:>10.2f}{1.75:>10.2f}{4.25:>10.2f}{3150:>10.2f}{3600:>10.2f}",
    ]
    assert lines[-5:] == [
        "",
        "rejected: too short: 2",
        "  German 1, unknown 1",
        "rejected: truncated: 1",
        "  English 1",
    ]


def test_the_longest_bar_of_the_text_stands_for_the_fullest_bin_and_the_emptiest_is_seen():
    lines = table_lines(count(Rows([(1.55, "Thai", "train")] * 1000 + [(22.5, "Thai", "train")])), [])

    bars = [line.split("  ", 1) for line in lines if "#" in line]
    assert [(label, bar.strip()) for label, bar in bars] == [
        ("1.5 - 1.6", f"1000  {'#' * 50}"),
        ("2.9 and more", "1  #"),
    ]


def test_columns_grow_with_their_numbers_instead_of_touching():
    stats = count(Rows([(3600.0 * 12345678, "Thai", "train")]))

    header, row = table_lines(stats, [])[:2]

    assert row.split() == ["Thai", "1", "(12345678.000)", "0", "(0.000)", "0", "(0.000)", "1", "(12345678.000)", "0"]
    assert len(header) == len(row)


def test_a_corpus_of_which_nothing_is_left_has_a_table_too(tmp_path):
    stats = count(Rows([]))

    draw(stats, tmp_path / "stats.png")

    lines = table_lines(stats, [{"language": "Thai", "reason": "empty: no samples"}])
    assert lines[1].split() == ["Thai", *["0", "(0.000)"] * 4, "1"]
    assert lines[2:] == ["", "rejected: empty: 1", "  Thai 1"]
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_all_languages_shows_each_of_them_and_is_the_same_again(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self) or save(self, *args, **kwargs)
    )
    names = [*LANGUAGES, None]
    stats = count(Rows([(1.0 + number, names[number % 31], ("train", "test")[number % 2]) for number in range(310)]))

    draw(stats, tmp_path / "first.png")
    draw(stats, tmp_path / "second.png")

    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    bars, spread, histogram = drawn[0].axes
    labels = [label.get_text() for label in bars.get_yticklabels()]
    totals = dict(zip(stats.languages, stats.seconds_LS.sum(axis=1).tolist(), strict=True))
    assert set(labels) == {*LANGUAGES, "unknown"}
    assert [totals[label] for label in labels] == sorted(totals.values())  # the first is at the bottom
    assert sum(bar.get_width() for bar in bars.patches) == pytest.approx(sum(totals.values()) / 60)
    ends = {bar.get_y(): bar.get_x() + bar.get_width() for bar in bars.patches}  # of the last split of a language
    assert [end * 60 for _, end in sorted(ends.items())] == pytest.approx([totals[label] for label in labels])
    assert bars.get_xlabel() == "minutes"
    assert sum(bar.get_height() for bar in histogram.patches) == 310
    assert spread.get_xlabel() == histogram.get_xlabel() == "seconds"
    hours = sum(totals.values()) / 3600
    assert drawn[0].get_suptitle() == f"{hours:.3g} hours of speech in 310 utterances, 30 languages"


def test_pyplot_and_its_global_state_are_left_alone(tmp_path):
    sys.modules.pop("matplotlib.pyplot", None)

    draw(count(FEW), tmp_path / "stats.png")

    assert "matplotlib.pyplot" not in sys.modules


def test_a_picture_without_matplotlib_names_what_to_install(tmp_path, monkeypatch):
    check_that_matplotlib_is_named(lambda path: draw(count(FEW), path), tmp_path / "stats.png", monkeypatch)


def test_a_picture_that_cannot_be_written_leaves_the_one_before(tmp_path):
    check_that_it_must_be_writable(lambda path: draw(count(FEW), path), tmp_path / "file" / "stats.png")
