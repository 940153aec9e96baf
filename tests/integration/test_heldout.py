"""Distances on the held-out split: to whom each token's KL belongs."""

import numpy as np
import pytest
import torch

from qad_dist.asr.load import load_teacher
from qad_dist.config import load_run
from qad_dist.distill.evaluate import Distances
from qad_dist.heldout import HeldOut
from qad_dist.pairing import load_student
from qad_dist.runtime.reading import open_reader
from qad_dist.runtime.world import current_world

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def distances_at(digits, two_rank_run):
    """Of the PTQ student, with so many tokens in a batch."""
    torch.set_num_threads(1)

    def measure(tokens: int) -> Distances:
        run = load_run(digits.config, [f"run={two_rank_run.folder}", f"quantize.micro_batch_tokens={tokens}"])
        teacher = load_teacher(run.model, CPU)
        student, _ = load_student(run, two_rank_run.folder / "quantize" / "student", CPU)
        with open_reader(run) as reader:
            heldout = HeldOut(run, teacher, reader, current_world(), max_utterances=15)
        assert len(heldout.batches) > (1 if tokens == 256 else 0)
        found["teacher"] = heldout.distances(teacher)
        found["student"] = heldout.distances(student)
        return found["student"]

    found: dict[str, Distances] = {}
    measure.found = found
    return measure


def test_each_utterance_has_its_own_kl_whatever_it_is_packed_with(distances_at):
    together, apart = distances_at(8192), distances_at(256)

    assert sorted(together.keys) == sorted(apart.keys)
    assert len(together.keys) == 15
    assert together.keys != apart.keys  # other batches, another order
    where = [apart.keys.index(key) for key in together.keys]
    assert np.array_equal(together.tokens_U, apart.tokens_U[where])
    # INT8 codes at ties differ with the shapes of products: of one utterance, by a fraction of its KL.
    assert np.corrcoef(together.kl_U, apart.kl_U[where])[0, 1] > 0.95
    assert apart.kl_per_token == pytest.approx(together.kl_per_token, rel=0.1)


def test_teacher_is_at_no_distance_from_itself(distances_at):
    distances_at(8192)
    teacher = distances_at.found["teacher"]

    assert np.abs(teacher.kl_U).max() < 1e-6
    assert teacher.agreement == 1.0
