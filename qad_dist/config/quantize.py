"""The ``quantize:`` section: what the decoder is quantized to, and how its scales are found."""

from typing import Literal, Self

from pydantic import Field, model_validator

from qad_dist.config.section import Section
from qad_dist.formats import FORMATS, Format, FormatName
from shards.errors import ConfigError

GroupName = Literal["qkv", "o", "gate_up", "down"]
"""Linears of a decoder layer that read the same input, and share a smoothing scale."""


class QuantizeConfig(Section):
    """The ``quantize:`` section: the decoder's Linear layers in fewer bits."""

    format: FormatName = "int8"
    """INT8 weights per output channel and INT8 inputs per tensor (static); or per token (``int8_dynamic``), or weights
    alone; E4M3 (``fp8``); INT4 weights in groups alone or with INT8 inputs per token (``w4a8``); ``w3a8``: research."""
    research: bool = False
    """Allow formats that no server computes in."""
    group_size: int = Field(default=128, ge=8)
    """Weights that share a scale, in formats of fewer than 8 bits; it must divide the width of every input."""
    alpha: float | Literal["search", "none"] | dict[GroupName, float] = "search"
    """SmoothQuant: 1 moves all outlier channels of the inputs into the weights, 0 the other way round. One value, one
    for each group (1 where none is given), the best for each by the error of its outputs, or no smoothing."""
    clip: Literal["none", "mse", "percentile", "search"] = "search"
    """How static input scales cut outliers off: not at all; where the outputs' error is least; at ``clip_percentile``;
    or whichever of these has the lowest KL. No effect on formats without static input scales."""
    clip_percentile: float = Field(default=99.99, gt=90, le=100)
    """Share of the inputs, in percent, that lies below the clipped amax."""
    calibration_utterances: int = Field(default=1024, ge=1)
    """Taken from the labelled training split, spread over languages and durations; 4 KB of memory a token."""
    calibration_sources: tuple[str, ...] = ()
    """Only utterances of these sources, by the name in the index; empty: of all. What is served is what matters here:
    speech that nobody will send widens the scales, though it may be good to train on."""
    make_clips: bool = True
    """Make silent clips and clips of 20 to 30 s where the data has few of them; the teacher answers these, too."""
    micro_batch_tokens: int = Field(default=8192, ge=256)
    """Tokens of one calibration batch."""
    search_share: float = Field(default=0.125, gt=0, lt=1)
    """Part of the calibration set that is held out, to choose alpha and clipping on."""
    search_rows: int = Field(default=8192, ge=64)
    """Tokens of that part whose inputs are kept to compare choices on, and as many of the rest to correct weights."""
    evaluate_utterances: int = Field(default=256, ge=1)
    """Held-out utterances to measure the result on, beside the formats of ``compare``, and to choose kept layers on."""
    compare: list[FormatName] = []
    """Formats to measure beside the chosen one: each calibrated on the same set, none of them written."""
    sensitivity_utterances: int = Field(default=64, ge=0)
    """Held-out utterances on which each Linear is quantized alone, to name the worst; 0 leaves that out."""
    keep_high_precision: list[str] | Literal["auto"] = []
    """Layers to leave alone (``layers.3``, ``layers.*.mlp.down_proj``); ``auto``: as few as ``kl_budget`` needs."""
    kl_budget: float | None = Field(default=None, gt=0)
    """Largest held-out KL in nats per token that ``keep_high_precision: auto`` aims for."""

    @property
    def recipe(self) -> Format:
        """The chosen format."""
        return FORMATS[self.format]

    @model_validator(mode="after")
    def _format_is_served(self) -> Self:
        if not self.recipe.is_served and not self.research:
            served = ", ".join(name for name, known in FORMATS.items() if known.is_served)
            raise ConfigError(
                f"quantize.format must be one that export can write for a server ({served}), got {self.format}; "
                "set quantize.research to true to quantize, train and score it all the same"
            )
        return self

    @model_validator(mode="after")
    def _alpha_is_a_share(self) -> Self:
        given = self.alpha.values() if isinstance(self.alpha, dict) else [self.alpha]
        for alpha in given:
            if isinstance(alpha, float) and not 0 <= alpha <= 1:
                raise ConfigError(f"quantize.alpha must be in [0, 1], got {alpha:g}; 1 and 0.5 are usual")
        return self

    @model_validator(mode="after")
    def _budget_belongs_to_auto(self) -> Self:
        if (self.keep_high_precision == "auto") != (self.kl_budget is not None):
            got = f"{self.keep_high_precision} and {self.kl_budget}"
            raise ConfigError(
                f"quantize.keep_high_precision auto and quantize.kl_budget need each other, got {got}; set both"
            )
        return self

    @model_validator(mode="after")
    def _auto_knows_the_worst(self) -> Self:
        if self.keep_high_precision == "auto" and not self.sensitivity_utterances:
            raise ConfigError(
                "quantize.sensitivity_utterances must be at least 1 for keep_high_precision auto, got 0; 64 are enough"
            )
        return self
