"""NeMo's tarred data sets: plain tars of audio, and manifests that say in which tar a recording is."""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from shards.errors import SourceError
from shards.places import Place
from shards.sources.fields import text_of
from shards.sources.jsonl import first_row, found_in_row
from shards.sources.keys import Found
from shards.sources.nemo import SPOKEN, rows
from shards.tars import Member, iterate_members

NAME = "nemo_tarred"

_ONE = "tarred_audio_manifest.json"
_SHARDED_FOLDER = "sharded_manifests"
_SHARDED = re.compile(r"manifest_(\d+)\.jsonl?(\.gz)?")
_TARS = re.compile(r"audio_(\d+)\.tar")
# NeMo gives a second stretch of a file, which is in the tar once, a name of its own.
_SUB = re.compile(r"-sub\d+(?=(\.\w+)?$)")
# Of tars whose members are kept in mind: a manifest goes through its tars one after the other.
_OPEN_TARS = 4


def fits(place: Place, names: list[str] | None) -> bool:
    """A folder with such manifests, or one of them."""
    if names is None:
        row = first_row(place)
        return row is not None and "audio_filepath" in row and "shard_id" in row
    return _ONE in names or (_SHARDED_FOLDER in names and any(_TARS.fullmatch(name) for name in names))


def read(place: Place, spool: Path | None) -> Iterator[Found]:
    """Read a folder of ``audio_<number>.tar``, or one of its manifests; tars are indexed as they are, not unpacked.

    Of both kinds of manifests the sharded ones are read, one for each tar; they say the same.

    Raises:
        SourceError: A line breaks a rule, or names what is not in its tar (told as ``file:line``).
        ShardError: A tar is damaged.
    """
    folder, manifests = _manifests(place)
    tars = {int(match[1]): match[0] for name in folder.names() if (match := _TARS.fullmatch(name))}

    @lru_cache(maxsize=_OPEN_TARS)
    def members_of(name: str) -> dict[str, Member]:
        tar = folder.child(name)
        with tar.open() as file:
            return {member.name: member for member in iterate_members(file, tar.url)}

    for manifest, number in manifests:
        for where, row in rows(manifest):
            name = tars.get(_shard(row, where, number))
            if name is None:
                raise SourceError(
                    f"{where}: shard_id must be the number of an audio_<number>.tar in {folder.url}, got "
                    f"{row.get('shard_id', number)!r}; copy the tars beside the manifest"
                )
            yield _found(row, where, folder.child(name), members_of(name))


def _manifests(place: Place) -> tuple[Place, list[tuple[Place, int | None]]]:
    """The folder of the tars, and manifests with the number of the tar that each is about, if it is about one."""
    if not place.is_folder():
        match = _SHARDED.fullmatch(place.name)
        folder = place.parent.parent if place.parent.name == _SHARDED_FOLDER else place.parent
        return folder, [(place, int(match[1]) if match else None)]
    names = place.names()
    if _SHARDED_FOLDER not in names:
        return place, [(place.child(_ONE), None)]
    sharded = place.child(_SHARDED_FOLDER)
    numbers = {name: int(match[1]) for name in sharded.names() if (match := _SHARDED.fullmatch(name))}
    return place, [(sharded.child(name), number) for name, number in sorted(numbers.items(), key=lambda one: one[1])]


def _shard(row: dict[str, Any], where: str, number: int | None) -> int:
    shard = row.get("shard_id", number)
    if isinstance(shard, bool) or not isinstance(shard, int):
        raise SourceError(f"{where}: shard_id must be the number of a tar, got {shard!r}; add it")
    return shard


def _found(row: dict[str, Any], where: str, tar: Place, members: dict[str, Member]) -> Found:
    name = text_of(row, ("audio_filepath",), where) or ""
    member = members.get(name) or members.get(_SUB.sub("", name))
    if member is None:
        raise SourceError(f"{where}: audio_filepath must be a member of {tar.url}, got {name!r}; make the tars again")
    # The names of members are data: none is taken as a path.
    found = found_in_row(
        {**row, "audio_filepath": "member", "audio": None, "path": None},
        where,
        folder=tar,
        source=tar.parent.name,
        languages=SPOKEN,
    )
    stem = name.rpartition(".")[0] or name
    return replace(
        found,
        path=tar.url,
        name=text_of(row, ("key",), where) or stem,
        offset_bytes=member.offset,
        num_bytes=member.num_bytes,
    )
