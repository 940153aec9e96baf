"""Records that machines agree on: a recording before packing, an utterance after it, a pseudo-label. Pure."""

from dataclasses import dataclass

SAMPLE_RATE_HZ = 16_000
"""Of every packed utterance and of the model's input."""

TRAIN, HELDOUT, TEST = "train", "heldout", "test"
SPLITS = (TRAIN, HELDOUT, TEST)
"""``heldout`` chooses checkpoints and settings; ``test`` only scores. Neither is trained or calibrated on."""

# How the generation of a response ended.
ENDED_BY_END_TOKEN, ENDED_BY_LENGTH = "end_token", "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One entry of a source: an audio file as delivered, and what is known about it."""

    path: str
    key: str
    """Unique in the source, ``[a-z0-9_-]+``."""
    source: str
    """Name of the source (the manifest's folder), for reports."""
    language: str | None = None
    """One of the model's 30 language names."""
    speaker: str | None = None
    reference: str | None = None
    """Human transcript, if there is one."""
    split: str | None = None
    """The source's own split name, mapped by ``pack.splits``; None lets ``pack.holdout`` decide."""
    told_seconds: float | None = None
    """What the source says it lasts: a longer file holds more than the source means by this recording."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Utterance:
    """One record of a shard, as ``utterances.parquet`` stores it (one column per field, in this order)."""

    key: str
    shard: str
    """File name of the tar, beside the index."""
    audio_offset: int
    """Byte offset of the FLAC member's data in the tar."""
    audio_bytes: int
    json_offset: int
    json_bytes: int
    duration_seconds: float
    split: str
    language: str | None
    speaker: str | None
    reference: str | None
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PseudoLabel:
    """What the teacher answered for one utterance; one line of a label file."""

    key: str
    token_ids: tuple[int, ...]
    """The exact response: language tag, text and end token as generated (no end token if ended by length)."""
    text: str
    language: str | None
    """As the teacher detected it; None for ``language None`` or a response without a tag."""
    token_logprobs: tuple[float, ...]
    """Natural log-probability of each token under the teacher."""
    mean_logprob: float
    ended_by: str
    """:data:`ENDED_BY_END_TOKEN` or :data:`ENDED_BY_LENGTH`."""
    duration_seconds: float
