"""FLEURS: a folder for each language (``vi_vn``), with ``audio/<split>/*.wav`` and a table for each split."""

from collections.abc import Collection, Iterator
from pathlib import Path

from shards.errors import SourceError
from shards.places import Place
from shards.schema import SAMPLE_RATE_HZ
from shards.sources.fields import language_of
from shards.sources.keys import Found
from shards.sources.tables import fields_of, language_folders, tables_in

NAME = "fleurs"

# Number of the sentence, file, transcript as written, transcript, its characters, samples at 16 kHz, gender.
_NUM_COLUMNS, _FILE, _TRANSCRIPT, _SAMPLES = 7, 1, 3, 5


def fits(place: Place, names: list[str] | None) -> bool:
    """The folder of a language, or one of several of them."""
    return names is not None and bool(language_folders(place, names, _is_language))


def read(place: Place, spool: Path | None, splits: Collection[str] | None = None) -> Iterator[Found]:
    """Read the tables, which have no header. The language is that of the folder's name; speakers are not told.

    Args:
        place: As :func:`fits` takes it.
        spool: Not used.
        splits: What is wanted; the audio of other splits may still be packed, and they are left out then. None: all.

    Raises:
        SourceError: A line breaks a rule (told as ``file:line``), the language is none of the model's, or the audio is
            still packed.
    """
    for folder in language_folders(place, place.names(), _is_language):
        language = language_of(folder.name, folder.url)
        audio = folder.child("audio")
        unpacked = audio.folders()
        for table in tables_in(folder.names()):
            split = table.removesuffix(".tsv")
            if split not in unpacked:
                if splits is not None and split not in splits:
                    continue
                raise SourceError(f"{audio.url} must have a folder {split}, got none; unpack {split}.tar.gz there")
            yield from _read_table(folder.child(table), audio.child(split), language=language, split=split)


def _read_table(table: Place, audio: Place, *, language: str | None, split: str) -> Iterator[Found]:
    code, source = table.parent.name, table.parent.parent.name
    for where, fields in fields_of(table):
        if len(fields) != _NUM_COLUMNS or not fields[_SAMPLES].isascii() or not fields[_SAMPLES].isdigit():
            raise SourceError(
                f"{where} must have {_NUM_COLUMNS} fields between tabs, the sixth a number, got {fields}; "
                "download it again"
            )
        name = fields[_FILE]
        if not name or "/" in name:
            raise SourceError(f"{where} must name a file in {audio.url}, got {name!r}; download it again")
        yield Found(
            path=audio.child(name).url,
            name=f"{code}/{name.rpartition('.')[0] or name}",
            where=where,
            source=f"{source}-{code}",
            told_seconds=int(fields[_SAMPLES]) / SAMPLE_RATE_HZ or None,
            language=language,
            reference=fields[_TRANSCRIPT].strip(),
            split=split,
        )


def _is_language(place: Place, names: list[str]) -> bool:
    return "audio" in names and "clips" not in names and bool(tables_in(names))
