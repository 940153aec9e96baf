"""Lhotse Shar: cuts in JSON lines beside plain tars with their audio, in the same order."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from shards.errors import SourceError
from shards.places import Place
from shards.sources.fields import json_lines, split_word
from shards.sources.folder import is_audio
from shards.sources.keys import Found
from shards.sources.lhotse import found_in_cut, recording_of
from shards.tars import Member, iterate_members

NAME = "lhotse_shar"

_CUTS = re.compile(r"cuts(\.\d+)?\.jsonl(\.gz)?")
_TAR = re.compile(r"recording(\.\d+)?\.tar")


def fits(place: Place, names: list[str] | None) -> bool:
    """A folder with ``cuts.000000.jsonl.gz``, or with cuts and ``recording.tar``."""
    cuts = [match for name in names or [] if (match := _CUTS.fullmatch(name))]
    return any(match[1] for match in cuts) or (bool(cuts) and any(_TAR.fullmatch(name) for name in names or []))


def read(place: Place, spool: Path | None) -> Iterator[Found]:
    """Read a folder of ``cuts.<number>.jsonl.gz`` and ``recording.<number>.tar``, which are not unpacked.

    Raises:
        SourceError: Cuts have no tar or are not in it, or a line breaks a rule (told as ``file:line``).
        ShardError: A tar is damaged.
    """
    names = place.names()
    source, split = place.name, split_word(place.name)
    for match in [match for name in names if (match := _CUTS.fullmatch(name))]:
        tar = place.child(f"recording{match[1] or ''}.tar")
        if tar.name not in names:
            raise SourceError(
                f"{place.child(match[0]).url} must have its audio in {tar.name}, got no such file; commands, addresses "
                "and features are not read: write the Shar with fields={'recording': 'flac'}"
            )
        with tar.open() as file:
            members = {_stem(member.name): member for member in iterate_members(file, tar.url) if is_audio(member.name)}
        for where, row in json_lines(place.child(match[0])):
            found = found_in_cut(row, recording_of(row, where), where, path=tar.url, source=source, split=split)
            member = members.get(found.name)
            if member is None:
                raise SourceError(f"{where}: id must be that of audio in {tar.url}, got {found.name!r}; write it again")
            yield _in_tar(found, member)


def _in_tar(found: Found, member: Member) -> Found:
    return replace(found, offset_bytes=member.offset, num_bytes=member.num_bytes)


def _stem(name: str) -> str:
    return name.rpartition(".")[0]
