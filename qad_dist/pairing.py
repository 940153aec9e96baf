"""Teacher and student side by side, for every stage that needs both: what they share, and how far apart they are.

Here meet the parts that know of each other nowhere else: the model family, quantization, and distillation's measures.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qad_dist.asr.decoder import DecoderStack, embed, response_states, run_layer
from qad_dist.asr.load import AsrModel, load_model
from qad_dist.asr.save import save_checkpoint
from qad_dist.batch import Batch
from qad_dist.config import RunConfig
from qad_dist.distill.models import TeacherAndStudent
from qad_dist.quant.fake_quant import use_fast_fake_quant, without_backend
from qad_dist.quant.state import (
    QUANTIZATION,
    Quantization,
    check_quantizers,
    enable_checkpointing,
    read_quantization,
)
from qad_dist.quant.walk import WalkBatch


def load_student(
    run: RunConfig, folder: Path, device: torch.device, *, dtype: str | None = None
) -> tuple[AsrModel, Quantization]:
    """A student of this project, checked against what stands beside its weights, its fake quantization fast.

    Args:
        run: Says dtype and attention.
        folder: Of ``quantize``, ``train`` or an export.
        device: Where to put it.
        dtype: Instead of ``model.dtype``.

    Raises:
        ModelError: It is not complete, or not quantized as it says.
    """
    enable_checkpointing()
    quantization = read_quantization(folder)
    student = load_model(
        folder,
        dtype=dtype or run.model.dtype,
        audio_attention=run.model.audio_attention,
        device=device,
        quantized=True,
    )
    check_quantizers(student.model, quantization)
    use_fast_fake_quant(student.model)
    return student, quantization


def save_student(student: AsrModel, quantization: Quantization, folder: Path, *, dtype: str) -> None:
    """Write a student as :func:`load_student` reads it, its state plain ModelOpt's.

    Args:
        student: On any device; the files of the folder it was loaded from go with it.
        quantization: What was done to it.
        folder: Replaced if it exists.
        dtype: Of the weights, as the config shall say.
    """
    with without_backend(student.model):
        save_checkpoint(
            student.model, folder, base=student.folder, dtype=dtype, beside={QUANTIZATION: quantization.as_json()}
        )


def join_models(teacher: AsrModel, student: AsrModel, student_stack: Any) -> TeacherAndStudent:
    """Put the two models behind the callables that ``distill`` knows.

    Args:
        teacher: Its audio tower, embeddings, final norm and head serve both.
        student: Only its layers are used.
        student_stack: A :class:`DecoderStack` of the student's layers, or the engine around one.
    """
    teacher_stack, norm = DecoderStack(teacher.decoder.layers), teacher.decoder.norm
    return TeacherAndStudent(
        embed=lambda batch: embed(teacher, batch),
        teacher_states=lambda embedded: response_states(teacher_stack, embedded, norm),
        student_states=lambda embedded: response_states(student_stack, embedded, norm),
        head_VD=teacher.head_weight_VD,
        device=teacher.device,
    )


@torch.no_grad()
def walk_batch(model: AsrModel, batch: Batch, *, number: int, is_search: bool) -> WalkBatch:
    """A batch as quantization sees it: behind embeddings and audio tower, on the model's device.

    Args:
        model: Whose frozen parts are used, in its dtype.
        batch: On the host.
        number: Place in the plan.
        is_search: Whether choices are compared on it.
    """
    on_device = batch.to(model.device)
    embedded = embed(model, on_device)

    def run(layer: torch.nn.Module, hidden_ND: Tensor) -> Tensor:
        return run_layer(layer, hidden_ND, embedded.cos_1NE, embedded.sin_1NE, embedded.segments)

    start_ND = embedded.hidden_ND
    return WalkBatch(
        number=number,
        is_search=is_search,
        start_ND=start_ND,
        rows_R=embedded.rows_R,
        run_layer=run,
        hidden_ND=start_ND,
        drifted_ND=start_ND,
    )
