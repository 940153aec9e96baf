from collections import Counter

import numpy as np
import pytest

from shards.columns import Columns
from shards.layout import BYTES_PER_SECOND, ShardSize, lay_out
from shards.schema import SPLITS, Recording

LANGUAGES = ("English", "Thai", "German", None)


def make(count, seed=0):
    random = np.random.default_rng(seed)
    chosen = random.choice(len(LANGUAGES), count, p=[0.7, 0.2, 0.08, 0.02])
    recordings = [
        Recording(path=f"{number}.wav", key=f"k{number}", source="s", language=LANGUAGES[code])
        for number, code in enumerate(chosen.tolist())
    ]
    return recordings, random.uniform(1, 30, count)


def shards_of(recordings, seconds, splits=None, *, seed=0, hours=1.0, num_bytes=None, count=10**9):
    places = np.zeros(len(recordings), np.int64) if splits is None else splits
    size = ShardSize(hours=hours, bytes=num_bytes, recordings=count)
    return list(lay_out(Columns.of(Recording, recordings), seconds, places, seed=seed, size=size))


def test_every_recording_is_in_one_shard_of_its_split():
    recordings, seconds = make(900)
    splits = np.arange(900) % 3

    shards = shards_of(recordings, seconds, splits, hours=0.5)

    assert sorted(np.concatenate([shard.rows for shard in shards]).tolist()) == list(range(900))
    for shard in shards:
        assert {SPLITS[place] for place in splits[shard.rows].tolist()} == {shard.split}
        assert shard.seconds == pytest.approx(seconds[shard.rows].sum())
    for split in SPLITS:
        names = [shard.name for shard in shards if shard.split == split]
        assert names == [f"{split}-{number:06d}.tar" for number in range(len(names))]


def test_shards_are_equally_large_and_at_most_a_recording_above_the_limit():
    recordings, seconds = make(5_000)

    sizes = np.array([shard.seconds for shard in shards_of(recordings, seconds, hours=0.5)])

    assert len(sizes) == np.ceil(seconds.sum() / 1800)
    assert sizes.max() < 1800 + 30
    assert sizes.max() - sizes.min() < 60


def test_bytes_limit_a_shard_where_they_are_less_than_the_hours():
    recordings, seconds = make(2_000)

    shards = shards_of(recordings, seconds, hours=100, num_bytes=600 * BYTES_PER_SECOND)

    assert len(shards) == np.ceil(seconds.sum() / 600)
    assert max(shard.seconds for shard in shards) < 630


def test_a_shard_holds_no_more_recordings_than_it_may():
    recordings, seconds = make(33)

    assert [len(shard.rows) for shard in shards_of(recordings, seconds, count=8)] == [7, 6, 7, 6, 7]
    assert [len(shard.rows) for shard in shards_of(recordings[:32], seconds[:32], count=8)] == [8, 8, 8, 8]


def test_every_shard_has_its_share_of_each_language_and_of_short_and_long():
    recordings, seconds = make(5_000)
    shards = shards_of(recordings, seconds, hours=1)
    shares = Counter(recording.language for recording in recordings)

    for shard in shards:
        found = Counter(recordings[row].language for row in shard.rows.tolist())
        for language, count in shares.items():
            assert abs(found[language] - count / len(shards)) <= 5  # one for each class of durations, and the cut
        assert np.median(seconds[shard.rows]) == pytest.approx(15.5, abs=1.5)


def test_the_order_is_random_by_seed_and_does_not_depend_on_that_of_the_source():
    recordings, seconds = make(400)

    def keys(shards, listed):
        return [[listed[row].key for row in shard.rows.tolist()] for shard in shards]

    forwards = keys(shards_of(recordings, seconds, hours=0.2), recordings)

    assert keys(shards_of(recordings[::-1], seconds[::-1], hours=0.2), recordings[::-1]) == forwards
    assert keys(shards_of(recordings, seconds, hours=0.2, seed=1), recordings) != forwards
    numbers = [int(key[1:]) for shard in forwards for key in shard]
    assert abs(np.corrcoef(numbers, np.arange(400))[0, 1]) < 0.15


def test_one_recording_longer_than_a_shard_has_one_of_its_own():
    recordings, seconds = make(40)
    seconds[7] = 4 * 3600

    shards = shards_of(recordings, seconds, hours=0.1)

    assert [len(shard.rows) for shard in shards if 7 in shard.rows] == [1]
    assert [shard.name for shard in shards] == [f"train-{number:06d}.tar" for number in range(len(shards))]
