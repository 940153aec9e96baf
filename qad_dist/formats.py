"""The number formats that a decoder can be quantized to. Pure: no torch."""

from dataclasses import dataclass
from typing import Literal

FormatName = Literal["int8", "int8_dynamic", "int8_weight_only", "fp8", "int4_weight_only", "w4a8", "w3a8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """What becomes of the weights and the inputs of a Linear."""

    weight_bits: int
    """Of an integer; of ``fp8`` the 8 of E4M3."""
    weight_scales: Literal["tensor", "channel", "group"]
    """Which weights share a scale: all, an output channel's, or ``quantize.group_size`` of them along an input row."""
    input_scales: Literal["none", "tensor", "token"]
    """Whether inputs are 8 bits, too, and which of them share a scale: all (static, calibrated), or one token's."""
    is_float: bool = False
    """E4M3 instead of integers."""
    is_served: bool = True
    """Whether there is a serving form for an export to write."""

    @property
    def is_corrected(self) -> bool:
        """So coarse that weights are clipped, and corrected for the error of what was rounded before them."""
        return self.weight_bits < 8


FORMATS: dict[FormatName, Format] = {
    "int8": Format(weight_bits=8, weight_scales="channel", input_scales="tensor"),
    "int8_dynamic": Format(weight_bits=8, weight_scales="channel", input_scales="token"),
    "int8_weight_only": Format(weight_bits=8, weight_scales="channel", input_scales="none"),
    "fp8": Format(weight_bits=8, weight_scales="tensor", input_scales="tensor", is_float=True),
    "int4_weight_only": Format(weight_bits=4, weight_scales="group", input_scales="none"),
    "w4a8": Format(weight_bits=4, weight_scales="group", input_scales="token"),
    "w3a8": Format(weight_bits=3, weight_scales="group", input_scales="token", is_served=False),
}
