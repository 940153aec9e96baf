"""Test sets that the field measures on, by name: what reads them, and where they lie in what people download.

A name says source, split and language. Archives are unpacked in many places, so a set is looked for in the folder that
is named and in those below it that are called like the corpus; it is told from its neighbours by its folder's name.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from shards.errors import ConfigError, SourceError
from shards.languages import language_name
from shards.places import Place
from shards.sources import AUTO, common_voice, fleurs, librispeech, vivos

# Of LibriSpeech (openslr.org/12) and Mini LibriSpeech (openslr.org/31); what they train on is no test set.
_LIBRISPEECH_SPLITS = ("dev-clean", "dev-other", "test-clean", "test-other", "dev-clean-2")
_TEST = "test"

_READERS = {reader.NAME: reader for reader in (vivos, fleurs, common_voice)}
_PREFIXES = {
    "librispeech-": librispeech.NAME,
    "vivos-": vivos.NAME,
    "fleurs-": fleurs.NAME,
    "common-voice-": common_voice.NAME,
}
# How folders are called that corpora are unpacked into. FLEURS lies in `data` where it is downloaded from the hub.
_AROUND = {
    librispeech.NAME: re.compile(r"(?i).*librispeech.*"),
    vivos.NAME: re.compile(r"(?i).*vivos.*"),
    fleurs.NAME: re.compile(r"(?i).*fleurs.*|data"),
    common_voice.NAME: re.compile(r"(?i)cv|cv-corpus.*|.*common.?voice.*"),
}
_LEVELS = 3
# What the folder of a set holds, beside what its reader asks for: the one around it may be called the same.
_HOLDS = {vivos.NAME: "waves", fleurs.NAME: "audio", common_voice.NAME: "clips"}


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownSet:
    """What a name says."""

    source: str
    """The kind of source that reads it: a module of :mod:`shards.sources`."""
    language: str
    """One of the model's language names."""
    folder: str
    """Of the split (``dev-clean-2``), or of the language as the corpus calls it (``vi_vn``) or as ``vi`` does."""
    splits: tuple[str, ...] | None
    """The source's names of what is scored of that folder; None is all of it."""


def known_set(name: str, *, source: str = AUTO) -> KnownSet | None:
    """What a test set's name says; None where it says nothing, or ``source`` is another one than that of the name.

    ``librispeech-<split>``, ``vivos-test``, ``fleurs-<language>`` and ``common-voice-<locale>`` are known; languages
    are codes or names, in lower case, as :func:`~shards.languages.language_name` takes them.

    Raises:
        ConfigError: The name begins as a known one does and goes on otherwise: all that lies there would be scored.
    """
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
    if prefix is None or source not in (AUTO, _PREFIXES[prefix]):
        return None
    kind, rest = _PREFIXES[prefix], name.removeprefix(prefix)
    if kind == librispeech.NAME and rest in _LIBRISPEECH_SPLITS:
        return KnownSet(source=kind, language="English", folder=rest, splits=None)
    if kind == vivos.NAME and rest == _TEST:
        return KnownSet(source=kind, language="Vietnamese", folder=rest, splits=None)
    if kind in (fleurs.NAME, common_voice.NAME) and (language := _language(rest)):
        return KnownSet(source=kind, language=language, folder=rest, splits=(_TEST,))
    choices = {librispeech.NAME: f"one of {', '.join(_LIBRISPEECH_SPLITS)}", vivos.NAME: _TEST}
    choice = choices.get(kind, "the code of one of the model's languages")
    raise ConfigError(
        f"score.sets names must go on after {prefix} with {choice}, got {name!r}; mend it, or give the set another name"
    )


def begins_as_known(name: str) -> bool:
    """Whether a name promises a known set, or one like it."""
    return name.startswith(tuple(_PREFIXES))


def find_known(known: KnownSet, place: Place, *, setting: str) -> Place:
    """The folder of a known set: a place itself, or what lies below it as the unpacked archive has it.

    Args:
        known: The set.
        place: The folder of the split or language, that of the corpus, or one that this is in.
        setting: What the place is called in messages.

    Raises:
        SourceError: Nothing is there, there is no such folder below it, or there are several.
    """
    if not place.is_folder():
        state = "a file" if place.exists() else "nothing at that path"
        raise SourceError(f"{setting} must be a folder, got {place.url!r} ({state}); unpack the archive, mend the path")
    # A folder that links lead to as well is one.
    found = list({_real(folder): folder for folder in _candidates(known, place, _LEVELS)}.values())
    exact = [folder for folder in found if _plain(folder.name) == _plain(known.folder)]
    chosen = exact or found
    if len(chosen) == 1:
        return chosen[0]
    if not chosen:
        raise SourceError(
            f"{setting} must hold the folder of {known.folder} of {known.source}, or be it, got {place.url!r} without "
            "one; unpack the archive there, mend the path, or set the source for another form of it"
        )
    places = " and ".join(folder.url for folder in chosen)
    raise SourceError(f"{setting} must hold {known.folder} of {known.source} once, got {places}; name one of them")


def _candidates(known: KnownSet, place: Place, levels: int) -> Iterator[Place]:
    """Folders of the set's name that its source can read, from the outer ones inwards."""
    folders = place.folders()
    if _is_called(known, place.name) and _is_set(known, place, folders):
        yield place
        return
    for name in folders:
        if levels and (_is_called(known, name) or _AROUND[known.source].fullmatch(name)):
            yield from _candidates(known, place.child(name), levels - 1)


def _real(place: Place) -> str:
    return place.url if place.is_remote else os.path.realpath(place.url)


def _is_set(known: KnownSet, place: Place, folders: list[str]) -> bool:
    if known.source == librispeech.NAME:  # speakers are numbers
        return bool(folders) and all(name.isdigit() for name in folders)
    return _HOLDS[known.source] in folders and _READERS[known.source].fits(place, place.names())


def _is_called(known: KnownSet, name: str) -> bool:
    if known.splits is None:
        return name == known.folder
    return _plain(name) == _plain(known.folder) or _language(name) == known.language


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def _language(code: str) -> str | None:
    try:
        return language_name(code)
    except SourceError:
        return None
