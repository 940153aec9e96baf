"""JSONL manifests: one JSON object per recording, with the field names of NeMo, Qwen3-ASR's fine-tuning and others."""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shards.errors import SourceError
from shards.languages import language_name
from shards.sources.keys import Found

MAX_LINE_BYTES = 1_000_000

_PATHS = ("audio", "audio_filepath", "path", "audio_path")
_REFERENCES = ("text", "reference", "transcript")
_LANGUAGES = ("language", "lang")
_SPEAKERS = ("speaker", "speaker_id")

# Qwen3-ASR's fine-tuning files: `language English<asr_text>...`, `language None<asr_text>...`.
_TAGGED = re.compile(r"\s*language\s+([^<]*?)\s*<asr_text>(.*)", re.DOTALL)


def read_manifest(path: Path) -> list[Found]:
    """Read a manifest; paths in it are relative to its folder.

    Fields: the audio as ``audio``, ``audio_filepath``, ``path`` or ``audio_path``; optional ``text``, ``reference`` or
    ``transcript``; ``language`` or ``lang``; ``speaker`` or ``speaker_id``; ``split``; ``key``; ``duration`` in
    seconds. Others are ignored.

    Raises:
        SourceError: A line breaks a rule (told as ``file:line``), or there are no lines.
    """
    found = []
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise SourceError(f"{where} must be shorter than {MAX_LINE_BYTES} bytes, got more; is it JSONL?")
            if line.strip():
                found.append(_read_line(line, path=path, where=where))
    if not found:
        raise SourceError(f"pack.inputs must each hold recordings, got none in {str(path)!r}; remove it or fill it")
    return found


def _read_line(line: bytes, *, path: Path, where: str) -> Found:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as cause:
        raise SourceError(f"{where} must be a JSON object in UTF-8, got {cause}; mend the line") from cause
    if not isinstance(row, dict):
        raise SourceError(f"{where} must be a JSON object, got {type(row).__name__}; mend the line")
    _refuse_parts_of_recordings(row, where)
    audio = _text(row, _PATHS, where)
    if audio is None:
        raise SourceError(f"{where} must name its audio as one of {', '.join(_PATHS)}, got {sorted(row)}; add it")
    _refuse_commands_and_addresses(audio, where)
    language, reference = _text(row, _LANGUAGES, where), _text(row, _REFERENCES, where)
    if reference is not None and (tagged := _TAGGED.fullmatch(reference)):
        tag, reference = tagged.groups()
        language = language or (None if tag.lower() == "none" else tag)
    try:
        name = language_name(language)
    except SourceError as cause:
        raise SourceError(f"{where}: {cause}") from cause
    return Found(
        path=os.path.join(path.parent, audio),
        name=_text(row, ("key",), where) or str(Path(audio).parent / Path(audio).stem),
        where=where,
        source=path.absolute().parent.name,
        language=name,
        speaker=_text(row, _SPEAKERS, where),
        reference="" if reference is None and _is_silent(row) else reference,
        split=_text(row, ("split",), where),
        told_seconds=_seconds(row, where),
    )


def _is_silent(row: Mapping[str, Any]) -> bool:
    """Whether a line that has no transcript says so: blank is not the same as absent."""
    return any(isinstance(row.get(name), str) for name in _REFERENCES)


def _text(row: Mapping[str, Any], names: tuple[str, ...], where: str) -> str | None:
    """The first of several fields that is there, as text; blank counts as absent."""
    for name in names:
        value = row.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if value is None:
            continue
        if not isinstance(value, str):
            raise SourceError(f"{where}: {name} must be text, got {value!r}; mend the line")
        try:
            value.encode()
        except UnicodeEncodeError as cause:
            raise SourceError(f"{where}: {name} must be valid Unicode, got half a surrogate pair; mend it") from cause
        if value.strip():
            return value.strip()
    return None


def _seconds(row: Mapping[str, Any], where: str) -> float | None:
    """How long the source says that the recording lasts; some write 0 or less where they do not know."""
    value = row.get("duration")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SourceError(f"{where}: duration must be a number of seconds, got {value!r}; mend or remove it")
    return float(value) if 0 < value < math.inf else None


def _refuse_commands_and_addresses(audio: str, where: str) -> None:
    """Kaldi's and webdataset's path notations can run commands or open connections; only files are read here."""
    is_address = re.match(r"(?i)[a-z][a-z0-9+.-]*://|(pipe|data):", audio)
    if is_address or audio.startswith("|") or audio.endswith("|") or "\0" in audio:
        raise SourceError(f"{where}: audio must be a file's path, got {audio!r}; download it or write its output first")


def _refuse_parts_of_recordings(row: Mapping[str, Any], where: str) -> None:
    if row.get("offset") not in (None, 0):
        raise SourceError(
            f"{where}: offset must be 0 or absent, got {row['offset']!r}; cut the recording into files first"
        )
