"""Utterances of one window of the plan into its micro-batches: alike in tokens first, then in audio. Pure: no I/O.

Everything is counted in integers, tokens and audio samples, so that every machine comes to the same micro-batches.
"""

import heapq

import numpy as np
from numpy.typing import NDArray

LEFT_OVER = -1
"""Place of an utterance that fits into none of the micro-batches."""

# Audio of the micro-batches is even when the most and the least differ by less than a thousandth of their mean.
_EVEN_SHARE = 1000
# Rounds of swaps, and rounds in a row that may pass without the widest gap getting narrower: what is left then lacks
# utterances to swap.
_MAX_ROUNDS, _MAX_IDLE_ROUNDS = 40, 5
# Utterances of a micro-batch that a round looks at: bounds its cost; the next round looks at others.
_CANDIDATES = 32


def fill(num_tokens: NDArray[np.int64], *, token_budget: int, num_micro_batches: int) -> NDArray[np.int64]:
    """Place utterances, longest first, each into the micro-batch that is emptiest then.

    So every micro-batch gets short and long utterances (alike in cost, and in what it teaches), and the short ones even
    out the rest.

    Args:
        num_tokens: Length of each utterance, at most the budget.
        token_budget: Most tokens in a micro-batch.
        num_micro_batches: At least 1; none stays empty if there are as many utterances.

    Returns:
        For each utterance the number of its micro-batch, or :data:`LEFT_OVER`.
    """
    order = np.argsort(-num_tokens, kind="stable")  # ties stay in the given order
    # A micro-batch is one integer, its tokens times their number plus its own: that compares faster than a pair.
    emptiest = list(range(num_micro_batches))
    limit = (token_budget + 1) * num_micro_batches
    chosen = []
    for length in (num_tokens[order] * num_micro_batches).tolist():
        filled = emptiest[0] + length
        if filled < limit:
            heapq.heapreplace(emptiest, filled)
            chosen.append(filled % num_micro_batches)
        else:
            chosen.append(LEFT_OVER)
    places = np.empty(len(num_tokens), dtype=np.int64)
    places[order] = chosen
    return places


def even_out(
    places: NDArray[np.int64],
    num_tokens: NDArray[np.int64],
    num_audio_samples: NDArray[np.int64],
    *,
    token_budget: int,
) -> NDArray[np.int64]:
    """Swap utterances of about equal tokens and different audio until the micro-batches are even in audio, too.

    In each round the micro-batch with most audio swaps with the one with least, the second with the second least, and
    so on; each pair the two utterances that narrow its gap most and keep both within the budget.

    Args:
        places: Micro-batch of each utterance, from 0, none empty.
        num_tokens: Length of each utterance.
        num_audio_samples: Audio of each utterance.
        token_budget: Most tokens in a micro-batch.

    Returns:
        New places; every micro-batch keeps its number of utterances.
    """
    table = _table(places, num_tokens)
    tokens = np.where(table >= 0, num_tokens[table], 0)
    audio = np.where(table >= 0, num_audio_samples[table], 0)
    num_pairs, idle_rounds = len(table) // 2, 0
    for number in range(_MAX_ROUNDS):
        total = audio.sum(axis=1)
        if (total.max() - total.min()) * _EVEN_SHARE * len(table) <= total.sum() or idle_rounds == _MAX_IDLE_ROUNDS:
            break
        order = np.argsort(total, kind="stable")
        most, least = order[::-1][:num_pairs], np.roll(order[:num_pairs], idle_rounds)  # stuck: pair them differently
        step = -(-table.shape[1] // _CANDIDATES)
        columns = np.arange(number % step, table.shape[1], step)
        is_narrower, given, taken = _best_swaps(table, tokens, audio, most, least, columns, token_budget)
        idle_rounds = 0 if is_narrower[0] else idle_rounds + 1
        here, there = (most[is_narrower], given[is_narrower]), (least[is_narrower], taken[is_narrower])
        for values in (table, tokens, audio):
            values[here], values[there] = values[there], values[here]
    evened = np.empty_like(places)
    rows, columns = np.nonzero(table >= 0)
    evened[table[rows, columns]] = rows
    return evened


def _table(places: NDArray[np.int64], num_tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Row by row the utterances of each micro-batch, longest first, filled up with -1."""
    order = np.lexsort((-num_tokens, places))
    counts = np.bincount(places)
    columns = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((len(counts), counts.max()), -1, dtype=np.int64)
    table[places[order], columns] = order
    return table


def _best_swaps(
    table: NDArray[np.int64],
    tokens: NDArray[np.int64],
    audio: NDArray[np.int64],
    most: NDArray[np.int64],
    least: NDArray[np.int64],
    columns: NDArray[np.int64],
    token_budget: int,
) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    """For each pair of rows whether a swap narrows its gap, and the columns of what ``most`` gives and takes."""
    given, taken = np.ix_(most, columns), np.ix_(least, columns)
    room = token_budget - tokens.sum(axis=1)
    moved = tokens[given][:, :, None] - tokens[taken][:, None, :]
    fits = (moved <= room[least][:, None, None]) & (-moved <= room[most][:, None, None])
    fits &= (table[given] >= 0)[:, :, None] & (table[taken] >= 0)[:, None, :]
    gap = audio[most].sum(axis=1) - audio[least].sum(axis=1)
    left = np.abs(gap[:, None, None] - 2 * (audio[given][:, :, None] - audio[taken][:, None, :]))
    left = np.where(fits, left, gap[:, None, None]).reshape(len(gap), -1)
    best = left.argmin(axis=1)
    is_narrower = left[np.arange(len(gap)), best] < gap
    return is_narrower, columns[best // len(columns)], columns[best % len(columns)]
