from pathlib import Path
from typing import Any

import pytest

from qad_dist.text.label_picture import draw_report
from qad_dist.text.label_report import LabelReport
from shards.languages import LANGUAGES
from shards.schema import PseudoLabel
from shards.verdicts import Verdict
from tests.helpers.pictures import check_that_it_must_be_writable, check_that_matplotlib_is_named

VERDICTS = [
    Verdict(use="all"),
    Verdict(use="all"),
    Verdict(use="kl_only", reasons=("language",)),
    Verdict(use="nothing", reasons=("loop", "rate")),
]


def summary_of(num_labels: int) -> dict[str, Any]:
    """Of all languages and an unknown one, more of the later ones."""
    names = [*LANGUAGES, None]
    report = LabelReport()
    for number in range(num_labels):
        label = PseudoLabel(
            key=f"k{number}",
            token_ids=(1,),
            text="ok",
            language=None,
            token_logprobs=(-0.5,),
            mean_logprob=-0.5,
            ended_by="end_token",
            duration_seconds=60.0 + number % len(names),
        )
        report.add([label], [VERDICTS[number % len(VERDICTS)]], [names[number % len(names)]])
    return report.summary()


def test_bars_show_the_hours_of_each_use_in_each_language(tmp_path: Path, drawn: list[Any]) -> None:
    summary = summary_of(341)

    draw_report(summary, tmp_path / "accept.png")

    bars, _ = drawn[0].axes
    languages = summary["languages"]
    labels = [label.get_text() for label in bars.get_yticklabels()]
    assert set(labels) == {*LANGUAGES, "unknown"}
    hours = [languages[label]["hours"] for label in labels]
    assert hours == sorted(hours)  # the first is at the bottom
    widths = [[bar.get_width() for bar in container] for container in bars.containers]
    for use, of_use in zip(("all", "kl_only", "nothing"), widths, strict=True):
        assert of_use == pytest.approx([languages[label]["use"][use]["hours"] * 60 for label in labels])
    assert bars.get_xlabel() == "minutes"
    ends = [bar.get_x() + bar.get_width() for bar in bars.containers[-1]]
    assert ends == pytest.approx([hour * 60 for hour in hours])


def test_cells_show_the_share_of_each_reason_in_each_language(tmp_path: Path, drawn: list[Any]) -> None:
    summary = summary_of(341)

    draw_report(summary, tmp_path / "accept.png")

    bars, cells = drawn[0].axes
    labels = [label.get_text() for label in bars.get_yticklabels()]
    reasons = [label.get_text() for label in cells.get_xticklabels()]
    assert reasons == ["loop", "rate", "language"]
    shown = {(labels[round(text.xy[1])], reasons[round(text.xy[0])]): text.get_text() for text in cells.texts}
    expected = {
        (name, reason): f"{100 * amount['utterances'] / group['utterances']:.0f}"
        for name, group in summary["languages"].items()
        for reason, amount in group["reasons"].items()
    }
    assert shown == expected
    assert len(cells.patches) == len(expected)


def test_the_title_tells_what_is_kept(tmp_path: Path, drawn: list[Any]) -> None:
    draw_report(summary_of(4), tmp_path / "accept.png")

    # Of 60, 61, 62 and 63 s the last is dropped.
    assert drawn[0].get_suptitle() == "4.1 minutes of labelled speech, 74.4 % of it kept"


def test_the_same_report_gives_the_same_picture(tmp_path: Path) -> None:
    for name in ("first.png", "second.png"):
        draw_report(summary_of(100), tmp_path / name)

    first = (tmp_path / "first.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert first == (tmp_path / "second.png").read_bytes()


def test_a_report_on_nothing_has_a_picture_too(tmp_path: Path) -> None:
    draw_report(LabelReport().summary(), tmp_path / "accept.png")

    assert (tmp_path / "accept.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_matplotlib_is_named(lambda path: draw_report(summary_of(4), path), tmp_path / "accept.png", monkeypatch)


def test_a_picture_that_cannot_be_written_is_an_error_of_the_stage(tmp_path: Path) -> None:
    check_that_it_must_be_writable(lambda path: draw_report(summary_of(4), path), tmp_path / "file" / "accept.png")
