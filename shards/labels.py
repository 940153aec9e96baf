"""Label files: the teacher's answers for one shard, as JSON lines after a header; written once and whole."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.errors import NonFiniteError, ShardError
from shards.schema import PseudoLabel
from shards.storage import atomic_write

_VERSION = 1
_REMEDY = "delete it and label again"


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelHeader:
    """What the labels of a file were made from."""

    shard: str
    """File name of the tar."""
    shard_sha256: str
    teacher: str
    """Fingerprint of the teacher's folder."""
    settings: dict[str, Any]
    """Everything else that decides the labels, JSON-able."""


def label_path(folder: Path, shard: str) -> Path:
    """``<folder>/<shard without .tar>.jsonl``."""
    return folder / f"{shard.removesuffix('.tar')}.jsonl"


def write_labels(path: Path, header: LabelHeader, labels: Sequence[PseudoLabel]) -> None:
    """Write a label file atomically; equal labels give equal bytes, and log-probabilities come back exactly.

    Raises:
        NonFiniteError: A log-probability is NaN or infinite.
        StageError: The file cannot be written.
    """
    for label in labels:
        if wrong := [value for value in (*label.token_logprobs, label.mean_logprob) if not math.isfinite(value)]:
            raise NonFiniteError(
                f"{path}: log-probabilities of {label.key!r} must be finite, got {wrong[0]}; "
                "the teacher overflows: check its weights, or set model.dtype to float32"
            )
    body = "".join(_line(asdict(label)) for label in labels).encode()
    first = {
        "version": _VERSION,
        **asdict(header),
        "num_labels": len(labels),
        "labels_sha256": hashlib.sha256(body).hexdigest(),
    }
    with atomic_write(path) as file:
        file.write(_line(first).encode())
        file.write(body)


def read_labels(path: Path, *, shard_sha256: str | None = None) -> tuple[LabelHeader, list[PseudoLabel]]:
    """A whole label file, checked against the count and the hash in its header.

    Args:
        path: From :func:`label_path`.
        shard_sha256: Hash in the index of the shard that it must label; None for any.

    Raises:
        ShardError: It is missing, cut or damaged, or labels another shard.
    """
    try:
        first, newline, body = path.read_bytes().partition(b"\n")
    except OSError as cause:
        raise ShardError(f"{path} must be readable, got {cause.strerror!r}; run the label stage") from cause
    header, num_labels, digest = _header(path, first + newline)
    if (found := body.count(b"\n")) != num_labels:
        raise ShardError(f"{path} must hold {num_labels} labels, got {found}; {_REMEDY}")
    if hashlib.sha256(body).hexdigest() != digest:
        raise ShardError(f"{path} must have the hash in its header, got another; it is damaged, {_REMEDY}")
    try:
        labels = [_label(json.loads(line)) for line in body.decode().split("\n")[:-1]]
    except (ValueError, TypeError, KeyError) as cause:
        raise ShardError(f"{path} must hold one pseudo-label a line, got {cause}; {_REMEDY}") from cause
    if shard_sha256 is not None and header.shard_sha256 != shard_sha256:
        raise ShardError(f"{path} must label the shard that is in the index, got another one; label again")
    return header, labels


def _header(path: Path, line: bytes) -> tuple[LabelHeader, int, str]:
    try:
        values = json.loads(line)
        if (version := values.pop("version")) != _VERSION:
            raise ShardError(f"{path} must be of version {_VERSION}, got {version!r}; {_REMEDY}")
        num_labels, digest = int(values.pop("num_labels")), str(values.pop("labels_sha256"))
        return LabelHeader(**values), num_labels, digest
    except ShardError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as cause:
        raise ShardError(f"{path} must begin with a header, got {line[:80]!r}; {_REMEDY}") from cause


def _label(values: dict[str, Any]) -> PseudoLabel:
    values["token_ids"] = tuple(values["token_ids"])
    values["token_logprobs"] = tuple(values["token_logprobs"])
    return PseudoLabel(**values)


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
