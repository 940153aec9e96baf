"""Sources: manifests, corpora and folders of audio, of each kind one module, read as a stream of recordings."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from shards.errors import SourceError
from shards.languages import language_name
from shards.places import Place
from shards.sources import (
    common_voice,
    fleurs,
    folder,
    kaldi,
    lhotse,
    lhotse_shar,
    librispeech,
    nemo,
    nemo_tarred,
    parquet,
    qwen,
    vivos,
    webdataset,
)
from shards.sources.keys import Found
from shards.sources.repeats import Repeats


class _Reader(Protocol):
    @property
    def NAME(self) -> str:
        """What ``pack.source`` calls this kind."""
        ...

    def fits(self, place: Place, names: list[str] | None) -> bool:
        """Whether a place looks like this kind; ``names`` is what is in it, None for a file."""
        ...

    def read(self, place: Place, spool: Path | None) -> Iterator[Found]:
        """The recordings of a place of this kind, in an order that depends on nothing but it."""
        ...


_PLAIN: _Reader = folder
_SPECIAL: tuple[_Reader, ...] = (
    *(qwen, nemo, lhotse, kaldi, librispeech, vivos, common_voice, fleurs, parquet, nemo_tarred, lhotse_shar),
    webdataset,
)
# Audio beside these would be left out without a word.
_CONTAINERS: tuple[_Reader, ...] = (parquet, webdataset)
_READERS = {reader.NAME: reader for reader in (_PLAIN, *_SPECIAL)}

AUTO = "auto"
KINDS = (AUTO, *_READERS)
"""What ``pack.source`` may be."""

# NeMo's and webdataset's notations for many files in one name.
_PATTERN = re.compile(r"_OP_.*_CL_|\{.*\.\..*\}")


def read_found(
    inputs: Sequence[str],
    *,
    default_language: str | None,
    kind: str = AUTO,
    spool: Path | None,
    setting: str = "pack.inputs",
    splits: Collection[str] | None = None,
) -> Iterator[Found]:
    """Read all inputs of a run, in their order, as a stream: what is kept of each recording is 8 bytes.

    Args:
        inputs: Paths and addresses.
        default_language: Name or code for recordings whose source does not say (``pack.language``).
        kind: One of :data:`KINDS`; ``auto`` sees it from what is there, for each input by itself.
        spool: Folder for audio that lies in files of which it is no stretch of bytes; None to look only: such audio
            is then named by its file, and its size is the mean of the file's.
        setting: What the inputs are called in messages.
        splits: The source's names of what is wanted: an archive of any other split need not be unpacked. Recordings of
            others may come all the same.

    Raises:
        SourceError: An input is missing, of no known kind or of several, unreadable or empty, holds a bad line, or
            names a recording that was named before.
        ShardError: A tar is damaged.
    """
    try:
        language = language_name(default_language)
    except SourceError as cause:
        raise SourceError(f"pack.language: {cause}") from cause
    if kind not in KINDS:
        raise SourceError(f"pack.source must be one of {', '.join(KINDS)}, got {kind!r}")
    repeats = Repeats(setting)
    for value in inputs:
        is_empty = True
        for found in _read(value, kind, spool, setting, splits):
            repeats.add(found)
            is_empty = False
            yield found if found.language or not language else _in_language(found, language)
        if is_empty:
            raise SourceError(f"{setting} must each hold recordings, got none in {value!r}; remove it or fill it")
    repeats.check()


def _read(value: str, kind: str, spool: Path | None, setting: str, splits: Collection[str] | None) -> Iterator[Found]:
    try:
        place = Place.of(value)
        if place.is_file():
            names = None
        elif place.is_folder():
            names = place.names()
        else:
            raise _no_source(place, setting)
        reader = _detect(place, names, setting) if kind == AUTO else _READERS[kind]
    except SourceError as cause:
        if str(cause).startswith(setting):
            raise
        raise SourceError(f"{setting}: {cause}") from cause
    # Of what is read by folder, only here has each split an archive of its own beside a table that is always there.
    return fleurs.read(place, spool, splits) if reader is fleurs else reader.read(place, spool)


def _detect(place: Place, names: list[str] | None, setting: str) -> _Reader:
    fitting = [reader for reader in _SPECIAL if reader.fits(place, names)]
    if any(reader in _CONTAINERS for reader in fitting) and any(folder.is_audio(name) for name in names or []):
        fitting.append(_PLAIN)
    if len(fitting) > 1:
        kinds = " and ".join(reader.NAME for reader in fitting)
        raise SourceError(
            f"{setting} must each be of one kind, got {place.url!r}, which looks like {kinds}; set pack.source"
        )
    if fitting:
        return fitting[0]
    if _PLAIN.fits(place, names):
        return _PLAIN
    raise _no_source(place, setting)


def _no_source(place: Place, setting: str) -> SourceError:
    state = "a file of another kind" if place.exists() else "nothing at that path"
    remedy = "name the folder or the manifest" if _PATTERN.search(place.url) else "write a manifest or mend the path"
    kinds = ", ".join(_READERS)
    return SourceError(f"{setting} must each be a source ({kinds}), got {place.url!r} ({state}); {remedy}")


def _in_language(found: Found, language: str) -> Found:
    return replace(found, language=language)
