"""The ``score:`` section: which systems are compared, on which utterances, and how surely."""

import re
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from qad_dist.config.decoding import DecodingSection
from qad_dist.config.section import Section, SourceKind, Split
from shards.errors import ConfigError

TEACHER = "teacher"
Student = Literal["ptq", "qad"]
OWN_SYSTEMS = (TEACHER, "ptq", "qad")
"""Names of the systems that a run has itself."""

RESERVED = (*OWN_SYSTEMS, "own", "sets", "groups", "worst")
"""Names of files and folders that score writes itself."""

PREDICTIONS_SUFFIX = ".jsonl"
_NAME = re.compile(r"[a-z0-9_-]+")


class TestSetConfig(Section):
    """A test set that lies outside the run."""

    __test__ = False  # no test, whatever its name makes of it

    path: str
    """A packed folder (``index.json``), or a corpus in any form that ``pack.inputs`` may have; also an address."""
    source: SourceKind = "auto"
    """What lies there, as in ``pack.source``."""
    language: str | None = None
    """Language of utterances whose source does not name one."""
    splits: list[str] | None = None
    """The source's own names of the splits to score; ``null`` is what the set's name says, or else all."""


def _with_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class ScoreConfig(DecodingSection):
    """The ``score:`` section: errors and distances of any number of systems on the same utterances."""

    splits: list[Split] = ["test"]
    """Splits of the run's own shards to score, as the set ``own``; ``[]`` scores ``sets`` only."""
    sets: dict[str, Annotated[TestSetConfig, BeforeValidator(_with_path)]] = {}
    """Further test sets: name to path, or to the settings below. Known names choose language and splits themselves."""
    max_utterances: int | None = Field(default=None, ge=2)
    """Score a random subset of each set, drawn by ``seed``; ``null`` is the whole set."""
    students: list[Student] = ["ptq", "qad"]
    """Which of the run's own students are compared with the teacher."""
    systems: dict[str, str] = {}
    """Further systems: name to model folder, hub id, or a file of predictions (``.jsonl``, ``{set}`` in its path)."""
    audio_attention: list[Literal["windowed", "full"]] | None = Field(default=None, min_length=1)
    """Each set is scored in all of these; ``null`` is ``model.audio_attention`` alone."""
    arithmetic: Literal["fake_quant", "int8"] = "fake_quant"
    """How quantized systems compute: with quantized values in ``model.dtype``, as they were trained, or in integers."""
    margin: float = Field(default=0.1, ge=0)
    """Points of WER or CER that a system may lose to the teacher and still count as not inferior."""
    num_resamples: int = Field(default=10_000, ge=1_000)
    """Of the bootstrap behind all intervals and p-values."""
    worst_utterances: int = Field(default=50, ge=0)
    """So many utterances with the most errors are shown with their alignments."""

    @field_validator("systems", "sets")
    @classmethod
    def _names_are_free(cls, named: dict[str, Any], about: ValidationInfo) -> dict[str, Any]:
        for name in named:
            if name in RESERVED or not _NAME.fullmatch(name):
                raise ConfigError(
                    f"score.{about.field_name} names must match [a-z0-9_-]+ and be none of {', '.join(RESERVED)}, got "
                    f"{name!r}; rename it"
                )
        return named

    @model_validator(mode="after")
    def _there_is_something_to_score(self) -> Self:
        if not self.splits and not self.sets:
            raise ConfigError("score.splits must name a split where score.sets is empty, got []; name one of them")
        return self


def is_predictions(path: str) -> bool:
    """Whether a system of ``score.systems`` is a file of what some model has written elsewhere."""
    return PurePath(path).suffix == PREDICTIONS_SUFFIX
