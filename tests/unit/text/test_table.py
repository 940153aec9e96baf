import re
from typing import Any

import pytest

from qad_dist.text.table import judged_student, score_markdown, score_summary, score_table

LANGUAGES = [
    *("Chinese", "English", "Cantonese", "Arabic", "German", "French", "Spanish", "Portuguese"),
    *("Indonesian", "Italian", "Korean", "Russian", "Thai", "Vietnamese", "Japanese", "Turkish"),
    *("Hindi", "Malay", "Dutch", "Swedish", "Danish", "Finnish", "Polish", "Czech"),
    *("Filipino", "Persian", "Greek", "Romanian", "Hungarian"),
]


def row(*, errors: int, tokens: int = 200, kl: float | None = None, unit: str = "WER") -> dict[str, Any]:
    rate = errors / tokens if tokens else None
    return {
        "unit": unit,
        "substitutions": errors,
        "deletions": 0,
        "insertions": 0,
        "reference_tokens": tokens,
        "error_rate": rate,
        "interval": None if rate is None else [rate - 0.01, rate + 0.01],
        "utterances": 10,
        "measures": {
            "norm_v1 CER": {"reference_tokens": 4 * tokens, "error_rate": None if rate is None else rate / 2},
        },
        "kl_per_token": kl,
        "agreement": None if kl is None else 0.9875,
        "response_tokens": 300,
        "language_accuracy": 0.97,
        "runaway": 0.015,
    }


def system(*, kl: float | None, overall: int, **errors: int) -> dict[str, Any]:
    return {
        "overall": row(errors=overall, tokens=373, kl=kl, unit="WER/CER"),
        "languages": {
            name: row(errors=count, kl=kl, unit="CER" if name == "Thai" else "WER") for name, count in errors.items()
        },
    }


def section(systems: dict[str, dict[str, Any]], **facts: Any) -> dict[str, Any]:
    languages = next(iter(systems.values()))["languages"]
    pair = {
        "first": "teacher",
        "second": "ptq",
        "difference": {"low": -0.02, "value": -0.0125, "high": 0.00001},
        "p_value": 0.0312,
        "p_adjusted": 0.0936,
        "words_to_see": 12_345,
    }
    against = {"difference": pair["difference"], "verdict": "not inferior"}
    told = {
        "pairs": [pair] if "ptq" in systems else [],
        "sentences": ["What this says."],
        "non_inferiority": {"ptq": against, "qad": {**against, "difference": None}} if "ptq" in systems else {},
        "margin": 0.1,
        "num_clusters": 12,
        "is_by_speaker": True,
        "reference_tokens": 200,
    }
    return {
        "audio_attention": "windowed",
        "num_utterances": 65,
        "num_in_all": 65,
        "num_references": 65,
        "num_rejected": 0,
        "audio_hours": 0.0512,
        "systems": systems,
        "significance": {"overall": told, "languages": dict.fromkeys(languages, told)},
        **facts,
    }


def score(**systems: dict[str, Any]) -> dict[str, Any]:
    return {
        "normalizer": "norm_v1",
        "dtype": "float32",
        "arithmetic": "fake_quant",
        "decoding": {
            "language": "auto",
            "context": "",
            "batch_audio_seconds": 160.0,
            "slots": 128,
            "max_response_tokens": 448,
        },
        "sections": {"own": section(systems)},
        "systems": {
            name: {"path": "x", "disk_bytes": 3_625_112, "served_bytes": None if name == "teacher" else 2_100_000}
            for name in systems
        },
    }


def three_systems() -> dict[str, Any]:
    # As read back from score.json: names sorted.
    return score(
        ptq=system(kl=0.004, overall=213, English=40, Thai=9),
        qad=system(kl=0.001, overall=215, English=8, Thai=30),
        teacher=system(kl=None, overall=215, English=30, Thai=10),
    )


def rows(text: str, first: str) -> list[list[str]]:
    lines = (line for line in text.splitlines() if line.startswith(first) and "|" in line)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def cells(text: str, first: str) -> list[str]:
    (only,) = rows(text, first)
    return only


def test_table_shows_rates_in_percent_and_kl_for_students_only() -> None:
    text = score_table(three_systems(), {})

    assert cells(text, "language") == [
        *("language", "rate", "tokens", "teacher %", "ptq %", "ptq KL", "qad %", "qad KL")
    ]
    assert cells(text, "English") == ["English", "WER", "200", "15.00", "20.00", "0.00400", "4.00", "0.00100"]
    assert cells(text, "overall") == ["overall", "WER/CER", "373", "57.64", "57.10", "0.00400", "57.64", "0.00100"]


def test_table_marks_the_worst_language_of_the_student_not_of_the_teacher() -> None:
    text = score_table(three_systems(), {})

    assert cells(text, "Thai")[:2] == ["Thai <", "CER"]
    assert "< marks qad's worst language: Thai, 15.00 % CER." in text


def test_system_tables_show_kinds_of_errors_and_what_else_there_is() -> None:
    speed = {"own": {"teacher": {"rtfx_per_rank": 431.26}, "ptq": {"rtfx_per_rank": None}, "qad": {}}}

    text = score_table(three_systems(), speed)

    errors, others = rows(text, "teacher ")
    assert errors == ["teacher", "57.64", "56.64 to 58.64", "215", "0", "0", "1.50", "97.00"]
    assert others == ["teacher", "-", "-", "3.6", "-", "431.3"]
    assert rows(text, "qad ")[-1] == ["qad", "0.00100", "98.75", "3.6", "2.1", "-"]


def test_a_pair_is_told_as_what_the_later_system_loses() -> None:
    assert cells(score_table(three_systems(), {}), "ptq - teacher") == [
        *("ptq - teacher", "+1.25", "0.00 to 2.00", "0.0312", "0.0936", "12,345")
    ]


def test_other_rules_have_a_row_each_and_korean_its_characters() -> None:
    korean = {"teacher": system(kl=None, overall=1, Korean=30), "qad": system(kl=0.1, overall=1, Korean=40)}

    text = score_table(score(**korean), {})

    assert cells(text, "norm_v1 CER") == ["norm_v1 CER", "1,492", "0.13", "0.13"]
    assert cells(text, "Korean CER") == ["Korean CER", "800", "7.50", "10.00"]
    assert not rows(score_table(three_systems(), {}), "Korean CER")


def test_findings_say_what_significance_says_and_what_training_did_to_the_kl() -> None:
    text = score_table(three_systems(), {})

    assert "What this says." in text
    assert "QAD removed 75.0 % of PTQ's KL to the teacher: 0.00400 to 0.00100 nats per token." in text


def test_findings_admit_that_qad_made_the_kl_worse() -> None:
    text = score_table(score(ptq=system(kl=0.004, overall=1), qad=system(kl=0.005, overall=1)), {})

    assert "QAD raised PTQ's KL to the teacher by 25.0 %: 0.00400 to 0.00500 nats per token." in text


def test_a_section_tells_what_it_is_of() -> None:
    told = three_systems()
    told["sections"]["vivos-test-full"] = section(
        told["sections"]["own"]["systems"],
        **{"num_utterances": 500, "num_in_all": 760, "num_references": 499, "num_rejected": 2},
        audio_attention="full",
    )

    lines = score_table(told, {}).splitlines()

    assert "own: 65 utterances, 0.05 hours; windowed audio attention" in lines
    assert (
        "vivos-test-full: 500 utterances (a random subset of 760), 1 of them without a reference, 2 recordings could "
        "not be used, 0.05 hours; full audio attention"
    ) in lines


def test_notes_tell_the_conditions_that_all_systems_share() -> None:
    told = three_systems()
    told["decoding"] |= {"language": "manifest", "context": "names"}

    text = score_table(told, {})

    assert "All systems: the model is told the language, greedy, with context; dtype float32, fake_quant" in text
    assert "under norm_v1, in characters (CER) or words (WER), summed over the set" in text


@pytest.mark.parametrize("num_others", [0, 1, 2, 6])
def test_29_languages_fit_100_columns_and_no_value_is_folded(num_others: int) -> None:
    errors = {name: 200 + number for number, name in enumerate(LANGUAGES)}  # rates above 100 % are the widest
    others = {f"a-rather-long-system-name-{i}": system(kl=0.0123, overall=1, **errors) for i in range(num_others)}
    systems = {name: system(kl=kl, overall=1, **errors) for name, kl in (("teacher", None), ("ptq", 0.1), ("qad", 0.1))}

    text = score_table(score(**systems, **others), {"own": {}})

    tables = [line for line in text.splitlines() if "|" in line]
    assert max(map(len, tables)) <= 100
    assert rows(text, "qad ")[-1][-2:] == ["3.6", "2.1"]
    shown = [line.split()[0] for line in text.splitlines() if re.match(r"[A-Z]\w+ <? *\|", line)]
    assert shown == LANGUAGES * (1 + max(0, num_others + 2) // 4)
    assert rows(text, "Hungarian")[0][3:5] == ["114.00", "114.00"]


def test_text_is_plain_ascii_even_when_colours_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")

    text = score_table(three_systems(), {})

    assert text.isascii()
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) > 70


def test_table_of_one_system_and_one_language_marks_nothing() -> None:
    text = score_table(score(teacher=system(kl=None, overall=215, English=30)), {})

    assert cells(text, "English") == ["English", "WER", "200", "15.00"]
    assert "<" not in text


def test_a_rate_that_does_not_exist_is_a_dash() -> None:
    only = system(kl=None, overall=0, English=0)
    only["overall"] |= {"error_rate": None, "interval": None}

    text = score_table(score(teacher=only), {})

    assert cells(text, "overall")[3] == "-"
    assert rows(text, "teacher ")[0][1:3] == ["-", "-"]


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


def test_markdown_holds_each_language_against_the_teacher_and_tells_no_speed() -> None:
    lines = score_markdown(three_systems()).splitlines()

    assert lines[0:3] == ["# Score", "", "## own"]
    assert "| language | tokens | draws | ptq loses | verdict | qad loses | verdict |" in lines
    assert "| Thai | 200 | 12 speakers | -2.00 to 0.00 | not inferior | - | not inferior |" in lines
    assert not any("RTFx" in line for line in lines)


def test_summary_has_two_lines_for_each_system_and_none_for_languages() -> None:
    text = score_summary(three_systems(), {})

    assert rows(text, "teacher ") == rows(score_table(three_systems(), {}), "teacher ")
    titles = [line.split()[0] for line in text.splitlines() if " | " in line]
    assert titles == ["system", "teacher", "ptq", "qad"] * 2


@pytest.mark.parametrize(
    ("systems", "judged"),
    [(["teacher", "ptq", "qad", "other"], "qad"), (["other", "ptq", "teacher"], "ptq"), (["teacher", "a"], "teacher")],
)
def test_what_is_judged_is_the_last_of_teacher_ptq_and_qad(systems: list[str], judged: str) -> None:
    assert judged_student(systems) == judged
