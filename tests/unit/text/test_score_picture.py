"""The picture of a score: which marks stand where, for any number of languages, systems and sections."""

import random
import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qad_dist.text.score_picture import draw_scores
from shards.languages import LANGUAGES
from tests.helpers.pictures import check_that_it_must_be_writable, check_that_matplotlib_is_named


def row(rate: float | None, interval: list[float] | None = None, *, unit: str = "WER") -> dict[str, Any]:
    return {"unit": unit, "error_rate": rate, "interval": interval, "reference_tokens": 100}


def section_of(
    systems: dict[str, dict[str, Any]], *, utterances: int = 232, attention: str = "windowed"
) -> dict[str, Any]:
    """Of rows by system and language, one of which is ``overall``."""
    return {
        "audio_attention": attention,
        "num_utterances": utterances,
        "systems": {
            name: {"overall": rows["overall"], "languages": {k: v for k, v in rows.items() if k != "overall"}}
            for name, rows in systems.items()
        },
    }


def score_of(**sections: dict[str, Any]) -> dict[str, Any]:
    return {"normalizer": "norm_v1", "sections": sections}


# Sorted by name, as files are.
SYSTEMS = {
    "ptq": {
        "English": row(0.06, [0.05, 0.08]),
        "German": row(0.20, [0.1, 0.3]),
        "Thai": row(0.10, unit="CER"),
        "overall": row(0.09, [0.08, 0.1], unit="WER/CER"),
    },
    "qad": {
        "English": row(0.05, [0.04, 0.07]),
        "German": row(None),
        "Thai": row(0.15, [0.12, 0.18], unit="CER"),
        "overall": row(0.07, [0.06, 0.09], unit="WER/CER"),
    },
    "teacher": {
        "English": row(0.03, [0.02, 0.04]),
        "German": row(0.30, [0.2, 0.4]),
        "Thai": row(0.04, unit="CER"),
        "overall": row(0.04, None, unit="WER/CER"),
    },
}
SCORE = score_of(own=section_of(SYSTEMS))
ROWS = ["Thai (CER)", "English (WER)", "German (WER)", "overall (WER/CER)"]


def random_score(*, languages: int, systems: int, sections: int) -> dict[str, Any]:
    generator = random.Random(3)

    def some_row() -> dict[str, Any]:
        rate = generator.uniform(0.02, 0.3)
        return row(rate, [rate * 0.8, rate * 1.3])

    names = ["teacher", "ptq", "qad", "a", "b", "c", "d", "_e"][:systems]
    return score_of(
        **{
            f"set-{number}": section_of(
                {name: {language: some_row() for language in [*LANGUAGES[:languages], "overall"]} for name in names}
            )
            for number in range(sections)
        }
    )


def panels_of(figure: Any) -> list[Any]:
    """All but the axes of the legend, from the upper left, column by column."""
    return [axes for axes in figure.axes if axes.axison]


def labels_of(axes: Any) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def row_of(axes: Any, height: float) -> str:
    """The row at whose name a mark is closest."""
    return labels_of(axes)[int(np.abs(axes.get_yticks() - height).argmin())]


def legend_of(figure: Any) -> dict[str, tuple[Any, Any]]:
    """Color and marker by the name that the reader sees."""
    legend = figure.axes[0].get_legend()
    lines = zip(legend.get_texts(), legend.get_lines(), strict=True)
    return {text.get_text(): (line.get_color(), line.get_marker()) for text, line in lines}


def marks_of(figure: Any, axes: Any) -> dict[tuple[str, str], float]:
    """By row and by system, as its color and marker are told in the legend."""
    systems = {style: name for name, style in legend_of(figure).items()}
    found: dict[tuple[str, str], float] = {}
    for line in axes.lines:
        if (style := (line.get_color(), line.get_marker())) in systems:
            for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True):
                found[row_of(axes, y), systems[style]] = float(x)
    return found


def whiskers_of(figure: Any, axes: Any) -> dict[tuple[str, str], list[float]]:
    from matplotlib.colors import to_rgba

    systems = {to_rgba(color): name for name, (color, _) in legend_of(figure).items()}
    return {
        (row_of(axes, start[1]), systems[tuple(lines.get_edgecolor()[0])]): [float(start[0]), float(end[0])]
        for lines in axes.collections
        for start, end in lines.get_segments()
    }


def test_marks_and_whiskers_stand_at_the_rates_and_intervals_in_percent(tmp_path: Path, drawn: list[Any]) -> None:
    """Without a rate no mark, without an interval no whisker."""
    draw_scores(SCORE, tmp_path / "score.png")

    (axes,) = panels_of(drawn[0])
    rows = {label.partition(" ")[0]: label for label in ROWS}
    told = {(rows[name], system): one for system, by_name in SYSTEMS.items() for name, one in by_name.items()}
    rates = {place: 100 * one["error_rate"] for place, one in told.items() if one["error_rate"] is not None}
    assert marks_of(drawn[0], axes) == pytest.approx(rates)
    assert len(rates) == 11
    whiskers = whiskers_of(drawn[0], axes)
    expected = {place: [100 * end for end in one["interval"]] for place, one in told.items() if one["interval"]}
    assert whiskers == {place: pytest.approx(ends) for place, ends in expected.items()}
    assert axes.get_xlabel() == "error rate, %"
    low, high = axes.get_xlim()
    assert low == 0
    assert high > 40  # the longest whisker


def test_rows_go_from_the_worst_language_of_the_student_to_all_of_them(tmp_path: Path, drawn: list[Any]) -> None:
    draw_scores(SCORE, tmp_path / "score.png")

    (axes,) = panels_of(drawn[0])
    assert labels_of(axes) == ROWS
    bottom, top = axes.get_ylim()
    ticks = axes.get_yticks().tolist()
    assert top < ticks[0] < ticks[-1] < bottom
    first, second, third, overall = ticks
    assert second - first == third - second == 1
    assert overall - third == 1.5  # apart


@pytest.mark.parametrize(
    ("systems", "order"),
    [
        (["teacher", "ptq", "qad"], ["Thai", "English", "German"]),
        (["teacher", "ptq"], ["German", "Thai", "English"]),
        (["teacher"], ["German", "Thai", "English"]),
        (["other", "teacher", "qad"], ["Thai", "English", "German"]),
        (["other", "another"], ["German", "Thai", "English"]),
    ],
    ids=lambda names: "+".join(names),
)
def test_the_student_is_the_last_of_teacher_ptq_and_qad(
    tmp_path: Path, drawn: list[Any], systems: list[str], order: list[str]
) -> None:
    rows = SYSTEMS | {"other": SYSTEMS["ptq"], "another": SYSTEMS["qad"]}

    draw_scores(score_of(own=section_of({name: rows[name] for name in systems})), tmp_path / "score.png")

    assert [label.partition(" ")[0] for label in labels_of(panels_of(drawn[0])[0])] == [*order, "overall"]


def test_a_language_without_a_rate_stands_below_one_without_errors(tmp_path: Path, drawn: list[Any]) -> None:
    rows = {"Arabic": row(None), "Thai": row(0.0), "overall": row(0.0)}

    draw_scores(score_of(own=section_of({"qad": rows})), tmp_path / "score.png")

    assert labels_of(panels_of(drawn[0])[0]) == ["Thai (WER)", "Arabic (WER)", "overall (WER)"]


def test_systems_of_a_row_stand_in_the_order_of_the_stages(tmp_path: Path, drawn: list[Any]) -> None:
    draw_scores(SCORE, tmp_path / "score.png")

    systems = {style: name for name, style in legend_of(drawn[0]).items()}
    heights = {
        systems[line.get_color(), line.get_marker()]: line.get_ydata()[-1]
        for line in panels_of(drawn[0])[0].lines
        if (line.get_color(), line.get_marker()) in systems
    }
    assert sorted(heights, key=lambda name: heights[name]) == ["teacher", "ptq", "qad"]  # from above


def test_systems_of_a_row_stand_below_each_other_within_it(tmp_path: Path, drawn: list[Any]) -> None:
    draw_scores(random_score(languages=4, systems=8, sections=1), tmp_path / "score.png")

    (axes,) = panels_of(drawn[0])
    heights = np.array([line.get_ydata() for line in axes.lines if len(line.get_ydata()) == 5])
    assert heights.shape == (8, 5)
    assert (np.diff(heights, axis=0) > 0.05).all()
    assert np.abs(heights - axes.get_yticks()).max() < 0.5  # in their own row
    assert list(legend_of(drawn[0])) == ["teacher", "c", "ptq", "d", "qad", "_e", "a", "b"]  # two rows, by columns


def test_each_section_has_a_panel_with_its_own_rows_and_name(tmp_path: Path, drawn: list[Any]) -> None:
    english = {name: {"English": row(0.02), "overall": row(0.02)} for name in ("teacher", "whisper", "qad")}
    score = score_of(
        own=section_of(SYSTEMS),
        clean=section_of(english, utterances=2703),
        full=section_of({"qad": {"overall": row(0.5)}}, utterances=1, attention="full"),
    )

    draw_scores(score, tmp_path / "score.png")

    panels = panels_of(drawn[0])
    assert [axes.get_title(loc="left") for axes in panels] == [
        "own: 232 utterances, audio attention windowed",
        "clean: 2,703 utterances, audio attention windowed",
        "full: 1 utterance, audio attention full",
    ]
    assert [labels_of(axes) for axes in panels] == [ROWS, ["English (WER)", "overall (WER)"], ["overall (WER)"]]
    assert list(legend_of(drawn[0])) == ["teacher", "ptq", "qad", "whisper"]
    assert marks_of(drawn[0], panels[1])["English (WER)", "whisper"] == pytest.approx(2)


def test_a_language_that_a_system_lacks_has_the_marks_of_the_others(tmp_path: Path, drawn: list[Any]) -> None:
    systems = {"qad": {"overall": row(0.1)}, "teacher": {"Greek": row(0.2), "overall": row(0.2)}}

    draw_scores(score_of(own=section_of(systems)), tmp_path / "score.png")

    (axes,) = panels_of(drawn[0])
    marks = marks_of(drawn[0], axes)
    assert set(marks) == {("Greek (WER)", "teacher"), ("overall (WER)", "teacher"), ("overall (WER)", "qad")}


def test_a_rate_far_beyond_the_others_stands_at_the_end_with_its_number(tmp_path: Path, drawn: list[Any]) -> None:
    """Of 30 rates below 12 % and one of 312 % nothing could be read on one scale."""
    rows = {name: row(0.1 + place / 1000, [0.05, 0.2]) for place, name in enumerate(LANGUAGES)}
    systems = {"teacher": rows | {"Thai": row(3.12, [1.0, 5.0]), "overall": row(0.11)}}

    draw_scores(score_of(own=section_of(systems)), tmp_path / "score.png")

    (axes,) = panels_of(drawn[0])
    end = axes.get_xlim()[1]
    assert 20 < end < 45
    assert marks_of(drawn[0], axes)["Thai (WER)", "teacher"] == end
    (told,) = axes.texts
    assert told.get_text() == "\u2192 312"
    assert row_of(axes, told.xy[1]) == "Thai (WER)"


def test_the_scale_ends_at_everything_wrong(tmp_path: Path, drawn: list[Any]) -> None:
    draw_scores(score_of(own=section_of({"ptq": {"Thai": row(1.5), "overall": row(1.5)}})), tmp_path / "score.png")

    assert panels_of(drawn[0])[0].get_xlim() == (0, 100)


def test_notes_tell_whiskers_and_normalizer(tmp_path: Path, drawn: list[Any]) -> None:
    draw_scores(SCORE, tmp_path / "score.png")
    draw_scores(score_of(own=section_of({"qad": {"overall": row(0.5)}})), tmp_path / "score.png")

    assert drawn[0].get_suptitle() == "Error rates by language"
    assert drawn[0].get_supxlabel() == "Whiskers: 95 %, bootstrap. Text: norm_v1."
    assert drawn[1].get_supxlabel() == "Text: norm_v1."  # nothing to explain


def lightness(color: str) -> float:
    """L* of CIE 1976, from 0 to 100, of an sRGB color."""
    from matplotlib.colors import to_rgb

    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ [0.2126, 0.7152, 0.0722])
    return 116 * luminance ** (1 / 3) - 16


def test_eight_systems_differ_by_marker_and_the_own_ones_also_in_grey(tmp_path: Path, drawn: list[Any]) -> None:
    draw_scores(random_score(languages=0, systems=8, sections=1), tmp_path / "score.png")

    styles = legend_of(drawn[0])
    assert len({marker for _, marker in styles.values()}) == 8
    assert len({color for color, _ in styles.values()}) == 8
    teacher, qad, ptq = (lightness(styles[name][0]) for name in ("teacher", "qad", "ptq"))
    assert teacher + 20 < qad < ptq - 20


# Severity 1.0 of Machado, Oliveira and Fernandes 2009, table 1: protanomaly, deuteranomaly, tritanomaly.
DEFICIENCIES = {
    "red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def test_colors_of_eight_systems_differ_for_who_lacks_a_kind_of_cone(tmp_path: Path, drawn: list[Any]) -> None:
    from matplotlib.colors import to_rgb

    draw_scores(random_score(languages=0, systems=8, sections=1), tmp_path / "score.png")

    colors = [to_rgb(color) for color, _ in legend_of(drawn[0]).values()]
    for matrix in DEFICIENCIES.values():
        seen = [np.clip(np.array(matrix) @ color, 0, 1) for color in colors]
        distances = [float(np.linalg.norm(one - other)) for place, one in enumerate(seen) for other in seen[:place]]
        assert min(distances) > 0.25  # black and white are 1.7 apart; what some cannot tell apart, 0.01


@pytest.mark.parametrize(("languages", "systems", "sections"), [(0, 1, 1), (1, 2, 3), (30, 2, 1), (9, 8, 3)])
def test_names_and_panels_never_overlap(
    tmp_path: Path, drawn: list[Any], languages: int, systems: int, sections: int
) -> None:
    draw_scores(random_score(languages=languages, systems=systems, sections=sections), tmp_path / "score.png")

    figure = drawn[0]
    legend, *panels = figure.axes
    assert len(panels) == sections
    boxes = [axes.get_tightbbox() for axes in panels] + [legend.get_legend().get_window_extent()]
    boxes += [text.get_window_extent() for text in figure.texts]
    boxes += [figure._suptitle.get_window_extent(), figure._supxlabel.get_window_extent()]
    distinct = {tuple(np.round(box.extents).tolist()) for box in boxes}
    for place, (left, low, right, high) in enumerate(sorted(distinct)):
        assert left >= 0
        assert low >= 0
        assert right <= figure.bbox.x1
        assert high <= figure.bbox.y1
        for other in sorted(distinct)[:place]:
            assert other[2] <= left or right <= other[0] or other[3] <= low or high <= other[1]
    for axes in panels:
        names: Sequence[Any] = [label.get_window_extent() for label in axes.get_yticklabels()]
        gaps = [upper.y0 - lower.y1 for upper, lower in pairwise(names)]
        assert min(gaps, default=9) > 3  # pixels


def test_a_picture_grows_with_its_rows_but_not_without_end(tmp_path: Path) -> None:
    sizes = []
    for languages, sections in ((2, 1), (9, 1), (9, 3)):
        draw_scores(random_score(languages=languages, systems=8, sections=sections), tmp_path / "score.png")
        sizes.append(struct.unpack(">II", (tmp_path / "score.png").read_bytes()[16:24]))  # as PNG's header says

    (width, low), (same_width, high), (wide, highest) = sizes
    assert width == same_width < wide
    assert 2 * low < high
    assert highest < 5_000


@pytest.mark.parametrize(
    "score",
    [
        score_of(),
        score_of(own=section_of({"qad": {"overall": row(None)}})),
        score_of(own=section_of({"qad": {"Thai": row(None), "overall": row(None)}})),
        score_of(own=section_of({"qad": {"Thai": row(0.0, [0.0, 0.0]), "overall": row(0.0)}})),
        score_of(own=section_of({"$a_$": {"$x$": row(0.1), "overall": row(0.1)}})),
    ],
    ids=["no sections", "nothing", "no rates", "no errors", "formulas"],
)
def test_scores_of_little_have_a_picture_too(
    tmp_path: Path, score: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    draw_scores(score, tmp_path / "score.png")

    assert (tmp_path / "score.png").read_bytes().startswith(b"\x89PNG")
    assert not [str(warning.message) for warning in recwarn]


def test_equal_scores_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("first.png", "second.png"):
        draw_scores(SCORE, tmp_path / name)

    first, second = ((tmp_path / name).read_bytes() for name in ("first.png", "second.png"))
    assert first.startswith(b"\x89PNG")
    assert first == second
    assert b"tEXt" not in first  # no dates, no versions


def test_a_picture_without_matplotlib_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_matplotlib_is_named(lambda path: draw_scores(SCORE, path), tmp_path / "score.png", monkeypatch)


def test_a_picture_that_cannot_be_written_is_an_error_of_the_stage(tmp_path: Path) -> None:
    check_that_it_must_be_writable(lambda path: draw_scores(SCORE, path), tmp_path / "file" / "score.png")
