"""Label files: the teacher's answers for one shard, as JSON lines after a header; written once and whole.

Beside ``<shard>.jsonl`` there may be ``<shard>.second.jsonl``, answers of a second pass to some of the same utterances,
and beside either one the hidden states of its answers (:mod:`shards.hidden`), which are written before it.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from shards.columns import values_of
from shards.errors import NonFiniteError, ShardError
from shards.faults import fault_point
from shards.hidden import Bits, HiddenFile, check_hidden, hidden_path, write_hidden
from shards.schema import ENDED_BY_END_TOKEN, ENDED_BY_LENGTH, UNREADABLE, PseudoLabel
from shards.storage import atomic_write

_VERSION = 2
_REMEDY = "delete it and label again"
_ENDS = (ENDED_BY_END_TOKEN, ENDED_BY_LENGTH, UNREADABLE)
_SHOWN_OF_A_HASH = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelHeader:
    """What the labels of a file were made from, and what lies beside it."""

    shard: str
    """Name of the shard in the index."""
    shard_sha256: str
    teacher: str
    """Fingerprint of the teacher's folder."""
    settings: dict[str, Any]
    """Everything else that decides the labels, JSON-able."""
    first_sha256: str | None = None
    """Of a second pass: hash of the label file whose labels it gives anew."""
    engine: str | None = None
    """What decoded, with its version: for readers, as the labels of another version are no worse."""
    hidden: HiddenFile | None = None
    """The hidden states beside it, if there are any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelFile:
    """A label file as read."""

    path: Path
    sha256: str
    """Of its bytes: what verdicts and second passes name it by."""
    header: LabelHeader
    labels: list[PseudoLabel]

    @property
    def num_tokens(self) -> int:
        """Of all labels."""
        return sum(label.num_tokens for label in self.labels)


def label_path(folder: Path, shard: str) -> Path:
    """``<folder>/<shard without .tar>.jsonl``."""
    return folder / f"{shard.removesuffix('.tar')}.jsonl"


def second_path(folder: Path, shard: str) -> Path:
    """``<folder>/<shard without .tar>.second.jsonl``, for some of the keys of :func:`label_path`'s file."""
    return folder / f"{shard.removesuffix('.tar')}.second.jsonl"


def write_labels(
    path: Path, header: LabelHeader, labels: Sequence[PseudoLabel], *, states_TD: Bits | None = None
) -> str:
    """Write a label file atomically; equal labels give equal bytes, and log-probabilities come back exactly.

    Args:
        path: From :func:`label_path` or :func:`second_path`.
        header: Without ``hidden``, which is found out here.
        labels: In the order of the shard.
        states_TD: The hidden states of all labels' tokens, ``[tokens, width]``, to be written beside it; None for none.

    Returns:
        The file's sha256.

    Raises:
        NonFiniteError: A log-probability or a hidden state is NaN or infinite.
        StageError: A file cannot be written.
    """
    for label in labels:
        numbers = (*label.token_logprobs, *([] if label.mean_logprob is None else [label.mean_logprob]))
        if wrong := [value for value in numbers if not math.isfinite(value)]:
            raise NonFiniteError(
                f"{path}: log-probabilities of {label.key!r} must be finite, got {wrong[0]}; "
                "the teacher overflows: check its weights, or set model.dtype to float32"
            )
        assert (rule := _broken_rule(label)) is None, f"{label.key}: {rule}"
    hidden = None
    if states_TD is not None:
        assert len(states_TD) == sum(label.num_tokens for label in labels)
        hidden = write_hidden(hidden_path(path), states_TD)
        fault_point("label.after_hidden", shard=header.shard)
    body = "".join(_line({**values_of(label), "num_tokens": label.num_tokens}) for label in labels).encode()
    first = {
        "version": _VERSION,
        **asdict(replace(header, hidden=hidden)),
        "num_labels": len(labels),
        "labels_sha256": hashlib.sha256(body).hexdigest(),
    }
    data = _line(first).encode() + body
    with atomic_write(path) as file:
        file.write(data)
        fault_point("label.before_rename", shard=header.shard)
    fault_point("label.after_rename", shard=header.shard)
    if hidden is None:
        hidden_path(path).unlink(missing_ok=True)  # of labels that were made with other settings
    return hashlib.sha256(data).hexdigest()


def read_labels(path: Path, *, shard_sha256: str | None = None) -> tuple[LabelHeader, list[PseudoLabel]]:
    """Header and labels of a first pass; as :func:`read_label_file`."""
    found = read_label_file(path, shard_sha256=shard_sha256)
    return found.header, found.labels


def read_label_file(path: Path, *, shard_sha256: str | None = None, first_sha256: str | None = None) -> LabelFile:
    """A whole label file, checked against the count and the hash in its header, and that its hidden states are there.

    Args:
        path: From :func:`label_path` or :func:`second_path`.
        shard_sha256: Hash in the index of the shard that it must label; None for any.
        first_sha256: Hash of the label file that it must be a second pass of; None for one of a first pass.

    Raises:
        ShardError: It is missing, cut or damaged, or labels another shard; or its hidden states are missing or others.
    """
    try:
        data = path.read_bytes()
    except OSError as cause:
        raise ShardError(f"{path} must be readable, got {cause.strerror!r}; run the label stage") from cause
    first, newline, body = data.partition(b"\n")
    header, num_labels, digest = _header(path, first + newline)
    if (found := body.count(b"\n")) != num_labels:
        raise ShardError(f"{path} must hold {num_labels} labels, got {found}; {_REMEDY}")
    if hashlib.sha256(body).hexdigest() != digest:
        raise ShardError(f"{path} must have the hash in its header, got another; it is damaged, {_REMEDY}")
    labels = list(_labels(path, body))
    if len({label.key for label in labels}) != len(labels):
        raise ShardError(f"{path} must label each utterance once, got one twice; {_REMEDY}")
    if shard_sha256 is not None and header.shard_sha256 != shard_sha256:
        raise ShardError(f"{path} must label the shard that is in the index, got another one; label again")
    if header.first_sha256 != first_sha256:
        wanted = "labels of a first pass" if first_sha256 is None else f"a second pass of {first_sha256[:12]}"
        raise ShardError(f"{path} must hold {wanted}, got one of {_shown(header.first_sha256)}; label again")
    labelled = LabelFile(path=path, sha256=hashlib.sha256(data).hexdigest(), header=header, labels=labels)
    if header.hidden is not None:
        check_hidden(hidden_path(path), header.hidden, num_tokens=labelled.num_tokens)
    return labelled


def changes(found: LabelHeader, wanted: LabelHeader) -> list[str]:
    """What labels were made from that is no more so, as ``settings.dtype is 'bfloat16', was 'float32'``. Pure.

    Engine and hidden states are not compared: settings say which are wanted.
    """
    old, new = dict(_causes(found)), dict(_causes(wanted))
    return [
        f"{name} is {_shown(new.get(name))}, was {_shown(old.get(name))}"
        for name in dict.fromkeys([*new, *old])
        if name not in new or name not in old or not _is_same(new[name], old[name])
    ]


def _causes(header: LabelHeader) -> Iterator[tuple[str, Any]]:
    yield from (("shard", header.shard), ("shard_sha256", header.shard_sha256), ("teacher", header.teacher))
    yield "first_sha256", header.first_sha256
    yield from sorted(_flat(header.settings, "settings"))


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", value


def _is_same(one: Any, other: Any) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _shown(value: Any) -> str:
    if isinstance(value, str) and len(value) == hashlib.sha256().digest_size * 2:
        return value[:_SHOWN_OF_A_HASH]
    return "nothing" if value is None else repr(value)


def _header(path: Path, line: bytes) -> tuple[LabelHeader, int, str]:
    try:
        values = json.loads(line)
        if (version := values.pop("version")) != _VERSION:
            raise ShardError(f"{path} must be of version {_VERSION}, got {version!r}; {_REMEDY}")
        num_labels, digest = int(values.pop("num_labels")), str(values.pop("labels_sha256"))
        if (hidden := values.pop("hidden")) is not None:
            hidden = HiddenFile(**hidden)
        return LabelHeader(hidden=hidden, **values), num_labels, digest
    except ShardError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as cause:
        raise ShardError(f"{path} must begin with a header, got {line[:80]!r}; {_REMEDY}") from cause


def _labels(path: Path, body: bytes) -> Iterator[PseudoLabel]:
    for number, line in enumerate(body.split(b"\n")[:-1], start=2):
        try:
            yield _label(json.loads(line))
        except (ValueError, TypeError, KeyError) as cause:
            raise ShardError(f"{path}:{number} must hold a pseudo-label, got {cause}; {_REMEDY}") from cause


def _label(values: dict[str, Any]) -> PseudoLabel:
    values["token_ids"] = tuple(values["token_ids"])
    values["token_logprobs"] = tuple(values["token_logprobs"])
    num_tokens = values.pop("num_tokens")
    label = PseudoLabel(**values)
    if label.num_tokens != num_tokens:
        raise ValueError(f"{label.num_tokens} tokens where num_tokens is {num_tokens}")
    if (rule := _broken_rule(label)) is not None:
        raise ValueError(rule)
    return label


def _broken_rule(label: PseudoLabel) -> str | None:
    """Which rule of :class:`~shards.schema.PseudoLabel` does not hold."""
    if label.ended_by not in _ENDS:
        return f"ended_by must be one of {', '.join(_ENDS)}, got {label.ended_by!r}"
    if len(label.token_logprobs) != label.num_tokens:
        return f"there must be a log-probability for each token, got {len(label.token_logprobs)} of {label.num_tokens}"
    is_empty = label.ended_by == UNREADABLE
    if is_empty != (not label.num_tokens) or is_empty != (label.mean_logprob is None):
        return f"what has no tokens must be {UNREADABLE}, and nothing else, got {label.num_tokens} in {label.ended_by}"
    if is_empty != (label.error is not None) or (is_empty and label.text):
        return f"what is {UNREADABLE} must have an error and no text, and nothing else, got {label.error!r}"
    return None


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
