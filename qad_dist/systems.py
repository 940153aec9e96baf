"""The systems that score compares: teacher, the run's own students, other models, and what was written elsewhere."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from qad_dist.asr.load import MODELOPT_STATE, AsrModel, load_model, resolve_model_folder
from qad_dist.config import RunConfig
from qad_dist.config.score import TEACHER, is_predictions
from qad_dist.quant.fake_quant import use_fast_fake_quant
from qad_dist.quant.folded import fold_for_decoding
from qad_dist.quant.int8 import use_int8
from qad_dist.quant.state import (
    QUANTIZATION,
    check_quantizers,
    enable_checkpointing,
    read_quantization,
    served_bytes,
)
from qad_dist.runtime.record import STUDENT, model_fingerprint
from shards.errors import ConfigError
from shards.storage import folder_bytes, sha256_file, verify_manifest

log = logging.getLogger(__name__)

STUDENT_STAGES = {"ptq": "quantize", "qad": "train"}
"""The stages that write the run's own students."""

_SET = "{set}"


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """Something whose transcripts are scored."""

    name: str
    path: str
    """As the config names it, or below the run's folder."""
    folder: Path | None
    """Of the checkpoint; None for predictions."""

    @property
    def is_teacher(self) -> bool:
        """Whether the others are compared with it."""
        return self.name == TEACHER

    def predictions(self, test_set: str) -> Path:
        """The file of predictions for a test set."""
        return Path(self.path.replace(_SET, test_set))

    def fingerprint(self, test_set: str) -> str:
        """Of all that its transcripts of a set come from.

        Raises:
            ConfigError: There is no file of predictions.
        """
        if self.folder is not None:
            return model_fingerprint(self.folder)
        path = self.predictions(test_set)
        if not path.is_file():
            raise ConfigError(
                f"score.systems.{self.name} must be a file of predictions, got {path}, which is none; correct the path,"
                f" in which {_SET} stands for the name of the test set"
            )
        return sha256_file(path)

    def disk_bytes(self) -> int | None:
        """Of its weights, as they are stored."""
        return None if self.folder is None else folder_bytes(self.folder, suffixes=(".safetensors", MODELOPT_STATE))


def find_systems(run: RunConfig) -> list[System]:
    """The teacher first, then the run's own students, then ``score.systems`` in their order. Hub ids are downloaded.

    Raises:
        QadError: A folder is missing or is no checkpoint.
    """
    teacher = resolve_model_folder(run.model.path, run.model.revision)
    systems = [System(name=TEACHER, path=run.model.path, folder=teacher)]
    for name in run.score.students:
        path = f"{STUDENT_STAGES[name]}/{STUDENT}"
        systems.append(System(name=name, path=path, folder=run.folder / path))
    for name, path in run.score.systems.items():
        folder = None if is_predictions(path) else resolve_model_folder(path, setting=f"score.systems.{name}")
        systems.append(System(name=name, path=path, folder=folder))
    return systems


def verify_students(run: RunConfig) -> None:
    """Check every byte of the run's own students, before anything of them is loaded.

    Raises:
        CheckpointError: One is damaged.
    """
    for name in run.score.students:
        verify_manifest(run.stage_folder(STUDENT_STAGES[name]) / STUDENT)


def load_system(
    run: RunConfig, system: System, *, audio_attention: str, device: torch.device
) -> tuple[AsrModel, int | None]:
    """A system's model, ready to decode, and the bytes of its weights as they are served (None: not quantized).

    Quantized weights are folded, or computed with in integers (``score.arithmetic``).

    Args:
        run: Says dtype, arithmetic and context.
        system: Not one of predictions.
        audio_attention: ``windowed`` or ``full``.
        device: Where to put it.

    Raises:
        ModelError: It cannot be loaded, or is not quantized as it says.
    """
    assert system.folder is not None, "predictions have no model"
    folder, is_quantized = system.folder, (system.folder / MODELOPT_STATE).exists() and not system.is_teacher
    enable_checkpointing()
    loaded = load_model(
        folder, dtype=run.model.dtype, audio_attention=audio_attention, device=device, quantized=is_quantized
    )
    num_served_bytes = None
    if is_quantized:
        if (folder / QUANTIZATION).is_file():
            check_quantizers(loaded.model, read_quantization(folder))
        # Before folding: it drops the weight quantizers, by which quantized tensors are known.
        num_served_bytes = served_bytes(loaded.model)
        if run.score.arithmetic == "int8":
            log.info("event=int8 system=%s linears=%d", system.name, use_int8(loaded.decoder))
        else:
            use_fast_fake_quant(loaded.model)
            fold_for_decoding(loaded.decoder.layers)
    return loaded, num_served_bytes
