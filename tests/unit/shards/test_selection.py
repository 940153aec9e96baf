"""What is labelled of each language, and in which order: against plain loops over records."""

from collections import Counter, defaultdict
from itertools import chain

import numpy as np
import pyarrow as pa
import pytest

from shards.columns import schema_of
from shards.index import UtteranceTable
from shards.schema import Utterance
from shards.selection import label_order, own_first, select


def table_of(rows: list[tuple[str, str | None, float]]) -> UtteranceTable:
    """Utterances with these splits, languages and seconds."""
    splits, languages, seconds = zip(*rows, strict=True) if rows else ((), (), ())
    columns = {name: pa.nulls(len(rows), schema_of(Utterance).field(name).type) for name in schema_of(Utterance).names}
    columns["split"] = pa.array(splits, pa.string()).dictionary_encode()
    columns["language"] = pa.array(languages, pa.string())
    columns["duration_seconds"] = pa.array(seconds, pa.float64())
    return UtteranceTable(Utterance, pa.table(columns))


def chosen_by_loop(rows: list[tuple[str, str | None, float]], max_hours: float) -> list[bool]:
    taken: Counter[tuple[str, str | None]] = Counter()
    chosen = []
    for split, language, seconds in rows:
        chosen.append(taken[split, language] < round(max_hours * 3600 * 16_000))
        taken[split, language] += round(seconds * 16_000)
    return chosen


def test_each_language_of_each_split_gets_its_first_utterances_up_to_the_one_that_reaches_the_limit():
    hour = 3_600.0
    rows = [
        ("train", "German", 0.5 * hour),
        ("train", "French", 2.0 * hour),
        ("train", None, 0.75 * hour),
        ("heldout", "German", 0.5 * hour),
        ("train", "German", 0.25 * hour),
        ("train", "German", 0.25 * hour),
        ("train", None, 0.5 * hour),
        ("train", "German", 0.25 * hour),
        ("train", "French", 0.1 * hour),
        ("heldout", "German", 0.1 * hour),
        ("train", None, 0.01 * hour),
    ]

    selected = select(table_of(rows), 1.0)

    # German is full with exactly one hour, French by its first utterance, the unknown one by the one that exceeds it.
    assert selected.dtype == np.bool_
    assert selected.tolist() == [True, True, True, True, True, True, True, False, False, True, False]


@pytest.mark.parametrize("max_hours", [0.001, 0.01, 0.02, 10.0])
def test_selection_is_that_of_a_loop_over_records(max_hours):
    random = np.random.default_rng(3)
    languages = ["German", "French", None]
    rows = [
        (["train", "heldout"][int(random.integers(2))], languages[int(random.integers(3))], n / 16_000)
        for n in random.integers(1_600, 160_000, 500).tolist()
    ]

    assert select(table_of(rows), max_hours).tolist() == chosen_by_loop(rows, max_hours)


def test_no_limit_and_no_utterances_are_fine():
    rows = [("train", "German", 1e9), ("train", None, 1e9)]

    assert select(table_of(rows), None).tolist() == [True, True]
    assert select(table_of([]), 1.0).tolist() == []


def test_of_a_split_by_itself_the_same_is_selected():
    rows = [(split, "German", 100.0) for split in ("train", "heldout", "train", "train") * 30]
    table = table_of(rows)
    is_train = np.array([split == "train" for split, *_ in rows])

    assert (select(table, 0.5)[is_train] == select(table.take(np.flatnonzero(is_train)), 0.5)).all()


@pytest.mark.parametrize(("num_samples", "count"), [(1_600, 36_000), (258_727, 536), (283_720, 1_772)])
def test_hours_add_up_exactly_however_many_utterances_there_are(num_samples, count):
    """Sums of seconds, and hours in samples, miss the limit by an utterance here if they are not rounded."""
    seconds = num_samples / 16_000
    rows = [("train", "German", seconds)] * (count + 100)

    assert int(select(table_of(rows), count * seconds / 3_600).sum()) == count


def test_languages_take_turns_and_keep_the_order_of_their_own_shards():
    shards = {
        "a": {"German": 5.0, "French": 1.0},
        "b": {"German": 9.0},
        "c": {"German": 1.0},
        "d": {"unknown": 3.0},
        "e": {"German": 2.0, "French": 2.0},  # as much of both: the first by name
        "f": {"zulu": 1.0, "unknown": 0.5},
        "g": {"German": 4.0},
        "h": {},
    }

    order = label_order(shards)

    assert order == ["h", "e", "a", "f", "d", "b", "c", "g"]


def test_any_beginning_of_the_order_holds_languages_evenly():
    random = np.random.default_rng(8)
    names = [f"shard-{number}" for number in range(90)]
    language = {name: f"L{int(random.integers(3))}" for name in names}
    totals = Counter(language.values())

    order = label_order({name: {language[name]: 1.0} for name in names})

    assert sorted(order) == sorted(names)
    done: defaultdict[str, int] = defaultdict(int)
    for name in order:
        done[language[name]] += 1
        unfinished = [done[one] for one in totals if done[one] < totals[one]]
        assert max(unfinished, default=0) - min(unfinished, default=0) <= 1
    for one in totals:
        assert [name for name in order if language[name] == one] == [name for name in names if language[name] == one]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8, 12])
def test_each_rank_begins_with_its_share_and_then_helps_the_others_from_their_ends(world_size):
    order = [f"shard-{number}" for number in range(10)]
    plans = [own_first(order, rank=rank, world_size=world_size) for rank in range(world_size)]

    assert all(sorted(plan) == sorted(order) for plan in plans)
    shares = [order[rank::world_size] for rank in range(world_size)]
    for rank, plan in enumerate(plans):
        size = len(shares[rank])
        helped = [*shares[rank + 1 :], *shares[:rank]]
        assert plan[:size] == shares[rank]
        assert plan[size:] == list(chain.from_iterable(share[::-1] for share in helped))
