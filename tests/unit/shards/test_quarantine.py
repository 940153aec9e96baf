"""The quarantine: each damaged utterance once, on disk, over any number of starts, and no more than the limit."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shards.errors import ShardError, StageError
from shards.quarantine import Quarantine
from shards.read import Damaged


def damaged(number: int, *, reason: str = "must be FLAC, got số 7") -> Damaged:
    return Damaged(key=f"tone-{number}", shard="train-000000.tar", reason=reason)


def open_quarantine(path: Path, *, num_utterances: int = 100, max_share: float = 0.02) -> Quarantine:
    return Quarantine(path, num_utterances=num_utterances, max_share=max_share)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "train" / "quarantine.jsonl"


def test_the_file_appears_with_the_first_and_holds_each_once(path):
    quarantine = open_quarantine(path)
    assert not path.parent.exists()

    for number in (2, 1, 2, 2):
        quarantine.add(damaged(number))

    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"key": f"tone-{number}", "reason": "must be FLAC, got số 7", "shard": "train-000000.tar"} for number in (2, 1)
    ]
    assert quarantine.damaged == (damaged(2), damaged(1))
    assert quarantine.keys == {"tone-1", "tone-2"}


def test_a_later_start_goes_on_with_it_and_writes_nothing_twice(path):
    open_quarantine(path).add(damaged(2))

    again = open_quarantine(path)
    assert again.damaged == (damaged(2),)
    again.add(damaged(2, reason="another one"))
    again.add(damaged(3))

    assert open_quarantine(path).damaged == (damaged(2), damaged(3))
    assert len(path.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("left", [1, 20, -1])
def test_a_line_that_was_cut_by_a_kill_is_dropped_and_written_again(path, left):
    for number in (1, 2):
        open_quarantine(path).add(damaged(number))
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    path.write_bytes(whole[: start + left] if left > 0 else whole[:left])

    again = open_quarantine(path)
    assert again.damaged == (damaged(1),)
    again.add(damaged(2))

    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", [b"{}", b"[1]", b"not json", b'{"key": "a", "shard": "b"}', b"\xff"])
def test_a_file_that_is_something_else_is_not_added_to(path, line):
    path.parent.mkdir()
    path.write_bytes(line + b"\n")

    with pytest.raises(
        ShardError, match=r"quarantine\.jsonl must hold damaged utterances as JSON lines, got .*; remove it"
    ):
        open_quarantine(path)


@pytest.mark.parametrize(
    ("num_utterances", "max_share", "allowed"),
    [(100, 0.02, 2), (199, 0.01, 1), (99, 0.01, 0), (100, 0.29, 29), (100, 0.07, 7), (10, 1.0, 10), (10**7, 0.0, 0)],
)
def test_as_many_as_the_share_rounded_down_are_allowed(path, num_utterances, max_share, allowed):
    quarantine = open_quarantine(path, num_utterances=num_utterances, max_share=max_share)

    quarantine.check([damaged(number) for number in range(allowed)])
    with pytest.raises(ShardError, match=rf"\(at most {allowed} of {num_utterances} utterances\) and {allowed + 1}: "):
        quarantine.check([damaged(number) for number in range(allowed + 1)])


def test_an_utterance_that_several_ranks_met_counts_once(path):
    open_quarantine(path).check([damaged(1), damaged(2), damaged(1, reason="as another rank says it")])


def test_the_error_names_setting_counts_examples_and_file(path):
    reasons = {number: f"reason {number}" for number in (5, 3, 9, 1)}

    with pytest.raises(ShardError) as caught:
        open_quarantine(path).check([damaged(number, reason=reason) for number, reason in reasons.items()])

    assert str(caught.value) == (
        "read.max_quarantined_share must cover what cannot be read, got 0.02 (at most 2 of 100 utterances) and 4: "
        "tone-1 (reason 1), tone-3 (reason 3), tone-5 (reason 5); "
        f"see {path}, mend the shards or raise it"
    )


def test_threads_may_add_at_a_time(path):
    quarantine = open_quarantine(path)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(quarantine.add, [damaged(number % 10) for number in range(80)]))

    assert len(path.read_bytes().splitlines()) == 10
    assert set(open_quarantine(path).damaged) == {damaged(number) for number in range(10)}


def test_a_file_that_cannot_be_written_is_named(path):
    quarantine = open_quarantine(path)
    path.parent.write_bytes(b"")

    with pytest.raises(StageError, match=r"quarantine\.jsonl must be writable, got '(File exists|Not a directory)'"):
        quarantine.add(damaged(1))
    assert quarantine.keys == frozenset()
