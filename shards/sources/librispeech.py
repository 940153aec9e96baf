"""LibriSpeech's tree, and that of Multilingual LibriSpeech (MLS)."""

import re
from collections.abc import Iterator
from pathlib import Path

from shards.errors import SourceError
from shards.places import Place
from shards.sources.fields import keyed_lines, language_of, split_word
from shards.sources.folder import is_audio
from shards.sources.keys import Found

NAME = "librispeech"

_SPLIT = re.compile(r"(train|dev|test)-(clean|other)(-\d+)?")
_MLS = re.compile(r"(?i)mls_([a-z]+?)(_opus)?")
_MLS_SPLITS = ("train", "dev", "test")
_TRANSCRIPTS = "transcripts.txt"
_LANGUAGE = "English"


def fits(place: Place, names: list[str] | None) -> bool:
    """LibriSpeech, one of its splits, MLS, or one of its languages or splits."""
    if names is None:
        return False
    is_split = _SPLIT.fullmatch(place.name) is not None and all(name.isdigit() for name in place.folders())
    is_root = any(_SPLIT.fullmatch(name) or _MLS.fullmatch(name) for name in place.folders())
    return is_split or is_root or _is_mls_split(names) or _is_mls_language(place, names)


def read(place: Place, spool: Path | None) -> Iterator[Found]:
    """Read all splits that are there.

    LibriSpeech is ``<split>/<speaker>/<chapter>/*.flac`` with ``*.trans.txt``, its language English,
    ``train-clean-100`` a part of ``train``. MLS is ``mls_<language>/<split>/transcripts.txt`` with
    ``audio/<speaker>/<book>/*.flac`` (or ``.opus``); a folder of another name has the language of ``pack.language``.

    Raises:
        SourceError: A line breaks a rule (told as ``file:line``), or a folder cannot be read.
    """
    names = place.names()
    if _is_mls_split(names):
        yield from _read_mls_split(place, language=_mls_language(place.parent))
    elif _SPLIT.fullmatch(place.name):
        yield from _read_split(place)
    elif _is_mls_language(place, names):
        yield from _read_mls(place)
    else:
        for name in place.folders():
            if _SPLIT.fullmatch(name):
                yield from _read_split(place.child(name))
            elif _MLS.fullmatch(name):
                yield from _read_mls(place.child(name))


def _read_split(folder: Place) -> Iterator[Found]:
    split = split_word(folder.name)
    for speaker in folder.folders():
        for chapter in folder.child(speaker).folders():
            place = folder.child(speaker).child(chapter)
            names = place.names()
            texts = {
                key: (where, text)
                for name in names
                if name.endswith(".trans.txt")
                for where, key, text in keyed_lines(place.child(name))
            }
            audio = {Path(name).stem: name for name in names if is_audio(name)}
            if missing := sorted(texts.keys() - audio.keys()):
                raise SourceError(
                    f"{texts[missing[0]][0]} must be about audio in its folder, got {missing[0]!r}; "
                    "copy the folder again"
                )
            for key, name in audio.items():
                where, text = texts.get(key, (place.url, None))
                yield Found(
                    path=place.child(name).url,
                    name=key,
                    where=where,
                    source=folder.parent.name,
                    language=_LANGUAGE,
                    speaker=speaker,
                    reference=text,
                    split=split,
                )


def _read_mls(folder: Place) -> Iterator[Found]:
    language = _mls_language(folder)
    for name in [name for name in folder.folders() if name in _MLS_SPLITS]:
        yield from _read_mls_split(folder.child(name), language=language)


def _read_mls_split(folder: Place, *, language: str | None) -> Iterator[Found]:
    suffix = None
    for where, key, text in keyed_lines(folder.child(_TRANSCRIPTS)):
        parts = key.split("_")
        if len(parts) != 3 or not all(part.isalnum() for part in parts):
            raise SourceError(f"{where} must begin with <speaker>_<book>_<number>, got {key!r}; is it of MLS?")
        stem = f"audio/{parts[0]}/{parts[1]}/{key}"
        if suffix is None:  # one for all: the corpus is too large to look for each
            suffix = ".opus" if folder.child(f"{stem}.opus").exists() else ".flac"
        yield Found(
            path=folder.child(stem + suffix).url,
            name=key,
            where=where,
            source=folder.parent.name,
            language=language,
            speaker=parts[0],
            reference=text,
            split=split_word(folder.name),
        )


def _mls_language(folder: Place) -> str | None:
    match = _MLS.fullmatch(folder.name)
    return language_of(match[1], folder.url) if match else None


def _is_mls_split(names: list[str]) -> bool:
    return _TRANSCRIPTS in names and "audio" in names


def _is_mls_language(place: Place, names: list[str]) -> bool:
    return any(name in names and _is_mls_split(place.child(name).names()) for name in _MLS_SPLITS)
