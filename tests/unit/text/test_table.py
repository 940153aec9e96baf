import re
from typing import Any

import pytest

from qad_dist.text.table import score_markdown, score_summary, score_table

LANGUAGES = [
    *("Chinese", "English", "Cantonese", "Arabic", "German", "French", "Spanish", "Portuguese"),
    *("Indonesian", "Italian", "Korean", "Russian", "Thai", "Vietnamese", "Japanese", "Turkish"),
    *("Hindi", "Malay", "Dutch", "Swedish", "Danish", "Finnish", "Polish", "Czech"),
    *("Filipino", "Persian", "Greek", "Romanian", "Hungarian"),
]


def row(*, errors: int, tokens: int = 200, kl: float | None = None, unit: str = "WER") -> dict[str, Any]:
    return {
        "unit": unit,
        "substitutions": errors,
        "deletions": 0,
        "insertions": 0,
        "reference_tokens": tokens,
        "error_rate": errors / tokens if tokens else None,
        "utterances": 10,
        "kl_per_token": kl,
        "agreement": None if kl is None else 0.9875,
        "response_tokens": 300,
        "language_accuracy": 0.97,
        "runaway": 0,
    }


def system(*, kl: float | None, overall: int, **errors: int) -> dict[str, Any]:
    return {
        "path": "somewhere",
        "disk_bytes": 3_625_112,
        "served_bytes": None if kl is None else 2_100_000,
        "overall": row(errors=overall, tokens=373, kl=kl, unit="WER/CER"),
        "languages": {
            name: row(errors=count, kl=kl, unit="CER" if name == "Thai" else "WER") for name, count in errors.items()
        },
    }


def score(**systems: dict[str, Any]) -> dict[str, Any]:
    return {
        "normalizer": "norm_v0",
        "dtype": "float32",
        "audio_attention": "windowed",
        "num_utterances": 65,
        "audio_hours": 0.0512,
        "systems": systems,
    }


def three_systems() -> dict[str, Any]:
    # As read back from score.json: names sorted.
    return score(
        ptq=system(kl=0.004, overall=213, English=40, Thai=9),
        qad=system(kl=0.001, overall=215, English=8, Thai=30),
        teacher=system(kl=None, overall=215, English=30, Thai=10),
    )


def cells(text: str, first: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(first))
    return [cell.strip() for cell in line.split("|")]


def test_table_shows_rates_in_percent_and_kl_for_students_only() -> None:
    text = score_table(three_systems())

    assert cells(text, "language") == [
        *("language", "rate", "tokens", "teacher %", "ptq %", "ptq KL", "qad %", "qad KL")
    ]
    assert cells(text, "English") == ["English", "WER", "200", "15.00", "20.00", "0.00400", "4.00", "0.00100"]
    assert cells(text, "overall") == ["overall", "WER/CER", "373", "57.64", "57.10", "0.00400", "57.64", "0.00100"]


def test_table_marks_the_worst_language_of_the_student_not_of_the_teacher() -> None:
    text = score_table(three_systems())

    assert cells(text, "Thai")[:2] == ["Thai <", "CER"]
    assert "< marks qad's highest error rate: Thai." in text


def test_system_table_shows_agreement_and_sizes() -> None:
    text = score_table(three_systems())

    assert cells(text, "teacher") == ["teacher", "57.64", "215", "-", "-", "97.00", "0", "3.6", "-"]
    assert cells(text, "qad") == ["qad", "57.64", "215", "0.00100", "98.75", "97.00", "0", "3.6", "2.1"]


def test_findings_state_differences_and_claim_nothing_more() -> None:
    text = score_table(three_systems())

    assert "QAD removed 75.0 % of PTQ's KL to the teacher: 0.00400 to 0.00100 nats per token." in text
    assert "Errors out of 373 reference tokens: teacher 215; against it, ptq makes 2 fewer, qad makes as many." in text
    assert "significan" not in text


def test_findings_admit_that_qad_made_the_kl_worse() -> None:
    text = score_table(score(ptq=system(kl=0.004, overall=1), qad=system(kl=0.005, overall=1)))

    assert "QAD raised PTQ's KL to the teacher by 25.0 %: 0.00400 to 0.00500 nats per token." in text


@pytest.mark.parametrize("num_others", [0, 1, 2, 6])
def test_29_languages_fit_100_columns_and_no_value_is_folded(num_others: int) -> None:
    errors = {name: 200 + number for number, name in enumerate(LANGUAGES)}  # rates above 100 % are the widest
    others = {f"a-rather-long-system-name-{i}": system(kl=0.0123, overall=1, **errors) for i in range(num_others)}
    systems = {name: system(kl=kl, overall=1, **errors) for name, kl in (("teacher", None), ("ptq", 0.1), ("qad", 0.1))}

    text = score_table(score(**systems, **others))

    tables = [line for line in text.splitlines() if "|" in line]
    assert max(map(len, tables)) <= 100
    assert cells(text, "qad")[-2:] == ["3.6", "2.1"]
    shown = [line.split()[0] for line in text.splitlines() if re.match(r"[A-Z]\w+ <? *\|", line)]
    assert shown == LANGUAGES * (1 + max(0, num_others + 2) // 4)
    assert cells(text.split("system")[0].split("\n\n")[1], "Hungarian")[3:5] == ["114.00", "114.00"]


def test_text_is_plain_ascii_even_when_colours_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")

    text = score_table(three_systems())

    assert text.isascii()
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) > 70


def test_table_of_one_system_and_one_language_marks_nothing() -> None:
    text = score_table(score(teacher=system(kl=None, overall=215, English=30)))

    assert cells(text, "English") == ["English", "WER", "200", "15.00"]
    assert "<" not in text


def test_a_rate_that_does_not_exist_is_a_dash() -> None:
    only = system(kl=None, overall=0, English=0)
    only["overall"]["error_rate"] = None

    assert cells(score_table(score(teacher=only)), "overall")[3] == "-"


def test_markdown_holds_the_same_cells_as_the_text() -> None:
    lines = score_markdown(three_systems()).splitlines()

    assert "| language | rate | tokens | teacher % | ptq % | ptq KL | qad % | qad KL |" in lines
    assert "|---|---:|---:|---:|---:|---:|---:|---:|" in lines
    assert "| English | WER | 200 | 15.00 | 20.00 | 0.00400 | 4.00 | 0.00100 |" in lines
    assert (
        "| **overall** | **WER/CER** | **373** | **57.64** | **57.10** | **0.00400** | **57.64** | **0.00100** |"
        in lines
    )
    assert "- QAD removed 75.0 % of PTQ's KL to the teacher: 0.00400 to 0.00100 nats per token." in lines


def test_summary_has_a_line_for_each_system_and_none_for_languages() -> None:
    text = score_summary(three_systems())

    assert cells(text, "teacher")[1:3] == cells(score_table(three_systems()), "teacher")[1:3]
    assert [line.split()[0] for line in text.splitlines() if " | " in line] == ["system", "teacher", "ptq", "qad"]
