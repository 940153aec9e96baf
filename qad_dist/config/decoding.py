"""How utterances are decoded: the settings that label and score share."""

from typing import Literal

from pydantic import Field

from qad_dist.config.section import Section


class DecodingSection(Section):
    """Base of the sections whose stage decodes."""

    language: Literal["auto", "manifest"] = "auto"
    """``auto``: the model names the language; ``manifest``: it is told the source's, where there is one."""
    context: str = Field(default="", max_length=10_000)
    """Text of the prompt's system turn: names and terms to expect."""
    batch_audio_seconds: float = Field(default=160.0, gt=0)
    """Audio that goes through the audio tower and the prompts' forward pass at once, padding counted."""
    slots: int = Field(default=128, ge=1)
    """Utterances of a rank that are decoded at once; an ended one makes place for the next."""
    max_response_tokens: int = Field(default=448, ge=8)
    """A response that is longer is cut and counts as runaway (``ended_by: length``)."""
    max_tokens_per_second: float = Field(default=25.0, gt=0)
    """So does one that is longer than 32 tokens and this many for each second of its audio."""
