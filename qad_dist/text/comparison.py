"""Formats side by side: how far each is from the teacher on the held-out split, as JSON, Markdown and plain text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qad_dist.text.bootstrap import Interval, resample
from qad_dist.text.grid import Grid, as_markdown, as_text

SEED = 0
NOTHING = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One format on the held-out utterances, which are the same ones in the same order for all."""

    kl_U: npt.NDArray[np.float64]
    """KL from the teacher in nats, summed over the response tokens of each utterance."""
    agreements_U: npt.NDArray[np.int64]
    """Of these tokens, those on which both prefer the same one."""
    tokens_U: npt.NDArray[np.int64]
    """Response tokens."""
    served_bytes: int
    """Of the model as it is served."""


def compare_formats(measured: Mapping[str, Measured], *, chosen: str) -> dict[str, Any]:
    """What ``comparison.json`` holds: rates with 95 % paired bootstrap intervals over utterances.

    Args:
        measured: By format.
        chosen: The one that was written; the others are told as shares of its KL.
    """
    names = [chosen, *(name for name in measured if name != chosen)]
    tokens_U = measured[chosen].tokens_U
    resampled = None
    if len(tokens_U) > 1:
        resampled = resample([measured[name].kl_U for name in names], tokens_U, seed=SEED)
    formats = {}
    for place, name in enumerate(names):
        one = measured[name]
        share = resampled.ratio(place, 0) if resampled is not None and place else None
        formats[name] = {
            "kl_per_token": float(one.kl_U.sum() / tokens_U.sum()),
            "kl_interval": _ends(resampled.rate(place)) if resampled is not None else None,
            "share_of_chosen": share.value if share is not None else None,
            "share_interval": _ends(share) if share is not None else None,
            "agreement": float(one.agreements_U.sum() / tokens_U.sum()),
            "served_bytes": one.served_bytes,
        }
    return {
        "chosen": chosen,
        "utterances": len(tokens_U),
        "response_tokens": int(tokens_U.sum()),
        "formats": formats,
    }


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """``comparison.md``."""
    told = [f"- {sentence}" for sentence in _sentences(comparison)]
    return "\n".join(["# Formats on the held-out split", "", as_markdown(_grid(comparison)), "", *told, ""])


def comparison_summary(comparison: Mapping[str, Any]) -> str:
    """The same for a terminal."""
    return "\n".join([as_text(_grid(comparison)), *_sentences(comparison), ""])


def _grid(comparison: Mapping[str, Any]) -> Grid:
    chosen = comparison["chosen"]
    header = ["format", "KL", "95 %", f"of {chosen}'s", "95 %", "top-1 %", "served MB"]
    rows = []
    for name, found in comparison["formats"].items():
        rows.append(
            [
                name,
                _figure(1e6 * found["kl_per_token"]),
                _range(found["kl_interval"], factor=1e6),
                NOTHING if found["share_of_chosen"] is None else _figure(found["share_of_chosen"]),
                _range(found["share_interval"]),
                f"{100 * found['agreement']:.2f}",
                f"{found['served_bytes'] / 1e6:,.1f}",
            ]
        )
    if len(rows) == 1:  # nothing to be a share of
        header, rows = header[:3] + header[5:], [rows[0][:3] + rows[0][5:]]
    return Grid(header, rows)


def _sentences(comparison: Mapping[str, Any]) -> Sequence[str]:
    return (
        f"KL: from the teacher, in 1e-6 nats per response token, before training, on {comparison['utterances']:,} "
        f"held-out utterances ({comparison['response_tokens']:,} tokens).",
        "95 %: paired bootstrap over utterances; top-1: tokens that the teacher would have chosen too.",
    )


def _ends(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def _range(ends: Sequence[float] | None, *, factor: float = 1) -> str:
    return NOTHING if ends is None else f"{_figure(factor * ends[0])} to {_figure(factor * ends[1])}"


def _figure(value: float) -> str:
    """Three digits that count, never as a power of ten."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{digits}f}"
