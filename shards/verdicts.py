"""Verdict files: which labels of a label file are used, and why the others are not.

They stand beside the label file, are made from it and from settings alone, and can be made again at any time: whatever
is wrong with one, the remedy is to judge again.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import ShardError
from shards.labels import LabelFile
from shards.storage import fingerprint, read_json, write_json

ALL, KL_ONLY, NOTHING = "all", "kl_only", "nothing"
USES = (ALL, KL_ONLY, NOTHING)
"""What of a label is learned from, from the most to the least: ``kl_only`` are the teacher's distributions without the
tokens that it chose."""

_VERSION = 1
_REMEDY = "delete it and run the label stage, which makes it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one label is good for."""

    use: str
    """One of :data:`USES`."""
    reasons: tuple[str, ...] = ()
    """Everything that there is against it, in a fixed order; empty exactly for :data:`ALL`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What the verdicts of a file were made from."""

    shard: str
    """File name of the tar."""
    labels_sha256: str
    """Of all bytes of the label file."""
    settings: dict[str, Any]
    """Everything else that decides the verdicts, JSON-able."""


def verdict_path(label_file: Path) -> Path:
    """``<name>.accept.json`` beside the label file ``<name>.jsonl``, of a first or a second pass."""
    return label_file.with_suffix(".accept.json")


def verdicts_fingerprint(verdicts: Sequence[Verdict]) -> str:
    """Name of what was decided, however it came about: equal if and only if the verdicts are, in their order."""
    return fingerprint(_columns(verdicts))


def write_verdicts(path: Path, judged: Judged, verdicts: Sequence[Verdict]) -> None:
    """Write a verdict file atomically; equal verdicts from equal settings give equal bytes.

    Args:
        path: From :func:`verdict_path`.
        judged: What was judged, and by which settings.
        verdicts: One for each label of the label file, in its order.

    Raises:
        StageError: The file cannot be written.
    """
    values = {
        "version": _VERSION,
        **_judged_values(judged),
        **_columns(verdicts),
        "counts": count(verdicts),
        "fingerprint": verdicts_fingerprint(verdicts),
    }
    write_json(path, values, indent=None)


def read_verdicts(path: Path, judged: Judged) -> list[Verdict] | None:
    """The verdicts on a label file, in its order; None if it was not yet judged so, or only by other settings.

    Args:
        path: From :func:`verdict_path`.
        judged: What must have been judged, and by which settings.

    Raises:
        ShardError: The file is damaged.
    """
    values = _read(path)
    expected = {"version": _VERSION, **_judged_values(judged)}
    if values is None or any(values.get(name) != value for name, value in expected.items()):
        return None
    return _verdicts(path, values)


def stored_verdicts(file: LabelFile) -> list[Verdict]:
    """The verdicts beside a label file, in its order, whatever settings they were made by.

    Raises:
        ShardError: There are none, they are damaged, or of other labels.
    """
    path = verdict_path(file.path)
    values = _read(path)
    if values is None or (values["version"], values.get("labels_sha256")) != (_VERSION, file.sha256):
        raise ShardError(f"{path} must hold the verdicts on {file.path.name}, got none; run the label stage")
    verdicts = _verdicts(path, values)
    if len(verdicts) != len(file.labels):
        raise ShardError(f"{path} must hold {len(file.labels)} verdicts, got {len(verdicts)}; {_REMEDY}")
    return verdicts


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    values = read_json(path)
    if not isinstance(values, dict) or "version" not in values:
        raise ShardError(f"{path} must hold verdicts, got another JSON value; {_REMEDY}")
    return values


def _verdicts(path: Path, values: dict[str, Any]) -> list[Verdict]:
    try:
        verdicts = [
            Verdict(use=use, reasons=tuple(reasons))
            for use, reasons in zip(values["use"], values["reasons"], strict=True)
        ]
        is_whole = values["fingerprint"] == verdicts_fingerprint(verdicts) and values["counts"] == count(verdicts)
    except (ValueError, TypeError, KeyError) as cause:
        raise ShardError(f"{path} must hold a use and reasons for each label, got {cause!r}; {_REMEDY}") from cause
    if not is_whole or not {verdict.use for verdict in verdicts} <= set(USES):
        raise ShardError(f"{path} must have the fingerprint that it names, got another; {_REMEDY}")
    return verdicts


def count(verdicts: Sequence[Verdict]) -> dict[str, dict[str, int]]:
    """How many labels have each use, and how many each reason speaks against; a label may have several."""
    uses = Counter(verdict.use for verdict in verdicts)
    reasons = Counter(reason for verdict in verdicts for reason in verdict.reasons)
    return {"use": {use: uses[use] for use in USES}, "reasons": dict(sorted(reasons.items()))}


def _judged_values(judged: Judged) -> dict[str, Any]:
    # As they come back from JSON: a tuple in the settings as a list.
    settings = json.loads(json.dumps(judged.settings))
    return {"shard": judged.shard, "labels_sha256": judged.labels_sha256, "settings": settings}


def _columns(verdicts: Sequence[Verdict]) -> dict[str, list[Any]]:
    return {
        "use": [verdict.use for verdict in verdicts],
        "reasons": [list(verdict.reasons) for verdict in verdicts],
    }
