"""The held-out split, on which students are compared with their teacher before and while they learn.

Dimension key: N packed tokens, D width, R response rows, U utterances.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qad_dist.asr.dataset import LabelledSet, OnDamaged, refuse
from qad_dist.asr.load import AsrModel
from qad_dist.batch import Batch
from qad_dist.config import RunConfig
from qad_dist.distill.loss import RowMetrics, row_metrics
from qad_dist.labelling import read_used_labels
from qad_dist.pairing import walk_batch
from qad_dist.quant.walk import WalkBatch, final_hidden
from qad_dist.runtime.collectives import all_gather_objects
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


@dataclass(frozen=True, slots=True)
class Distances:
    """How far a student is from its teacher, utterance by utterance, in the order of the plan; equal on all ranks."""

    keys: tuple[str, ...]
    kl_U: npt.NDArray[np.float64]
    """KL from teacher to student in nats, summed over response tokens."""
    agreements_U: npt.NDArray[np.int64]
    """Response tokens on which both prefer the same one."""
    tokens_U: npt.NDArray[np.int64]
    """Response tokens."""

    @property
    def kl_per_token(self) -> float:
        """In nats."""
        return float(self.kl_U.sum() / self.tokens_U.sum())

    @property
    def agreement(self) -> float:
        """Share of the response tokens."""
        return float(self.agreements_U.sum() / self.tokens_U.sum())


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
        self._states_RD: dict[int, Tensor] = {}
        for number, batch in heldout_batches(dataset, run, world, token_budget=budget):
            if number < 0:
                continue
            walking = walk_batch(teacher, batch, number=number, is_search=True)
            self.batches.append(walking)
            self._keys[number] = batch.keys
            ends_U = batch.cu_seqlens_U1[1:].long()
            self._owners_R[number] = torch.searchsorted(ends_U, batch.rows_R, right=True)
            self._states_RD[number] = _states(teacher, walking, final_hidden(walking, teacher.decoder.layers))

    def distances(self, student: AsrModel) -> Distances:
        """From the teacher to a student as it is now."""
        own = {b.number: self._distance(student, b, final_hidden(b, student.decoder.layers)) for b in self.batches}
        everywhere = {number: found for share in all_gather_objects(own) for number, found in share.items()}
        ordered = [everywhere[number] for number in sorted(everywhere)]
        return Distances(
            tuple(key for found in ordered for key in found.keys),
            np.concatenate([found.kl_U for found in ordered]),
            np.concatenate([found.agreements_U for found in ordered]),
            np.concatenate([found.tokens_U for found in ordered]),
        )

    def kl(self, student: AsrModel, batch: WalkBatch, student_ND: Tensor) -> tuple[float, int]:
        """KL in nats summed over a batch's response tokens, and their number, from ``[N, D]`` behind the last layer."""
        found = self._distance(student, batch, student_ND)
        return float(found.kl_U.sum()), int(found.tokens_U.sum())

    def _distance(self, student: AsrModel, batch: WalkBatch, student_ND: Tensor) -> Distances:
        rows = _compare(student, _states(student, batch, student_ND), self._states_RD[batch.number])
        keys, owners_R = self._keys[batch.number], self._owners_R[batch.number].numpy()
        kl_R, agrees_R = rows.kl_R.double().cpu().numpy(), rows.agrees_R.cpu().numpy()
        return Distances(
            keys,
            np.bincount(owners_R, weights=kl_R, minlength=len(keys)),
            np.bincount(owners_R[agrees_R], minlength=len(keys)),
            np.bincount(owners_R, minlength=len(keys)),
        )


@torch.no_grad()
def kl_between(model: AsrModel, batch: WalkBatch, student_ND: Tensor, teacher_ND: Tensor) -> tuple[float, int]:
    """KL in nats from the teacher to the student, summed over the batch's response tokens, and their number.

    Args:
        model: Whose final norm and head both share.
        batch: Says which tokens count.
        student_ND: Behind the student's last layer.
        teacher_ND: Behind the teacher's.
    """
    rows = _compare(model, _states(model, batch, student_ND), _states(model, batch, teacher_ND))
    return float(rows.kl_R.double().sum()), len(batch.rows_R)


def _states(model: AsrModel, batch: WalkBatch, hidden_ND: Tensor) -> Tensor:
    """``[R, D]``: what the LM head reads at the response rows."""
    with torch.no_grad():
        return model.decoder.norm(hidden_ND.index_select(0, batch.rows_R))


def _compare(model: AsrModel, student_RD: Tensor, teacher_RD: Tensor) -> RowMetrics:
    """Through the head that both share; of no interest is the cross-entropy, for which targets would be needed."""
    nothing_R = torch.zeros(len(teacher_RD), dtype=torch.int64, device=teacher_RD.device)
    return row_metrics(student_RD, teacher_RD, model.head_weight_VD, nothing_R, chunk_rows=CHUNK_ROWS)
