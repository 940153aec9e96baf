"""Corpora that are folders of a language each, with a tab-separated table for each split."""

import re
from collections.abc import Callable, Iterator

from shards.places import Place
from shards.sources.fields import text_lines

SPLITS = ("train", "dev", "test")

# Not every folder is worth looking into: a corpus may have a hundred thousand of them.
_CODE = re.compile(r"(?i)[a-z]{2,3}([_-][a-z0-9]+)*")


def tables_in(names: list[str]) -> list[str]:
    """Names of the tables of splits in a folder."""
    return [f"{split}.tsv" for split in SPLITS if f"{split}.tsv" in names]


def language_folders(place: Place, names: list[str], is_one: Callable[[Place, list[str]], bool]) -> list[Place]:
    """The folder itself if it is that of a language, else those below it that are."""
    if is_one(place, names):
        return [place]
    folders = [place.child(name) for name in place.folders() if _CODE.fullmatch(name)]
    return [folder for folder in folders if is_one(folder, folder.names())]


def fields_of(table: Place) -> Iterator[tuple[str, list[str]]]:
    """The fields of each line. Quotation marks mean nothing in these tables: they are part of a text."""
    for where, line in text_lines(table):
        yield where, line.split("\t")
