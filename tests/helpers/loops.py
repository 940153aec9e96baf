"""What the training loop is tested with: micro-batches by step, evaluations from a list, and all that it tells."""

from collections.abc import Iterator, Sequence

import torch

from qad_dist.batch import Batch
from qad_dist.config.train import TrainConfig
from qad_dist.distill.checkpoint import TrainingState
from qad_dist.distill.evaluate import Evaluation
from qad_dist.distill.loop import Hooks
from qad_dist.distill.window import BadBatch
from shards.errors import ShardError
from tests.helpers.states import make_batch

VOCABULARY, WIDTH = 29, 6
NAN_ID = 28
"""Token of which the teacher of these tests makes no number; no batch has it unless it was put there."""
START = TrainingState(fingerprint="f")


def settings(**values: object) -> TrainConfig:
    """Of a student that is a table: it has no layers whose states could be compared."""
    given = {"steps": 4, "warmup_steps": 1, "log_every": 2, "learning_rate": 0.1}
    return TrainConfig.model_validate({**given, **values})


def batch_of(count: int, *, seed: int, key: str = "u") -> Batch:
    ids, targets = torch.randint(NAN_ID, (2, count), generator=torch.Generator().manual_seed(seed)).tolist()
    return make_batch(ids, targets, key=key)


class Steps:
    """Micro-batches by step; the same for every step where only one list is given."""

    def __init__(self, *steps: list[Batch]) -> None:
        self.steps = steps

    def micro_batches(self, step: int) -> Iterator[Batch]:
        return iter(self.steps[step % len(self.steps)])

    def num_rows(self, step: int) -> int:
        return sum(batch.weighted_rows for batch in self.steps[step % len(self.steps)])

    def audio_seconds(self, step: int) -> float:
        return 10.0


class PlannedSteps(Steps):
    """Rows are counted as planned, with a weight or without."""

    def num_rows(self, step: int) -> int:
        return sum(batch.num_rows for batch in self.steps[step % len(self.steps)])


class Recorder:
    """Evaluations and word errors from lists, one utterance a time that cannot be read, and all that the loop tells."""

    def __init__(self, *kls: float, words: Sequence[float | None] = (), too_many: int = 1_000) -> None:
        self.kls, self.words = list(kls), list(words)
        self.quarantined = 0
        self.too_many = too_many
        self.best: list[int] = []
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.bad: list[tuple[int, list[BadBatch]]] = []

    def hooks(self) -> Hooks:
        return Hooks(
            evaluate=lambda: evaluation_of(self.kls.pop(0)),
            count_words=lambda: self.words.pop(0) if self.words else None,
            keep_best=lambda step, _: self.best.append(step),
            write=lambda step, values: self.lines.append((step, values)),
            write_bad=lambda step, bad: self.bad.append((step, bad)),
            count_quarantined=self.count_quarantined,
        )

    def count_quarantined(self) -> int:
        self.quarantined += 1
        if self.quarantined >= self.too_many:
            raise ShardError("too many cannot be read")
        return self.quarantined

    def of(self, name: str) -> list[tuple[int, float]]:
        """Step and value of every line that has it."""
        return [(step, values[name]) for step, values in self.lines if name in values]


def evaluation_of(kl: float, words: float | None = None) -> Evaluation:
    return Evaluation(
        kl_per_token=kl,
        ce_per_token=1.0,
        agreement=0.5,
        response_tokens=8,
        kl_by_language={},
        word_error_rate=words,
    )
