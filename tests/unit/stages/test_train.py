"""What teacher and student share exists once, and only if it is equal."""

from collections.abc import Callable

import pytest
import torch

from qad_dist.asr.load import AsrModel
from qad_dist.stages.train import _share_frozen_parts
from shards.errors import ModelError


def test_student_keeps_its_layers_and_takes_the_teachers_frozen_parts(load_nano: Callable[..., AsrModel]) -> None:
    teacher, student = load_nano(), load_nano()
    layers = student.decoder.layers

    _share_frozen_parts(teacher, student)

    assert student.decoder.layers is layers
    assert student.decoder.layers is not teacher.decoder.layers
    shared = {parameter.data_ptr() for parameter in teacher.model.parameters()}
    own = {name for name, parameter in student.model.named_parameters() if parameter.data_ptr() not in shared}
    assert own == {f"thinker.model.layers.{name}" for name, _ in layers.named_parameters()}


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("audio tower", "thinker.audio_tower.layers.3.fc1.bias"),
        ("embeddings", "thinker.model.embed_tokens.weight"),
        ("final norm", "thinker.model.norm.weight"),
    ],
)
def test_student_with_another_frozen_part_is_refused(load_nano: Callable[..., AsrModel], part: str, name: str) -> None:
    teacher, student = load_nano(), load_nano()
    with torch.no_grad():
        dict(student.model.named_parameters())[name].view(-1)[-1] += 1e-3

    with pytest.raises(ModelError, match=f"must share their {part}, got other values of .*; run quantize again"):
        _share_frozen_parts(teacher, student)
