"""The score of a run as tables that a terminal, a log file and a README can hold. Pure: no I/O.

The same cells are laid out twice: by rich as plain text of limited width, and as Markdown. The score is the content of
``score.json``; systems stand in the order teacher, ptq, qad, then the others as they come.
"""

from collections.abc import Callable, Sequence
from typing import Any

from qad_dist.text.grid import Grid, as_markdown, as_text

SCORE = "score.json"
"""What these tables show, in the score stage's folder."""

MAIN_SYSTEMS = ("teacher", "ptq", "qad")
SYSTEMS_PER_TABLE = 4
"""More columns than these would not fit :data:`~qad_dist.text.grid.WIDTH`; further systems get a table of their own."""

WORST = "<"
"""Stands behind the language with the highest error rate of the student."""

NOTHING = "-"
"""Stands where a value does not exist."""


def score_table(score: dict[str, Any]) -> str:
    """The score as plain text: languages, systems, then what the numbers say."""
    grids = [*_language_grids(score), _system_grid(score)]
    return "\n".join([_conditions(score), "", *(as_text(grid) for grid in grids), *_findings(score), ""])


def score_summary(score: dict[str, Any]) -> str:
    """The systems alone, without languages: a few lines for the end of a log."""
    return "\n".join([_conditions(score), "", as_text(_system_grid(score)), ""])


def score_markdown(score: dict[str, Any]) -> str:
    """The same tables and lines as Markdown."""
    grids = [*_language_grids(score), _system_grid(score)]
    parts = [_conditions(score), *(as_markdown(grid) for grid in grids), "\n".join(f"- {f}" for f in _findings(score))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _conditions(score: dict[str, Any]) -> str:
    return (
        f"{score['num_utterances']:,} utterances, {score['audio_hours']:.2f} hours; text {score['normalizer']}, "
        f"dtype {score['dtype']}, audio attention {score['audio_attention']}"
    )


def _ordered_systems(score: dict[str, Any]) -> list[str]:
    # A score that was written and read back has its names sorted.
    present = score["systems"]
    return [name for name in MAIN_SYSTEMS if name in present] + [name for name in present if name not in MAIN_SYSTEMS]


def _student(score: dict[str, Any]) -> str:
    """The system whose worst language is marked: the last of teacher, ptq and qad, else the first of the others."""
    main = [name for name in MAIN_SYSTEMS if name in score["systems"]]
    return main[-1] if main else _ordered_systems(score)[0]


def _language_grids(score: dict[str, Any]) -> list[Grid]:
    names = _ordered_systems(score)
    return [
        _language_grid(score, names[start : start + SYSTEMS_PER_TABLE])
        for start in range(0, len(names), SYSTEMS_PER_TABLE)
    ]


def _language_grid(score: dict[str, Any], names: Sequence[str]) -> Grid:
    systems = {name: score["systems"][name] for name in names}
    with_kl = {name for name in names if systems[name]["overall"]["kl_per_token"] is not None}
    header = ["language", "rate", "tokens"]
    for name in names:
        header += [f"{name} %", f"{name} KL"] if name in with_kl else [f"{name} %"]
    worst = _worst_language(score)

    def row(title: str, pick: Callable[[dict[str, Any]], dict[str, Any]]) -> list[str]:
        first = pick(systems[names[0]])
        cells = [title, first["unit"], f"{first['reference_tokens']:,}"]
        for name in names:
            cells.append(_percent(pick(systems[name])["error_rate"]))
            if name in with_kl:
                cells.append(_kl(pick(systems[name])["kl_per_token"]))
        return cells

    languages = list(systems[names[0]]["languages"])
    rows = [
        row(f"{language} {WORST}" if language == worst else language, lambda s, key=language: s["languages"][key])
        for language in languages
    ]
    return Grid(header, [*rows, row("overall", lambda s: s["overall"])], has_total=True)


def _worst_language(score: dict[str, Any]) -> str | None:
    """The language with the student's highest error rate; None if there is only one, or none has a rate."""
    languages = score["systems"][_student(score)]["languages"]
    rated = {name: row["error_rate"] for name, row in languages.items() if row["error_rate"] is not None}
    return max(rated, key=lambda name: rated[name]) if len(rated) > 1 else None


def _system_grid(score: dict[str, Any]) -> Grid:
    header = ["system", "rate %", "errors", "KL", "top-1 %", "language %", "runaway", "disk MB", "served MB"]
    rows = []
    for name in _ordered_systems(score):
        system = score["systems"][name]
        overall = system["overall"]
        rows.append(
            [
                name,
                _percent(overall["error_rate"]),
                f"{_errors(overall):,}",
                _kl(overall["kl_per_token"]),
                _percent(overall["agreement"]),
                _percent(overall["language_accuracy"]),
                f"{overall['runaway']:,}",
                _megabytes(system["disk_bytes"]),
                _megabytes(system["served_bytes"]),
            ]
        )
    return Grid(header, rows)


def _findings(score: dict[str, Any]) -> list[str]:
    """What the columns mean and what the numbers say, in sentences: plain differences, no claim of significance."""
    overall = {name: system["overall"] for name, system in score["systems"].items()}
    findings = [
        "KL: to the teacher, nats per response token; top-1: tokens that the teacher would have chosen too.",
        "disk: the folder as scored; served: the same model with its weights in their few bits, the rest in bf16.",
    ]
    if worst := _worst_language(score):
        findings.append(f"{WORST} marks {_student(score)}'s highest error rate: {worst}.")
    if "ptq" in overall and "qad" in overall:
        findings += _kl_finding(overall["ptq"]["kl_per_token"], overall["qad"]["kl_per_token"])
    if "teacher" in overall:
        tokens, teacher = overall["teacher"]["reference_tokens"], _errors(overall["teacher"])
        told = [
            f"{name} {_difference(_errors(overall[name]) - teacher)}" for name in MAIN_SYSTEMS[1:] if name in overall
        ]
        if told:
            findings.append(
                f"Errors out of {tokens:,} reference tokens: teacher {teacher:,}; against it, {', '.join(told)}."
            )
    return findings


def _kl_finding(ptq: float | None, qad: float | None) -> list[str]:
    if ptq is None or qad is None or ptq <= 0:
        return []
    share, pair = 1 - qad / ptq, f"{_kl(ptq)} to {_kl(qad)} nats per token"
    if share < 0:
        return [f"QAD raised PTQ's KL to the teacher by {-100 * share:.1f} %: {pair}."]
    return [f"QAD removed {100 * share:.1f} % of PTQ's KL to the teacher: {pair}."]


def _difference(errors: int) -> str:
    if errors == 0:
        return "makes as many"
    return f"makes {abs(errors):,} {'more' if errors > 0 else 'fewer'}"


def _errors(row: dict[str, Any]) -> int:
    return row["substitutions"] + row["deletions"] + row["insertions"]


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.2f}"


def _kl(nats: float | None) -> str:
    return NOTHING if nats is None else f"{nats:.5f}"


def _megabytes(num_bytes: int | None) -> str:
    return NOTHING if num_bytes is None else f"{num_bytes / 1e6:,.1f}"
