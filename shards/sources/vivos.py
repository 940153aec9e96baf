"""VIVOS: read speech in Vietnamese, ``<split>/waves/<speaker>/*.wav`` with ``<split>/prompts.txt``."""

from collections.abc import Iterator
from pathlib import Path

from shards.errors import SourceError
from shards.places import Place
from shards.sources.fields import keyed_lines, split_word
from shards.sources.keys import Found

NAME = "vivos"

_SPLITS = ("train", "test")
_PROMPTS, _WAVES = "prompts.txt", "waves"
_LANGUAGE = "Vietnamese"


def fits(place: Place, names: list[str] | None) -> bool:
    """A folder with ``train`` or ``test`` in this form, or one of these."""
    return names is not None and bool(_splits(place, names))


def read(place: Place, spool: Path | None) -> Iterator[Found]:
    """Read what the prompts list.

    Raises:
        SourceError: A line breaks a rule (told as ``file:line``).
    """
    for folder in _splits(place, place.names()):
        source = folder.parent.name
        for where, key, text in keyed_lines(folder.child(_PROMPTS)):
            speaker, separator, _ = key.rpartition("_")
            if not separator or "/" in key:
                raise SourceError(f"{where} must begin with <speaker>_<number>, got {key!r}; is it of VIVOS?")
            yield Found(
                path=folder.child(f"{_WAVES}/{speaker}/{key}.wav").url,
                name=key,
                where=where,
                source=source,
                language=_LANGUAGE,
                speaker=speaker,
                reference=text,
                split=split_word(folder.name),
            )


def _splits(place: Place, names: list[str]) -> list[Place]:
    if _PROMPTS in names and _WAVES in names:
        return [place]
    folders = [place.child(name) for name in _SPLITS if name in names]
    return [folder for folder in folders if folder.is_folder() and {_PROMPTS, _WAVES} <= set(folder.names())]
