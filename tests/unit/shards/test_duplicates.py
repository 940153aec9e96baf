import numpy as np
import pytest

from shards.duplicates import EXCLUDED, digests_of, originals
from shards.schema import SPLITS

TRAIN, HELDOUT, TEST = (SPLITS.index(name) for name in ("train", "heldout", "test"))


def copies(rows):
    """Which rows go, given (sound, split, rank) of each."""
    digests = np.array([[sound >> 64, sound & (2**64 - 1)] for sound, _, _ in rows], np.uint64)
    splits = np.array([split for _, split, _ in rows], np.int8)
    return originals(digests, splits, np.array([rank for _, _, rank in rows], np.uint64))


def test_of_equal_samples_in_a_split_the_lowest_rank_stays():
    assert copies([(1, TRAIN, 5), (2, TRAIN, 1), (1, TRAIN, 3), (1, TRAIN, 9)]) == {0: 2, 3: 2}


@pytest.mark.parametrize(
    ("splits", "kept"),
    [((TRAIN, HELDOUT), 1), ((TRAIN, TEST), 1), ((TEST, HELDOUT), 0), ((HELDOUT, EXCLUDED), 1), ((EXCLUDED, TEST), 1)],
)
def test_test_stays_before_the_excluded_before_heldout_before_train(splits, kept):
    rows = [(7, split, rank) for rank, split in enumerate(splits)]

    assert copies(rows) == {1 - kept: kept}


def test_sounds_that_differ_in_any_half_of_their_digest_are_no_copies():
    assert copies([(1, TRAIN, 0), (1 << 64, TRAIN, 0), (1 | 1 << 64, TRAIN, 0), (0, TRAIN, 0)]) == {}


def test_no_rows_have_no_copies():
    assert copies([(1, TRAIN, 0)]) == {}
    assert originals(digests_of([]), np.zeros(0, np.int8), np.zeros(0, np.uint64)) == {}


def test_digests_are_read_from_their_hexadecimal_form():
    assert digests_of(["00000000000000010000000000000002", "ff" * 16]).tolist() == [[1, 2], [2**64 - 1] * 2]
