"""What a source reader finds, and the keys that it gets. Pure: no I/O."""

import hashlib
import re
from dataclasses import dataclass

MAX_KEY_LENGTH = 72
"""``<key>.json`` must fit the 100 bytes of a plain tar header, with room for both suffixes below."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One recording as a source names it; the fields that :class:`~shards.schema.Recording` has too mean the same."""

    path: str
    name: str
    """The key that the source gives, or the path as the source writes it: what the key is made of."""
    where: str
    """File and line, or folder, for messages."""
    source: str
    offset_bytes: int | None = None
    num_bytes: int | None = None
    start_seconds: float | None = None
    told_seconds: float | None = None
    language: str | None = None
    speaker: str | None = None
    reference: str | None = None
    split: str | None = None
    audio_name: str | None = None
    json_offset: int | None = None
    json_bytes: int | None = None


def clean_key(name: str) -> str:
    """``name`` in ``[a-z0-9_-]+``: folders joined by ``-``, all else that is not allowed becomes one ``_``.

    There are never two ``_`` in a row, so that no key looks like one of :func:`piece_key`.
    """
    key = re.sub(r"[^a-z0-9-]+", "_", name.lower().replace("/", "-")).strip("_-")
    if len(key) > MAX_KEY_LENGTH:  # the end of a path says more than its beginning
        key = f"{_digest(name)}-{key[-(MAX_KEY_LENGTH - 9) :]}"
    return key or f"r-{_digest(name)}"


def suffixed_key(key: str, source: str, name: str) -> str:
    """The key of one of several recordings that have the same clean one; it does not depend on the others.

    Args:
        key: The clean one.
        source: Of the recording, as its name: what tells it from the others.
        name: What the key was made of.
    """
    return f"{key}-{_digest(f'{source}/{name}')}"


def piece_key(key: str, number: int) -> str:
    """The key of a piece of a recording that was cut, from 0 on: ``<key>__0000``, in the order of their names."""
    return f"{key}__{number:04d}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]
