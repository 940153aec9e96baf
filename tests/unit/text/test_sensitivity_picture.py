import math
from pathlib import Path
from typing import Any

import pytest

from qad_dist.linears import LINEARS
from qad_dist.text.sensitivity_picture import draw_sensitivity
from tests.helpers.pictures import check_that_it_must_be_writable, check_that_matplotlib_is_named

GROUPS = ("qkv", "qkv", "qkv", "o", "gate_up", "gate_up", "down")


def report_of(num_layers: int, *, kept: tuple[str, ...] = ()) -> dict[str, Any]:
    """KL that doubles from Linear to Linear; amax that tell layer and group."""
    linears: list[dict[str, Any]] = []
    for number in range(num_layers):
        for name, group in zip(LINEARS, GROUPS, strict=True):
            is_kept = f"layers.{number}.{name}" in kept
            linears.append(
                {
                    "name": f"layers.{number}.{name}",
                    "group": group,
                    "sqnr_db": None if is_kept else 40.0,
                    "kl_per_token": None if is_kept else 1e-6 * 2.0 ** len(linears),
                    "input_amax_before": 10.0 * (number + 1) + len(group),
                    "input_amax_after": 1.0 * (number + 1) + len(group) / 10,
                    "outlier_share": 0.0,
                    "is_kept": is_kept,
                }
            )
    worst = [linear["name"] for linear in linears if not linear["is_kept"]][-5:]
    return {
        "kl_per_token": 0.0052,
        "kl_unquantized": None,
        "linears": linears,
        "worst": worst[::-1],
        "kept": list(kept),
    }


def cells_of(axes: Any) -> dict[tuple[int, int], Any]:
    """By layer and place of the Linear."""
    return {
        (round(bar.get_y() + bar.get_height() / 2), round(bar.get_x() + bar.get_width() / 2)): bar
        for bar in axes.patches
    }


def redness(bar: Any) -> float:
    return 1 - bar.get_facecolor()[1]


def test_cells_are_darker_the_more_a_linear_costs(tmp_path: Path, drawn: list[Any]) -> None:
    """By equal steps for equal factors."""
    draw_sensitivity(report_of(1), tmp_path / "sensitivity.png")

    cells = cells_of(drawn[0].axes[0])
    assert list(cells) == [(0, column) for column in range(7)]
    steps = [redness(cells[0, column + 1]) - redness(cells[0, column]) for column in range(6)]
    assert steps == pytest.approx([steps[0]] * 6)
    assert steps[0] > 0.05
    assert [label.get_text() for label in drawn[0].axes[0].get_xticklabels()] == [
        *("q", "k", "v", "o", "gate", "up", "down")
    ]


def test_cells_tell_their_kl_and_the_worst_are_framed(tmp_path: Path, drawn: list[Any]) -> None:
    draw_sensitivity(report_of(2, kept=("layers.0.self_attn.o_proj",)), tmp_path / "sensitivity.png")

    axes = drawn[0].axes[0]
    told = {(text.xy[1], text.xy[0]): text.get_text() for text in axes.texts}
    assert told[0, 0] == "1.00"
    assert told[0, 3] == "kept"
    assert told[1, 6] == "8,192"
    framed = {place for place, bar in cells_of(axes).items() if bar.get_edgecolor() == (0, 0, 0, 1)}
    assert framed == {(1, column) for column in range(2, 7)}
    dashed = {place for place, bar in cells_of(axes).items() if bar.get_linestyle() == "--"}
    assert dashed == {(0, 3)}
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first layer is on top


def test_inputs_of_each_group_stand_before_and_after_smoothing(tmp_path: Path, drawn: list[Any]) -> None:
    draw_sensitivity(report_of(3), tmp_path / "sensitivity.png")

    _, *panels = drawn[0].axes
    assert [panel.get_title(loc="left") for panel in panels] == ["qkv", "o", "gate_up", "down"]
    for panel in panels:
        extra = len(panel.get_title(loc="left"))
        before, after = panel.lines
        assert list(before.get_xdata()) == [10 + extra, 20 + extra, 30 + extra]
        assert list(after.get_xdata()) == pytest.approx([1 + extra / 10, 2 + extra / 10, 3 + extra / 10])
        assert list(before.get_ydata()) == list(after.get_ydata()) == [0, 1, 2]
        assert panel.get_xscale() == "log"
        assert panel.get_xlim() == panels[0].get_xlim()
    assert drawn[0].get_suptitle() == "KL to the teacher: 0.0052 as quantized"


@pytest.mark.parametrize("kl", [0.0, -1e-12, 1e-6])
def test_linears_that_cost_nothing_or_the_same_have_a_picture_too(tmp_path: Path, drawn: list[Any], kl: float) -> None:
    report = report_of(1)
    for linear in report["linears"]:
        linear["kl_per_token"] = kl

    draw_sensitivity(report, tmp_path / "sensitivity.png")

    assert {round(redness(bar), 3) for bar in drawn[0].axes[0].patches} == {0.03}


def test_all_kept_has_a_picture_too(tmp_path: Path) -> None:
    draw_sensitivity(report_of(1, kept=tuple(f"layers.0.{name}" for name in LINEARS)), tmp_path / "sensitivity.png")

    assert (tmp_path / "sensitivity.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_report_gives_the_same_picture_whose_height_grows_with_the_layers(
    tmp_path: Path, drawn: list[Any]
) -> None:
    for name, num_layers in (("first.png", 2), ("second.png", 2), ("third.png", 14)):
        draw_sensitivity(report_of(num_layers), tmp_path / name)

    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    heights = [figure.get_size_inches()[1] for figure in drawn]
    assert math.isclose(heights[0], heights[1])
    assert heights[2] > heights[0] + 2


def test_a_picture_without_matplotlib_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_matplotlib_is_named(
        lambda path: draw_sensitivity(report_of(1), path), tmp_path / "sensitivity.png", monkeypatch
    )


def test_a_picture_that_cannot_be_written_is_an_error_of_the_stage(tmp_path: Path) -> None:
    check_that_it_must_be_writable(
        lambda path: draw_sensitivity(report_of(1), path), tmp_path / "file" / "sensitivity.png"
    )
