"""Parquet files as Hugging Face's datasets have them: a column of audio files, and others about them.

Inside such a file no recording is a stretch of bytes. So its audio is copied to the spool first, one file for each, and
what follows reads it there by offset.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import SourceError, StageError
from shards.index import INDEX, UTTERANCES
from shards.places import Place
from shards.sources.fields import (
    LANGUAGES,
    REFERENCES,
    SPEAKERS,
    language_of,
    reference_of,
    seconds_of,
    split_word,
    text_of,
    without_suffix,
)
from shards.sources.folder import holds
from shards.sources.jsonl import DURATIONS
from shards.sources.keys import Found
from shards.storage import atomic_write

NAME = "parquet"

_AUDIO, _BYTES, _PATH = "audio", "bytes", "path"
_READ = ("key", "split", *REFERENCES, *LANGUAGES, *SPEAKERS, *DURATIONS)
# Audio of this many rows is in memory at once, and whole pages of the file, which its writer made as large as it liked.
_ROWS_AT_ONCE = 16
_BUFFER_BYTES = 1 << 20


def fits(place: Place, names: list[str] | None) -> bool:
    """A parquet file, or a folder of them; not one of packed shards, whose table has no audio."""
    if names is None:
        return place.suffix == ".parquet" and place.is_file()
    if {INDEX, UTTERANCES}.issubset(names):
        return False
    return holds(place, names, ".parquet")


def read(place: Place, spool: Path | None) -> Iterator[Found]:
    """Read a file, or all parquet files in a folder and those below it, in the order of their paths.

    The split is the one that a column or the file's name says (``train-00000-of-00004.parquet``), else that of its
    folder. Where no column tells the language, the name of a folder may (``german/``).

    Raises:
        SourceError: A file is damaged, has no column of audio files, or a row breaks a rule (told as ``file: row``).
        StageError: The spool cannot be written.
    """
    if not place.is_folder():
        yield from _read_file(place, [place.stem, place.parent.name], folders=[], source=place.parent.name, spool=spool)
        return
    for name in [name for name in place.walk() if name.endswith(".parquet")]:
        parts = name.removesuffix(".parquet").split("/")[::-1]
        yield from _read_file(place.child(name), parts, folders=parts[1:], source=place.name, spool=spool)


def _read_file(
    table: Place, parts: list[str], *, folders: list[str], source: str, spool: Path | None
) -> Iterator[Found]:
    split = next(filter(None, map(split_word, parts)), None)
    folder_language = _folder_language(folders)
    offset = 0
    with table.open() as raw, _told(table):
        file = pq.ParquetFile(raw, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        column = _audio_column(file.schema_arrow, table)
        path, sizes = _spooled(file, column, table, spool) if spool else _mean_sizes(file, column, table)
        for number, row in enumerate(_rows(file, table, num_rows=len(sizes))):
            where = f"{table.url}: row {number + 1}"
            audio_path = text_of(row.pop(_AUDIO, None) or {}, (_PATH,), where)
            name = without_suffix(audio_path) if audio_path else f"{table.stem}-{number:06d}"
            has_language = any(field in row for field in LANGUAGES)
            yield Found(
                path=os.fspath(path),
                name=text_of(row, ("key",), where) or name,
                where=where,
                source=source,
                offset_bytes=offset,
                num_bytes=sizes[number],
                told_seconds=seconds_of(row, DURATIONS, where),
                language=language_of(text_of(row, LANGUAGES, where) if has_language else folder_language, where),
                speaker=text_of(row, SPEAKERS, where),
                reference=reference_of(row, where)[0],
                split=text_of(row, ("split",), where) or split,
            )
            offset += sizes[number]


def _rows(file: pq.ParquetFile, table: Place, *, num_rows: int) -> Iterator[dict[str, Any]]:
    """What is said about the audio, row by row, with the names behind numbers; and the audio's path."""
    schema = file.schema_arrow
    audio = schema.field(_AUDIO).type
    columns = [name for name in schema.names if name in _READ]
    if pa.types.is_struct(audio) and audio.get_field_index(_PATH) >= 0:
        columns.append(f"{_AUDIO}.{_PATH}")
    if not columns:
        yield from ({} for _ in range(num_rows))
        return
    labels, number = _class_labels(schema), 0
    for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE * 64, columns=columns):
        for row in batch.to_pylist():
            number += 1
            for name in labels.keys() & row.keys():
                row[name] = _label(row[name], labels[name], f"{table.url}: row {number}")
            yield row


def _audio_column(schema: pa.Schema, table: Place) -> str:
    """The column with files, as its path in the schema."""
    kind = schema.field(_AUDIO).type if _AUDIO in schema.names else None
    if kind is not None and pa.types.is_struct(kind) and (place := kind.get_field_index(_BYTES)) >= 0:
        name, kind = f"{_AUDIO}.{_BYTES}", kind.field(place).type
    else:
        name = _AUDIO
    if kind is None or not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise SourceError(
            f"{table.url} must have a column {_AUDIO} of files, as bytes or {{bytes, path}}, got "
            f"{kind or schema.names}; write it with datasets' Audio feature"
        )
    return name


def _spooled(file: pq.ParquetFile, column: str, table: Place, spool: Path) -> tuple[Path, list[int]]:
    """Copy the audio of a parquet file to one plain file, if that was not done before.

    Returns:
        The file, and the sizes of the recordings in it, one behind the other.
    """
    told = f"{table.full}\0{table.state()}\0{column}".encode(errors="surrogateescape")
    path = spool / f"{hashlib.sha256(told).hexdigest()[:32]}.bin"
    sizes_path = path.with_suffix(".sizes")
    if path.is_file() and sizes_path.is_file():
        sizes = np.fromfile(sizes_path, dtype="<i8")
        if len(sizes) == file.metadata.num_rows and sizes.sum() == path.stat().st_size:
            return path, sizes.tolist()
    sizes = []
    with atomic_write(path) as spooled:
        for data in _files(file, column, table):
            try:
                spooled.write(data)
            except OSError as cause:
                raise StageError(f"{path} must be writable, got {cause.strerror!r}; make room there") from cause
            sizes.append(len(data))
        # Before the audio has its name: with that, both are there.
        with atomic_write(sizes_path) as sizes_file:
            sizes_file.write(np.array(sizes, dtype="<i8").tobytes())
    return path, sizes


def _mean_sizes(file: pq.ParquetFile, column: str, table: Place) -> tuple[Path, list[int]]:
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    chunks = [group.column(place) for group in groups for place in range(group.num_columns)]
    num_bytes = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
    num_rows = file.metadata.num_rows
    return Path(table.url), [num_bytes // max(1, num_rows)] * num_rows


def _files(file: pq.ParquetFile, column: str, table: Place) -> Iterator[pa.Buffer]:
    number = 0
    for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[column]):
        values = batch.column(0)
        for audio in values.field(_BYTES) if pa.types.is_struct(values.type) else values:
            number += 1
            data = audio.as_buffer()
            if not data:
                raise SourceError(
                    f"{table.url}: row {number} must hold a file's bytes, got none; embed the audio: "
                    "datasets.table.embed_table_storage"
                )
            yield data


def _class_labels(schema: pa.Schema) -> dict[str, list[str]]:
    """Names behind the numbers in columns of ``ClassLabel``, which datasets writes into the file's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        labels = {name: one["names"] for name, one in features.items() if one.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}
    return {name: texts for name, texts in labels.items() if name in _READ}


def _label(value: Any, texts: list[str], where: str) -> str | None:
    if value is None or value == -1:
        return None
    if not isinstance(value, int) or not 0 <= value < len(texts):
        raise SourceError(f"{where}: a label must be one of {len(texts)}, got {value!r}; write the file again")
    return str(texts[value])


def _folder_language(folders: list[str]) -> str | None:
    for name in folders:
        try:
            if split_word(name) is None and language_of(name, ""):
                return name
        except SourceError:
            continue
    return None


@contextmanager
def _told(table: Place) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as cause:
        raise SourceError(f"{table.url} must be a parquet file, got {cause}; copy or download it again") from cause
