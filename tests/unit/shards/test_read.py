"""Reading ahead: the same samples, the next ones already under way."""

import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from shards.errors import ShardError
from shards.index import read_utterances
from shards.read import read_ahead, read_many
from tests.helpers.packing import pack_tones
from tests.helpers.tones import make_recordings


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    pack_tones(make_recordings(tmp_path / "in", 12), tmp_path / "pack", utterances_per_shard=5)
    return tmp_path / "pack"


def test_batches_come_in_order_with_their_own_samples(packed):
    utterances = read_utterances(packed)
    batches = [utterances[5:8], utterances[:5], utterances[8:]]

    found = list(read_ahead(partial(read_many, packed), batches))

    assert [len(samples) for samples in found] == [3, 5, 4]
    for batch, samples in zip(batches, found, strict=True):
        for expected, got in zip(read_many(packed, batch), samples, strict=True):
            np.testing.assert_array_equal(got, expected)
    assert list(read_ahead(partial(read_many, packed), [])) == []


def test_next_batch_is_loaded_while_the_present_one_is_in_use_and_no_later_one(packed):
    utterances = read_utterances(packed)
    begun = [threading.Event() for _ in range(4)]

    def load(batch):
        begun[utterances.index(batch[0])].set()
        return read_many(packed, batch)

    batches = read_ahead(load, [[utterance] for utterance in utterances[:4]])

    for number in range(4):
        next(batches)
        assert begun[min(number + 1, 3)].wait(timeout=30)
        assert not any(event.is_set() for event in begun[number + 2 :])


def test_damage_is_told_with_the_batch_that_it_is_about(packed):
    utterances = read_utterances(packed)
    (packed / utterances[-1].shard).unlink()
    batches = read_ahead(partial(read_many, packed), [utterances[:1], utterances[-1:]])

    assert len(next(batches)) == 1
    with pytest.raises(ShardError, match=rf"{utterances[-1].shard} must be readable, got 'No such file"):
        next(batches)
