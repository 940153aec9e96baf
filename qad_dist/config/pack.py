"""The ``pack:`` section, and the ``read:`` section: how recordings become shards, and how these are read."""

from typing import Literal, Self

from pydantic import Field, model_validator

from qad_dist.config.section import Section, SourceKind, Split
from shards.errors import ConfigError


class PackConfig(Section):
    """The ``pack:`` section: recordings in, shards out."""

    inputs: list[str] = Field(min_length=1)
    """Manifests, corpora and folders of audio, read in this order; also ``http(s)://`` and ``s3://`` addresses."""
    source: SourceKind = "auto"
    """What the inputs are; ``auto`` sees it from what is there."""
    in_place: bool = False
    """Index WebDataset tars where they are, instead of packing a copy; all audio is decoded once, to check it."""
    language: str | None = None
    """Language of utterances whose source does not name one (one of the model's 30 names, or a code such as ``vi``)."""
    splits: dict[str, Split] = {"train": "train", "dev": "heldout", "heldout": "heldout", "test": "test"}
    """The source's split names and what they mean here; an utterance whose split is not listed is refused."""
    holdout: float = Field(default=0.05, ge=0, lt=1)
    """Share of the training recordings set aside per language as ``heldout``; 0 where the sources name such a split."""
    holdout_by: Literal["speaker", "recording"] = "speaker"
    """Whole speakers are set aside where they are known, else single recordings."""
    exclude: list[str] = []
    """Test sets, in any form that ``inputs`` may have: what sounds exactly like one of their utterances is dropped."""
    hours_per_shard: float = Field(default=1.0, gt=0)
    """About how much audio a shard holds. Smaller ones share out better over ranks, larger ones read faster."""
    bytes_per_shard: int | None = Field(default=None, ge=1_000_000)
    """Where this is less than ``hours_per_shard``: size of a shard, counting 32,000 bytes a second (uncompressed)."""
    utterances_per_shard: int = Field(default=10_000, ge=1)
    """A shard holds no more recordings than this, however short they are."""
    min_audio_seconds: float = Field(default=0.1, ge=0.05)
    """Shorter recordings are rejected."""
    max_audio_seconds: float = Field(default=30.0, ge=1, le=1200)
    """Longest utterance; what happens to longer recordings is said by ``long_recordings``."""
    long_recordings: Literal["energy", "vad", "reject"] = "energy"
    """Cut where they are quietest, or where silero-vad hears no speech (the extra ``vad``); or reject them."""
    max_recording_hours: float = Field(default=6.0, gt=0)
    """Longer recordings are rejected: the whole of one must fit in memory, as FLAC (66 MB an hour)."""
    drop_duplicates: bool = True
    """Of utterances with exactly the same samples keep one: that of test before heldout before train."""
    max_rejected_share: float = Field(default=0.05, ge=0, le=1)
    """Packing stops with an error when a larger share of the recordings cannot be used; duplicates do not count."""
    processes: int = Field(default=0, ge=0)
    """Packing processes; 0 is one for each core. The shards' bytes do not depend on it."""

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        if self.min_audio_seconds > self.max_audio_seconds / 4:
            raise ConfigError(
                f"pack.min_audio_seconds must be at most a quarter of pack.max_audio_seconds "
                f"({self.max_audio_seconds:g}), got {self.min_audio_seconds:g}; a cut must leave two utterances"
            )
        return self


class ReadConfig(Section):
    """The ``read:`` section: how every stage reads the shards. Results do not depend on it."""

    workers: int = Field(default=4, ge=0)
    """Processes of each rank that decode audio ahead of the model; 0 decodes in the rank itself."""
    cache: str | None = None
    """Folder for copies of shards that lie behind an address, best on a local disk; needed only for those."""
    cache_gib: float = Field(default=200.0, gt=0)
    """Size of that folder; the shards that were used longest ago go first."""
    max_quarantined_share: float = Field(default=0.01, ge=0, le=1)
    """Training leaves out utterances that cannot be read any more, and stops above this share of them."""
