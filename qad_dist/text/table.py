"""The score of a run as tables that a terminal, a log file and a README can hold. Pure: no I/O.

The same cells are laid out twice: by rich as plain text of limited width, and as Markdown. The score is the content of
``score.json``, the speed that of ``speed.json``, which alone depends on machine and ranks; systems stand in the order
teacher, ptq, qad, then the others as they come.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from qad_dist.config.score import OWN_SYSTEMS
from qad_dist.text.grid import Grid, as_markdown, as_text

SCORE, SPEED = "score.json", "speed.json"
"""What these tables show, in the score stage's folder."""

SYSTEMS_PER_TABLE = 4
"""More columns than these would not fit :data:`~qad_dist.text.grid.WIDTH`; further systems get a table of their own."""

WORST = "<"
"""Stands behind the language with the highest error rate of the student."""

NOTHING = "-"
"""Stands where a value does not exist."""

Section = dict[str, Any]


def score_table(score: dict[str, Any], speed: dict[str, Any]) -> str:
    """The score as plain text: of each section languages, systems, then what the numbers say."""
    parts = []
    for name, section in score["sections"].items():
        grids = _grids(score, section, speed.get(name, {}))
        parts += [_conditions(name, section), "", *(as_text(grid) for grid in grids), *_findings(section), ""]
    return "\n".join([*parts, *_notes(score), ""])


def score_summary(score: dict[str, Any], speed: dict[str, Any]) -> str:
    """The systems alone, without languages: a few lines for the end of a log."""
    parts = []
    for name, section in score["sections"].items():
        grids = _system_grids(score, section, speed.get(name, {}))
        parts += [_conditions(name, section), "", *(as_text(grid) for grid in grids), *_findings(section), ""]
    return "\n".join([*parts, ""])


def score_markdown(score: dict[str, Any]) -> str:
    """All tables and lines but the speeds, as Markdown: the same on any machine."""
    parts = ["# Score"]
    for name, section in score["sections"].items():
        parts += [f"## {name}", _conditions(name, section)]
        parts += [as_markdown(grid) for grid in _grids(score, section, {})]
        parts.append("\n".join(f"- {finding}" for finding in _findings(section)))
        parts += _verdicts(section)
    parts.append("\n".join(f"- {note}" for note in _notes(score)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _grids(score: dict[str, Any], section: Section, speeds: dict[str, Any]) -> list[Grid]:
    return [
        *_language_grids(section),
        *_system_grids(score, section, speeds),
        _pair_grid(section),
        _measure_grid(section),
    ]


def _conditions(name: str, section: Section) -> str:
    """What was scored, in a line."""
    number, in_all = section["num_utterances"], section["num_in_all"]
    of_all = f" (a random subset of {in_all:,})" if number < in_all else ""
    silent = number - section["num_references"]
    without = f", {silent:,} of them without a reference" if silent else ""
    lost = f", {section['num_rejected']:,} recordings could not be used" if section["num_rejected"] else ""
    return (
        f"{name}: {number:,} utterances{of_all}{without}{lost}, {section['audio_hours']:.2f} hours; "
        f"{section['audio_attention']} audio attention"
    )


def ordered_systems(systems: Iterable[str]) -> list[str]:
    """In the order in which they are shown: a score that was written and read back has its names sorted."""
    present = list(systems)
    return [name for name in OWN_SYSTEMS if name in present] + [name for name in present if name not in OWN_SYSTEMS]


def judged_student(systems: Iterable[str]) -> str:
    """Whose worst language and utterances are shown: the last of teacher, ptq and qad, else the first of the others."""
    shown = ordered_systems(systems)
    return [name for name in shown if name in OWN_SYSTEMS or name == shown[0]][-1]


def _language_grids(section: Section) -> list[Grid]:
    names = ordered_systems(section["systems"])
    return [
        _language_grid(section, names[start : start + SYSTEMS_PER_TABLE])
        for start in range(0, len(names), SYSTEMS_PER_TABLE)
    ]


def _language_grid(section: Section, names: Sequence[str]) -> Grid:
    systems = {name: section["systems"][name] for name in names}
    with_kl = {name for name in names if systems[name]["overall"]["kl_per_token"] is not None}
    header = ["language", "rate", "tokens"]
    for name in names:
        header += [f"{name} %", f"{name} KL"] if name in with_kl else [f"{name} %"]
    worst = worst_language(section)

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


def worst_language(section: Section) -> str | None:
    """The language with the student's highest error rate; None if there is only one, or none has a rate."""
    languages = section["systems"][judged_student(section["systems"])]["languages"]
    rated = {name: row["error_rate"] for name, row in languages.items() if row["error_rate"] is not None}
    return max(rated, key=lambda name: rated[name]) if len(rated) > 1 else None


def _system_grids(score: dict[str, Any], section: Section, speeds: dict[str, Any]) -> list[Grid]:
    """Errors of each system, and what else there is to say of it."""
    errors, others = [], []
    for name in ordered_systems(section["systems"]):
        overall, system = section["systems"][name]["overall"], score["systems"][name]
        counts = [f"{overall[kind]:,}" for kind in ("substitutions", "deletions", "insertions")]
        errors.append([name, _percent(overall["error_rate"]), _range(overall["interval"]), *counts])
        errors[-1] += [_percent(overall["runaway"]), _percent(overall["language_accuracy"])]
        speed = speeds.get(name, {}).get("rtfx_per_rank")
        told = [name, _kl(overall["kl_per_token"]), _percent(overall["agreement"])]
        told += [_megabytes(system["disk_bytes"]), _megabytes(system["served_bytes"])]
        others.append([*told, *([NOTHING if speed is None else f"{speed:,.1f}"] if speeds else [])])
    header = ["system", "KL", "top-1 %", "disk MB", "served MB", *(["RTFx a rank"] if speeds else [])]
    return [
        Grid(["system", "rate %", "95 %", "sub", "del", "ins", "runaway %", "language %"], errors),
        Grid(header, others),
    ]


def _pair_grid(section: Section) -> Grid:
    """Every pair of systems: the later one's rate minus the earlier one's, and how sure that is."""
    rows = []
    for pair in section["significance"]["overall"]["pairs"]:
        difference, words = pair["difference"], pair["words_to_see"]
        ends = None if difference is None else [-difference["high"], -difference["low"]]
        points = NOTHING if difference is None else f"{-100 * difference['value']:+.2f}"
        chances = [NOTHING if p is None else f"{p:.4f}" for p in (pair["p_value"], pair["p_adjusted"])]
        needed = NOTHING if words is None else f"{words:,}"
        rows.append([f"{pair['second']} - {pair['first']}", points, _range(ends), *chances, needed])
    return Grid(["difference", "points", "95 %", "p", "p (Holm)", "tokens to see it"], rows)


def _measure_grid(section: Section) -> Grid:
    """The same answers under other rules."""
    names = ordered_systems(section["systems"])
    overall = {name: section["systems"][name]["overall"] for name in names}
    rows = []
    for measure in overall[names[0]]["measures"]:
        counts = {name: overall[name]["measures"].get(measure) for name in names}
        first = counts[names[0]]
        tokens = NOTHING if first is None else f"{first['reference_tokens']:,}"
        rates = [NOTHING if one is None else _percent(one["error_rate"]) for one in counts.values()]
        rows.append([measure, tokens, *rates])
    for language, row in _korean(section, names):
        rows.append([f"{language} CER", *row])
    return Grid(["other rules", "tokens", *(f"{name} %" for name in names)], rows)


def _korean(section: Section, names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Korean is spaced in more ways than one: its CER is told beside its WER."""
    rows = [section["systems"][name]["languages"].get("Korean") for name in names]
    if rows[0] is None:
        return []
    counts = [next((own for name, own in row["measures"].items() if name.endswith("CER")), None) for row in rows]
    if counts[0] is None:
        return []
    rates = [NOTHING if one is None else _percent(one["error_rate"]) for one in counts]
    return [("Korean", [f"{counts[0]['reference_tokens']:,}", *rates])]


def _findings(section: Section) -> list[str]:
    """What the numbers say, in sentences."""
    findings = list(section["significance"]["overall"]["sentences"])
    if worst := worst_language(section):
        row = section["systems"][judged_student(section["systems"])]["languages"][worst]
        rate = f"{_percent(row['error_rate'])} % {row['unit']}"
        findings.append(f"{WORST} marks {judged_student(section['systems'])}'s worst language: {worst}, {rate}.")
    overall = {name: system["overall"] for name, system in section["systems"].items()}
    if "ptq" in overall and "qad" in overall:
        findings += _kl_finding(overall["ptq"]["kl_per_token"], overall["qad"]["kl_per_token"])
    return findings


def _verdicts(section: Section) -> list[str]:
    """Each language against the teacher, where there are several: what each system loses, and whether that is much."""
    languages, overall = section["significance"]["languages"], section["significance"]["overall"]
    names = [name for name in ordered_systems(section["systems"]) if name in overall["non_inferiority"]]
    if len(languages) < 2 or not names:
        return []
    rows = []
    for language, found in languages.items():
        draws = f"{found['num_clusters']:,} {'speakers' if found['is_by_speaker'] else 'utterances'}"
        row = [language, f"{found['reference_tokens']:,}", draws]
        for name in names:
            difference = found["non_inferiority"][name]["difference"]
            ends = None if difference is None else [difference["low"], difference["high"]]
            row += [_range(ends), found["non_inferiority"][name]["verdict"]]
        rows.append(row)
    header = ["language", "tokens", "draws", *(title for name in names for title in (f"{name} loses", "verdict"))]
    words = frozenset({0, 2, *range(4, len(header), 2)})
    told = (
        f"Points that a system loses to the teacher (95 %), and whether that is less than {overall['margin']:g}, more, "
        "or not shown either way. A range over fewer than 50 draws is too narrow; `-`: as many errors in each draw."
    )
    return ["### Each language against the teacher", as_markdown(Grid(header, rows, text_columns=words)), told]


def _notes(score: dict[str, Any]) -> list[str]:
    """What the columns mean, and under which settings all was scored."""
    decoding = score["decoding"]
    prompt = "the model names the language" if decoding["language"] == "auto" else "the model is told the language"
    return [
        f"rate: errors by reference tokens under {score['normalizer']}, in characters (CER) or words (WER), summed over"
        " the set; 95 %: bootstrap. Other rules name themselves.",
        "tokens to see it: words or characters at which such a difference is seen in four of five tests.",
        "KL: to the teacher, nats per response token; top-1: tokens that the teacher would have chosen too.",
        "runaway %: responses that were cut at their longest length or repeat themselves; language %: found correctly.",
        "disk: the folder as scored; served: the same model with its weights in their few bits, the rest in bf16.",
        f"All systems: {prompt}, greedy, {'with' if decoding['context'] else 'without'} context; dtype "
        f"{score['dtype']}, {score['arithmetic']}, prompts of {decoding['batch_audio_seconds']:g} s of audio at once, "
        f"{decoding['slots']} slots, at most {decoding['max_response_tokens']} tokens.",
    ]


def _kl_finding(ptq: float | None, qad: float | None) -> list[str]:
    if ptq is None or qad is None or ptq <= 0:
        return []
    share, pair = 1 - qad / ptq, f"{_kl(ptq)} to {_kl(qad)} nats per token"
    if share < 0:
        return [f"QAD raised PTQ's KL to the teacher by {-100 * share:.1f} %: {pair}."]
    return [f"QAD removed {100 * share:.1f} % of PTQ's KL to the teacher: {pair}."]


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.2f}"


def _range(ends: Sequence[float] | None) -> str:
    return NOTHING if ends is None else f"{_points(ends[0])} to {_points(ends[1])}"


def _points(rate: float) -> str:
    return f"{round(100 * rate, 2) + 0.0:.2f}"  # no -0.00


def _kl(nats: float | None) -> str:
    return NOTHING if nats is None else f"{nats:.5f}"


def _megabytes(num_bytes: int | None) -> str:
    return NOTHING if num_bytes is None else f"{num_bytes / 1e6:,.1f}"
