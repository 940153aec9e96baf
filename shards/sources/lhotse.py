"""Lhotse cuts: JSON lines, each a stretch of one recording with what is said in it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shards.errors import SourceError
from shards.places import Place
from shards.sources.fields import (
    child_of,
    json_lines,
    language_of,
    reference_of,
    seconds_of,
    split_word,
    start_of,
    text_of,
)
from shards.sources.jsonl import first_row
from shards.sources.keys import Found

NAME = "lhotse"

_CUTS = ("MonoCut", "MultiCut", "MixedCut", "PaddingCut", "DataCut")
_REMEDY = "write the audio of the cuts to files first: cuts.save_audios"
_FILES = ("cuts.jsonl", "cuts.jsonl.gz")
# Cuts are rounded to samples, or to 8 digits.
_SLACK_SECONDS = 1e-3


def fits(place: Place, names: list[str] | None) -> bool:
    """A file whose first line is a cut, a recording or a supervision; or a folder with ``cuts.jsonl.gz``."""
    if names is not None:
        return any(name in names for name in _FILES) and not any(name.endswith(".tar") for name in names)
    row = first_row(place)
    if row is None:
        return False
    is_cut = row.get("type") in _CUTS or ("recording" in row and "supervisions" in row)
    return is_cut or ("sources" in row and "id" in row) or ("recording_id" in row and "id" in row)


def read(place: Place, spool: Path | None) -> Iterator[Found]:
    """Read cuts of one recording each (``MonoCut``); relative paths are so to the manifest's folder.

    The split is the one that the name of the manifest says, if it says one (``cuts_dev.jsonl.gz``). Several
    supervisions of a cut are joined in the order of their beginnings.

    Raises:
        SourceError: A cut is of another kind, or not of a file (told as ``file:line``).
    """
    if place.is_folder():
        place = place.child(next((name for name in place.names() if name in _FILES), _FILES[0]))
    folder, split = place.parent, split_word(place.stem)
    for where, row in json_lines(place):
        recording = recording_of(row, where)
        yield found_in_cut(
            row,
            recording,
            where,
            path=child_of(folder, _path(recording, where), where).url,
            source=folder.name,
            split=split,
        )


def recording_of(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The recording that a line is a cut of.

    Raises:
        SourceError: The line is no cut of one recording, or of one that is changed when it is loaded.
    """
    if "recording" not in row and "type" not in row:
        raise SourceError(
            f"{where} must be a cut, got a {'recording' if 'sources' in row else 'supervision'}; make cuts of both: "
            "lhotse cut simple -r RECORDINGS -s SUPERVISIONS CUTS"
        )
    recording = row.get("recording")
    if row.get("type", "MonoCut") != "MonoCut" or not isinstance(recording, dict):
        raise SourceError(f"{where}: type must be MonoCut with a recording, got {row.get('type')!r}; {_REMEDY}")
    transforms = recording.get("transforms") or []
    names = [one.get("name") if isinstance(one, dict) else one for one in transforms]
    if changed := [name for name in names if name != "Resample"]:
        raise SourceError(f"{where}: transforms must be absent, got {changed[0]!r}; {_REMEDY}")
    channels, channel = recording.get("channel_ids") or [0], row.get("channel", 0)
    if len(channels) > 1:
        raise SourceError(
            f"{where}: a recording must have one channel, got channel {channel!r} of {channels}; {_REMEDY}"
        )
    return recording


def found_in_cut(
    row: Mapping[str, Any], recording: Mapping[str, Any], where: str, *, path: str, source: str, split: str | None
) -> Found:
    """What a cut says, given where its audio is.

    Raises:
        SourceError: A field breaks a rule.
    """
    start, seconds = start_of(row.get("start"), where, name="start"), seconds_of(row, ("duration",), where)
    whole = seconds_of(recording, ("duration",), where)
    if start is None or seconds is None:
        raise SourceError(f"{where} must tell start and duration of a cut, got {sorted(row)}; mend the line")
    is_whole = start == 0 and whole is not None and abs(seconds - whole) <= _SLACK_SECONDS
    supervisions = row.get("supervisions") or []
    if not isinstance(supervisions, list) or not all(isinstance(one, dict) for one in supervisions):
        raise SourceError(f"{where}: supervisions must be a list of objects, got {supervisions!r}; mend the line")
    supervisions = sorted(supervisions, key=lambda one: start_of(one.get("start", 0.0), where, name="start") or 0.0)
    name = text_of(row, ("id",), where)
    if name is None:
        raise SourceError(f"{where} must have an id, got {sorted(row)}; add it")
    return Found(
        path=path,
        name=name,
        where=where,
        source=source,
        start_seconds=None if is_whole else start,
        told_seconds=seconds,
        language=language_of(_common(supervisions, "language", where), where),
        speaker=_common(supervisions, "speaker", where),
        reference=_reference(supervisions, where),
        split=split,
    )


def _path(recording: Mapping[str, Any], where: str) -> str:
    sources = recording.get("sources")
    if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], dict):
        raise SourceError(f"{where}: a recording must have one source, got {sources!r}; {_REMEDY}")
    kind, path = sources[0].get("type"), sources[0].get("source")
    if kind != "file" or not isinstance(path, str):
        # A command would be run by a shell; `memory` holds the audio itself; `shar` stands for what is in a tar.
        raise SourceError(
            f"{where}: type of a recording's source must be 'file', got {kind!r}; {_REMEDY}, or name the folder if "
            "this is a Lhotse Shar"
        )
    return path


def _common(supervisions: Sequence[Mapping[str, Any]], name: str, where: str) -> str | None:
    """What all supervisions of a cut say alike."""
    values = {text_of(one, (name,), where) for one in supervisions}
    return values.pop() if len(values) == 1 else None


def _reference(supervisions: Sequence[Mapping[str, Any]], where: str) -> str | None:
    texts = [reference_of(one, where)[0] for one in supervisions]
    if not texts or any(text is None for text in texts):
        return None
    return " ".join(text for text in texts if text)
