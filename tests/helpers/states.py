"""Batches and models for distillation without speech: hidden states are looked up by token id."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qad_dist.batch import Batch
from qad_dist.distill.models import TeacherAndStudent


def make_batch(ids: Sequence[int], targets: Sequence[int], *, key: str = "u") -> Batch:
    """One utterance whose every position is a response row."""
    count = len(ids)
    return Batch(
        keys=(key,),
        input_ids_N=torch.tensor(ids),
        position_ids_N=torch.arange(count),
        cu_seqlens_U1=torch.tensor([0, count], dtype=torch.int32),
        audio_positions_P=torch.zeros(0, dtype=torch.int64),
        mel_MF=torch.zeros(1, 1),
        mel_lengths_U=torch.tensor([1]),
        rows_R=torch.arange(count),
        targets_R=torch.tensor(targets),
        kl_weight_R=torch.ones(count),
        ce_weight_R=torch.ones(count),
        weighted_rows=count,
    )


def make_models(teacher_VD: Tensor, student_VD: Tensor, head_VD: Tensor) -> TeacherAndStudent:
    """Models whose hidden state at a position is a row of a table."""
    return TeacherAndStudent(
        embed=lambda batch: batch.input_ids_N[batch.rows_R],
        teacher_states=lambda ids_R: teacher_VD[ids_R],
        student_states=lambda ids_R: student_VD[ids_R],
        head_VD=head_VD,
        device=torch.device("cpu"),
    )
