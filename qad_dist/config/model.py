"""The ``model:`` section: the full-precision teacher."""

from typing import Literal

from qad_dist.config.section import Section


class ModelConfig(Section):
    """The ``model:`` section: the full-precision teacher, from which the student is made."""

    path: str
    """Folder of a Qwen3-ASR checkpoint, or its hub id."""
    revision: str | None = None
    """Commit of the hub id; no effect for a folder."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What teacher and student compute in. Calibration and the masters of training are float32 either way."""
    audio_attention: Literal["windowed", "full"] = "windowed"
    """The audio tower's attention: 8 s windows, as the model was trained and is served, or the whole utterance."""
