"""What a source reader finds, and the keys that it gets. Pure: no I/O."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

MAX_KEY_LENGTH = 80
"""``<key>.json`` must fit the 100 bytes of a plain tar header, with room for the suffixes below."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One recording as a source names it."""

    path: str
    name: str
    """The key that the source gives, or the path as the source writes it: what the key is made of."""
    where: str
    """File and line, or folder, for messages."""
    source: str
    language: str | None = None
    speaker: str | None = None
    reference: str | None = None
    split: str | None = None
    told_seconds: float | None = None


def clean_key(name: str) -> str:
    """``name`` in ``[a-z0-9_-]+``: folders joined by ``-``, everything else that is not allowed becomes ``_``."""
    key = re.sub(r"[^a-z0-9_-]+", "_", name.lower().replace("/", "-")).strip("_-")
    if len(key) > MAX_KEY_LENGTH:  # the end of a path says more than its beginning
        key = f"{_digest(name)}-{key[-(MAX_KEY_LENGTH - 9) :]}"
    return key or f"r-{_digest(name)}"


def unique_keys(found: Sequence[Found]) -> list[str]:
    """One key for each recording; where several would have the same one, all of them get a suffix hashed from the name.

    So the key of a recording does not depend on the order of the inputs. Equal names in sources of equal names are
    numbered in the order of their paths.
    """
    keys = [clean_key(entry.name) for entry in found]
    counts = Counter(keys)
    taken = {key for key, count in counts.items() if count == 1}
    for i in sorted(range(len(found)), key=lambda i: found[i].path):
        if counts[keys[i]] > 1:
            suffixed = unique = f"{keys[i]}-{_digest(f'{found[i].source}/{found[i].name}')}"
            number = 1
            while unique in taken:
                number += 1
                unique = f"{suffixed}-{number}"
            taken.add(unique)
            keys[i] = unique
    return keys


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]
