"""The ``score:`` and the ``export:`` section: what the student is compared with, and how it is shipped."""

import re
from typing import Literal

from pydantic import Field, field_validator

from qad_dist.config.section import Section, Split
from shards.errors import ConfigError


class ScoreConfig(Section):
    """The ``score:`` section: WER, CER and KL of any number of systems on the same utterances."""

    splits: list[Split] = ["test"]
    """Splits to score."""
    systems: dict[str, str] = {}
    """Further systems beside teacher, ptq and qad: name to model folder or hub id."""
    batch_audio_seconds: float = Field(default=160.0, gt=0)
    """Audio in one decoding batch, padding counted."""
    max_response_tokens: int = Field(default=448, ge=8)
    """Longest response."""
    arithmetic: Literal["fake_quant", "int8"] = "fake_quant"
    """How quantized systems compute: with quantized values in ``model.dtype``, as they were trained, or in integers."""

    @field_validator("systems")
    @classmethod
    def _names_are_free(cls, systems: dict[str, str]) -> dict[str, str]:
        for name in systems:
            if name in ("teacher", "ptq", "qad") or not re.fullmatch(r"[a-z0-9_-]+", name):
                raise ConfigError(
                    f"score.systems names must match [a-z0-9_-]+ and not be teacher, ptq, qad, got {name!r}; rename it"
                )
        return systems


class ExportConfig(Section):
    """The ``export:`` section: a folder that others load."""

    format: Literal["modelopt"] = "modelopt"
    """``modelopt``: fake-quantized Hugging Face folder for ``mto.enable_huggingface_checkpointing()``."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Dtype of the stored weights; ``null`` keeps ``model.dtype``, the only one that is bit for bit the student."""
    verify_utterances: int = Field(default=8, ge=1)
    """Utterances that the reloaded folder and the student must transcribe alike."""
