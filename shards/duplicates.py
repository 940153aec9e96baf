"""Which utterances are exact copies of others, sample by sample. Pure: no I/O."""

import numpy as np
import numpy.typing as npt

from shards.schema import HELDOUT, SPLITS, TEST, TRAIN

EXCLUDED = len(SPLITS)
"""Stands among the splits for the utterances of ``pack.exclude``, which are compared and never packed."""

# What is kept of several copies: a test set stays whole, and nothing is trained on that is held out.
_PRECEDENCE = np.zeros(len(SPLITS) + 1, np.int8)
_PRECEDENCE[[SPLITS.index(TEST), EXCLUDED, SPLITS.index(HELDOUT), SPLITS.index(TRAIN)]] = range(len(SPLITS) + 1)

Digests = npt.NDArray[np.uint64]


def digests_of(texts: list[str]) -> Digests:
    """Digests of 16 bytes as ``[n, 2]`` numbers, from their hexadecimal form."""
    return np.frombuffer(bytes.fromhex("".join(texts)), ">u8").reshape(-1, 2).astype(np.uint64)


def originals(digests: Digests, splits: npt.NDArray[np.int8], ranks: npt.NDArray[np.uint64]) -> dict[int, int]:
    """The rows that are not kept, and the row that each of them is a copy of.

    Args:
        digests: ``[n, 2]``, equal for equal samples.
        splits: Of each row, as a place in :data:`~shards.schema.SPLITS`, or :data:`EXCLUDED`.
        ranks: Decide among copies of one split: the lowest is kept, whatever the order of the rows.
    """
    if not len(digests):
        return {}
    order = np.lexsort((ranks, _PRECEDENCE[splits], digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    is_copy = np.concatenate([[False], (ordered[1:] == ordered[:-1]).all(axis=1)])
    places = np.maximum.accumulate(np.where(is_copy, 0, np.arange(len(order))))
    return dict(zip(order[is_copy].tolist(), order[places[is_copy]].tolist(), strict=True))
