"""The ``label:`` section: the teacher's pass over the shards."""

from typing import Literal, Self

from pydantic import Field, model_validator

from qad_dist.config.decoding import DecodingSection
from qad_dist.config.filters import FiltersConfig
from qad_dist.config.section import Split
from shards.errors import ConfigError


class LabelConfig(DecodingSection):
    """The ``label:`` section: the teacher's pass over the shards. Calibration and training use its prompts."""

    splits: list[Split] = ["train", "heldout"]
    """Splits to label. ``test`` is decoded by score."""
    max_hours_per_language: float | None = Field(default=None, gt=0)
    """Most audio of one language to label in each split, in the order of the shards; the rest is left unlabelled."""
    second_pass: Literal["none", "manifest"] = "none"  # noqa: S105  no password
    """``manifest``: rejected utterances are labelled once more, with the source's language, where there is one."""
    hidden_states: bool = False
    """Also store the teacher's final hidden states, 2 KB a token, for training without its forward pass."""
    stale_seconds: float = Field(default=120.0, ge=1)
    """A rank that makes no progress for so long loses its shard to another one."""
    backend: Literal["torch", "vllm"] = "torch"
    """What decodes: this project, or a vLLM server."""
    vllm_url: str | None = None
    """Address of a server that runs with ``--enable-scale-out``; None starts one a rank with ``vllm_python``."""
    vllm_python: str | None = None
    """Python of an environment that has vLLM; it cannot be this one, as it needs another torch."""
    filters: FiltersConfig = FiltersConfig()
    """Which labels are used for calibration and training."""

    @model_validator(mode="after")
    def _backend_fits(self) -> Self:
        if self.backend == "vllm" and self.vllm_url is None and self.vllm_python is None:
            raise ConfigError(
                "label.backend vllm needs a server, got neither label.vllm_url nor label.vllm_python; set one of them"
            )
        if self.backend == "vllm" and self.hidden_states:
            raise ConfigError("label.hidden_states needs label.backend torch, got vllm; vLLM does not give them")
        return self
