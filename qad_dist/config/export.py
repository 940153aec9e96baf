"""The ``export:`` section: how the student is shipped."""

from typing import Literal

from pydantic import Field

from qad_dist.config.section import Section


class ExportConfig(Section):
    """The ``export:`` section: a folder that others load."""

    format: Literal["modelopt"] = "modelopt"
    """``modelopt``: fake-quantized Hugging Face folder for ``mto.enable_huggingface_checkpointing()``."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Dtype of the stored weights; ``null`` keeps ``model.dtype``, the only one that is bit for bit the student."""
    verify_utterances: int = Field(default=8, ge=1)
    """Utterances that the reloaded folder and the student must transcribe alike."""
