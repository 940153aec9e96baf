"""A teacher and a student that look states up in a table, and the loop that trains on them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from qad_dist.config.train import TrainConfig
from qad_dist.distill.checkpoint import Checkpoints, TrainingState
from qad_dist.distill.loop import train
from qad_dist.distill.models import TeacherAndStudent
from tests.helpers.loops import NAN_ID, VOCABULARY, WIDTH, Recorder, Steps, batch_of
from tests.helpers.states import PlainEngine, make_models

Loop = Callable[..., tuple[TrainingState, PlainEngine]]


@pytest.fixture
def student() -> nn.Parameter:
    return nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def models(student: nn.Parameter) -> TeacherAndStudent:
    """Whose teacher makes no number of one token."""
    random = torch.Generator().manual_seed(2)
    teacher_VD, head_VD = (torch.randn(VOCABULARY, WIDTH, generator=random) for _ in range(2))
    teacher_VD[NAN_ID] = torch.nan
    return make_models(teacher_VD, student, head_VD)


@pytest.fixture
def run_loop(models: TeacherAndStudent, student: nn.Parameter, tmp_path: Path) -> Loop:
    def run(
        recorder: Recorder,
        state: TrainingState,
        config: TrainConfig,
        data: Steps | None = None,
        engine: PlainEngine | None = None,
    ) -> tuple[TrainingState, PlainEngine]:
        engine = engine or PlainEngine(table=student)
        state = train(
            engine,  # type: ignore[arg-type]
            models,
            data or Steps([batch_of(3, seed=0), batch_of(8, seed=1)], [batch_of(5, seed=2)]),
            config,
            state=state,
            checkpoints=Checkpoints(tmp_path, keep=config.keep_checkpoints),
            hooks=recorder.hooks(),
        )
        return state, engine

    return run
