"""Files of predictions, an utterance a line: as the Open ASR Leaderboard writes them, and with more fields as ours.

``{"audio_filepath": ..., "duration": ..., "time": ..., "text": ..., "pred_text": ...}``: the name of the recording,
its seconds, the seconds that its transcription took, reference and hypothesis as they were delivered and written. Any
other field may follow; the leaderboard's programs leave it alone.

Source:
    ``write_manifest`` of ``normalizer/eval_utils.py``, huggingface/open_asr_leaderboard, commit d1e99b25 (2026-08-21).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import SourceError
from shards.places import Place
from shards.sources.fields import check_unicode, json_lines, without_suffix

AUDIO, DURATION, TIME, REFERENCE, HYPOTHESIS = "audio_filepath", "duration", "time", "text", "pred_text"
"""The leaderboard's fields, in its order."""

KEY, LANGUAGE, DETECTED_LANGUAGE = "key", "language", "detected_language"
"""Fields of ours that have a meaning in every such file."""

_WITH_PLACE = frozenset({AUDIO, REFERENCE, HYPOTHESIS, KEY, LANGUAGE, DETECTED_LANGUAGE})


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a system made of an utterance, as a file of predictions tells it."""

    key: str
    text: str
    """The hypothesis; may be empty."""
    reference: str
    """The human transcript; empty where there is none or nothing is said."""
    audio_name: str | None
    """Name or path of the recording."""
    language: str | None
    detected_language: str | None
    extra: Mapping[str, Any]
    """All other fields, unchecked: the leaderboard's ``duration`` and ``time`` are among them."""


def prediction_line(
    *,
    audio_filepath: str,
    duration: float | None,
    text: str,
    pred_text: str,
    time: float | None = None,
    extra: Mapping[str, Any] | None = None,
) -> str:
    """One line of such a file, without its end. The names are the leaderboard's.

    Args:
        audio_filepath: Name of the recording.
        duration: Its seconds.
        text: Reference.
        pred_text: Hypothesis.
        time: Seconds that the transcription took; None where they are not known, and then there is no RTFx.
        extra: Further fields, behind these.

    Raises:
        ValueError: A further field has the name of one of these, or a number is not finite.
    """
    line = {AUDIO: audio_filepath, DURATION: duration, TIME: time, REFERENCE: text, HYPOTHESIS: pred_text}
    further = extra or {}
    if taken := sorted(line.keys() & further.keys()):
        raise ValueError(f"extra must have fields of its own, got {', '.join(taken)}; rename them")
    return json.dumps({**line, **further}, ensure_ascii=False, allow_nan=False)


def read_predictions(path: Path) -> dict[str, Prediction]:
    """The predictions of a file, by key and in its order; blank lines are left out.

    The key is what the line says, or else the name of its audio file without folders and suffix.

    Raises:
        SourceError: The file cannot be read or holds no predictions, a line is longer than 1 MB or no JSON object in
            UTF-8, a field is missing or no text, or a key is there twice.
    """
    found: dict[str, Prediction] = {}
    lines: dict[str, str] = {}
    for where, row in json_lines(Place(str(path))):
        prediction = _prediction_of(row, where)
        if prediction.key in found:
            raise SourceError(
                f"{where}: key must be there once, got {prediction.key!r} again after {lines[prediction.key]}; "
                f"remove one of the lines, or give each its own {KEY}"
            )
        found[prediction.key] = prediction
        lines[prediction.key] = where
    if not found:
        raise SourceError(f"{path} must hold predictions, got none; is it the right file?")
    return found


def _prediction_of(row: Mapping[str, Any], where: str) -> Prediction:
    texts = {name: _text_of(row, name, where) for name in (REFERENCE, HYPOTHESIS)}
    for name, text in texts.items():
        if text is None:
            raise SourceError(
                f"{where} must have the field {name}, got none; add it, with an empty text if nothing is said"
            )
    audio_name = _text_of(row, AUDIO, where)
    key = _text_of(row, KEY, where) or without_suffix((audio_name or "").rpartition("/")[2])
    if not key:
        raise SourceError(f"{where} must have the field {KEY} or the name of a file in {AUDIO}, got neither; add one")
    return Prediction(
        key=key,
        text=texts[HYPOTHESIS] or "",
        reference=texts[REFERENCE] or "",
        audio_name=audio_name,
        language=_text_of(row, LANGUAGE, where),
        detected_language=_text_of(row, DETECTED_LANGUAGE, where),
        extra={name: value for name, value in row.items() if name not in _WITH_PLACE},
    )


def _text_of(row: Mapping[str, Any], name: str, where: str) -> str | None:
    """A field as it is written; None where it is missing or null."""
    value = row.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise SourceError(f"{where}: {name} must be text, got {value!r:.80}; mend the line")
    check_unicode(value, name, where)
    return value
