"""What each Linear costs when it alone is quantized, as tables for a terminal and as Markdown. Pure: no I/O.

The cells come from :data:`SENSITIVITY_JSON`, which :func:`qad_dist.quant.sensitivity.as_json` makes.
"""

from collections.abc import Callable
from typing import Any

from qad_dist.linears import LINEARS
from qad_dist.text.grid import Grid, as_markdown, as_text

SENSITIVITY_JSON, SENSITIVITY_MARKDOWN, SENSITIVITY_PICTURE = "sensitivity.json", "sensitivity.md", "sensitivity.png"
"""The report in the quantize stage's folder."""

COLUMNS = [name.partition(".")[2].removesuffix("_proj") for name in LINEARS]
"""The Linears of a layer, as the tables call them."""

KL_UNIT = 1e-6
"""Nats per response token in which the KL of single Linears is told."""

ROUNDING = 1e-7
"""A KL below this, in nats, is that of equal models: float32 sums in another order."""

KEPT = "kept"
"""Stands where a Linear was not quantized, so that there is nothing to measure."""
NOTHING = "-"
"""Stands where a value does not exist."""


def sensitivity_summary(report: dict[str, Any]) -> str:
    """The worst Linears alone: a few lines for the end of a log."""
    return "\n".join([_headline(report), "", as_text(_worst_grid(report)), *_notes(report), ""])


def sensitivity_markdown(report: dict[str, Any]) -> str:
    """The worst Linears, then all of them, layer by layer: KL, then SQNR."""
    parts = [
        "# Sensitivity of the Linears",
        _headline(report),
        "## The worst",
        as_markdown(_worst_grid(report)),
        "\n".join(f"- {note}" for note in _notes(report)),
        "## KL, in 1e-6 nats per token",
        as_markdown(_matrix(report, lambda linear: kl_text(linear["kl_per_token"]))),
        "## SQNR, in dB",
        as_markdown(_matrix(report, lambda linear: _decibels(linear["sqnr_db"]))),
        "## Inputs, largest magnitude before and after smoothing",
        as_markdown(_input_grid(report)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def layers_of(report: dict[str, Any]) -> list[dict[str, dict[str, Any]]]:
    """The records of each layer, by the names of its Linears below it."""
    layers: dict[int, dict[str, dict[str, Any]]] = {}
    for linear in report["linears"]:
        _, number, name = linear["name"].split(".", 2)
        layers.setdefault(int(number), {})[name] = linear
    return [layers[number] for number in sorted(layers)]


def headline_values(report: dict[str, Any]) -> str:
    """KL of the whole student, and of the same without quantization, where these were measured."""
    known = [("as quantized", report["kl_per_token"]), ("with nothing quantized", report["kl_unquantized"])]
    return ", ".join(f"{_nats(kl)} {how}" for how, kl in known if kl is not None)


def _nats(kl: float) -> str:
    """What is nothing but rounding, of either sign, is not told in digits."""
    return f"{kl:.3g}" if kl >= ROUNDING else f"below {ROUNDING:g}"


def kl_text(nats: float | None) -> str:
    """In millionths of a nat: three digits, and never a zero for what there is."""
    if nats is None:
        return KEPT
    value = nats / KL_UNIT
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 9.95:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.005 or value == 0 else "<0.01"


def _headline(report: dict[str, Any]) -> str:
    values = headline_values(report)
    return f"KL to the teacher in nats per token: {values}." if values else "KL to the teacher, one Linear quantized."


def _notes(report: dict[str, Any]) -> list[str]:
    notes = [
        "KL: to the teacher, in 1e-6 nats per token, with this Linear alone quantized; SQNR: of its output.",
        "amax: largest magnitude of its input, before and after smoothing; outliers: input channels above 10 medians.",
    ]
    if report["kept"]:
        notes.append(f"In high precision: {', '.join(report['kept'])}.")
    return notes


def _worst_grid(report: dict[str, Any]) -> Grid:
    linears = {linear["name"]: linear for linear in report["linears"]}
    rows = []
    for name in report["worst"]:
        linear = linears[name]
        rows.append(
            [
                name,
                kl_text(linear["kl_per_token"]),
                _decibels(linear["sqnr_db"]),
                _amax(linear["input_amax_before"]),
                _amax(linear["input_amax_after"]),
                f"{100 * linear['outlier_share']:.2f}",
            ]
        )
    return Grid(["Linear", "KL", "SQNR dB", "amax before", "after", "outliers %"], rows)


def _matrix(report: dict[str, Any], cell: Callable[[dict[str, Any]], str]) -> Grid:
    rows = []
    for number, linears in enumerate(layers_of(report)):
        cells = [_marked(linears[name], cell(linears[name]), report) for name in LINEARS]
        rows.append([str(number), *cells])
    return Grid(["layer", *COLUMNS], rows, text_columns=frozenset())


def _marked(linear: dict[str, Any], cell: str, report: dict[str, Any]) -> str:
    """The worst stand out; what was measured and then kept says so."""
    if linear["kl_per_token"] is None:
        return KEPT
    told = f"**{cell}**" if linear["name"] in report["worst"] else cell
    return f"{told} ({KEPT})" if linear["is_kept"] else told


def _input_grid(report: dict[str, Any]) -> Grid:
    rows, names = [], []
    for number, linears in enumerate(layers_of(report)):
        groups = {linear["group"]: linear for linear in linears.values()}  # equal within a group
        names = list(groups)
        cells = [f"{_amax(g['input_amax_before'])} → {_amax(g['input_amax_after'])}" for g in groups.values()]
        rows.append([str(number), *cells])
    return Grid(["layer", *names], rows, text_columns=frozenset())


def _decibels(decibels: float | None) -> str:
    return NOTHING if decibels is None else f"{decibels:.1f}"


def _amax(value: float) -> str:
    return f"{value:,.0f}" if value >= 999.5 else f"{value:#.3g}".rstrip(".")
