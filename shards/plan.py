"""Which utterances are processed together, and when. Pure: no I/O, no global state.

Training: an epoch is a list of steps, a step exactly M micro-batches, a micro-batch a list of indices into the table of
utterances. The plan does not know the number of ranks: rank r takes micro-batches r, r + W, ... of each step, so every
world size trains on the same global batches, and the position in the data is one integer, the step.
"""

import heapq
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from shards.errors import ConfigError

MicroBatch = list[int]
Step = list[MicroBatch]

MIN_CHARGED_SECONDS = 2.0
"""Every utterance of a decoding batch counts as at least this long: one of 2 s has about as many tokens for its prompt
and response as for its audio (13 a second), so below that it is rows, not seconds, that fill the memory."""

# Micro-batches that are filled at once: enough for lengths to mix and match, few enough to keep the order random.
_WINDOW = 64


def plan_epoch(
    num_tokens: Sequence[int], *, seed: int, epoch: int, token_budget: int, micro_batches_per_step: int
) -> list[Step]:
    """All steps of one epoch: every utterance exactly once.

    Args:
        num_tokens: Packed length of each utterance.
        seed: Of the run.
        epoch: From 0; each has an order of its own.
        token_budget: Most tokens in a micro-batch.
        micro_batches_per_step: M; the last step is filled up with empty micro-batches.

    Returns:
        Steps of exactly M micro-batches of indices into ``num_tokens``.

    Raises:
        ConfigError: There is no utterance, or one is longer than the budget.
    """
    if not len(num_tokens):
        raise ConfigError("train needs at least one utterance, got 0; look at the filter's verdicts and pack.splits")
    lengths = np.asarray(num_tokens)
    if (longest := int(lengths.max())) > token_budget:
        raise ConfigError(
            f"train.micro_batch_tokens must hold the longest utterance ({longest} tokens), got {token_budget}; "
            "raise it or lower pack.max_audio_seconds"
        )
    random = np.random.default_rng([seed, epoch])
    micro_batches = _fill(lengths.tolist(), random.permutation(len(lengths)).tolist(), token_budget)
    micro_batches = [micro_batches[i] for i in random.permutation(len(micro_batches))]
    m = micro_batches_per_step
    steps = [micro_batches[start : start + m] for start in range(0, len(micro_batches), m)]
    steps[-1] += [[] for _ in range(m - len(steps[-1]))]
    return steps


def share_of_rank(step: Step, *, rank: int, world_size: int) -> list[MicroBatch]:
    """The micro-batches of one rank: rank, rank + W, ...; a rank that is one short gets an empty one at the end."""
    share = step[rank::world_size]
    return share + [[] for _ in range(-(-len(step) // world_size) - len(share))]


class Plan:
    """The steps of all epochs in one row, counted from 0; only the current epoch is kept."""

    def __init__(self, num_tokens: Sequence[int], *, seed: int, token_budget: int, micro_batches_per_step: int) -> None:
        self._num_tokens = num_tokens
        self._seed = seed
        self._token_budget = token_budget
        self._micro_batches_per_step = micro_batches_per_step
        self._starts = [0]
        self._epoch = -1
        self._steps: list[Step] = []

    def step(self, step: int) -> Step:
        """The M micro-batches of step ``step``."""
        epoch, position = self.position(step)
        return self._load(epoch)[position]

    def position(self, step: int) -> tuple[int, int]:
        """Epoch of a step, and its number within that epoch."""
        while step >= self._starts[-1]:
            self._load(len(self._starts) - 1)
        epoch = bisect_right(self._starts, step) - 1
        return epoch, step - self._starts[epoch]

    def _load(self, epoch: int) -> list[Step]:
        if epoch != self._epoch:
            self._steps = plan_epoch(
                self._num_tokens,
                seed=self._seed,
                epoch=epoch,
                token_budget=self._token_budget,
                micro_batches_per_step=self._micro_batches_per_step,
            )
            self._epoch = epoch
            if epoch + 1 == len(self._starts):
                self._starts.append(self._starts[-1] + len(self._steps))
        return self._steps


def plan_decoding(durations: Sequence[float], *, batch_audio_seconds: float) -> list[MicroBatch]:
    """Batches for labelling and scoring, longest utterances first.

    The memory of a batch has a part that grows with its audio, largest in the first batches, and a part that grows with
    its rows (prompts, responses, logits), largest in the last ones, where :data:`MIN_CHARGED_SECONDS` bounds it.

    Args:
        durations: Seconds of each utterance.
        batch_audio_seconds: Most seconds in a batch, padding to its longest utterance counted and no utterance for less
            than :data:`MIN_CHARGED_SECONDS`; a longer utterance is a batch of its own.

    Returns:
        Batches of indices into ``durations``, each index once.
    """
    order = sorted(range(len(durations)), key=lambda i: (-durations[i], i))
    batches: list[MicroBatch] = []
    for index in order:
        if batches:
            charged = max(durations[batches[-1][0]], MIN_CHARGED_SECONDS)
            if (len(batches[-1]) + 1) * charged <= batch_audio_seconds:
                batches[-1].append(index)
                continue
        batches.append([index])
    return batches


def _fill(lengths: list[int], order: list[int], budget: int) -> list[MicroBatch]:
    """Pack utterances into micro-batches, window by window of the shuffled order.

    A window holds the tokens of :data:`_WINDOW` micro-batches; longest first, each utterance goes into the emptiest
    one. So every micro-batch gets short and long utterances (alike in cost, and in what it teaches), and the short ones
    even out the rest. What does not fit anywhere waits for the next window.
    """
    micro_batches: list[MicroBatch] = []
    waiting: list[int] = []
    tokens, position = 0, 0
    while waiting or position < len(order):
        while position < len(order) and tokens < _WINDOW * budget:
            waiting.append(order[position])
            tokens += lengths[order[position]]
            position += 1
        num_bins = min(_WINDOW, -(-tokens // budget))
        filled, waiting = _fill_window(lengths, waiting, budget, num_bins)
        micro_batches += filled
        tokens = sum(lengths[i] for i in waiting)
    return micro_batches


def _fill_window(
    lengths: list[int], waiting: list[int], budget: int, num_bins: int
) -> tuple[list[MicroBatch], list[int]]:
    filled: list[MicroBatch] = [[] for _ in range(max(1, num_bins))]
    emptiest = [(0, number) for number in range(len(filled))]
    left = []
    for index in sorted(waiting, key=lambda i: -lengths[i]):  # stable: ties stay in shuffled order
        used, number = emptiest[0]
        if used + lengths[index] > budget:
            left.append(index)
            continue
        heapq.heapreplace(emptiest, (used + lengths[index], number))
        filled[number].append(index)
    return [micro_batch for micro_batch in filled if micro_batch], left
