"""How far the student is from the teacher on held-out utterances, equal for any number of ranks.

Dimension key: U utterances, R response rows.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from qad_dist.batch import Batch
from qad_dist.distill.loss import RowMetrics, row_metrics
from qad_dist.distill.models import TeacherAndStudent
from qad_dist.runtime.collectives import all_gather_objects
from shards.errors import ShardError
from shards.index import UNKNOWN_LANGUAGE


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
class Distances:
    """Sums over the response tokens of each utterance, in the order of the plan."""

    keys: tuple[str, ...]
    kl_U: npt.NDArray[np.float64]
    """KL(teacher to student) in nats."""
    ce_U: npt.NDArray[np.float64]
    """Cross-entropy of the teacher's tokens in nats."""
    agreements_U: npt.NDArray[np.int64]
    """Tokens on which both models prefer the same one."""
    tokens_U: npt.NDArray[np.int64]
    """Response tokens; 0 of what could not be read."""

    @classmethod
    def of_rows(
        cls,
        keys: tuple[str, ...],
        rows: RowMetrics,
        owners_R: npt.NDArray[np.int64],
        counts_R: npt.NDArray[np.bool_] | None = None,
    ) -> Self:
        """Add up rows.

        Args:
            keys: Of the utterances.
            rows: Of all of them.
            owners_R: Place of each row's utterance.
            counts_R: Rows that count; None for all.
        """
        counts = np.ones(len(owners_R), np.bool_) if counts_R is None else counts_R

        def add_up(values_R: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
            values_R = np.where(counts, values_R, 0.0)
            return np.bincount(owners_R, weights=values_R, minlength=len(keys)).astype(np.float64)

        return cls(
            keys=keys,
            kl_U=add_up(rows.kl_R.double().cpu().numpy()),
            ce_U=add_up(rows.ce_R.double().cpu().numpy()),
            agreements_U=add_up(rows.agrees_R.cpu().numpy()).astype(np.int64),
            tokens_U=add_up(counts).astype(np.int64),
        )

    @classmethod
    def of_all_ranks(cls, own: Mapping[int, Self]) -> Self:
        """Those of all batches, by number in the plan, whichever rank had them; collective, equal on all ranks."""
        everywhere = {number: found for share in all_gather_objects(own) for number, found in share.items()}
        ordered = [everywhere[number] for number in sorted(everywhere)]
        arrays = {name: np.concatenate([getattr(found, name) for found in ordered]) for name in _ARRAYS}
        return cls(keys=tuple(key for found in ordered for key in found.keys), **arrays)

    def only(self, keys: set[str]) -> Self:
        """Of these utterances."""
        kept = [place for place, key in enumerate(self.keys) if key in keys]
        arrays = {name: getattr(self, name)[kept] for name in _ARRAYS}
        return replace(self, keys=tuple(self.keys[place] for place in kept), **arrays)

    @property
    def kl_per_token(self) -> float:
        """In nats."""
        return float(self.kl_U.sum() / self.tokens_U.sum())

    @property
    def agreement(self) -> float:
        """Share of the response tokens."""
        return float(self.agreements_U.sum() / self.tokens_U.sum())


_ARRAYS = ("kl_U", "ce_U", "agreements_U", "tokens_U")


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


def summed(distances: Distances, *, languages: Mapping[str, str | None] | None = None) -> Evaluation:
    """Means over all tokens. Pure."""
    by_language = {}
    if languages is not None:
        names = [languages[key] or UNKNOWN_LANGUAGE for key in distances.keys]
        for name in sorted(set(names)):
            own = distances.only({key for key, one in zip(distances.keys, names, strict=True) if one == name})
            if own.tokens_U.any():
                by_language[name] = own.kl_per_token
    tokens = int(distances.tokens_U.sum())
    return Evaluation(
        kl_per_token=distances.kl_per_token,
        ce_per_token=float(distances.ce_U.sum()) / tokens,
        agreement=distances.agreement,
        response_tokens=tokens,
        kl_by_language=by_language,
    )


@torch.no_grad()
def batch_distances(models: TeacherAndStudent, host_batch: Batch, *, chunk_rows: int) -> Distances:
    """How far the models are from each other on the utterances of one batch; rows without weight do not count.

    Args:
        models: Teacher and student.
        host_batch: Moved to their device.
        chunk_rows: Rows whose logits exist at once.
    """
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
    counts_R = ((host_batch.kl_weight_R > 0) | (host_batch.ce_weight_R > 0)).numpy()
    return Distances.of_rows(host_batch.keys, rows, host_batch.owners().numpy(), counts_R)


def compare(models: TeacherAndStudent, batches: Iterable[tuple[int, Batch]], *, chunk_rows: int) -> Distances:
    """How far the models are from each other, utterance by utterance; rows without weight do not count.

    Args:
        models: Teacher and student.
        batches: Number in the plan and batch, equally many on every rank; a number below 0 marks a batch that only
            keeps the ranks together.
        chunk_rows: Rows whose logits exist at once.

    Raises:
        ShardError: On every rank, when no row of the set has a weight.
    """
    own: dict[int, Distances] = {}
    for number, batch in batches:
        found = batch_distances(models, batch, chunk_rows=chunk_rows)
        if number >= 0:
            own[number] = found
    # In plan order, whichever rank had them: floating-point sums depend on their order.
    everywhere = Distances.of_all_ranks(own)
    if not everywhere.tokens_U.any():
        error = ShardError("held-out utterances must be readable, got none that is; verify the shards and pack again")
        error.is_shared = True  # every rank has the sums of all
        raise error
    return everywhere
