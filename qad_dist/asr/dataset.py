"""Utterances from the shards: with their labels as packed batches in the order of a plan, or as log-mels alone."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from qad_dist.asr.collate import Example, collate, num_packed_tokens
from qad_dist.asr.mel import log_mel
from qad_dist.asr.prompt import Prompt
from qad_dist.batch import Batch
from qad_dist.runtime.world import World
from shards.labelled import LabelledUtterance
from shards.plan import Plan, share_of_rank
from shards.read import read_ahead, read_audio, read_many
from shards.schema import Utterance


class LabelledSet:
    """Utterances with their pseudo-labels: lengths without touching the audio, batches on demand."""

    def __init__(
        self, rows: Sequence[LabelledUtterance], *, folder: Path, prompt: Prompt, extractor: Any, threads: int = 1
    ) -> None:
        """Take the table.

        Args:
            rows: What to learn from; their order is the plan's index.
            folder: Of the shards.
            prompt: The model's.
            extractor: The model's.
            threads: How many utterances are read and transformed at a time; batches do not depend on it.
        """
        self.rows = list(rows)
        self.num_tokens = [
            num_packed_tokens(
                prompt, duration_seconds=utterance.duration_seconds, num_response_tokens=len(response.token_ids)
            )
            for utterance, response in self.rows
        ]
        self._folder, self._prompt, self._extractor = folder, prompt, extractor
        # Threads suffice: decoding FLAC and the Fourier transform let go of the interpreter.
        self._readers = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="readers")

    def num_rows(self, indices: Sequence[int]) -> int:
        """Response tokens of these utterances."""
        return sum(len(self.rows[i][1].token_ids) for i in indices)

    def audio_seconds(self, indices: Sequence[int]) -> float:
        """Seconds of audio of these utterances."""
        return sum(self.rows[i][0].duration_seconds for i in indices)

    def fingerprint(self) -> str:
        """Hex sha256 of the keys and responses, in their order."""
        digest = hashlib.sha256()
        for utterance, response in self.rows:
            digest.update(f"{utterance.key} {len(response.token_ids)}\n".encode())
            digest.update(response.token_ids.astype("<i4", copy=False).tobytes())
        return digest.hexdigest()

    def batch(self, indices: Sequence[int]) -> Batch:
        """Read, transform and pack these utterances."""
        return collate(list(self._readers.map(self._example, indices)), prompt=self._prompt)

    def _example(self, index: int) -> Example:
        utterance, response = self.rows[index]
        mel_MF = log_mel(read_audio(self._folder, utterance), self._extractor)
        return Example(key=utterance.key, mel_MF=mel_MF, response_ids=response.token_ids.tolist())


def mels_ahead(folder: Path, batches: Iterable[Sequence[Utterance]], extractor: Any) -> Iterator[list[Tensor]]:
    """Log-mels of one batch after the other (``[M, F]`` each); the next are made while the present ones are in use.

    Raises:
        ShardError: With the batch in which a shard is missing or damaged.
    """
    return read_ahead(lambda batch: [log_mel(audio, extractor) for audio in read_many(folder, batch)], batches)


class PlannedBatches:
    """This rank's micro-batches, step by step; those of the next step are prepared while the present one is in use."""

    def __init__(self, dataset: LabelledSet, plan: Plan, world: World, *, steps: int) -> None:
        """Follow a plan.

        Args:
            dataset: What the plan's indices point into.
            plan: Steps of all ranks.
            world: Which share is ours.
            steps: Where training ends: nothing is prepared for later.
        """
        self._dataset, self._plan, self._world, self._steps = dataset, plan, world, steps
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._pending: dict[int, list[Future[Batch]]] = {}
        self._contents: dict[int, list[list[int]]] = {}

    def num_rows(self, step: int) -> int:
        """Response tokens of a step over all ranks: what its loss is divided by."""
        return sum(self._dataset.num_rows(indices) for indices in self._step(step))

    def audio_seconds(self, step: int) -> float:
        """Seconds of audio of a step over all ranks."""
        return sum(self._dataset.audio_seconds(indices) for indices in self._step(step))

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """This rank's share of a step, on the host: equally many batches on every rank.

        A rank for which nothing is left gets a batch without weight, because ZeRO's collectives need every rank.
        """
        present = self._pending.pop(step, None) or self._prepare(step)
        if step + 1 < self._steps:
            self._pending = {step + 1: self._prepare(step + 1)}
        for future in present:
            yield future.result()

    def _step(self, step: int) -> list[list[int]]:
        """Filled micro-batches of a step. The plan holds one epoch; at its end both sides are kept here."""
        if step not in self._contents:
            kept = {known: contents for known, contents in self._contents.items() if abs(known - step) == 1}
            self._contents = {**kept, step: [indices for indices in self._plan.step(step) if indices]}
        return self._contents[step]

    def _prepare(self, step: int) -> list[Future[Batch]]:
        filled = self._step(step)
        share = share_of_rank(filled, rank=self._world.rank, world_size=self._world.world_size)
        return [self._reader.submit(self._make, indices, filled[0]) for indices in share]

    def _make(self, indices: list[int], stand_in: list[int]) -> Batch:
        return self._dataset.batch(indices) if indices else self._dataset.batch(stand_in).without_weight()
