"""JSONL manifests, with the field names of Qwen3-ASR's fine-tuning files and of others."""

from collections.abc import Iterator
from pathlib import Path

from shards.places import Place
from shards.sources import lhotse, nemo, nemo_tarred
from shards.sources.fields import json_lines
from shards.sources.jsonl import PATHS, first_row, found_in_row
from shards.sources.keys import Found

NAME = "qwen"


def fits(place: Place, names: list[str] | None) -> bool:
    """A file of lines that is no other kind of manifest; one that ends in ``.json`` must name audio."""
    if names is not None or not place.is_file():
        return False
    if place.suffix in (".jsonl", ".jsonl.gz"):
        return not any(kind.fits(place, None) for kind in (lhotse, nemo, nemo_tarred))
    row = first_row(place)
    return row is not None and "audio_filepath" not in row and any(name in row for name in PATHS)


def read(place: Place, spool: Path | None) -> Iterator[Found]:
    """Read a manifest; paths in it are relative to its folder.

    Fields: the audio as ``audio``, ``audio_filepath``, ``path`` or ``audio_path``; optional ``text``, ``reference`` or
    ``transcript``; ``language`` or ``lang``; ``speaker`` or ``speaker_id``; ``split``; ``key``; ``duration`` in
    seconds; ``offset`` in seconds, with which the line is a stretch of the file. Others are ignored.

    Raises:
        SourceError: A line breaks a rule (told as ``file:line``).
    """
    folder = place.parent
    source = folder.name
    for where, row in json_lines(place):
        yield found_in_row(row, where, folder=folder, source=source)
