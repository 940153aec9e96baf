"""One JSON object for each recording: the rows that manifests, and the records in WebDataset tars, are made of."""

from collections.abc import Mapping
from typing import Any

from shards.errors import SourceError
from shards.places import Place
from shards.sources.fields import (
    LANGUAGES,
    SPEAKERS,
    child_of,
    json_lines,
    language_of,
    reference_of,
    seconds_of,
    start_of,
    stretch_name,
    text_of,
    without_suffix,
)
from shards.sources.keys import Found

PATHS = ("audio", "audio_filepath", "path", "audio_path")
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
DURATIONS = ("duration", "duration_seconds")


def first_row(place: Place) -> dict[str, Any] | None:
    """The first object of a JSONL file; None if it is something else."""
    if place.suffix not in SUFFIXES or not place.is_file():
        return None
    try:
        return next((row for _, row in json_lines(place)), None)
    except SourceError:
        return None


def found_in_row(
    row: Mapping[str, Any], where: str, *, folder: Place, source: str, languages: tuple[str, ...] = LANGUAGES
) -> Found:
    """What a line of a manifest says.

    Args:
        row: The line. With an ``offset``, even one of 0, it names a stretch of the file; without, the whole file.
        where: ``file:line``.
        folder: What paths are relative to.
        source: Its name.
        languages: Names of the field with the language.

    Raises:
        SourceError: A field breaks a rule.
    """
    audio = text_of(row, PATHS, where)
    if audio is None:
        raise SourceError(f"{where} must name its audio as one of {', '.join(PATHS)}, got {sorted(row)}; add it")
    start = start_of(row.get("offset"), where, name="offset")
    seconds = seconds_of(row, DURATIONS, where)
    if start is not None and seconds is None and row.get(DURATIONS[0]) is not None:
        raise SourceError(f"{where}: duration of a stretch must be above 0, got {row[DURATIONS[0]]!r}; mend the line")
    reference, tagged_language = reference_of(row, where)
    return Found(
        path=child_of(folder, audio, where).url,
        name=text_of(row, ("key",), where) or stretch_name(without_suffix(audio), start),
        where=where,
        source=source,
        start_seconds=start,
        told_seconds=seconds,
        language=language_of(text_of(row, languages, where) or tagged_language, where),
        speaker=text_of(row, SPEAKERS, where),
        reference=reference,
        split=text_of(row, ("split",), where),
    )
