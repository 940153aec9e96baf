"""The course of training as a picture: which numbers it shows, and where."""

import struct
from pathlib import Path
from typing import Any

import pytest

from qad_dist.text.loss_picture import draw_losses
from tests.helpers.pictures import check_that_it_must_be_writable, check_that_matplotlib_is_named

TRAINING = {"ce": 0.2, "agreement": 0.9, "tokens_per_second": 1e4, "seconds_per_step": 0.5, "skipped": 0}
HELDOUT = {"heldout_agreement": 0.99, "heldout_ce_per_token": 0.1}


def training_line(step: int, kl: float) -> dict[str, Any]:
    """A loss that is no KL, and a rate and a norm that tell the step."""
    return {"step": step, "loss": kl + 1, "kl": kl, "lr": step * 1e-6, "gradient_norm": 2.0**step, **TRAINING}


def heldout_line(step: int, kl: float, **words: float) -> dict[str, Any]:
    return {"step": step, "heldout_kl_per_token": kl, **HELDOUT, **words}


LINES = [
    heldout_line(0, 8e-4),
    training_line(2, 9e-4),
    training_line(4, 6e-4),
    heldout_line(4, 3e-4),
    training_line(6, 5e-4),
    heldout_line(6, 4e-4),
]


def curves_of(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """The points of each curve, by its name."""
    return {
        curve.get_label(): list(zip(curve.get_xdata().tolist(), curve.get_ydata().tolist(), strict=True))
        for curve in axes.lines
    }


def close_to(points: list[tuple[float, float]]) -> list[Any]:
    return [pytest.approx(point) for point in points]


def test_kl_of_both_splits_stands_over_the_steps_and_the_best_is_marked(tmp_path: Path, drawn: list[Any]) -> None:
    """In 1e-6 nats, equal lengths for equal factors."""
    draw_losses(LINES, tmp_path / "loss.png")

    kl = drawn[0].axes[0]
    curves = curves_of(kl)
    assert list(curves) == ["training", "held-out split", "best: step 4"]
    assert curves["training"] == close_to([(2, 900), (4, 600), (6, 500)])
    assert curves["held-out split"] == close_to([(0, 800), (4, 300), (6, 400)])
    assert curves["best: step 4"] == close_to([(4, 300)])
    assert [text.get_text() for text in kl.get_legend().get_texts()] == list(curves)
    assert kl.get_yscale() == "log"
    assert "1e-6 nats" in kl.get_ylabel()
    assert drawn[0].get_suptitle() == "KL to the teacher on the held-out split: 800 at first, 300 at best"
    low, high = kl.get_xlim()
    assert low < 0 < 6 < high


def test_learning_rate_and_gradient_norm_stand_below_on_the_same_steps(tmp_path: Path, drawn: list[Any]) -> None:
    draw_losses(LINES, tmp_path / "loss.png")

    kl, rate, norm = drawn[0].axes
    (rates,), (norms,) = curves_of(rate).values(), curves_of(norm).values()
    assert rate.get_ylabel() == "learning rate, 1e-6"
    assert rates == close_to([(2, 2), (4, 4), (6, 6)])
    assert norm.get_ylabel() == "gradient norm"
    assert norms == close_to([(2, 4), (4, 16), (6, 64)])
    assert norm.get_yscale() == "log"
    assert kl.get_xlim() == rate.get_xlim() == norm.get_xlim()


def test_word_errors_have_a_panel_where_they_were_counted(tmp_path: Path, drawn: list[Any]) -> None:
    """In percent; not every evaluation counts them."""
    lines = [heldout_line(0, 8e-4, heldout_word_error_rate=0.061), *LINES[1:], heldout_line(8, 5e-4)]
    lines.append(heldout_line(9, 5e-4, heldout_word_error_rate=0.052))

    draw_losses(lines, tmp_path / "loss.png")

    assert len(drawn[0].axes) == 4
    (errors,) = curves_of(drawn[0].axes[1]).values()
    assert errors == close_to([(0, 6.1), (9, 5.2)])
    assert drawn[0].axes[1].get_ylabel() == "held-out\nword errors, %"


def test_long_curve_comes_with_its_mean(tmp_path: Path, drawn: list[Any]) -> None:
    """Of 120 values in turn 1e-4 and 3e-4, any 3 of which have a mean of 5/3 or 7/3, at the one in the middle."""
    draw_losses([training_line(step, 1e-4 if step % 2 else 3e-4) for step in range(120)], tmp_path / "loss.png")

    curves = curves_of(drawn[0].axes[0])
    assert len(curves["training"]) == 120
    means = curves["training, mean of 3 values"]
    assert means[:2] == close_to([(1, 700 / 3), (2, 500 / 3)])
    assert means[-1] == pytest.approx((118, 500 / 3))


@pytest.mark.parametrize(
    "lines",
    [
        [],
        LINES[:1],
        LINES[1:2],
        [training_line(1, 0.0), heldout_line(1, 0.0)],
        [heldout_line(1, -1e-12)],
        [{"step": 3}],
    ],
    ids=["none", "one held out", "one of training", "no distance", "rounding", "no values"],
)
def test_few_lines_and_no_distance_have_a_picture_too(
    tmp_path: Path, lines: list[dict[str, Any]], recwarn: pytest.WarningsRecorder
) -> None:
    draw_losses(lines, tmp_path / "loss.png")

    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not [str(warning.message) for warning in recwarn]


def test_equal_lines_give_equal_bytes_of_the_size_of_the_figure(tmp_path: Path, drawn: list[Any]) -> None:
    for name in ("first.png", "second.png"):
        draw_losses(LINES, tmp_path / name)

    first, second = ((tmp_path / name).read_bytes() for name in ("first.png", "second.png"))
    assert first == second
    width, height = struct.unpack(">II", first[16:24])  # of the header, as PNG says
    assert (width, height) == (1350, 1050)
    assert drawn[0].get_size_inches() == pytest.approx([width / 150, height / 150])


def test_a_picture_without_matplotlib_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_matplotlib_is_named(lambda path: draw_losses(LINES, path), tmp_path / "loss.png", monkeypatch)


def test_a_picture_that_cannot_be_written_is_an_error_of_the_stage(tmp_path: Path) -> None:
    check_that_it_must_be_writable(lambda path: draw_losses(LINES, path), tmp_path / "file" / "loss.png")
