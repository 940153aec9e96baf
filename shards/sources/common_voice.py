"""Mozilla Common Voice: a folder for each language, with ``clips/`` and a table for each split."""

from collections.abc import Iterator
from pathlib import Path

from shards.errors import SourceError
from shards.places import Place
from shards.sources.fields import language_of, split_word
from shards.sources.keys import Found
from shards.sources.tables import fields_of, language_folders, tables_in

NAME = "common_voice"

_CLIPS, _VALIDATED = "clips", "validated.tsv"
_COLUMNS = ("client_id", "path", "sentence")


def fits(place: Place, names: list[str] | None) -> bool:
    """The folder of a language, or one of several of them."""
    return names is not None and bool(language_folders(place, names, _is_language))


def read(place: Place, spool: Path | None) -> Iterator[Found]:
    """Read the tables of the splits; only where there is none of them ``validated.tsv``, without a split.

    What is in ``validated.tsv`` and in no split is left out: its speakers may be those of dev and test, and nothing in
    the tables keeps them apart.

    Raises:
        SourceError: A line breaks a rule (told as ``file:line``).
    """
    for folder in language_folders(place, place.names(), _is_language):
        for name in tables_in(folder.names()) or [_VALIDATED]:
            split = None if name == _VALIDATED else split_word(name)
            yield from _read_table(folder.child(name), folder, split=split)


def _read_table(table: Place, folder: Place, *, split: str | None) -> Iterator[Found]:
    columns: dict[str, int] = {}
    clips, source, number = folder.child(_CLIPS), folder.parent.name, 0
    for where, fields in fields_of(table):
        if not columns:
            columns, number = {name: place for place, name in enumerate(fields)}, len(fields)
            if missing := [name for name in _COLUMNS if name not in columns]:
                raise SourceError(f"{where} must have a column {missing[0]}, got {fields}; is it of Common Voice?")
            continue
        if len(fields) != number:
            raise SourceError(f"{where} must have {number} fields between tabs, got {len(fields)}; download it again")
        path = fields[columns["path"]]
        if not path or "/" in path:
            raise SourceError(f"{where}: path must be the name of a file in {_CLIPS}, got {path!r}; download it again")
        locale = fields[columns["locale"]] if "locale" in columns else ""
        yield Found(
            path=clips.child(path).url,
            name=path.rpartition(".")[0] or path,
            where=where,
            source=f"{source}-{folder.name}",
            language=language_of(locale or folder.name, where),
            speaker=fields[columns["client_id"]] or None,
            reference=fields[columns["sentence"]].strip(),
            split=split,
        )


def _is_language(place: Place, names: list[str]) -> bool:
    return _CLIPS in names and (bool(tables_in(names)) or _VALIDATED in names)
