"""The ``label.filters:`` section of a config: which pseudo-labels are used, and how strict each filter is."""

from typing import Literal

from pydantic import Field

from qad_dist.config.section import Section

FilterAction = Literal["drop", "kl_only", "none"]
"""``drop`` leaves an utterance out of calibration and training, ``kl_only`` only its cross-entropy term."""


class FilterConfig(Section):
    """What a filter does with a label that it objects to."""

    action: FilterAction = "drop"
    """``drop``: not used in calibration and training; ``kl_only``: without its cross-entropy; ``none``: used."""


class LoopFilterConfig(FilterConfig):
    """The text repeats itself, as a decoder does that has lost the audio."""

    repeated_words: float = Field(default=9.0, ge=3)
    """So much said again at once, three times or more in all, is a loop: 10 times one word, 4 times three words.

    Where words are not spaced, a few characters count as a word."""
    new_share: float = Field(default=0.4, ge=0, le=1)
    """And so is a longer text if fewer of its stretches of four words than this share are new. 0 turns this off."""


class RateFilterConfig(FilterConfig):
    """The text is too long or far too short for the audio."""

    fastest: float = Field(default=2.5, gt=1)
    """A text is too long if reading it usually takes so many times as long as the audio lasts."""
    slowest: float = Field(default=0.1, ge=0, lt=1)
    """It is too short if reading it usually takes less than this share of the audio; 0 allows any."""
    silence_seconds: float = Field(default=3.0, ge=0)
    """Audio that may be silent before ``slowest`` counts."""


class ScriptFilterConfig(FilterConfig):
    """The text is not written as its language is."""

    max_share: float = Field(default=0.3, ge=0, le=1)
    """Most letters of scripts in which the language is not written, as a share of all."""
    max_latin_share: float = Field(default=0.8, ge=0, le=1)
    """Most Latin letters in a language of another script, where names and foreign words are often Latin."""


class LanguageFilterConfig(FilterConfig):
    """The teacher heard another language than the source names."""

    action: FilterAction = "kl_only"
    """``drop``: not used in calibration and training; ``kl_only``: without its cross-entropy; ``none``: used."""


class ConfidenceFilterConfig(FilterConfig):
    """The teacher was unsure of its own tokens."""

    action: FilterAction = "kl_only"
    """``drop``: not used in calibration and training; ``kl_only``: without its cross-entropy; ``none``: used."""
    min_mean_logprob: float = Field(default=-0.6, le=0)
    """Lowest mean log-probability of the tokens of a long response."""
    short_slack: float = Field(default=1.5, ge=0)
    """This, divided by the square root of the number of tokens, is how much lower it may be: short means are noisy."""


class ReferenceFilterConfig(FilterConfig):
    """The text differs from the human transcript, where there is one."""

    action: FilterAction = "none"
    """``drop``: not used in calibration and training; ``kl_only``: without its cross-entropy; ``none``: used."""
    max_error_rate: float = Field(default=0.5, ge=0)
    """Highest word error rate (character error rate where words are not spaced)."""


class FiltersConfig(Section):
    """The ``label.filters:`` section: which labels are used. Changing it takes seconds: nothing is labelled again.

    An utterance that cannot be read is never used.
    """

    no_text: FilterConfig = FilterConfig()
    """The response has no text, or names `None` as its language."""
    runaway: FilterConfig = FilterConfig()
    """The response reached its longest length without an end token."""
    loop: LoopFilterConfig = LoopFilterConfig()
    """The text repeats itself."""
    rate: RateFilterConfig = RateFilterConfig()
    """The text is too long or far too short for the audio."""
    script: ScriptFilterConfig = ScriptFilterConfig()
    """The text is not written as its language is."""
    language: LanguageFilterConfig = LanguageFilterConfig()
    """The teacher heard another language than the source names."""
    confidence: ConfidenceFilterConfig = ConfidenceFilterConfig()
    """The teacher was unsure."""
    reference: ReferenceFilterConfig = ReferenceFilterConfig()
    """The text differs from the human transcript."""
