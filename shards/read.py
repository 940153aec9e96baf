"""Reading utterances by offset: no scan of the tar, and no utterance taken for another."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

from shards.audio import Samples, decode_flac
from shards.errors import AudioError, ShardError
from shards.schema import SAMPLE_RATE_HZ, Utterance

Loaded = TypeVar("Loaded")

# Of a plain tar: the block before a member's data begins with its name. Keys are short enough for one such block.
_HEADER_BYTES, _NAME_BYTES = 512, 100


def read_audio(folder: Path, utterance: Utterance) -> Samples:
    """The samples of one utterance: float32 in [-1, 1], 16 kHz, mono.

    Raises:
        ShardError: The shard is missing, or does not hold this utterance's FLAC where the index says.
    """
    return read_many(folder, [utterance])[0]


def read_many(folder: Path, utterances: Sequence[Utterance]) -> list[Samples]:
    """The samples of several utterances, in their order; each shard is opened once and read forwards.

    Raises:
        ShardError: As :func:`read_audio`.
    """
    by_shard: defaultdict[str, list[int]] = defaultdict(list)
    for number, utterance in enumerate(utterances):
        by_shard[utterance.shard].append(number)
    samples: dict[int, Samples] = {}
    for shard, numbers in by_shard.items():
        path = folder / shard
        try:
            with path.open("rb") as file:
                for number in sorted(numbers, key=lambda n: utterances[n].audio_offset):
                    samples[number] = _read(file, path, utterances[number])
        except OSError as cause:
            raise ShardError(f"{path} must be readable, got {cause.strerror!r}; pack again or mend the disk") from cause
    return [samples[number] for number in range(len(utterances))]


def read_ahead(
    load: Callable[[Sequence[Utterance]], Loaded], batches: Iterable[Sequence[Utterance]]
) -> Iterator[Loaded]:
    """What ``load`` makes of one batch after the other; the next is loaded while the present one is in use.

    What ``load`` raises comes with the batch that it is about.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as reader:
        pending: Future[Loaded] | None = None
        for batch in batches:
            present, pending = pending, reader.submit(load, batch)
            if present is not None:
                yield present.result()
        if pending is not None:
            yield pending.result()


def _read(file: BinaryIO, path: Path, utterance: Utterance) -> Samples:
    file.seek(utterance.audio_offset - _HEADER_BYTES)
    header = file.read(_HEADER_BYTES)
    data = file.read(utterance.audio_bytes)
    where = f"{path}: utterance {utterance.key!r}"
    if len(data) != utterance.audio_bytes:
        raise ShardError(
            f"{where} must have {utterance.audio_bytes} bytes, got {len(data)}; the shard was cut, pack again"
        )
    if (name := header[:_NAME_BYTES].rstrip(b"\0")) != f"{utterance.key}.flac".encode():
        raise ShardError(f"{where} must be where the index says, got {name!r} there; it is another shard, pack again")
    try:
        samples = decode_flac(data)
    except AudioError as cause:
        raise ShardError(f"{where} must be FLAC, got {cause}; the shard is damaged, pack again") from cause
    if len(samples) != round(utterance.duration_seconds * SAMPLE_RATE_HZ):
        raise ShardError(
            f"{where} must last {utterance.duration_seconds} s, got {len(samples) / SAMPLE_RATE_HZ} s; "
            "the shard is not the one that was indexed, pack again"
        )
    return samples
