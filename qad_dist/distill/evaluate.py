"""How far the student is from the teacher on held-out utterances, equal for any number of ranks.

Dimension key: U utterances, R response rows.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qad_dist.batch import Batch
from qad_dist.distill.loss import row_metrics
from qad_dist.distill.models import TeacherAndStudent
from qad_dist.runtime.collectives import all_gather_objects
from shards.errors import ShardError

UNKNOWN_LANGUAGE = "unknown"


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
    kl_by_language: Mapping[str, float]
    """As ``kl_per_token``, of the utterances of each language."""
    word_error_rate: float | None = None
    """Of the student's own transcripts, where they were made."""

    def as_metrics(self, prefix: str) -> dict[str, float]:
        """Flat names for ``metrics.jsonl``."""
        values: dict[str, Any] = {
            "kl_per_token": self.kl_per_token,
            "ce_per_token": self.ce_per_token,
            "agreement": self.agreement,
            "response_tokens": self.response_tokens,
            "word_error_rate": self.word_error_rate,
            **{f"kl_per_token/{language}": kl for language, kl in self.kl_by_language.items()},
        }
        return {f"{prefix}{name}": value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Sums over the response tokens of each utterance, in the order of the plan; equal on all ranks."""

    keys: tuple[str, ...]
    kl_U: npt.NDArray[np.float64]
    """KL(teacher to student) in nats."""
    ce_U: npt.NDArray[np.float64]
    """Cross-entropy of the teacher's tokens in nats."""
    agreements_U: npt.NDArray[np.int64]
    """Tokens on which both models prefer the same one."""
    tokens_U: npt.NDArray[np.int64]
    """Response tokens; 0 of what could not be read."""


def evaluate(
    models: TeacherAndStudent,
    batches: Iterable[tuple[int, Batch]],
    *,
    chunk_rows: int,
    languages: Mapping[str, str | None] | None = None,
) -> Evaluation:
    """Compare the models on this rank's batches and add up over all ranks; rows without weight do not count.

    Args:
        models: Teacher and student.
        batches: As in :func:`compare`.
        chunk_rows: Rows whose logits exist at once.
        languages: Of the utterances, by key; without it none is told apart.

    Raises:
        ShardError: As :func:`compare`.
    """
    return summed(compare(models, batches, chunk_rows=chunk_rows), languages=languages)


def summed(compared: Compared, *, languages: Mapping[str, str | None] | None = None) -> Evaluation:
    """Means over all tokens. Pure."""
    tokens = int(compared.tokens_U.sum())
    by_language = {}
    if languages is not None:
        names = np.array([languages[key] or UNKNOWN_LANGUAGE for key in compared.keys])
        for name in sorted(set(names.tolist())):
            own = names == name
            if own_tokens := int(compared.tokens_U[own].sum()):
                by_language[name] = float(compared.kl_U[own].sum()) / own_tokens
    return Evaluation(
        kl_per_token=float(compared.kl_U.sum()) / tokens,
        ce_per_token=float(compared.ce_U.sum()) / tokens,
        agreement=int(compared.agreements_U.sum()) / tokens,
        response_tokens=tokens,
        kl_by_language=by_language,
    )


@torch.no_grad()
def compare(models: TeacherAndStudent, batches: Iterable[tuple[int, Batch]], *, chunk_rows: int) -> Compared:
    """How far the models are from each other, utterance by utterance; rows without weight do not count.

    Args:
        models: Teacher and student.
        batches: Number in the plan and batch, equally many on every rank; a number below 0 marks a batch that only
            keeps the ranks together.
        chunk_rows: Rows whose logits exist at once.

    Raises:
        ShardError: On every rank, when no row of the set has a weight.
    """
    own: dict[int, Compared] = {}
    for number, host_batch in batches:
        batch = host_batch.to(models.device)
        embedded = models.embed(batch)
        rows = row_metrics(
            models.student_states(embedded).rows_RD,
            models.teacher_states(batch, embedded).rows_RD,
            models.head_VD,
            batch.targets_R,
            chunk_rows=chunk_rows,
            teacher_head_VE=models.teacher_head_VE,
        )
        if number >= 0:
            own[number] = _by_utterance(host_batch, rows.kl_R, rows.ce_R, rows.agrees_R)
    # In plan order, whichever rank had them: floating-point sums depend on their order.
    everywhere = {number: found for share in all_gather_objects(own) for number, found in share.items()}
    ordered = [everywhere[number] for number in sorted(everywhere)]
    if not sum(int(found.tokens_U.sum()) for found in ordered):
        error = ShardError("held-out utterances must be readable, got none that is; verify the shards and pack again")
        error.is_shared = True  # every rank has the sums of all
        raise error
    arrays = {name: np.concatenate([getattr(found, name) for found in ordered]) for name in _ARRAYS}
    return replace(ordered[0], keys=tuple(key for found in ordered for key in found.keys), **arrays)


_ARRAYS = ("kl_U", "ce_U", "agreements_U", "tokens_U")


def _by_utterance(batch: Batch, kl_R: Tensor, ce_R: Tensor, agrees_R: Tensor) -> Compared:
    """Sums of each utterance of a batch, which is on the host."""
    count = batch.num_utterances
    counts_R = ((batch.kl_weight_R > 0) | (batch.ce_weight_R > 0)).numpy()
    owners_R = torch.searchsorted(batch.cu_seqlens_U1[1:].long(), batch.rows_R, right=True).numpy()

    def add_up(values_R: Tensor | npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        values = values_R.double().cpu().numpy() if isinstance(values_R, Tensor) else values_R
        return np.bincount(owners_R, weights=np.where(counts_R, values, 0.0), minlength=count).astype(np.float64)

    return Compared(
        keys=batch.keys,
        kl_U=add_up(kl_R),
        ce_U=add_up(ce_R),
        agreements_U=add_up(agrees_R).astype(np.int64),
        tokens_U=add_up(counts_R).astype(np.int64),
    )
