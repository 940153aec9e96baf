"""Kaldi data folders: ``wav.scp``, ``segments``, ``text``, ``utt2spk`` and ``utt2lang``, one line for each key."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

from shards.errors import SourceError
from shards.places import Place
from shards.sources.fields import child_of, keyed_lines, language_of, split_word, start_of
from shards.sources.keys import Found

NAME = "kaldi"

_IN_ARCHIVE = re.compile(r".*:\d+(\[.*\])?")
# An end before the beginning, by convention -1, means the end of the recording.
_TO_THE_END = -1.0


def fits(place: Place, names: list[str] | None) -> bool:
    """A folder with ``wav.scp``."""
    return names is not None and "wav.scp" in names


def read(place: Place, spool: Path | None) -> Iterator[Found]:
    """Read a data folder; relative paths in ``wav.scp`` are so to it.

    With ``segments`` the utterances are stretches of recordings, without the recordings themselves. All files must be
    sorted by bytes, as Kaldi demands: they are read side by side, and only ``wav.scp`` is kept in memory, where there
    are segments. The split is the one that the folder's name says, if it says one (``train_clean_100``).

    Raises:
        SourceError: A line breaks a rule, or names a command (told as ``file:line``), or a file is not sorted.
    """
    names = place.names()
    texts, speakers, languages = (
        _Beside(place.child(name) if name in names else None) for name in ("text", "utt2spk", "utt2lang")
    )
    split, source = split_word(place.name), place.name
    for where, key, path, start, seconds in _utterances(place, has_segments="segments" in names):
        language = languages.get(key)
        yield Found(
            path=path,
            name=key,
            where=where,
            source=source,
            start_seconds=start,
            told_seconds=seconds,
            language=language_of(language, where),
            speaker=speakers.get(key),
            reference=texts.get(key),
            split=split,
        )
    for beside in (texts, speakers, languages):
        beside.finish()


def _utterances(place: Place, *, has_segments: bool) -> Iterator[tuple[str, str, str, float | None, float | None]]:
    recordings = _recordings(place)
    if not has_segments:
        for where, key, path in _sorted(recordings):
            yield where, key, path, None, None
        return
    paths = {key: path for _, key, path in recordings}
    for where, key, rest in _sorted(keyed_lines(place.child("segments"))):
        fields = rest.split()
        if len(fields) != 3 or fields[0] not in paths:
            raise SourceError(
                f"{where} must be an utterance, a recording of wav.scp, its beginning and its end, got {rest!r}; "
                "mend the line"
            )
        start, end = (_number(field, where) for field in fields[1:])
        if end != _TO_THE_END and end <= start_of(start, where, name="the beginning of a segment"):  # type: ignore[operator]
            raise SourceError(f"{where} must end behind its beginning at {start:g} s, got {end:g}; mend the line")
        yield where, key, paths[fields[0]], start, None if end == _TO_THE_END else round(end - start, 6)


def _recordings(place: Place) -> Iterator[tuple[str, str, str]]:
    for where, key, path in keyed_lines(place.child("wav.scp")):
        if path.endswith("|") or path.startswith("|"):
            raise SourceError(
                f"{where} must name a file, got a shell command, {path!r}; write its output to a file first: "
                "wav-copy, or utils/data/... of Kaldi"
            )
        if not path or path == "-" or _IN_ARCHIVE.fullmatch(path):
            raise SourceError(f"{where} must name a file, got {path!r}; write its audio to a file first: wav-copy")
        yield where, key, child_of(place, path, where).url


def _sorted(lines: Iterator[tuple[str, str, str]]) -> Iterator[tuple[str, str, str]]:
    last = b""
    for where, key, rest in lines:
        if (now := key.encode()) <= last:
            raise SourceError(
                f"{where} must follow in the order of bytes on {last.decode()!r}, got {key!r}; sort the file: "
                "LC_ALL=C sort -u -k 1,1"
            )
        last = now
        yield where, key, rest


class _Beside:
    """A file of what is known about keys, read along with the list of them: both are sorted."""

    def __init__(self, place: Place | None) -> None:
        self._lines = _sorted(keyed_lines(place)) if place is not None else iter(())
        self._next = next(self._lines, None)

    def get(self, key: str) -> str | None:
        """What stands behind ``key``, which must follow on the one that was asked for before."""
        while self._next is not None and self._next[1].encode() < key.encode():
            self._next = next(self._lines, None)
        return self._next[2] if self._next is not None and self._next[1] == key else None

    def finish(self) -> None:
        """Read what is left: if it is not sorted, something was missed."""
        while self._next is not None:
            self._next = next(self._lines, None)


def _number(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise SourceError(f"{where} must tell seconds as numbers, got {text!r}; mend the line")
    return number
