"""The models of a training, with what they have only once."""

from dataclasses import dataclass

import torch

from qad_dist.asr.load import AsrModel, load_model, load_teacher, resolve_model_folder
from qad_dist.config import RunConfig
from qad_dist.pairing import check_same_vocabulary, load_student, share_frozen_parts
from qad_dist.quant.folded import fold_for_decoding
from qad_dist.quant.state import Quantization
from qad_dist.runtime.record import STUDENT
from qad_dist.runtime.world import World, device_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """What is loaded before there is an engine: once a ZeRO-3 plugin exists, all that is loaded is partitioned."""

    teacher: AsrModel
    student: AsrModel
    quantization: Quantization
    decoding: AsrModel | None
    """A copy of the student with folded weights, whose frozen parts are the student's; None if nothing is decoded."""
    written: AsrModel | None
    """Another one on rank 0's host, which gets the best weights and is written; None elsewhere."""


def load_models(run: RunConfig, world: World) -> Models:
    """Teacher and student, with what both have only once, and the copies that decode and are written.

    Raises:
        ModelError: The student was made from another model, or the teacher has another vocabulary.
    """
    device, folder = device_for(world), run.stage_folder("quantize") / STUDENT
    student, quantization = load_student(run, folder, device)
    if run.train.teacher_model is None:
        teacher = load_teacher(run.model, device)
        share_frozen_parts(teacher, student)
    else:
        teacher = load_model(
            resolve_model_folder(run.train.teacher_model, setting="train.teacher_model"),
            dtype=run.model.dtype,
            audio_attention=run.model.audio_attention,
            device=device,
        )
        check_same_vocabulary(teacher, student)
    decoding = None
    if run.train.decode_utterances:
        decoding, _ = load_student(run, folder, device)
        fold_for_decoding(decoding.decoder.layers)
        share_frozen_parts(student, decoding)
    if run.train.teacher == "cached":
        teacher.decoder.layers = torch.nn.ModuleList()
    return Models(
        teacher=teacher,
        student=student,
        quantization=quantization,
        decoding=decoding,
        written=load_student(run, folder, torch.device("cpu"))[0] if world.is_main else None,
    )
