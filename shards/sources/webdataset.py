"""WebDataset tars: audio, and beside it what is known about it as JSON or as plain text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from shards.errors import SourceError
from shards.places import Place
from shards.sources.fields import (
    LANGUAGES,
    SPEAKERS,
    json_object,
    language_of,
    reference_of,
    seconds_of,
    split_word,
    text_of,
)
from shards.sources.folder import AUDIO_SUFFIXES, holds, is_audio
from shards.sources.jsonl import DURATIONS
from shards.sources.keys import Found
from shards.tars import Member, Sample, group_samples, iterate_members

NAME = "webdataset"

MAX_RECORD_BYTES = 1_000_000


def fits(place: Place, names: list[str] | None) -> bool:
    """A tar, or a folder of tars that is not one of NeMo or Lhotse."""
    if names is None:
        return place.suffix == ".tar" and place.is_file()
    others = {"tarred_audio_manifest.json", "sharded_manifests"}
    is_shar = any(name.startswith("cuts.") for name in names)
    return not is_shar and not others & set(names) and holds(place, names, ".tar")


def read(place: Place, spool: Path | None) -> Iterator[Found]:
    """Read a tar, or all tars in a folder and those below it, in the order of their paths.

    A sample is audio, and beside it JSON with the fields of our manifests, or plain text that is the reference. The
    split is the one that the JSON says, else the name of the tar or of its folder; so is the source.

    Raises:
        SourceError: A record breaks a rule, or has no audio (told as ``tar: key``).
        ShardError: A tar is damaged.
    """
    if not place.is_folder():
        yield from _read_tar(place, source=place.parent.name, split=split_word(place.stem))
        return
    for name in [name for name in place.walk() if name.endswith(".tar")]:
        words = [split_word(part) for part in name.removesuffix(".tar").split("/")[::-1]]
        yield from _read_tar(place.child(name), source=place.name, split=next(filter(None, words), None))


def _read_tar(tar: Place, *, source: str, split: str | None) -> Iterator[Found]:
    with tar.open() as file:
        for sample in group_samples(iterate_members(file, tar.url), tar.url, audio_suffixes=AUDIO_SUFFIXES):
            where = f"{tar.url}: {sample.key!r}"
            audio = next((member for member in sample.members.values() if is_audio(member.name)), None)
            if audio is None:
                raise SourceError(f"{where} must have audio beside {', '.join(sample.members)}, got none; add it")
            yield _found(file, sample, audio, where, tar=tar, source=source, split=split)


def _found(
    file: BinaryIO, sample: Sample, audio: Member, where: str, *, tar: Place, source: str, split: str | None
) -> Found:
    record, text = sample.members.get("json"), sample.members.get("txt")
    row: dict[str, Any] = json_object(_read_member(file, record, where), where) if record else {}
    reference, tagged_language = reference_of(row, where)
    if reference is None and text:
        reference = _text(_read_member(file, text, where), where)
    return Found(
        path=tar.url,
        name=text_of(row, ("key",), where) or sample.key,
        where=where,
        source=told if isinstance(told := row.get("source"), str) and told else source,
        offset_bytes=audio.offset,
        num_bytes=audio.num_bytes,
        told_seconds=seconds_of(row, DURATIONS, where),
        language=language_of(text_of(row, LANGUAGES, where) or tagged_language, where),
        speaker=text_of(row, SPEAKERS, where),
        reference=reference,
        split=text_of(row, ("split",), where) or split,
        audio_name=audio.name,
        json_offset=record.offset if record else None,
        json_bytes=record.num_bytes if record else None,
    )


def _read_member(file: BinaryIO, member: Member, where: str) -> bytes:
    if member.num_bytes > MAX_RECORD_BYTES:
        raise SourceError(
            f"{where}: a record must be below {MAX_RECORD_BYTES} bytes, got {member.num_bytes}; shorten it"
        )
    try:
        file.seek(member.offset)
        return file.read(member.num_bytes)
    except OSError as cause:
        raise SourceError(f"{where} must be readable, got {cause}; copy the tar again") from cause


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as cause:
        raise SourceError(f"{where}: text must be in UTF-8, got {cause}; write the tar again") from cause
