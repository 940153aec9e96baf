"""Records that machines agree on: a recording before packing, an utterance after it, a pseudo-label. Pure."""

from dataclasses import dataclass

SAMPLE_RATE_HZ = 16_000
"""Of every packed utterance and of the model's input."""

TRAIN, HELDOUT, TEST = "train", "heldout", "test"
SPLITS = (TRAIN, HELDOUT, TEST)
"""``heldout`` chooses checkpoints and settings; ``test`` only scores. Neither is trained or calibrated on."""

# How the generation of a response ended.
ENDED_BY_END_TOKEN, ENDED_BY_LENGTH = "end_token", "length"
UNREADABLE = "unreadable"
"""Stands there for an utterance whose audio cannot be read: its label is empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One entry of a source: an audio file as delivered or a stretch of one, and what is known about it."""

    path: str
    """A file's path, or its ``http(s)://`` or ``s3://`` address."""
    key: str
    """Unique in the corpus, ``[a-z0-9_-]+``."""
    source: str
    """Name of the source (the manifest's folder), for reports."""
    offset_bytes: int | None = None
    """Where the audio file begins in ``path``, if that is a plain tar or another file of files; else None."""
    num_bytes: int | None = None
    """Size of the audio file in ``path``; None where ``offset_bytes`` is None."""
    start_seconds: float | None = None
    """Where the stretch begins in the audio file; None for the whole file."""
    told_seconds: float | None = None
    """How long the source says that the stretch, or the whole file, lasts."""
    language: str | None = None
    """One of the model's 30 language names."""
    speaker: str | None = None
    reference: str | None = None
    """Human transcript, if there is one."""
    split: str | None = None
    """The source's own split name, mapped by ``pack.splits``; None lets ``pack.holdout`` decide."""
    audio_name: str | None = None
    """Of a member of a WebDataset tar: its name."""
    json_offset: int | None = None
    """Of such a member: where the record beside it begins in the tar; None if there is none."""
    json_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Utterance:
    """One record of a shard, as ``utterances.parquet`` stores it (one column per field, in this order)."""

    key: str
    shard: str
    """Name of the shard in the index, which says where its tar is."""
    audio_name: str
    """Name of the audio's member in the tar: ``<key>.flac`` where this project wrote it."""
    audio_offset: int
    """Byte offset of that member's data in the tar."""
    audio_bytes: int
    json_offset: int
    """Of the member with the record; 0, as its size, in a tar that has none and is indexed in place."""
    json_bytes: int
    duration_seconds: float
    """Samples at 16 kHz, as decoded, divided by 16,000."""
    start_seconds: float
    """Where the utterance begins in its recording; above 0 only for a piece of one."""
    recording: str
    """Key of the recording that it is, or is a piece of."""
    split: str
    language: str | None
    speaker: str | None
    reference: str | None
    """Human transcript of just this utterance; None for the pieces of a longer recording."""
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PseudoLabel:
    """What the teacher answered for one utterance; one line of a label file."""

    key: str
    token_ids: tuple[int, ...]
    """The exact response as generated: language tag (in automatic mode), text and end token (not if ended by length).

    Empty for an utterance that cannot be read, and only for that."""
    text: str
    language: str | None
    """As the teacher detected it, or was told; None for ``language None`` or a response without a tag."""
    prompt_language: str | None = None
    """The language that the prompt told the teacher; None in automatic mode, where the response names it."""
    token_logprobs: tuple[float, ...]
    """Natural log-probability of each token under the teacher."""
    mean_logprob: float | None
    """Of the tokens; None without any."""
    ended_by: str
    """:data:`ENDED_BY_END_TOKEN`, :data:`ENDED_BY_LENGTH` or :data:`UNREADABLE`."""
    duration_seconds: float
    error: str | None = None
    """Why the audio cannot be read."""

    @property
    def num_tokens(self) -> int:
        """Length of the response."""
        return len(self.token_ids)
