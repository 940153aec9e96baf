"""What the filters leave of a run's labels, by language and by reason, as numbers, tables and examples. Pure: no I/O.

:class:`LabelReport` adds up shard after shard; its :meth:`~LabelReport.summary` is the content of :data:`ACCEPT_JSON`,
from which the tables and the picture are made.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from qad_dist.text.accept import REASONS
from qad_dist.text.grid import Grid, as_markdown, as_text, escaped, visible
from shards.index import UNKNOWN_LANGUAGE
from shards.schema import SAMPLE_RATE_HZ, PseudoLabel
from shards.verdicts import KL_ONLY, NOTHING, USES, Verdict

ACCEPT_JSON, ACCEPT_MARKDOWN, ACCEPT_PICTURE = "accept.json", "accept.md", "accept.png"
"""The report in the label stage's folder."""

EXAMPLES_PER_REASON = 3
LONGEST_EXAMPLE = 100
"""Characters of an example's text."""

_MOST_LANGUAGES = 3


@dataclass(slots=True)
class _Group:
    """Counts of some utterances. Samples, not seconds: whole numbers add up to the same in any order."""

    utterances: Counter[str] = field(default_factory=Counter)
    samples: Counter[str] = field(default_factory=Counter)
    alone: Counter[str] = field(default_factory=Counter)

    def add(self, verdict: Verdict, samples: int) -> None:
        for name in (verdict.use, *verdict.reasons):
            self.utterances[name] += 1
            self.samples[name] += samples
        if len(verdict.reasons) == 1:
            self.alone[verdict.reasons[0]] += 1

    def __add__(self, other: "_Group") -> "_Group":
        return _Group(self.utterances + other.utterances, self.samples + other.samples, self.alone + other.alone)

    def summary(self) -> dict[str, Any]:
        def amount(*names: str) -> dict[str, Any]:
            return {
                "utterances": sum(self.utterances[name] for name in names),
                "hours": sum(self.samples[name] for name in names) / SAMPLE_RATE_HZ / 3600,
            }

        reasons = {
            reason: amount(reason) | {"alone": self.alone[reason]} for reason in REASONS if self.utterances[reason]
        }
        return amount(*USES) | {"use": {use: amount(use) for use in USES}, "reasons": reasons}


class LabelReport:
    """Adds up labels and their verdicts; its memory does not grow with their number."""

    def __init__(self) -> None:
        self._languages: defaultdict[str, _Group] = defaultdict(_Group)
        self._examples: defaultdict[str, list[tuple[str, PseudoLabel]]] = defaultdict(list)

    def add(self, labels: Sequence[PseudoLabel], verdicts: Sequence[Verdict], languages: Sequence[str | None]) -> None:
        """Count the labels of a shard.

        Args:
            labels: In any order; the report does not depend on it, nor on that of the shards.
            verdicts: On each.
            languages: Of each utterance as its source names it; where that is None, as the teacher heard it.
        """
        for label, verdict, language in zip(labels, verdicts, languages, strict=True):
            group = self._languages[language or label.language or UNKNOWN_LANGUAGE]
            group.add(verdict, round(label.duration_seconds * SAMPLE_RATE_HZ))
            for reason in verdict.reasons:
                self._offer(reason, label)

    def summary(self) -> dict[str, Any]:
        """All numbers and examples, JSON-able: content of :data:`ACCEPT_JSON`."""
        languages = sorted(self._languages, key=lambda name: (name == UNKNOWN_LANGUAGE, name))
        total = sum(self._languages.values(), start=_Group())
        return total.summary() | {
            "languages": {name: self._languages[name].summary() for name in languages},
            "examples": {
                reason: [_example(label) for _, label in self._examples[reason]]
                for reason in REASONS
                if reason in self._examples
            },
        }

    def _offer(self, reason: str, label: PseudoLabel) -> None:
        """Keep the examples whose keys have the least hashes: a fair choice, and always the same one."""
        kept = self._examples[reason]
        rank = hashlib.sha256(label.key.encode()).hexdigest()
        if len(kept) == EXAMPLES_PER_REASON and rank > kept[-1][0]:
            return
        kept.append((rank, label))
        kept.sort(key=lambda pair: pair[0])
        del kept[EXAMPLES_PER_REASON:]


def report_text(summary: dict[str, Any]) -> str:
    """The tables as plain text, without examples: these may be in any script, a log is ASCII."""
    grids = [_language_grid(summary), _reason_grid(summary), _matrix_grid(summary)]
    return "\n".join([_headline(summary), "", *(as_text(grid) for grid in grids if grid.rows), *_notes(summary), ""])


def report_markdown(summary: dict[str, Any]) -> str:
    """The tables and the examples as Markdown."""
    grids = [_language_grid(summary), _reason_grid(summary), _matrix_grid(summary)]
    parts = [
        "# Accepted labels",
        _headline(summary),
        *(as_markdown(grid) for grid in grids if grid.rows),
        "\n".join(f"- {note}" for note in _notes(summary)),
        *_example_parts(summary),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _example(label: PseudoLabel) -> dict[str, Any]:
    return {
        "key": label.key,
        "language": label.language,
        "text": visible(label.text, longest=LONGEST_EXAMPLE),
        "duration_seconds": label.duration_seconds,
        "mean_logprob": label.mean_logprob,
    } | ({} if label.error is None else {"error": visible(label.error, longest=LONGEST_EXAMPLE)})


def reasons_of(group: dict[str, Any]) -> list[str]:
    """Reasons that speak against labels of a summary or one of its languages, in the order of the filters."""
    return [reason for reason in REASONS if reason in group["reasons"]]


def _headline(summary: dict[str, Any]) -> str:
    head = f"{summary['utterances']:,} labels, {summary['hours']:,.2f} hours"
    if not summary["hours"]:
        return f"{head}."
    used, kl_only, dropped = (_percent(summary["use"][use]["hours"], summary["hours"]) for use in USES)
    return f"{head}: {used} % used, {kl_only} % only for KL, {dropped} % dropped."


def _language_grid(summary: dict[str, Any]) -> Grid:
    header = ["language", "utterances", "KL only", "dropped", "hours", "KL only h", "dropped h", "kept %"]

    def row(name: str, group: dict[str, Any]) -> list[str]:
        amounts = [group, group["use"][KL_ONLY], group["use"][NOTHING]]
        return [
            name,
            *(f"{amount['utterances']:,}" for amount in amounts),
            *(f"{amount['hours']:,.2f}" for amount in amounts),
            _percent(group["hours"] - group["use"][NOTHING]["hours"], group["hours"]),
        ]

    rows = [row(name, group) for name, group in summary["languages"].items()]
    return Grid(header, [*rows, row("all", summary)] if rows else [], has_total=True)


def _reason_grid(summary: dict[str, Any]) -> Grid:
    rows = []
    for reason in reasons_of(summary):
        amount = summary["reasons"][reason]
        counts = {
            name: group["reasons"][reason] for name, group in summary["languages"].items() if reason in group["reasons"]
        }
        most = sorted(counts, key=lambda name: (-counts[name]["utterances"], name))
        told = [f"{name} {counts[name]['utterances']:,}" for name in most[:_MOST_LANGUAGES]]
        told += [f"{len(most) - _MOST_LANGUAGES} more"] if len(most) > _MOST_LANGUAGES else []
        rows.append(
            [
                reason,
                f"{amount['utterances']:,}",
                f"{amount['alone']:,}",
                f"{amount['hours']:,.2f}",
                _percent(amount["utterances"], summary["utterances"]),
                ", ".join(told),
            ]
        )
    header = ["reason", "utterances", "alone", "hours", "%", "languages"]
    return Grid(header, rows, text_columns=frozenset({0, 5}))


def _matrix_grid(summary: dict[str, Any]) -> Grid:
    """Utterances of each language that each reason speaks against, as a share."""
    reasons = reasons_of(summary)
    rows = [
        [name, *(_percent(count, group["utterances"]) if count else "" for count in _counts(group, reasons))]
        for name, group in summary["languages"].items()
        if group["reasons"]
    ]
    return Grid(["% of language", *reasons], rows)


def _counts(group: dict[str, Any], reasons: Sequence[str]) -> Iterator[int]:
    return (group["reasons"].get(reason, {"utterances": 0})["utterances"] for reason in reasons)


def _notes(summary: dict[str, Any]) -> list[str]:
    if not summary["reasons"]:
        return ["No filter objects to anything."]
    return [
        "A label may have several reasons: alone counts those that have no other one.",
        "Which reason drops a label and which only its cross-entropy is set by label.filters.",
    ]


def _example_parts(summary: dict[str, Any]) -> Iterator[str]:
    if summary["examples"]:
        yield "## Examples"
    for reason in reasons_of(summary):
        examples = summary["examples"][reason]
        yield f"### {reason}"
        header = ["utterance", "language", "seconds", "mean log-prob", "text"]
        rows = [
            [
                escaped(example["key"]),
                escaped(visible(example["language"] or "None", longest=LONGEST_EXAMPLE)),
                f"{example['duration_seconds']:.2f}",
                "" if example["mean_logprob"] is None else f"{example['mean_logprob']:.3f}",
                escaped(example.get("error", example["text"])),
            ]
            for example in examples
        ]
        yield as_markdown(Grid(header, rows, text_columns=frozenset({0, 1, 4})))


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2f}" if whole else ""
