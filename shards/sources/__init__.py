"""Sources: manifests and folders of audio, read into one list of recordings with keys that are unique in the set."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from shards.errors import SourceError
from shards.languages import language_name
from shards.schema import Recording
from shards.sources import folder, manifest
from shards.sources.keys import Found, unique_keys

_READERS: tuple[tuple[str, Callable[[Path], bool], Callable[[Path], list[Found]]], ...] = (
    ("a .jsonl manifest", lambda path: path.suffix.lower() == ".jsonl" and path.is_file(), manifest.read_manifest),
    ("a folder of audio", Path.is_dir, folder.read_folder),
)


def read_sources(inputs: Sequence[str], *, default_language: str | None) -> list[Recording]:
    """Read all inputs of a run, in their order.

    Args:
        inputs: JSONL manifests and folders of audio; the kind of each is seen from what is there.
        default_language: Name or code for recordings whose source does not say (``pack.language``).

    Returns:
        The recordings, with keys that are unique in the list and depend on nothing but names inside the sources.

    Raises:
        SourceError: An input is missing, of no known kind, unreadable or empty, holds a bad line, or names a recording
            that was named before.
    """
    try:
        language = language_name(default_language)
    except SourceError as cause:
        raise SourceError(f"pack.language: {cause}") from cause
    found = [entry for value in inputs for entry in _read(value)]
    _refuse_repeats(found)
    return [
        Recording(
            path=entry.path,
            key=key,
            source=entry.source,
            language=entry.language or language,
            speaker=entry.speaker,
            reference=entry.reference,
            split=entry.split,
            told_seconds=entry.told_seconds,
        )
        for entry, key in zip(found, unique_keys(found), strict=True)
    ]


def _read(value: str) -> list[Found]:
    path = Path(value)
    try:
        for _, fits, read in _READERS:
            if fits(path):
                return read(path)
        state = "a file of another kind" if path.exists() else "nothing at that path"
    except (OSError, ValueError) as cause:
        if isinstance(cause, SourceError):
            raise
        reason = getattr(cause, "strerror", None) or cause
        raise SourceError(f"pack.inputs must be readable, got {value!r}: {reason}; mend its permissions") from cause
    kinds = " or ".join(kind for kind, _, _ in _READERS)
    raise SourceError(f"pack.inputs must each be {kinds}, got {value!r} ({state}); write a manifest or mend the path")


def _refuse_repeats(found: Sequence[Found]) -> None:
    """A recording that is named twice could land in training and in held-out at once."""
    seen: dict[str, Found] = {}
    for entry in found:
        path = os.path.normpath(Path(entry.path).absolute())
        if (first := seen.setdefault(path, entry)) is not entry:
            raise SourceError(
                f"pack.inputs must name every recording once, got {entry.path!r} at {first.where} and again at "
                f"{entry.where}; remove one"
            )
