"""Spliced speech: pieces of utterances, put together as nobody ever spoke them, at another speed.

A teacher is nearly certain of speech that it was trained on, however it is altered as a whole, and a student that only
hears such speech learns little of what the teacher does when it is unsure. Words that break off, and follow words that
never followed them, in a voice that is none of the training set's, make it as unsure as unknown speakers do.

What a splice is made of follows from its number, the seed and the pool, so any of them can be made by itself, and equal
arguments give equal bytes.

Dimension key: A audio samples.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.audio import Samples, change_speed, codec_versions, encode_flac
from shards.errors import StageError
from shards.faults import fault_point
from shards.index import UtteranceTable
from shards.processes import map_in_processes
from shards.read import Shards, refuse_damaged
from shards.schema import SAMPLE_RATE_HZ, TRAIN, Utterance
from shards.storage import fingerprint, read_json, settle_interrupted, sync, write_json
from shards.workers import Reader
from shards.write import write_shard

SOURCE = "splice"
ABOUT = "splice.json"
"""What the tars beside it are made from."""
ALL = "all"
"""A splice's pieces need nothing in common."""
PER_SHARD = 1000
"""Splices in a tar: some 40 minutes."""

_READ_AT_ONCE = 50
_FADE_SAMPLES = SAMPLE_RATE_HZ // 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Splicing:
    """How splices are made."""

    max_pieces: int
    """From one to so many; at least 1."""
    piece_seconds: tuple[float, float]
    """Shortest and longest piece, before the speed changes; a shorter utterance is a piece as a whole."""
    speeds: tuple[float, float]
    """Lowest and highest; 1.1 is a tenth faster and higher."""
    within: str
    """What the pieces of a splice have in common: ``language``, ``speaker`` or nothing (``all``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A stretch of an utterance."""

    utterance: Utterance
    start: int
    """In audio samples."""
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Splice:
    """What a splice is made of."""

    number: int
    pieces: tuple[Piece, ...]
    speed: float


class Pool:
    """Utterances to take pieces from: each second of speech is as likely as any other."""

    def __init__(self, utterances: UtteranceTable, settings: Splicing) -> None:
        """Take the utterances, in an order that decides what is made."""
        self._utterances, self._settings = utterances, settings
        seconds_U = utterances.numbers("duration_seconds")
        self._all = _Drawer(np.arange(len(utterances)), seconds_U)
        is_split = settings.within != ALL
        self._group_U = utterances.codes(settings.within)[0] if is_split else np.zeros(len(utterances), np.int64)
        places_G = np.split(np.argsort(self._group_U, kind="stable"), np.cumsum(np.bincount(self._group_U))[:-1])
        self._groups = [_Drawer(places, seconds_U[places]) for places in places_G]

    def draw(self, number: int, *, seed: int) -> Splice:
        """The splice of a number; a function of the arguments and the pool alone."""
        generator = random.Random(f"splice {seed} {number}")  # noqa: S311  no secret
        first = self._all.draw(generator)
        group = self._groups[self._group_U[first]]
        count = generator.randint(1, self._settings.max_pieces)
        places = [first, *(group.draw(generator) for _ in range(count - 1))]
        return Splice(
            number=number,
            pieces=tuple(self._piece(self._utterances[place], generator) for place in places),
            speed=round(generator.uniform(*self._settings.speeds) * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ,
        )

    def _piece(self, utterance: Utterance, generator: random.Random) -> Piece:
        there = round(utterance.duration_seconds * SAMPLE_RATE_HZ)
        length = min(there, round(generator.uniform(*self._settings.piece_seconds) * SAMPLE_RATE_HZ))
        return Piece(utterance=utterance, start=generator.randint(0, there - length), length=length)


class _Drawer:
    """Draws utterances by their seconds."""

    def __init__(self, places: npt.NDArray[np.int64], seconds: npt.NDArray[np.float64]) -> None:
        self._places, self._ends = places, np.cumsum(seconds)

    def draw(self, generator: random.Random) -> int:
        second = generator.random() * float(self._ends[-1])
        return int(self._places[min(int(np.searchsorted(self._ends, second, side="right")), len(self._places) - 1)])


def join(splice: Splice, audios: Sequence[Samples]) -> Samples:
    """A splice's audio.

    Args:
        splice: From :meth:`Pool.draw`.
        audios: The whole utterances of its pieces, in their order: float32 in [-1, 1] at 16 kHz.

    Returns:
        float32 in [-1, 1]: the pieces one behind the other, faded over 5 ms where they were cut, then resampled.
    """
    joined_A = np.concatenate([_faded(audio, piece) for piece, audio in zip(splice.pieces, audios, strict=True)])
    return np.clip(change_speed(joined_A, splice.speed), -1, 1)


def write_splices(
    pool: Pool,
    folder: Path,
    shards: Shards,
    *,
    num_splices: int,
    seed: int,
    about: str,
    per_shard: int = PER_SHARD,
    processes: int = 1,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write splices 0, 1, ... as WebDataset tars of the training split; tars of an interrupted start are kept.

    Args:
        pool: Where pieces come from.
        folder: Gets the tars and :data:`ABOUT`.
        shards: Of the pool's utterances.
        num_splices: How many to make.
        seed: Of the run.
        about: Fingerprint of the pool and of its settings.
        per_shard: Splices in a tar.
        processes: That make tars; 0 is one for each core.
        progress: Called with the splices that are there, behind each tar.

    Raises:
        ShardError: An utterance cannot be read.
        StageError: The folder holds splices that were made from something else, or cannot be written to; or a process
            died.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = fingerprint(about, seed, per_shard, codec_versions())
    if (folder / ABOUT).is_file() and read_json(folder / ABOUT)["about"] != about:
        raise StageError(
            f"{folder} must be empty or hold splices of this config, got those of other settings or shards, or of "
            "another soxr or libsndfile; remove it to splice again"
        )
    settle_interrupted(folder)
    write_json(folder / ABOUT, {"about": about})
    work = _Tars(pool=pool, folder=folder, shards=shards, num_splices=num_splices, per_shard=per_shard, seed=seed)
    tars, num_done = range(-(-num_splices // per_shard)), 0
    with closing(
        map_in_processes(work, tars, processes=processes, name_of=lambda number: work.path(number).name)
    ) as results:
        for number, _ in results:
            num_done += len(work.places(number))
            if progress is not None:
                progress(num_done)


def utterance_of(splice: Splice, audio_A: Samples) -> Utterance:
    """What is known of a splice: the language and the speaker that all of its pieces have, and no reference."""
    key = f"{SOURCE}-{splice.number:08d}"
    return Utterance(
        key=key,
        shard="",
        audio_name=f"{key}.flac",
        audio_offset=0,
        audio_bytes=0,
        json_offset=0,
        json_bytes=0,
        duration_seconds=len(audio_A) / SAMPLE_RATE_HZ,
        start_seconds=0.0,
        recording=key,
        split=TRAIN,
        language=_common({piece.utterance.language for piece in splice.pieces}),
        speaker=_common({piece.utterance.speaker for piece in splice.pieces}),
        reference=None,
        source=SOURCE,
    )


@dataclass(frozen=True, kw_only=True)
class _Tars:
    """Makes a tar by its number, in whatever process."""

    pool: Pool
    folder: Path
    shards: Shards
    num_splices: int
    seed: int
    per_shard: int

    def path(self, number: int) -> Path:
        return self.folder / f"{SOURCE}-{number:06d}.tar"

    def places(self, number: int) -> range:
        return range(self.num_splices)[number * self.per_shard : (number + 1) * self.per_shard]

    def __call__(self, number: int) -> None:
        path = self.path(number)
        if path.is_file():
            return
        splices = [self.pool.draw(place, seed=self.seed) for place in self.places(number)]
        with Reader(self.shards) as reader:
            audio = _audio(splices, reader)
            write_shard(path, ((utterance_of(splice, audio_A), encode_flac(audio_A)) for splice, audio_A in audio))
        sync(path)
        fault_point("splice.after_tar", shard=path.name)


def _audio(splices: Sequence[Splice], reader: Reader) -> Iterator[tuple[Splice, Samples]]:
    parts = [splices[start : start + _READ_AT_ONCE] for start in range(0, len(splices), _READ_AT_ONCE)]
    wanted = ([piece.utterance for splice in part for piece in splice.pieces] for part in parts)
    for part, found in zip(parts, reader.ahead(wanted), strict=True):
        audios = iter(refuse_damaged(found))
        for splice in part:
            yield splice, join(splice, [next(audios) for _ in splice.pieces])


def _faded(audio_A: Samples, piece: Piece) -> Samples:
    """A piece of an utterance; where it does not begin or end with the utterance, it does so without a click."""
    part_A = audio_A[piece.start : piece.start + piece.length].copy()
    ramp_A = np.linspace(0, 1, min(_FADE_SAMPLES, len(part_A)), dtype=np.float32)
    if piece.start > 0:
        part_A[: len(ramp_A)] *= ramp_A
    if piece.start + piece.length < len(audio_A):
        part_A[len(part_A) - len(ramp_A) :] *= ramp_A[::-1]
    return part_A


def _common(values: set[str | None]) -> str | None:
    return values.pop() if len(values) == 1 else None
