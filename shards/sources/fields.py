"""What a source says about a recording, checked: texts, seconds, languages, splits; and its files of lines."""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from shards.errors import SourceError
from shards.languages import language_name
from shards.places import Place

REFERENCES = ("text", "reference", "transcript", "transcription", "sentence", "normalized_text")
LANGUAGES = ("language", "lang", "locale", "lang_id")
SPEAKERS = ("speaker", "speaker_id", "client_id")

# Qwen3-ASR's fine-tuning files: `language English<asr_text>...`, `language None<asr_text>...`.
_TAGGED = re.compile(r"\s*language\s+([^<]*?)\s*<asr_text>(.*)", re.DOTALL)
_SPLIT = re.compile(r"(?<![a-z])(train|training|dev|val|valid|validation|heldout|test|eval)(?![a-z])")
_SPLIT_WORDS = {"training": "train", "val": "dev", "valid": "dev", "validation": "dev", "eval": "test"}


def json_object(line: bytes, where: str) -> dict[str, Any]:
    """A JSON object in UTF-8.

    Raises:
        SourceError: It is something else.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as cause:
        raise SourceError(f"{where} must be a JSON object in UTF-8, got {cause}; mend the line") from cause
    if not isinstance(row, dict):
        raise SourceError(f"{where} must be a JSON object, got {type(row).__name__}; mend the line")
    return row


def json_lines(place: Place) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with its ``file:line``; blank lines are left out.

    Raises:
        SourceError: A line is something else, or the file cannot be read.
    """
    for number, line in place.lines():
        if line.strip():
            where = f"{place.url}:{number}"
            yield where, json_object(line, where)


def text_lines(place: Place) -> Iterator[tuple[str, str]]:
    """The lines of a text file in UTF-8, each with its ``file:line``; blank lines are left out.

    Raises:
        SourceError: A line is not UTF-8, or the file cannot be read.
    """
    for number, line in place.lines():
        where = f"{place.url}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as cause:
            raise SourceError(f"{where} must be in UTF-8, got {cause}; convert the file") from cause
        if text.strip():
            yield where, text


def keyed_lines(place: Place) -> Iterator[tuple[str, str, str]]:
    """The lines of a file of ``<key> <all else>``: ``file:line``, key, and all else, which may be blank."""
    for where, line in text_lines(place):
        key, *rest = line.split(maxsplit=1)
        yield where, key, rest[0].strip() if rest else ""


def text_of(row: Mapping[str, Any], names: tuple[str, ...], where: str) -> str | None:
    """The first of several fields that is there, as text; blank counts as absent.

    Raises:
        SourceError: It is something else, or not valid Unicode.
    """
    for name in names:
        value = row.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if value is None:
            continue
        if not isinstance(value, str):
            raise SourceError(f"{where}: {name} must be text, got {value!r}; mend the line")
        check_unicode(value, name, where)
        if value.strip():
            return value.strip()
    return None


def check_unicode(text: str, name: str, where: str) -> None:
    """See that a field can be written again: JSON may hold what is no text.

    Raises:
        SourceError: It has half a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as cause:
        raise SourceError(f"{where}: {name} must be valid Unicode, got half a surrogate pair; mend it") from cause


def reference_of(row: Mapping[str, Any], where: str) -> tuple[str | None, str | None]:
    """The human transcript, and the language that Qwen3-ASR's fine-tuning files tell in front of it.

    Returns:
        None as transcript where there is none; blank where the source says that nothing is said.
    """
    reference = text_of(row, REFERENCES, where)
    if reference is None:
        return ("" if any(isinstance(row.get(name), str) for name in REFERENCES) else None), None
    if tagged := _TAGGED.fullmatch(reference):
        language, reference = tagged.groups()
        return reference, None if language.lower() == "none" else language
    return reference, None


def language_of(value: str | None, where: str) -> str | None:
    """The model's name of a language that a source names.

    Raises:
        SourceError: It is not one of the model's languages.
    """
    try:
        return language_name(value)
    except SourceError as cause:
        raise SourceError(f"{where}: {cause}") from cause


def seconds_of(row: Mapping[str, Any], names: tuple[str, ...], where: str) -> float | None:
    """How long the source says that a recording lasts; some write 0 or less where they do not know.

    Raises:
        SourceError: It is no number.
    """
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SourceError(f"{where}: {names[0]} must be a number of seconds, got {value!r}; mend or remove it")
    return float(value) if 0 < value <= sys.float_info.max else None


def start_of(value: Any, where: str, *, name: str) -> float | None:
    """Where a stretch begins, in seconds; None where the source says nothing.

    Raises:
        SourceError: It is no number, or below 0.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
        raise SourceError(f"{where}: {name} must be a number of seconds from 0, got {value!r}; mend the line")
    return float(value)


def stretch_name(name: str, start_seconds: float | None) -> str:
    """The name of a stretch of a recording that has no name of its own: with its beginning in milliseconds."""
    return name if start_seconds is None else f"{name}-{round(1000 * start_seconds):08d}"


def child_of(folder: Place, relative: str, where: str) -> Place:
    """A file that a line names relative to a folder.

    Raises:
        SourceError: It may not be named there.
    """
    try:
        return folder.child(relative)
    except SourceError as cause:
        raise SourceError(f"{where}: {cause}") from cause


def without_suffix(path: str) -> str:
    """A path without the suffix of its last part."""
    folder, slash, base = path.rpartition("/")
    stem, dot, _ = base.rpartition(".")
    return folder + slash + (stem if dot and stem else base)


def split_word(name: str) -> str | None:
    """``train``, ``dev`` or ``test`` if a name says one of them: ``train-clean-100``, ``cuts_dev``, ``validation``."""
    words = {_SPLIT_WORDS.get(word, word) for word in _SPLIT.findall(name.lower())}
    return words.pop() if len(words) == 1 else None
