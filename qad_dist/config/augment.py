"""The ``train.augment:`` section: altered copies of the utterances that are trained on."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from qad_dist.config.section import Section, check_order
from shards.errors import ConfigError

# Beyond it one of the two is inaudible, or overflows.
Decibels = Annotated[float, Field(ge=-60, le=60)]

_SLOWEST, _FASTEST = 0.5, 2.0


class AugmentConfig(Section):
    """The ``train.augment:`` section: copies of each utterance with another speed, noise and gain.

    Teacher and student hear the same copy, so it needs no label of its own: it counts in the KL, not in the
    cross-entropy.
    """

    copies: int = Field(default=0, ge=0, le=100)
    """Altered copies of each utterance beside itself; each comes once an epoch, as the utterance does. 0: none."""
    speeds: tuple[float, ...] = Field(default=(0.9, 1.0, 1.1), min_length=1)
    """Speeds that the copies of an utterance take in turns; 1.1 is a tenth faster, and higher. A copy that would be
    longer than the longest utterance keeps its speed."""
    noise_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the copies with noise."""
    noise_snr_db: tuple[Decibels, Decibels] = (10.0, 30.0)
    """Lowest and highest ratio of the utterance's power to that of its noise; no effect if ``noise_share`` is 0."""
    gain_db: tuple[Decibels, Decibels] = (-6.0, 6.0)
    """Lowest and highest gain; less is given where the copy would be clipped."""

    @model_validator(mode="after")
    def _speeds_are_speech(self) -> Self:
        for speed in self.speeds:
            if not _SLOWEST <= speed <= _FASTEST:
                raise ConfigError(
                    f"train.augment.speeds must be in [{_SLOWEST:g}, {_FASTEST:g}], got {speed:g}; "
                    "0.9, 1.0 and 1.1 are usual"
                )
        return self

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        check_order({"train.augment.noise_snr_db": self.noise_snr_db, "train.augment.gain_db": self.gain_db})
        return self
