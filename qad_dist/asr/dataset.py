"""Utterances from the shards: with their labels as packed batches in the order of a plan, or as log-mels alone."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qad_dist.asr.audio_tower import num_audio_tokens
from qad_dist.asr.augment import RULES_VERSION, augment, augmented_samples, choose_speeds, choose_variant
from qad_dist.asr.collate import Example, collate
from qad_dist.asr.mel import log_mels, num_frames
from qad_dist.asr.prompt import Prompt
from qad_dist.batch import Batch
from qad_dist.config.augment import AugmentConfig
from qad_dist.runtime.world import World
from shards.audio import Samples
from shards.errors import ShardError
from shards.labelled import LabelledTable, LabelledUtterance
from shards.plan import Plan, share_of_rank
from shards.read import Damaged, read_ahead, refuse_damaged
from shards.schema import SAMPLE_RATE_HZ, Utterance
from shards.storage import fingerprint
from shards.stored_states import StoredStates
from shards.workers import Reader

OnDamaged = Callable[[Damaged], None]
"""Is told of an utterance that is left out because it cannot be read."""


def refuse(damaged: Damaged) -> None:
    """What becomes of an utterance that cannot be read, where all are needed.

    Raises:
        ShardError: Always: what is wrong with it.
    """
    raise ShardError(damaged.reason)


def languages_of(rows: LabelledTable, *, detected_first: bool) -> tuple[npt.NDArray[np.int64], list[str | None]]:
    """The language of each utterance: as the teacher detected it, or as the source tells it, whichever is first.

    Args:
        rows: Utterances with their responses.
        detected_first: Whether the source is asked only where the teacher detected none, or the other way round.

    Returns:
        For each row a number, and the names that they stand for in alphabetical order; None, if there is any, is first.
    """
    told, told_names = rows.utterances.codes("language")
    names = sorted({*told_names, *rows.responses.names, None}, key=lambda name: name or "")
    place = {name: number for number, name in enumerate(names)}
    told = np.array([place[name] for name in told_names])[told]
    detected = np.array([place[name] for name in rows.responses.names])[rows.responses.languages]
    first, second = (detected, told) if detected_first else (told, detected)
    used, codes = np.unique(np.where(first == place[None], second, first), return_inverse=True)
    return codes, [names[number] for number in used]


class LabelledSet:
    """Utterances with their pseudo-labels, and altered copies: lengths without touching the audio, batches on demand.

    Entry ``i`` is copy ``i // len(rows)`` of row ``i % len(rows)``; copy 0, which comes first, is the utterance itself.
    A copy has the utterance's response as its context, and counts in the KL only: what the teacher would say to it
    itself is not known.
    """

    def __init__(
        self,
        rows: LabelledTable,
        *,
        reader: Reader,
        prompt: Prompt,
        extractor: Any,
        augment: AugmentConfig | None = None,
        seed: int = 0,
        stored: StoredStates | None = None,
    ) -> None:
        """Take the table.

        Args:
            rows: What to learn from; their order is the plan's index.
            reader: Of the shards; batches do not depend on its number of workers.
            prompt: The model's, with the context of the run.
            extractor: The model's.
            augment: ``train.augment``; None for no copies. Where a copy would be longer than the longest utterance, it
                keeps its utterance's speed.
            seed: Of the run; decides how copies are altered.
            stored: The teacher's hidden states, to be in the batches; None to leave them out. Copies have none.
        """
        assert stored is None or augment is None or not augment.copies
        self._stored = stored
        self.rows = rows
        self._augment, self._seed = augment or AugmentConfig(), seed
        self._num_response_tokens = rows.responses.num_tokens
        seconds = rows.utterances.numbers("duration_seconds")
        samples = np.rint(seconds * SAMPLE_RATE_HZ).astype(np.int64)
        automatic = prompt.num_prompt_tokens(0)
        told = [prompt.num_prompt_tokens(0, language=name) - automatic for name in rows.responses.names]
        text_tokens = np.array(told)[rows.responses.prompt_languages] + self._num_response_tokens
        speeds = choose_speeds(rows.utterances.texts("key"), self._augment, seed=seed)
        num_tokens = _prompt_tokens(augmented_samples(samples, speeds), prompt) + text_tokens
        speeds[num_tokens > num_tokens[0].max(initial=0)] = 1.0
        samples = augmented_samples(samples, speeds)
        self.num_tokens = (_prompt_tokens(samples, prompt) + text_tokens).ravel()
        """Packed length of each entry."""
        self.seconds = np.concatenate([seconds, samples[1:].ravel() / SAMPLE_RATE_HZ])
        """Of the audio of each entry."""
        self.utterance_of = np.tile(np.arange(len(rows)), len(speeds))
        """Row of each entry."""
        self._speeds = speeds.ravel()
        self._reader, self._prompt, self._extractor = reader, prompt, extractor

    def __len__(self) -> int:
        """Entries: utterances and copies."""
        return len(self.num_tokens)

    @property
    def languages(self) -> tuple[npt.NDArray[np.int64], list[str | None]]:
        """A number for each entry, and the names that they stand for: those of :func:`languages_of`, detected first."""
        codes, names = languages_of(self.rows, detected_first=True)
        return codes[self.utterance_of], names

    def num_rows(self, indices: Sequence[int]) -> int:
        """Response tokens of these entries, whether they can be read or not."""
        return int(self._num_response_tokens[self.utterance_of[indices]].sum())

    def audio_seconds(self, indices: Sequence[int]) -> float:
        """Seconds of audio of these entries."""
        return float(self.seconds[indices].sum())

    def fingerprint(self) -> str:
        """Hex sha256 of all that decides plans and batches: keys, durations, languages, responses, copies, in order."""
        codes, names = languages_of(self.rows, detected_first=True)
        responses, own = self.rows.responses, slice(len(self.rows))
        told = [responses.names[code] for code in responses.prompt_languages.tolist()]
        digest = hashlib.sha256(repr((names, fingerprint(told))).encode())
        for key in self.rows.utterances.texts("key"):
            digest.update(f"{key}\n".encode())
        for numbers, kind in (
            *((self.seconds[own], "<f8"), (codes, "<i8"), (self.num_tokens[own], "<i8"), (responses.ce_weights, "<f4")),
            *((self._num_response_tokens, "<i8"), (responses.token_ids, "<i4")),
        ):
            digest.update(np.ascontiguousarray(numbers, dtype=kind))
        if self._augment.copies:
            altered = fingerprint(RULES_VERSION, self._augment.model_dump(mode="json"), self._seed)
            digest.update(altered.encode())
        return digest.hexdigest()

    def batch(self, indices: Sequence[int]) -> Batch:
        """Read, transform and pack these entries.

        Raises:
            ShardError: One of them cannot be read.
        """
        return next(self.batches([indices]))

    def batches(self, chosen: Sequence[Sequence[int]], *, on_damaged: OnDamaged = refuse) -> Iterator[Batch]:
        """One batch after the other; the utterances of the next ones are read while the present one is in use.

        Args:
            chosen: The entries of each batch.
            on_damaged: Is told of each utterance that cannot be read. It becomes silence of its length whose rows have
                no weight: the batch keeps the shape that was planned, and the gradient of all other rows.
        """
        rows = [list(self.rows.take(self.utterance_of[indices])) for indices in chosen]
        audios = self._reader.ahead([utterance for utterance, _ in batch] for batch in rows)
        for indices, batch, found in zip(chosen, rows, audios, strict=True):
            yield self._pack(indices, batch, found, on_damaged)

    def _pack(
        self,
        indices: Sequence[int],
        rows: Sequence[LabelledUtterance],
        found: Sequence[Samples | Damaged],
        on_damaged: OnDamaged,
    ) -> Batch:
        audios: list[Samples] = []
        weights: list[float] = []
        copies = [index // len(self.rows) for index in indices]
        for index, copy, (utterance, _), audio in zip(indices, copies, rows, found, strict=True):
            weights.append(0.0 if isinstance(audio, Damaged) else 1.0)
            if isinstance(audio, Damaged):
                on_damaged(audio)
                audio = np.zeros(round(utterance.duration_seconds * SAMPLE_RATE_HZ), np.float32)
            variant = choose_variant(utterance.key, copy, self._augment, self._seed)
            audios.append(augment(audio, replace(variant, speed=float(self._speeds[index]))))
        examples = [
            Example(
                key=f"{utterance.key}~{copy}" if copy else utterance.key,
                mel_MF=mel_MF,
                response_ids=response.token_ids.tolist(),
                prompt_language=response.prompt_language,
                kl_weight=weight,
                ce_weight=0.0 if copy else weight * response.ce_weight,
            )
            for copy, (utterance, response), mel_MF, weight in zip(
                copies, rows, log_mels(audios, self._extractor), weights, strict=True
            )
        ]
        batch = collate(examples, prompt=self._prompt)
        if self._stored is None:
            return batch
        states = [self._stored.rows(self.rows, int(row)) for row in self.utterance_of[indices]]
        bits_RD = np.concatenate(states).view(np.int16)  # as torch, too, names 16 bits
        return replace(batch, teacher_RD=torch.from_numpy(bits_RD).view(torch.bfloat16))


def _prompt_tokens(num_samples: npt.NDArray[np.int64], prompt: Prompt) -> npt.NDArray[np.int64]:
    """Prompt and audio tokens of utterances of so many audio samples, in automatic language mode."""
    frames = num_frames(num_samples)
    # One prompt for each number of frames that there may be: far fewer than there are utterances.
    lengths = [prompt.num_prompt_tokens(num_audio_tokens(count)) for count in range(frames.max(initial=0) + 1)]
    return np.array(lengths)[frames]


def mels_ahead(reader: Reader, batches: Iterable[Sequence[Utterance]], extractor: Any) -> Iterator[list[Tensor]]:
    """Log-mels of one batch after the other (``[M, F]`` each); the next are made while the present ones are in use.

    Raises:
        ShardError: With the batch in which a shard is missing or damaged.
    """
    return read_ahead(lambda found: log_mels(refuse_damaged(found), extractor), reader.ahead(batches))


def try_mels_ahead(
    reader: Reader, batches: Iterable[Sequence[Utterance]], extractor: Any
) -> Iterator[list[Tensor | Damaged]]:
    """As :func:`mels_ahead`, with a :class:`~shards.read.Damaged` in the place of what cannot be read."""

    def transform(found: Sequence[Samples | Damaged]) -> list[Tensor | Damaged]:
        readable = [audio for audio in found if not isinstance(audio, Damaged)]
        mels = iter(log_mels(readable, extractor) if readable else [])
        return [one if isinstance(one, Damaged) else next(mels) for one in found]

    return read_ahead(transform, reader.ahead(batches))


class PlannedBatches:
    """This rank's micro-batches, step by step; those of the next step are prepared while the present one is in use."""

    def __init__(
        self, dataset: LabelledSet, plan: Plan, world: World, *, steps: int, on_damaged: OnDamaged = refuse
    ) -> None:
        """Follow a plan.

        Args:
            dataset: What the plan's indices point into.
            plan: Steps of all ranks.
            world: Which share is ours.
            steps: Where training ends: nothing is prepared for later.
            on_damaged: As in :meth:`LabelledSet.batches`; called from another thread.
        """
        self._dataset, self._plan, self._world, self._steps = dataset, plan, world, steps
        self._on_damaged = on_damaged
        self._maker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._pending: dict[int, list[Future[Batch]]] = {}
        self._contents: dict[int, list[list[int]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._maker.shutdown(cancel_futures=True)

    def num_rows(self, step: int) -> int:
        """Response tokens of a step over all ranks, as planned: what its loss is divided by.

        Those of utterances that cannot be read are among them: a damaged file weakens the step by its share of rows and
        changes nothing about the other ones, on any number of ranks.
        """
        return sum(self._dataset.num_rows(indices) for indices in self._step(step))

    def num_tokens(self, step: int) -> int:
        """Tokens of prompts and responses of a step over all ranks, as planned."""
        return sum(int(self._dataset.num_tokens[indices].sum()) for indices in self._step(step))

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
        batches = self._dataset.batches([indices or filled[0] for indices in share], on_damaged=self._on_damaged)
        # One thread: each task takes the next of the batches, which are read in that order.
        return [self._maker.submit(self._next, batches, has_weight=bool(indices)) for indices in share]

    def _next(self, batches: Iterator[Batch], *, has_weight: bool) -> Batch:
        return next(batches) if has_weight else next(batches).without_weight()
