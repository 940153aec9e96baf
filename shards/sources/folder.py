"""Plain folders of audio: every file below them with a known suffix is a recording."""

import os
from pathlib import Path
from typing import NoReturn

from shards.errors import SourceError
from shards.sources.keys import Found

_LIBSNDFILE = {".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64"}
_FFMPEG = {".m4a", ".mp4", ".aac", ".webm", ".wma", ".amr", ".3gp"}
AUDIO_SUFFIXES = frozenset(_LIBSNDFILE | _FFMPEG)


def read_folder(path: Path) -> list[Found]:
    """Find the audio below a folder, in the order of its paths; what is hidden or lies behind a link is left out.

    Raises:
        SourceError: There is none, or a folder below it cannot be read.
    """
    relative = sorted(
        Path(folder, name).relative_to(path).as_posix()
        for folder, _, names in os.walk(path, onerror=_refuse)
        for name in names
        if Path(name).suffix.lower() in AUDIO_SUFFIXES
    )
    relative = [name for name in relative if not any(part.startswith(".") for part in name.split("/"))]
    if not relative:
        known = " ".join(sorted(AUDIO_SUFFIXES))
        raise SourceError(f"pack.inputs must each hold recordings, got none in {str(path)!r}; known suffixes: {known}")
    source = path.absolute().name
    return [
        Found(path=os.path.join(path, name), name=str(Path(name).with_suffix("")), where=str(path), source=source)
        for name in relative
    ]


def _refuse(error: OSError) -> NoReturn:
    raise error
