import json
import random
import re
from typing import Any

import pytest

from qad_dist.text.grid import WIDTH
from qad_dist.text.label_report import LONGEST_EXAMPLE, LabelReport, report_markdown, report_text
from shards.languages import LANGUAGES
from shards.schema import PseudoLabel
from shards.verdicts import Verdict

Row = tuple[PseudoLabel, Verdict, str | None]


def row(
    key: str,
    seconds: float,
    use: str,
    *reasons: str,
    language: str | None = "Thai",
    heard: str | None = "Thai",
    text: str = "ok",
    error: str | None = None,
) -> Row:
    label = PseudoLabel(
        key=key,
        token_ids=() if error else (1, 2),
        text=text,
        language=heard,
        token_logprobs=() if error else (-0.25, -0.5),
        mean_logprob=None if error else -0.375,
        ended_by="unreadable" if error else "end_token",
        duration_seconds=seconds,
        error=error,
    )
    return label, Verdict(use=use, reasons=reasons), language


FEW = [
    row("a", 3600, "all"),
    row("b", 1800, "nothing", "loop", "rate"),
    row("c", 900, "kl_only", "language", heard="Greek"),
    row("d", 1800, "all", language=None, heard="Greek"),
    row("e", 360, "nothing", "rate", language=None, heard="Greek"),
    row("f", 36, "nothing", "no_text", language=None, heard=None, text=""),
]


def summary_of(*shards: list[Row]) -> dict[str, Any]:
    report = LabelReport()
    for rows in shards:
        report.add(*zip(*rows, strict=True))
    return report.summary()


def amount(utterances: int, hours: float) -> dict[str, Any]:
    return {"utterances": utterances, "hours": pytest.approx(hours, abs=1e-12)}


def test_utterances_and_hours_are_counted_by_language_use_and_reason() -> None:
    summary = summary_of(FEW)

    assert list(summary["languages"]) == ["Greek", "Thai", "unknown"]
    thai, greek = summary["languages"]["Thai"], summary["languages"]["Greek"]
    assert (thai["utterances"], thai["hours"]) == (3, 1.75)
    assert thai["use"] == {"all": amount(1, 1), "kl_only": amount(1, 0.25), "nothing": amount(1, 0.5)}
    assert thai["reasons"] == {
        "loop": amount(1, 0.5) | {"alone": 0},
        "rate": amount(1, 0.5) | {"alone": 0},
        "language": amount(1, 0.25) | {"alone": 1},
    }
    assert greek["use"] == {"all": amount(1, 0.5), "kl_only": amount(0, 0), "nothing": amount(1, 0.1)}
    assert greek["reasons"] == {"rate": amount(1, 0.1) | {"alone": 1}}
    assert (summary["utterances"], summary["hours"]) == (6, pytest.approx(2.36))
    assert summary["use"]["nothing"] == amount(3, 0.61)
    assert summary["reasons"]["rate"] == amount(2, 0.6) | {"alone": 1}


def test_reasons_stand_in_the_order_of_the_filters() -> None:
    assert list(summary_of(FEW)["reasons"]) == ["no_text", "loop", "rate", "language"]


def test_the_report_does_not_depend_on_the_order_of_shards_and_labels() -> None:
    rng = random.Random(0)
    rows = [
        row(f"k{number}", rng.randrange(1600, 480_000) / 16_000, *rng.choice([["all"], ["nothing", "loop"]]))
        for number in range(500)
    ]
    shuffled = rng.sample(rows, len(rows))

    one, other = summary_of(rows), summary_of(shuffled[:7], shuffled[7:300], shuffled[300:])

    assert json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def test_examples_are_three_of_each_reason_chosen_without_regard_to_their_place() -> None:
    rows = [row(f"k{number}", 2, "nothing", "loop", text=f"text {number}") for number in range(300)]
    rows += [row("other", 3, "nothing", "rate")]

    examples = summary_of(rows)["examples"]

    assert {reason: len(found) for reason, found in examples.items()} == {"loop": 3, "rate": 1}
    numbers = [int(example["key"][1:]) for example in examples["loop"]]
    assert numbers != [0, 1, 2]
    assert [example["text"] for example in examples["loop"]] == [f"text {number}" for number in numbers]
    assert examples["rate"] == [
        {"key": "other", "language": "Thai", "text": "ok", "duration_seconds": 3, "mean_logprob": -0.375}
    ]


def test_examples_are_short_and_harmless() -> None:
    text = "a\u202e\x1b[2J|`b`\n" * 100

    examples = summary_of([row("a", 2, "nothing", "loop", text=text)])["examples"]["loop"]

    assert examples[0]["text"] == ("a[2J|`b` " * 100)[: LONGEST_EXAMPLE - 1].rstrip() + "…"


def test_the_example_of_what_cannot_be_read_tells_why() -> None:
    summary = summary_of([row("a", 2, "nothing", "unreadable", heard=None, text="", error="bad | frame")])

    assert summary["examples"]["unreadable"][0]["error"] == "bad | frame"
    assert r"| a | None | 2.00 |  | bad \| frame |" in report_markdown(summary)


def test_memory_does_not_grow_with_the_number_of_labels() -> None:
    report = LabelReport()

    for number in range(2000):
        report.add(*zip(row(f"k{number}", 1, "nothing", "loop", "rate"), strict=True))

    held = [label for examples in report._examples.values() for _, label in examples]
    assert len(held) == 6
    assert report.summary()["utterances"] == 2000


def test_text_tells_what_is_kept_of_each_language_and_why_not() -> None:
    text = report_text(summary_of(FEW))

    lines = [re.sub(r"\s*\|\s*", "|", line) for line in text.splitlines()]
    assert lines[0] == "6 labels, 2.36 hours: 63.56 % used, 10.59 % only for KL, 25.85 % dropped."
    assert "language|utterances|KL only|dropped|hours|KL only h|dropped h|kept %" in lines
    assert "Thai|3|1|1|1.75|0.25|0.50|71.43" in lines
    assert "all|6|1|3|2.36|0.25|0.61|74.15" in lines
    assert "rate|2|1|0.60|33.33|Greek 1, Thai 1" in lines
    assert "Thai|||33.33|33.33|33.33" not in lines
    assert "% of language|no_text|loop|rate|language" in lines
    assert "Thai||33.33|33.33|33.33" in lines
    assert "unknown|100.00|||" in [line.rstrip() for line in lines]


def test_text_is_ascii_of_limited_width_for_all_languages() -> None:
    reasons = ("runaway", "loop", "rate", "script", "language", "confidence", "reference")
    rows = [
        row(f"k{number}", 30.0, "nothing", *reasons, language=LANGUAGES[number % 30], text="ไทย" * 50)
        for number in range(3000)
    ]

    text = report_text(summary_of(rows))

    assert text.isascii()
    assert max(map(len, text.splitlines())) <= WIDTH
    assert all(f"\n{language} " in text for language in LANGUAGES)
    assert "27 more" in re.sub(r"[\s|]+", " ", text)


def test_markdown_has_a_section_for_each_reason() -> None:
    markdown = report_markdown(summary_of(FEW))

    assert re.findall(r"^#+ .*", markdown, re.MULTILINE) == [
        "# Accepted labels",
        "## Examples",
        "### no_text",
        "### loop",
        "### rate",
        "### language",
    ]
    assert "| b | Thai | 1800.00 | -0.375 | ok |" in markdown
    for table in re.findall(r"(?:^\|.*\n?)+", markdown, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_markdown_cannot_be_broken_by_a_text() -> None:
    text = "x |\n| y | <script> | [z](http://w) ` _"

    markdown = report_markdown(summary_of([row("a", 1, "nothing", "loop", text=text)]))

    assert r"x \| \| y \| \<script\> \| \[z\]\(http\:\/\/w\) \` \_ |" in markdown


def test_without_objections_there_are_no_reasons_to_show() -> None:
    summary = summary_of([row("a", 3600, "all")])

    assert "No filter objects to anything." in report_text(summary)
    assert "## Examples" not in report_markdown(summary)
    assert "| **all** | **1** | **0** | **0** | **1.00** | **0.00** | **0.00** | **100.00** |" in report_markdown(
        summary
    )


def test_a_report_on_nothing_has_no_tables() -> None:
    summary = LabelReport().summary()

    assert report_text(summary).startswith("0 labels, 0.00 hours.\n")
    assert "|" not in report_text(summary) + report_markdown(summary)


def test_a_summary_that_was_written_and_read_gives_the_same_tables() -> None:
    summary = summary_of(FEW)

    again = json.loads(json.dumps(summary, sort_keys=True))

    assert report_text(again) == report_text(summary)
    assert report_markdown(again) == report_markdown(summary)
