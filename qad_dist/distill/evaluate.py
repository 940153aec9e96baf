"""How far the student is from the teacher on held-out utterances, equal for any number of ranks."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch

from qad_dist.batch import Batch
from qad_dist.distill.loss import row_metrics
from qad_dist.distill.models import TeacherAndStudent
from qad_dist.runtime.collectives import all_gather_objects
from shards.errors import ShardError


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Means over all response tokens of the set's readable utterances."""

    kl_per_token: float
    """KL(teacher to student) in nats."""
    ce_per_token: float
    """Cross-entropy of the teacher's tokens in nats."""
    agreement: float
    """Share of tokens on which both models prefer the same one."""
    response_tokens: int

    def as_metrics(self, prefix: str) -> dict[str, float]:
        """Flat names for ``metrics.jsonl``."""
        return {f"{prefix}{name}": value for name, value in asdict(self).items()}


@torch.no_grad()
def evaluate(models: TeacherAndStudent, batches: Iterable[tuple[int, Batch]], *, chunk_rows: int) -> Evaluation:
    """Compare the models on this rank's batches and add up over all ranks; rows without weight do not count.

    Args:
        models: Teacher and student.
        batches: Number in the plan and batch, equally many on every rank; a number below 0 marks a batch that only
            keeps the ranks together.
        chunk_rows: Rows whose logits exist at once.

    Raises:
        ShardError: On every rank, when no row of the set has a weight.
    """
    sums: list[tuple[int, float, float, int, int]] = []
    for number, host_batch in batches:
        batch = host_batch.to(models.device)
        shared = models.embed(batch)
        rows = row_metrics(
            models.student_states(shared),
            models.teacher_states(shared),
            models.head_VD,
            batch.targets_R,
            chunk_rows=chunk_rows,
        )
        if number >= 0:
            counts_R = (batch.kl_weight_R > 0) | (batch.ce_weight_R > 0)
            kl, ce = (float(values_R.double().where(counts_R, 0.0).sum()) for values_R in (rows.kl_R, rows.ce_R))
            sums.append((number, kl, ce, int((rows.agrees_R & counts_R).sum()), batch.weighted_rows))
    # In plan order, whichever rank had them: floating-point sums depend on their order.
    ordered = sorted(entry for share in all_gather_objects(sums) for entry in share)
    if not (tokens := sum(entry[4] for entry in ordered)):
        error = ShardError("held-out utterances must be readable, got none that is; verify the shards and pack again")
        error.is_shared = True  # every rank has the sums of all
        raise error
    return Evaluation(
        kl_per_token=sum(entry[1] for entry in ordered) / tokens,
        ce_per_token=sum(entry[2] for entry in ordered) / tokens,
        agreement=sum(entry[3] for entry in ordered) / tokens,
        response_tokens=tokens,
    )
