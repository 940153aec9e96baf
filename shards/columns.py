"""Records by the million: an Arrow table that is a sequence of dataclasses, each made only when it is asked for."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, Generic, Self, TypeVar, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Record = TypeVar("Record")

_TYPES = {
    "str": pa.string(),
    "str | None": pa.string(),
    "int": pa.int64(),
    "int | None": pa.int64(),
    "float": pa.float64(),
    "float | None": pa.float64(),
}
# The names of files need not be UTF-8, which Arrow's texts must be.
_PATHS = ("path",)
_ROWS_AT_ONCE = 8_192


def schema_of(kind: type) -> pa.Schema:
    """One column for each field of a dataclass of texts and numbers, in their order."""
    kinds = {
        field.name: field.type.__name__ if isinstance(field.type, type) else str(field.type) for field in fields(kind)
    }
    return pa.schema([(name, pa.binary() if name in _PATHS else _TYPES[text]) for name, text in kinds.items()])


class Columns(Sequence[Record], Generic[Record]):
    """Records of one dataclass in columns."""

    def __init__(self, kind: type[Record], table: pa.Table) -> None:
        """Take a table that has the fields of ``kind`` as columns; repeated texts may be dictionaries."""
        self._kind, self.table = kind, table

    @classmethod
    def of(cls, kind: type[Record], records: Sequence[Record]) -> Self:
        """Columns of records that are in memory."""
        return cls(kind, pa.Table.from_batches([batch_of(kind, records)]))

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> Self: ...
    def __getitem__(self, place: int | slice) -> Record | Self:
        if not isinstance(place, slice):
            return next(records_of(self._kind, self.table.slice(range(len(self))[place], 1)))
        start, stop, step = place.indices(len(self))
        if step == 1:
            return type(self)(self._kind, self.table.slice(start, max(0, stop - start)))
        return self.take(np.arange(start, stop, step))

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield from records_of(self._kind, self.table.slice(start, _ROWS_AT_ONCE))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Columns) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def take(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> Self:
        """These rows, in this order."""
        return type(self)(self._kind, self.table.take(pa.array(np.asarray(rows, dtype=np.int64))))

    def numbers(self, name: str) -> npt.NDArray[Any]:
        """A column of numbers; NaN where there is none."""
        return self.table.column(name).to_numpy()

    def texts(self, name: str) -> Iterator[str | None]:
        """A column of texts, one after the other."""
        for chunk in self.table.column(name).chunks:
            for start in range(0, len(chunk), _ROWS_AT_ONCE):
                yield from chunk.slice(start, _ROWS_AT_ONCE).to_pylist()

    def codes(self, name: str) -> tuple[npt.NDArray[np.int64], list[str | None]]:
        """A column of texts as codes.

        Returns:
            For each row a number, and the names that they stand for in alphabetical order, None (if there is any) last.
        """
        column = self.table.column(name)
        if not len(column):
            return np.zeros(0, np.int64), []
        if not pa.types.is_dictionary(column.type):
            column = pc.dictionary_encode(column)
        column = column.unify_dictionaries()
        texts: list[str | None] = [*column.chunk(0).dictionary.to_pylist(), None]
        raw = np.concatenate([pc.fill_null(chunk.indices, len(texts) - 1).to_numpy() for chunk in column.chunks])
        used = np.unique(raw).tolist()
        order = sorted(used, key=lambda code: (texts[code] is None, texts[code] or ""))
        places = np.zeros(len(texts), np.int64)
        places[order] = np.arange(len(order))
        return places[raw], [texts[code] for code in order]


def batch_of(kind: type[Record], records: Sequence[Record]) -> pa.RecordBatch:
    """Some records as an Arrow batch."""
    schema = schema_of(kind)
    columns = {name: [getattr(record, name) for record in records] for name in schema.names}
    for name in set(_PATHS) & columns.keys():
        columns[name] = [os.fsencode(path) for path in columns[name]]
    return pa.RecordBatch.from_pydict(columns, schema=schema)


def records_of(kind: type[Record], rows: pa.Table | pa.RecordBatch) -> Iterator[Record]:
    """The reverse of :func:`batch_of`."""
    columns: dict[str, list[Any]] = rows.to_pydict()
    for name in set(_PATHS) & columns.keys():
        columns[name] = [os.fsdecode(path) for path in columns[name]]
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # a dataclass
    for row in zip(*(columns[name] for name in names), strict=True):
        yield kind(**dict(zip(names, row, strict=True)))


def values_of(record: Any) -> dict[str, Any]:
    """The fields of a dataclass by name, as they are; ``asdict`` copies them all, at several times the cost."""
    return {name: getattr(record, name) for name in record.__dataclass_fields__}
