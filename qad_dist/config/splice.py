"""The ``splice:`` section: training speech put together from pieces of itself."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qad_dist.config.section import Section, check_order
from shards.errors import ConfigError

Speed = Annotated[float, Field(ge=0.5, le=2)]


class SpliceConfig(Section):
    """The ``splice:`` section: training speech put together from pieces of itself, as ``pack.py splice`` does.

    The teacher is unsure of it, as it is of unknown speakers, even where it was trained on the utterances themselves.
    """

    utterances: int = Field(default=10_000, ge=1)
    """How many are made."""
    max_pieces: int = Field(default=3, ge=1, le=20)
    """An utterance has one to so many pieces."""
    piece_seconds: tuple[float, float] = (0.4, 2.5)
    """Shortest and longest piece; a shorter utterance is a piece as a whole."""
    speeds: tuple[Speed, Speed] = (0.75, 1.35)
    """Lowest and highest speed; 1.1 is a tenth faster and higher, another voice."""
    within: Literal["language", "speaker", "all"] = "language"
    """What the pieces of an utterance have in common, as far as the sources tell."""
    sources: tuple[str, ...] = ()
    """Only pieces of these sources, by the name in the index (that of a manifest or folder); empty: of all."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        check_order({"splice.piece_seconds": self.piece_seconds, "splice.speeds": self.speeds})
        if self.piece_seconds[0] < 0.1:
            raise ConfigError(
                f"splice.piece_seconds must be at least 0.1, got {self.piece_seconds[0]:g}; 0.4 is about a word"
            )
        return self
