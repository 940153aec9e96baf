"""Which utterances are processed together, and when. Pure: no I/O, no global state.

Training: an epoch is a list of steps, a step exactly M micro-batches, a micro-batch a list of indices into the table of
utterances. The plan does not know the number of ranks: rank r takes micro-batches r, r + W, ... of each step, so every
world size trains on the same global batches, and the position in the data is one integer, the step.

An epoch is walked window by window of its shuffled order. A window is whole steps, and what did not fit into its
micro-batches waits for the next one. So the first step costs the order and one window, and a later one what lies before
it, which is filled but not evened out; all that is kept are the order and the window in use.
"""

import hashlib
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.balance import LEFT_OVER, even_out, fill
from shards.errors import ConfigError
from shards.mixture import Mixture
from shards.schema import SAMPLE_RATE_HZ

MicroBatch = list[int]
Step = list[MicroBatch]
Numbers = Sequence[float] | NDArray[np.integer] | NDArray[np.floating]

MIN_CHARGED_SECONDS = 2.0
"""Every utterance of a decoding batch counts as at least this long: one of 2 s has about as many tokens for its prompt
and response as for its audio (13 a second), so below that it is rows, not seconds, that fill the memory."""

# Micro-batches that are filled at once, rounded up to whole steps: enough for lengths to mix and match, few enough to
# keep the order random.
_WINDOW = 64
# Of the budget that a window is to use, in thousandths: without room nothing can be swapped to even out the audio.
_USED_THOUSANDTHS = 995
# Raised by any change, here or in balance or mixture, that gives a table other steps: these are another plan.
_VERSION = 2


def plan_epoch(
    num_tokens: Numbers,
    *,
    audio_seconds: Numbers | None = None,
    mixture: Mixture | None = None,
    seed: int,
    epoch: int,
    token_budget: int,
    micro_batches_per_step: int,
) -> list[Step]:
    """All steps of one epoch, as :class:`Plan` gives them.

    Raises:
        ConfigError: There is no utterance, or one is longer than the budget.
    """
    plan = Plan(
        num_tokens,
        audio_seconds=audio_seconds,
        mixture=mixture,
        seed=seed,
        token_budget=token_budget,
        micro_batches_per_step=micro_batches_per_step,
    )
    return plan.epoch(epoch)


def share_of_rank(step: Step, *, rank: int, world_size: int) -> list[MicroBatch]:
    """The micro-batches of one rank: rank, rank + W, ...; a rank that is one short gets an empty one at the end."""
    share = step[rank::world_size]
    return share + [[] for _ in range(-(-len(step) // world_size) - len(share))]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Filling:
    """Utterances that were placed into micro-batches together."""

    number: int
    """In its epoch, from 0."""
    utterances: NDArray[np.int32]
    places: NDArray[np.int64]
    num_micro_batches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window:
    """Consecutive steps of an epoch."""

    fillings: list[_Filling]
    """One; at the end of an epoch as many as it takes until nothing waits."""
    first_step: int
    num_steps: int


_BEFORE_ALL = _Window(fillings=[], first_step=0, num_steps=0)


class Plan:
    """The steps of all epochs in one row, counted from 0: a function of table, settings and seed.

    Every utterance comes once an epoch, or as often as the mixture says. No micro-batch exceeds the budget, and only
    the last step of an epoch has empty ones. The micro-batches of a window are even in tokens and, as far as utterances
    can be swapped, in audio: within 1 % of their mean for speech of 1 to 30 s and budgets from 4,096 tokens, with less
    than 2 % of the budget empty. The last window of an epoch holds what is left in fewer micro-batches, just as even;
    what fits into none of those makes up some more at the end of the last step, which need not be like the others.
    """

    def __init__(
        self,
        num_tokens: Numbers,
        *,
        audio_seconds: Numbers | None = None,
        mixture: Mixture | None = None,
        seed: int,
        token_budget: int,
        micro_batches_per_step: int,
    ) -> None:
        """Take the table.

        Args:
            num_tokens: Packed length of each utterance.
            audio_seconds: Of each utterance; None leaves the audio of the micro-batches as it comes.
            mixture: Of the languages of these utterances; None for every utterance once an epoch.
            seed: Of the run.
            token_budget: Most tokens in a micro-batch.
            micro_batches_per_step: M; the last step of an epoch is filled up with empty micro-batches.

        Raises:
            ConfigError: There is no utterance, or one is longer than the budget.
        """
        if not len(num_tokens):
            raise ConfigError(
                "train needs at least one utterance, got 0; look at the filter's verdicts and pack.splits"
            )
        self._num_tokens = np.asarray(num_tokens, dtype=np.int64)
        if (longest := int(self._num_tokens.max())) > token_budget:
            raise ConfigError(
                f"train.micro_batch_tokens must hold the longest utterance ({longest} tokens), got {token_budget}; "
                "raise it or lower pack.max_audio_seconds"
            )
        self._num_audio_samples = None if audio_seconds is None else _in_samples(audio_seconds)
        self._mixture = mixture
        self._seed = seed
        self._token_budget = token_budget
        self._micro_batches_per_step = micro_batches_per_step
        self._micro_batches_per_window = -(-_WINDOW // micro_batches_per_step) * micro_batches_per_step
        self._starts = [0]  # first steps of the epochs that were begun, and of the one after them
        self._num_known = 0  # steps of which the epoch is known
        self._epoch, self._windows, self._window = -1, iter(()), _BEFORE_ALL
        self._recent: dict[int, list[Step]] = {}

    def step(self, step: int) -> Step:
        """The M micro-batches of step ``step``. Going back in an epoch begins it again."""
        for first, steps in self._recent.items():
            if first <= step < first + len(steps):
                return steps[step - first]
        epoch, position = self.position(step)
        self._reach(epoch, position)
        first = self._starts[epoch] + self._window.first_step
        # The window before is kept as well: who prepares the next step while one is in use looks back across its edge.
        self._recent = {**dict(list(self._recent.items())[-1:]), first: self._steps(epoch, self._window)}
        return self._recent[first][step - first]

    def position(self, step: int) -> tuple[int, int]:
        """Epoch of a step, and its number within that epoch."""
        while step >= self._num_known:
            self._reach(len(self._starts) - 1, step - self._starts[-1])
        epoch = bisect_right(self._starts, step) - 1
        return epoch, step - self._starts[epoch]

    def num_steps(self, epoch: int) -> int:
        """Number of steps of an epoch: known only once it and all before it were walked to their ends."""
        while epoch + 1 >= len(self._starts):
            self._reach(len(self._starts) - 1, sys.maxsize)
        return self._starts[epoch + 1] - self._starts[epoch]

    def epoch(self, epoch: int) -> list[Step]:
        """All steps of an epoch."""
        return [step for window in self._walk(epoch) for step in self._steps(epoch, window)]

    def fingerprint(self) -> str:
        """Hex sha256 of all that the steps depend on: the table, the settings, the seed, and the rules of the plan."""
        mixture = self._mixture
        settings = [_VERSION, _WINDOW, _USED_THOUSANDTHS, self._seed, self._token_budget, self._micro_batches_per_step]
        mixed = None if mixture is None else (mixture.temperature, mixture.max_hours_per_language)
        digest = hashlib.sha256(repr((settings, mixed)).encode())
        for values in (self._num_tokens, self._num_audio_samples, None if mixture is None else mixture.languages):
            digest.update(b"none" if values is None else np.ascontiguousarray(values, dtype="<i8"))
        return digest.hexdigest()

    def _reach(self, epoch: int, position: int) -> None:
        """Walk to the window that holds a step of an epoch, or to the end of an epoch that has no such step."""
        if epoch != self._epoch or position < self._window.first_step:
            self._epoch, self._windows, self._window = epoch, self._walk(epoch), _BEFORE_ALL
        while position >= (end := self._window.first_step + self._window.num_steps):
            following = next(self._windows, None)
            if following is None:
                if epoch + 1 == len(self._starts):
                    self._starts.append(self._starts[epoch] + end)
                return
            self._window = following
            self._num_known = max(self._num_known, self._starts[epoch] + following.first_step + following.num_steps)

    def _walk(self, epoch: int) -> Iterator[_Window]:
        """The windows of an epoch: whole ones of whole steps, then all the rest as one."""
        rest: list[_Filling] = []
        step = 0
        for filling in self._fillings(epoch):
            if filling.num_micro_batches < self._micro_batches_per_window:
                rest.append(filling)
                continue
            num_steps = filling.num_micro_batches // self._micro_batches_per_step
            yield _Window(fillings=[filling], first_step=step, num_steps=num_steps)
            step += num_steps
        if rest:
            num_micro_batches = sum(filling.num_micro_batches for filling in rest)
            yield _Window(
                fillings=rest, first_step=step, num_steps=-(-num_micro_batches // self._micro_batches_per_step)
            )

    def _fillings(self, epoch: int) -> Iterator[_Filling]:
        """Fill window by window of the shuffled order; what does not fit waits for the next one.

        Those of fewer micro-batches than a window has come last: after them there is nothing left to take.
        """
        order = np.random.default_rng([self._seed, epoch]).permutation(self._utterances(epoch))
        ends = np.cumsum(self._num_tokens[order])
        size, used = self._micro_batches_per_window, max(1, self._token_budget * _USED_THOUSANDTHS // 1000)
        waiting, taken, number = order[:0], 0, 0
        while taken < len(order) or len(waiting):
            missing = size * used - self._num_tokens[waiting].sum()
            end = np.searchsorted(ends, (ends[taken - 1] if taken else 0) + missing) + 1
            # With at least as many utterances as micro-batches none of them stays empty.
            end = min(max(end, taken + size - len(waiting)), len(order))
            chosen = np.concatenate([waiting, order[taken:end]])
            num_tokens = self._num_tokens[chosen]
            num_micro_batches = min(size, -(-int(num_tokens.sum()) // used), len(chosen))
            places = fill(num_tokens, token_budget=self._token_budget, num_micro_batches=num_micro_batches)
            is_placed = places != LEFT_OVER
            yield _Filling(
                number=number,
                utterances=chosen[is_placed],
                places=places[is_placed],
                num_micro_batches=num_micro_batches,
            )
            waiting, taken, number = chosen[~is_placed], end, number + 1

    def _utterances(self, epoch: int) -> NDArray[np.int32]:
        if self._mixture is None:
            return np.arange(len(self._num_tokens), dtype=np.int32)
        return self._mixture.indices(seed=self._seed, epoch=epoch)

    def _steps(self, epoch: int, window: _Window) -> list[Step]:
        micro_batches = [micro_batch for filling in window.fillings for micro_batch in self._shuffled(epoch, filling)]
        m = self._micro_batches_per_step
        micro_batches += [[] for _ in range(window.num_steps * m - len(micro_batches))]
        return [micro_batches[start : start + m] for start in range(0, len(micro_batches), m)]

    def _shuffled(self, epoch: int, filling: _Filling) -> list[MicroBatch]:
        """Micro-batches of a filling, evened out in audio, in a random order."""
        places = filling.places
        if self._num_audio_samples is not None:
            places = even_out(
                places,
                self._num_tokens[filling.utterances],
                self._num_audio_samples[filling.utterances],
                token_budget=self._token_budget,
            )
        sizes = np.bincount(places)
        members = np.split(filling.utterances[np.argsort(places, kind="stable")], np.cumsum(sizes)[:-1])
        # The spawn key keeps [seed, epoch] and [seed, epoch, 0], which would be the same numbers, apart.
        random = np.random.default_rng(np.random.SeedSequence([self._seed, epoch], spawn_key=(filling.number,)))
        return [members[i].tolist() for i in random.permutation(len(members))]


def plan_decoding(
    durations: Sequence[float] | NDArray[np.floating], *, batch_audio_seconds: float, max_utterances: int | None = None
) -> list[MicroBatch]:
    """Batches for labelling and scoring, longest utterances first.

    The memory of a batch has a part that grows with its audio, largest in the first batches, and a part that grows with
    its rows (prompts, responses, logits), largest in the last ones, where :data:`MIN_CHARGED_SECONDS` bounds it.

    Args:
        durations: Seconds of each utterance.
        batch_audio_seconds: Most seconds in a batch, padding to its longest utterance counted and no utterance for less
            than :data:`MIN_CHARGED_SECONDS`; a longer utterance is a batch of its own.
        max_utterances: Most utterances in a batch, at least 1; None for as many as fit.

    Returns:
        Batches of indices into ``durations``, each index once.
    """
    seconds = np.asarray(durations, dtype=np.float64)
    order = np.argsort(-seconds, kind="stable")
    batches: list[MicroBatch] = []
    start = 0
    while start < len(order):
        charged = max(float(seconds[order[start]]), MIN_CHARGED_SECONDS)
        size = max(1, int(batch_audio_seconds / charged))
        # The quotient is rounded; what counts is the product.
        if (size + 1) * charged <= batch_audio_seconds:
            size += 1
        elif size > 1 and size * charged > batch_audio_seconds:
            size -= 1
        size = min(size, max_utterances or size)
        batches.append(order[start : start + size].tolist())
        start += size
    return batches


def _in_samples(audio_seconds: Numbers) -> NDArray[np.int64]:
    return np.rint(np.asarray(audio_seconds, dtype=np.float64) * SAMPLE_RATE_HZ).astype(np.int64)
