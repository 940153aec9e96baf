"""The held-out split, on which students are compared with their teacher before and while they learn.

Dimension key: N packed tokens, D width, R response rows, U utterances.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from qad_dist.asr.dataset import LabelledSet, OnDamaged, refuse
from qad_dist.asr.load import AsrModel
from qad_dist.batch import Batch
from qad_dist.config import RunConfig
from qad_dist.distill.evaluate import Distances
from qad_dist.distill.loss import RowMetrics, row_metrics
from qad_dist.labelling import read_used_labels
from qad_dist.pairing import walk_batch
from qad_dist.quant.walk import WalkBatch, final_hidden
from qad_dist.runtime.world import World
from shards.labelled import Labelled
from shards.plan import plan_epoch, share_of_rank
from shards.schema import HELDOUT
from shards.stored_states import StoredStates
from shards.workers import Reader

CHUNK_ROWS = 64
"""Response rows whose logits exist at once: with what is made of them 0.3 GB, of a vocabulary of 151,936."""


def heldout_set(
    run: RunConfig, teacher: AsrModel, reader: Reader, *, max_utterances: int, stored: StoredStates | None = None
) -> tuple[LabelledSet, Labelled]:
    """The held-out split, or as many of its utterances at equal distances: all languages and shards stay in."""
    labelled = read_used_labels(run, HELDOUT)
    rows = labelled.rows[:: math.ceil(len(labelled.rows) / max_utterances)]
    prompt = teacher.prompt.with_context(run.label.context)
    dataset = LabelledSet(rows, reader=reader, prompt=prompt, extractor=teacher.extractor, stored=stored)
    return dataset, labelled


def heldout_batches(
    heldout: LabelledSet, run: RunConfig, world: World, *, token_budget: int, on_damaged: OnDamaged = refuse
) -> Iterator[tuple[int, Batch]]:
    """This rank's held-out micro-batches with their numbers; -1 for one that only keeps the ranks together."""
    steps = plan_epoch(heldout.num_tokens, seed=run.seed, epoch=0, token_budget=token_budget, micro_batches_per_step=1)
    numbered = [[number] for number in range(len(steps))]
    share = share_of_rank(numbered, rank=world.rank, world_size=world.world_size)
    numbers = [number[0] if number else -1 for number in share]
    chosen = [steps[max(0, number)][0] for number in numbers]
    yield from zip(numbers, heldout.batches(chosen, on_damaged=on_damaged), strict=True)


class HeldOut:
    """Held-out utterances behind the teacher's embeddings, and what the teacher makes of them, kept on the device.

    The teacher itself is not: final norm and LM head of its students are its own.
    """

    def __init__(self, run: RunConfig, teacher: AsrModel, reader: Reader, world: World, *, max_utterances: int) -> None:
        """Read the utterances and run the teacher on this rank's share.

        Raises:
            ShardError: One cannot be read, or none is held out.
        """
        dataset, _ = heldout_set(run, teacher, reader, max_utterances=max_utterances)
        budget = max(run.quantize.micro_batch_tokens, int(dataset.num_tokens.max()))
        self.batches: list[WalkBatch] = []
        """This rank's; not those that only keep the ranks together."""
        self._keys: dict[int, tuple[str, ...]] = {}
        self._owners_R: dict[int, Tensor] = {}
        self._targets_R: dict[int, Tensor] = {}
        self._states_RD: dict[int, Tensor] = {}
        for number, batch in heldout_batches(dataset, run, world, token_budget=budget):
            if number < 0:
                continue
            walking = walk_batch(teacher, batch, number=number, is_search=True)
            self.batches.append(walking)
            self._keys[number] = batch.keys
            self._owners_R[number] = batch.owners()
            self._targets_R[number] = batch.targets_R.to(teacher.device)
            self._states_RD[number] = _states(teacher, walking, final_hidden(walking, teacher.decoder.layers))

    def distances(self, student: AsrModel) -> Distances:
        """From the teacher to a student as it is now."""
        return Distances.of_all_ranks(
            {b.number: self._distance(student, b, final_hidden(b, student.decoder.layers)) for b in self.batches}
        )

    def kl(self, student: AsrModel, batch: WalkBatch, student_ND: Tensor) -> tuple[float, int]:
        """KL in nats summed over a batch's response tokens, and their number, from ``[N, D]`` behind the last layer."""
        found = self._distance(student, batch, student_ND)
        return float(found.kl_U.sum()), int(found.tokens_U.sum())

    def _distance(self, student: AsrModel, batch: WalkBatch, student_ND: Tensor) -> Distances:
        exact_RD, targets_R = self._states_RD[batch.number], self._targets_R[batch.number]
        rows = _compare(student, _states(student, batch, student_ND), exact_RD, targets_R)
        return Distances.of_rows(self._keys[batch.number], rows, self._owners_R[batch.number].numpy())


@torch.no_grad()
def kl_between(model: AsrModel, batch: WalkBatch, student_ND: Tensor, teacher_ND: Tensor) -> tuple[float, int]:
    """KL in nats from the teacher to the student, summed over the batch's response tokens, and their number.

    Args:
        model: Whose final norm and head both share.
        batch: Says which tokens count.
        student_ND: Behind the student's last layer.
        teacher_ND: Behind the teacher's.
    """
    nothing_R = torch.zeros(len(batch.rows_R), dtype=torch.int64, device=batch.rows_R.device)  # no cross-entropy
    rows = _compare(model, _states(model, batch, student_ND), _states(model, batch, teacher_ND), nothing_R)
    return float(rows.kl_R.double().sum()), len(batch.rows_R)


def _states(model: AsrModel, batch: WalkBatch, hidden_ND: Tensor) -> Tensor:
    """``[R, D]``: what the LM head reads at the response rows."""
    with torch.no_grad():
        return model.decoder.norm(hidden_ND.index_select(0, batch.rows_R))


def _compare(model: AsrModel, student_RD: Tensor, teacher_RD: Tensor, targets_R: Tensor) -> RowMetrics:
    """Through the head that both share."""
    return row_metrics(student_RD, teacher_RD, model.head_weight_VD, targets_R, chunk_rows=CHUNK_ROWS)
