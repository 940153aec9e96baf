"""Plain folders of audio: every file below them with a known suffix is a recording."""

from collections.abc import Iterator
from pathlib import Path

from shards.errors import SourceError
from shards.places import Place
from shards.sources.fields import without_suffix
from shards.sources.keys import Found

NAME = "folder"

_LIBSNDFILE = {".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64"}
_FFMPEG = {".m4a", ".mp4", ".aac", ".webm", ".wma", ".amr", ".3gp"}
AUDIO_SUFFIXES = frozenset(_LIBSNDFILE | _FFMPEG)

_LEVELS, _FOLDERS_TRIED = 2, 8


def is_audio(name: str) -> bool:
    """Whether a file's name ends as one with audio."""
    return Path(name).suffix.lower() in AUDIO_SUFFIXES


def holds(place: Place, names: list[str], suffix: str) -> bool:
    """Whether files that end in ``suffix`` are in a folder or not far below it; only some folders are looked at."""
    if any(name.endswith(suffix) for name in names):
        return True
    for _ in range(_LEVELS):
        folders = [place.child(name) for name in place.folders()[:_FOLDERS_TRIED]]
        listed = [(folder, folder.names()) for folder in folders]
        if any(name.endswith(suffix) for _, below in listed for name in below):
            return True
        if not listed:
            return False
        place = listed[0][0]
    return False


def fits(place: Place, names: list[str] | None) -> bool:
    """Any folder: asked last."""
    return names is not None


def read(place: Place, spool: Path | None) -> Iterator[Found]:
    """Find the audio below a folder, in the order of its paths; what is hidden or lies behind a link is left out.

    Raises:
        SourceError: There is none, or a folder below it cannot be read.
    """
    relative = [name for name in place.walk() if is_audio(name)]
    if not relative:
        known = " ".join(sorted(AUDIO_SUFFIXES))
        raise SourceError(f"pack.inputs must each hold recordings, got none in {place.url!r}; known suffixes: {known}")
    source = place.name
    for name in relative:
        yield Found(path=place.child(name).url, name=without_suffix(name), where=place.url, source=source)
