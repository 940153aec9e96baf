"""A look ahead: what does not fit is told before the first step, and nothing of it stays."""

import logging

import pytest
import torch
from torch import nn

from qad_dist.batch import Batch
from qad_dist.config.train import TrainConfig
from qad_dist.distill.models import TeacherAndStudent
from qad_dist.distill.preflight import preflight
from tests.helpers.states import PlainEngine, make_batch, make_models, pack


@pytest.fixture
def batches() -> list[Batch]:
    one, other = make_batch([1, 2, 3], [4, 5, 6]), make_batch([7, 8], [9, 10])
    return [pack(one, other), other.without_weight()]


def test_every_batch_goes_forward_and_backward_and_changes_nothing(
    models: TeacherAndStudent, student: nn.Parameter, batches: list[Batch]
) -> None:
    engine, before = PlainEngine(table=student), student.detach().clone()

    preflight(engine, models, iter(batches), TrainConfig())  # type: ignore[arg-type]

    assert engine.calls == ["last", "step"] * 2
    assert engine.num_skipped() == 2
    assert torch.equal(student.detach(), before)
    assert not engine.moments["table"].any()
    assert student.grad is None


def test_sizes_and_memory_are_told(batches: list[Batch], caplog) -> None:
    """A table of 2^20 float32 numbers is 2^-8 GiB; the gradient, too: it was looked at while it was there."""
    caplog.set_level(logging.INFO)
    teacher_VD, student_VD, head_VD = torch.randn(3, 32, 2**15, generator=torch.Generator().manual_seed(0))
    student = nn.Parameter(student_VD.clone())

    preflight(
        PlainEngine(table=student),  # type: ignore[arg-type]
        make_models(teacher_VD, student, head_VD),
        iter(batches),
        TrainConfig(),
    )

    told = [record.getMessage() for record in caplog.records]
    assert told[:3] == [
        "event=preflight tokens=5 utterances=2 response_tokens=5 mel_frames=2",
        "event=preflight tokens=2 utterances=1 response_tokens=2 mel_frames=1",
        "event=memory_gib_of_a_rank source=measured weights=0.0039 gradients=0.0039 masters=0.0000 moments=0.0039",
    ]
    assert told[3].startswith("event=preflight peak_memory_gib=")
    assert len(told) == 4


class SmallEngine(PlainEngine):
    """Cannot hold a gradient."""

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_what_does_not_fit_ends_it_before_the_first_step(
    models: TeacherAndStudent, student: nn.Parameter, batches: list[Batch]
) -> None:
    engine = SmallEngine(table=student)

    with pytest.raises(torch.OutOfMemoryError):
        preflight(engine, models, iter(batches), TrainConfig())  # type: ignore[arg-type]

    assert engine.calls == []
