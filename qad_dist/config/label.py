"""The ``label:`` section: the teacher's pass over the shards."""

from typing import Literal, Self

from pydantic import Field, model_validator

from qad_dist.config.filters import FiltersConfig
from qad_dist.config.section import Section, Split
from shards.errors import ConfigError


class LabelConfig(Section):
    """The ``label:`` section: the teacher's pass over the shards."""

    splits: list[Split] = ["train", "heldout"]
    """Splits to label. ``test`` is decoded by score."""
    max_hours_per_language: float | None = Field(default=None, gt=0)
    """Most audio of one language to label in each split, in the order of the shards; the rest is left unlabelled."""
    language: Literal["auto", "manifest"] = "auto"
    """``auto``: the teacher names the language; ``manifest``: it is told the source's, where there is one."""
    context: str = Field(default="", max_length=10_000)
    """Text of the prompt's system turn: names and terms to expect. Training and calibration use the same prompt."""
    second_pass: Literal["none", "manifest"] = "none"  # noqa: S105  no password
    """``manifest``: rejected utterances are labelled once more, with the source's language, where there is one."""
    batch_audio_seconds: float = Field(default=160.0, gt=0)
    """Audio that goes through the audio tower and the prompts' forward pass at once, padding counted."""
    slots: int = Field(default=128, ge=1)
    """Utterances of a rank that are decoded at once; an ended one makes place for the next of its shard."""
    max_response_tokens: int = Field(default=448, ge=8)
    """A response that is longer counts as runaway (``ended_by: length``)."""
    max_tokens_per_second: float = Field(default=25.0, gt=0)
    """So does one that is longer than 32 tokens and this many for each second of its audio."""
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
