"""NeMo manifests: JSON lines with ``audio_filepath``, also of stretches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.places import Place
from shards.sources.fields import LANGUAGES, json_lines, text_of
from shards.sources.jsonl import first_row, found_in_row
from shards.sources.keys import Found

NAME = "nemo"

SPOKEN = (*LANGUAGES, "source_lang")
"""Fields with the language of the audio."""


def fits(place: Place, names: list[str] | None) -> bool:
    """A file whose first line names an ``audio_filepath`` that is not in a tar."""
    row = first_row(place) if names is None else None
    return row is not None and "audio_filepath" in row and "shard_id" not in row


def read(place: Place, spool: Path | None) -> Iterator[Found]:
    """Read a manifest; paths in it are relative to its folder.

    Raises:
        SourceError: A line breaks a rule (told as ``file:line``).
    """
    folder = place.parent
    source = folder.name
    for where, row in rows(place):
        yield found_in_row(row, where, folder=folder, source=source, languages=SPOKEN)


def rows(manifest: Place) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a manifest without those that NeMo marks as left out (``_skipme``).

    The text of a line whose ``source_lang`` and ``target_lang`` differ is a translation, and left out.
    """
    for where, row in json_lines(manifest):
        if row.get("_skipme"):
            continue
        spoken, written = (text_of(row, (name,), where) for name in ("source_lang", "target_lang"))
        if spoken and written and spoken != written:
            row["text"] = None
        yield where, row
