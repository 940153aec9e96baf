"""Reading processes: the same samples in the same order whatever their number, and an end to whatever happens."""

import itertools
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import CancelledError
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from shards import workers as module
from shards.errors import ConfigError, ShardError, StageError
from shards.index import read_utterances
from shards.read import Damaged, Shards
from shards.workers import Reader
from tests.helpers.decoders import count_heavy_modules, decode_in_company, decode_slowly
from tests.helpers.reading import same_tones, tone_of, write_tones

NUMBERS = [19, 0, 7, 3, 3, 10, 1, 18, 11, 2, 16]


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    write_tones(tmp_path / "pack", 20, per_shard=5)
    return tmp_path / "pack"


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_any_number_of_workers_gives_the_same_samples_in_the_order_asked_for(packed, workers):
    utterances = read_utterances(packed)
    batches = [[utterances[number] for number in NUMBERS], utterances[3:4], utterances[:0], utterances]

    with Reader(Shards(packed), workers=workers) as reader:
        pending = [reader.submit(batch) for batch in batches]
        later = [one.result() for one in reversed(pending)][::-1]
        ahead = list(reader.ahead(batches))
        one = reader.read(batches[0])

    for found in (later, ahead, [one, *ahead[1:]]):
        assert [same_tones(*pair) for pair in zip(found, [NUMBERS, [3], [], range(20)], strict=True)] == [True] * 4


@pytest.mark.parametrize("workers", [0, 2])
def test_batch_k_of_a_new_reader_is_the_kth_of_one_that_began_at_the_start(packed, workers):
    utterances = read_utterances(packed)
    batches = [[utterances[(7 * k + i) % 20] for i in range(4)] for k in range(6)]

    with Reader(Shards(packed), workers=workers) as reader:
        from_start = list(reader.ahead(batches))
    with Reader(Shards(packed), workers=workers) as reader:
        from_fourth = list(reader.ahead(batches[4:]))

    for expected, found in zip(from_start[4:], from_fourth, strict=True):
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_utterance_that_cannot_be_read_comes_as_damaged_in_its_place_or_as_an_error(packed, workers):
    utterances = list(read_utterances(packed))
    utterances[6] = replace(utterances[6], audio_offset=utterances[7].audio_offset)

    with Reader(Shards(packed), workers=workers) as reader:
        found = reader.try_read(utterances)
        with pytest.raises(ShardError, match=r"'tone-6' must be where the index says, got b'tone-7\.flac' there"):
            reader.read(utterances)
        assert same_tones(reader.read(utterances[:6]), range(6))

    assert isinstance(found[6], Damaged)
    assert found[6].key == "tone-6"
    assert same_tones(found[:6] + found[7:], [*range(6), *range(7, 20)])


def test_what_is_wrong_with_a_setting_is_told_and_not_taken_for_damage(tmp_path):
    utterances = write_tones(tmp_path, 2, per_shard=2, address="https://example.org/corpus")

    with Reader(Shards(tmp_path), workers=1) as reader, pytest.raises(ConfigError, match=r"read\.cache must name a"):
        reader.try_read(utterances)


def test_workers_import_nothing_heavy(packed):
    utterances = [replace(utterance, duration_seconds=1 / 16_000) for utterance in read_utterances(packed)[:2]]

    with Reader(Shards(packed, decode=count_heavy_modules), workers=1) as reader:
        assert [len(one) for one in reader.read(utterances)] == [1, 1]  # the one that is always there


def test_what_workers_import_of_the_programs_is_not_heavy_either(root):
    """A spawned process imports the program that started it, under another name."""
    code = f"""
import runpy, sys
from pathlib import Path
for path in sorted(Path({str(root)!r}, "launch").glob("*.py")):
    runpy.run_path(str(path), run_name="__mp_main__")
    assert not {{"torch", "transformers", "pyarrow", "webdataset"}} & set(sys.modules), path
"""
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)


def test_a_batch_is_cut_into_pieces_of_about_as_many_bytes_that_hold_each_utterance_once(packed):
    utterances = read_utterances(packed)[:]
    chosen = [replace(utterance, audio_bytes=size) for utterance, size in zip(utterances, [1] * 19 + [21], strict=True)]

    pieces = module._cut(chosen, 4)

    assert [len(piece) for piece in pieces] == [10, 10]  # the last one weighs half of all
    assert sorted(itertools.chain(*pieces)) == list(range(20))
    assert [len(piece) for piece in module._cut(chosen[:19], 4)] == [5, 5, 5, 4]
    assert module._cut(chosen[:2], 8) == [[0], [1]]
    assert module._cut([], 8) == []


def test_one_batch_is_decoded_by_several_workers_at_a_time(packed, tmp_path):
    (tmp_path / "here").mkdir()
    decode = partial(decode_in_company, tmp_path / "here", 2)

    with Reader(Shards(packed, decode=decode), workers=2) as reader:
        assert same_tones(reader.read(read_utterances(packed)[:4]), range(4))


def test_two_batches_are_read_ahead_and_no_more(packed):
    utterances = read_utterances(packed)
    asked = []

    def batches():
        for number in range(6):
            asked.append(number)
            yield utterances[number : number + 1]

    with Reader(Shards(packed)) as reader:
        ahead = reader.ahead(batches())
        for number in range(6):
            assert same_tones(next(ahead), [number])
            assert asked == list(range(min(number + 3, 6)))


def test_a_reader_may_be_shared_by_threads(packed):
    utterances = list(read_utterances(packed))
    wrong = []

    def read(number: int) -> None:
        for _ in range(10):
            if not same_tones(reader.read([utterances[number], utterances[-1]]), [number, 19]):
                wrong.append(number)

    with Reader(Shards(packed), workers=2) as reader:
        threads = [threading.Thread(target=read, args=[number]) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert wrong == []


def test_no_worker_is_left_after_the_end_and_none_is_started_without_need(packed):
    utterances = read_utterances(packed)

    with Reader(Shards(packed), workers=2) as reader:
        assert reader._processes == []
        np.testing.assert_array_equal(reader.read(utterances[4:5])[0], tone_of(4))
        assert [process.is_alive() for process in reader._processes] == [True, True]

    assert [process.is_alive() for process in reader._processes] == [False, False]
    assert [thread for thread in threading.enumerate() if thread.name == "reader"] == []


def test_workers_leave_ctrl_c_to_their_parent(packed):
    utterances = read_utterances(packed)

    with Reader(Shards(packed), workers=1) as reader:
        reader.read(utterances[:1])
        os.kill(reader._processes[0].pid or 0, signal.SIGINT)
        assert same_tones(reader.read(utterances), range(20))


@pytest.mark.timeout(60)
def test_closing_does_not_wait_for_what_is_being_read(packed):
    utterances = read_utterances(packed)

    with Reader(Shards(packed, decode=partial(decode_slowly, 3600.0)), workers=2) as reader:
        pending = [reader.submit(utterances) for _ in range(3)]

    for one in pending:
        with pytest.raises((StageError, CancelledError)):
            one.result()
    with pytest.raises(RuntimeError, match="a reader that is closed reads nothing"):
        reader.submit(utterances)


@pytest.mark.parametrize("when", ["idle", "busy"])
@pytest.mark.timeout(60)
def test_a_worker_that_dies_is_an_error_that_names_the_setting(packed, when):
    utterances = read_utterances(packed)
    decode = partial(decode_slowly, 0.05 if when == "idle" else 30.0)

    with Reader(Shards(packed, decode=decode), workers=2) as reader:
        if when == "idle":
            reader.read(utterances[:4])
        pending = reader.submit(utterances[:4]) if when == "busy" else None
        for process in reader._processes:
            process.kill()
        with pytest.raises(StageError, match=r"read\.workers must all live, got one that ended by signal 9; if memory"):
            (pending or reader.submit(utterances)).result()
        with pytest.raises(StageError, match=r"read\.workers must all live"):
            reader.read(utterances)
