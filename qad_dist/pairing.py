"""Teacher and student side by side, for every stage that needs both: what they share, and how far apart they are.

Here meet the parts that know of each other nowhere else: the model family, quantization, and distillation's measures.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qad_dist.asr.decoder import DecoderStack, EmbeddedBatch, embed, layer_states, run_layer
from qad_dist.asr.load import AsrModel, load_model
from qad_dist.asr.save import save_checkpoint
from qad_dist.batch import Batch
from qad_dist.config import RunConfig
from qad_dist.distill.models import States, TeacherAndStudent
from qad_dist.quant.fake_quant import use_fast_fake_quant, without_backend
from qad_dist.quant.state import (
    QUANTIZATION,
    Quantization,
    check_quantizers,
    enable_checkpointing,
    read_quantization,
)
from qad_dist.quant.walk import WalkBatch
from shards.errors import ModelError


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


def share_frozen_parts(teacher: AsrModel, student: AsrModel) -> None:
    """Check that what is frozen is equal in both models, and keep the teacher's: it exists once on a rank.

    Raises:
        ModelError: Something differs: the student was made from another model.
    """
    if differing := _frozen_difference(teacher, student):
        part, name = differing
        raise ModelError(f"teacher and student must share their {part}, got other values of {name}; run quantize again")
    _share(teacher, student)


def share_if_equal(teacher: AsrModel, system: AsrModel) -> bool:
    """As :func:`share_frozen_parts` where everything frozen is equal; otherwise nothing is done, and False."""
    if _frozen_difference(teacher, system):
        return False
    _share(teacher, system)
    return True


def check_same_vocabulary(teacher: AsrModel, student: AsrModel) -> None:
    """See that a teacher of its own size can teach: the same tokens in the same places, in prompts and logits.

    Raises:
        ModelError: Its vocabulary, prompt or audio features are others.
    """
    if differing := vocabulary_difference(teacher, student):
        what, shown = differing
        raise ModelError(
            f"train.teacher_model must have the {what} of model.path, got {shown} in {teacher.folder}; "
            "name a teacher of the same family"
        )


def vocabulary_difference(teacher: AsrModel, student: AsrModel) -> tuple[str, str] | None:
    """What keeps the distributions of two models from being compared token by token, and what the teacher's is."""
    ours, theirs = teacher.processor, student.processor
    for what, found, wanted in (
        ("size of the vocabulary", len(teacher.head_weight_VD), len(student.head_weight_VD)),
        ("vocabulary", ours.tokenizer.get_vocab(), theirs.tokenizer.get_vocab()),
        ("prompt", teacher.prompt.build(1), student.prompt.build(1)),
        ("audio features", teacher.extractor.to_dict(), student.extractor.to_dict()),
    ):
        if found != wanted:
            shown = f"{found} for {wanted}" if isinstance(found, int) else "another one"
            return what, shown
    return None


def _share(teacher: AsrModel, student: AsrModel) -> None:
    theirs, ours = student.model.thinker, teacher.model.thinker
    theirs.audio_tower, theirs.lm_head = ours.audio_tower, ours.lm_head
    theirs.model.embed_tokens, theirs.model.norm = ours.model.embed_tokens, ours.model.norm


def _frozen_difference(teacher: AsrModel, student: AsrModel) -> tuple[str, str] | None:
    """Part and name of the first frozen weight that differs."""
    theirs, ours = student.model.thinker, teacher.model.thinker
    parts = {
        "audio tower": (ours.audio_tower, theirs.audio_tower),
        "embeddings": (ours.model.embed_tokens, theirs.model.embed_tokens),
        "final norm": (ours.model.norm, theirs.model.norm),
        "LM head": (ours.lm_head, theirs.lm_head),
    }
    for part, (ours_of_it, theirs_of_it) in parts.items():
        weights = dict(theirs_of_it.named_parameters())
        for name, weight in ours_of_it.named_parameters():
            if name not in weights or not torch.equal(weight, weights[name]):
                return part, name
    return None


def join_models(
    teacher: AsrModel, student: AsrModel, student_stack: Any, *, is_cached: bool = False, compares_layers: bool = False
) -> TeacherAndStudent:
    """Put the two models behind the callables that ``distill`` knows.

    Where both have the same LM head, as behind :func:`share_frozen_parts`, one audio tower and one embedding serve
    both; otherwise each has its own.

    Args:
        teacher: What it is distilled from.
        student: Only its layers are used, if the rest is shared.
        student_stack: A :class:`DecoderStack` of the student's layers, or the engine around one.
        is_cached: Whether the teacher's hidden states come with the batches.
        compares_layers: Whether the states behind all layers are wanted; the student's stack must keep them then.
    """
    teacher_stack, norm = DecoderStack(teacher.decoder.layers, keeps_all=compares_layers), student.decoder.norm
    is_shared = teacher.audio_tower is student.audio_tower

    def states_of(stack: Any, embedded: EmbeddedBatch, norm: torch.nn.Module) -> States:
        layers = layer_states(stack, embedded)
        rows_RD = norm(layers[-1].index_select(0, embedded.rows_R))
        return States(rows_RD, layers if compares_layers else ())

    def of_cache(batch: Batch, _: EmbeddedBatch) -> States:
        assert batch.teacher_RD is not None, "the batch has no states of the teacher"
        return States(batch.teacher_RD.to(teacher.head_weight_VD.dtype))

    def of_teacher(batch: Batch, embedded: EmbeddedBatch) -> States:
        return states_of(teacher_stack, embedded if is_shared else embed(teacher, batch), teacher.decoder.norm)

    return TeacherAndStudent(
        embed=lambda batch: embed(student, batch),
        teacher_states=of_cache if is_cached else of_teacher,
        student_states=lambda embedded: states_of(student_stack, embedded, norm),
        head_VD=student.head_weight_VD,
        teacher_head_VE=None if is_shared else teacher.head_weight_VD,
        device=student.device,
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
