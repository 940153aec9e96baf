"""The ``train:`` section: quantization-aware distillation."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from qad_dist.config.augment import AugmentConfig
from qad_dist.config.section import Section
from shards.errors import ConfigError

PresetName = Literal["qad", "released"]

PRESETS: dict[PresetName, dict[str, Any]] = {
    "qad": {},
    "released": {"kl_weight": 0.5, "ce_weight": 0.5, "temperature": 2.0},
}
"""Values of settings that are not given; ``qad`` has the defaults, ``released`` the loss of the released INT8 model."""


class TrainConfig(Section):
    """The ``train:`` section: quantization-aware distillation."""

    preset: PresetName = "qad"
    """What the loss is where its settings are not given: ``qad``, KL at temperature 1 alone; ``released``, half KL at
    temperature 2 and half cross-entropy, as the released INT8 + QAD model was trained."""
    deepspeed: str | None = "configs/deepspeed/zero1.json"
    """DeepSpeed settings; the file's ``zero_optimization.stage`` (1, 2 or 3) says what is sharded. ``null``: nothing
    is, plain data parallelism."""
    teacher: Literal["online", "cached"] = "online"
    """``online``: the teacher runs beside the student; ``cached``: its hidden states are those that label stored
    (``label.hidden_states``), and its decoder takes no memory and no time."""
    teacher_model: str | None = None
    """Another teacher than ``model.path``: folder or hub id of a checkpoint with the same vocabulary, of any size. It
    shares nothing with the student, so that audio tower and embeddings run twice."""
    steps: int = Field(default=600, ge=1)
    """Optimizer updates."""
    seed: int | None = Field(default=None, ge=0)
    """Decides the order of the data and how copies are altered; ``null``: the run's ``seed``."""
    micro_batch_tokens: int = Field(default=16_384, ge=256)
    """Tokens that one rank forwards at once; utterances are packed up to it."""
    micro_batches_per_step: int = Field(default=8, ge=1)
    """Micro-batches of a step over all ranks, whatever their number: the global batch."""
    augment: AugmentConfig = AugmentConfig()
    """Altered copies of the utterances."""
    sources: tuple[str, ...] = ()
    """Only utterances of these sources, by the name in the index; empty: of all."""
    language_temperature: float = Field(default=1.0, ge=1, le=100)
    """Above 1, rare languages come more often: a language's share of the audio is its hours to the power of 1/T."""
    max_hours_per_language: float | None = Field(default=None, gt=0)
    """Most audio of one language in an epoch; another part of it comes in the next one."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak of the schedule."""
    final_learning_rate_share: float = Field(default=0.1, ge=0, le=1)
    """Where the cosine ends, as a share of the peak."""
    warmup_steps: int = Field(default=50, ge=0)
    """Linear from 0 to the peak."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled decay; never applied to norms."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """AdamW; the weights of a student that is near its teacher have small gradients, averaged over many steps."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest global gradient norm; a longer gradient is scaled down to it."""
    train_norms: bool = False
    """Also train the decoder layers' RMSNorm weights."""
    divergence: Literal["forward", "reverse"] = "forward"
    """``forward``: KL(teacher to student), which no likely token of the teacher escapes; ``reverse``: KL(student to
    teacher), by which the student may leave out what the teacher finds unlikely."""
    temperature: float = Field(default=1.0, gt=0, le=20)
    """Softens both distributions before the KL; 1 distils the teacher's own distribution."""
    kl_weight: float = Field(default=1.0, ge=0)
    """Weight of the KL per response token."""
    ce_weight: float = Field(default=0.0, ge=0)
    """Weight of the cross-entropy on the teacher's tokens; it pulls the student away from the teacher's doubts."""
    hidden_weight: float = Field(default=0.0, ge=0)
    """Weight of the relative squared distance between the hidden states of both models, the mean over all layers, per
    token of prompt, audio and response; 0 compares logits alone. It needs a teacher with the student's layers: not a
    cached one, nor another than ``model.path``."""
    loss_chunk_rows: int = Field(default=1024, ge=1)
    """Response rows whose logits exist at once."""
    compile: bool | None = None
    """Compile the decoder layers of both models, one graph each; ``null``: on GPUs, unless ZeRO-3 shards weights."""
    preflight: bool = True
    """Run the plan's largest micro-batches before the first step: if memory does not suffice, that is told at once."""
    max_skipped_steps: int = Field(default=10, ge=0)
    """Steps whose loss or gradient may be no finite number: they change nothing, and training goes on."""
    evaluate_every: int = Field(default=50, ge=1)
    """Steps between two looks at the held-out KL, which chooses the student."""
    evaluate_utterances: int = Field(default=512, ge=1)
    """Held-out utterances of such a look, at most."""
    decode_every: int | None = Field(default=None, ge=1)
    """Steps between two counts of held-out word errors, a multiple of ``evaluate_every``; ``null``: only before the
    first step and behind the last."""
    decode_utterances: int = Field(default=256, ge=0)
    """Held-out utterances that are decoded for it, at most; 0 never decodes."""
    keep: Literal["best", "last"] = "best"
    """Which student is the result: of all looks the one nearest to the teacher, or that of the last look."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many looks without a better student; ``null`` trains all steps."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between two checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=2)
    """Newest checkpoints kept; the newest may be the one that a kill interrupts, so at least 2."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two lines in ``metrics.jsonl``; elsewhere the host waits for nothing."""
    resume: str = "auto"
    """``auto``: the newest complete checkpoint, if any; ``none``: from the start, deleting them all; or a folder."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    """Also log to these (each needs its package); ``metrics.jsonl`` is always written."""

    @property
    def compares_layers(self) -> bool:
        """Whether the loss needs the hidden states behind all layers of both models."""
        return self.hidden_weight > 0

    @model_validator(mode="before")
    @classmethod
    def _take_preset(cls, values: Any) -> Any:
        """Settings that are given stand; the preset fills in the others."""
        if not isinstance(values, dict):
            return values
        name = values.get("preset", "qad")
        preset = PRESETS.get(name, {}) if isinstance(name, str) else {}  # pydantic refuses what is not known
        return {**preset, **values}

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ConfigError(
                f"train.warmup_steps must be below train.steps ({self.steps}), got {self.warmup_steps}; "
                "50 is enough for a cosine run of 1,000 steps"
            )
        if self.patience is not None and self.keep == "last":
            raise ConfigError(
                f"train.patience must be null with train.keep last, got {self.patience}; no look is better than another"
            )
        if self.kl_weight == 0 and self.ce_weight == 0:
            raise ConfigError("train.kl_weight and train.ce_weight must not both be 0, got 0 and 0; set one above 0")
        if self.decode_every is not None and self.decode_every % self.evaluate_every:
            raise ConfigError(
                f"train.decode_every must be a multiple of train.evaluate_every ({self.evaluate_every}), got "
                f"{self.decode_every}; words are counted where the KL is"
            )
        return self

    @model_validator(mode="after")
    def _compared_layers_are_there(self) -> Self:
        is_cached = self.teacher == "cached"
        if self.compares_layers and (is_cached or self.teacher_model is not None):
            what = "train.teacher online" if is_cached else "train.teacher_model null"
            raise ConfigError(
                f"train.hidden_weight above 0 needs {what}, got {self.hidden_weight:g}; set it to 0: that teacher has "
                "no layers to compare the student's with"
            )
        return self

    @model_validator(mode="after")
    def _cached_teacher_is_the_labels(self) -> Self:
        if self.teacher == "cached" and self.teacher_model is not None:
            raise ConfigError(
                f"train.teacher cached needs train.teacher_model null, got {self.teacher_model!r}; label stored the "
                "states of model.path"
            )
        if self.teacher == "cached" and self.augment.copies:
            raise ConfigError(
                f"train.teacher cached needs train.augment.copies 0, got {self.augment.copies}; no states are stored "
                "for altered audio"
            )
        return self
