"""The label stage when processes die, hang, run out of disk or come late: another start finishes, with equal bytes.

Real programs and the nano teacher, with hidden states and a second pass; 7 shards of 55 utterances.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import pytest

from shards.selection import own_first
from tests.helpers.digits import DigitsRun
from tests.helpers.forking import ForkServer
from tests.helpers.label_runs import (
    NUM_UTTERANCES,
    LabelRun,
    counts_of,
    shards_labelled,
    utterances_labelled,
)
from tests.helpers.launching import Ended, Started, launch_command, run_python

NUM_SHARDS = 7
PATIENT = "label.stale_seconds=600"
"""For jobs that must not wait for a claim to become stale: a test that does so does not end in time."""
LAUNCH_SECONDS = 300
NO_SPACE = (
    "{run} must be on a disk with free space, got a full one; free some space or set run to a folder on another disk"
)


@dataclass(frozen=True, slots=True)
class Whole:
    """What one rank makes if nothing happens."""

    files: dict[str, bytes]
    results: dict[str, Any]
    order: list[str]
    """Of the shards, as one rank labels them."""
    utterances: dict[str, int]
    """Of each shard."""
    steps: dict[str, int]
    """Of each shard, in both passes."""


@pytest.fixture(scope="module")
def new_run(forks: ForkServer, digits: DigitsRun, tmp_path_factory) -> Callable[[], LabelRun]:
    return lambda: LabelRun(forks, digits, digits.copy_to(tmp_path_factory.mktemp("label") / "run"))


@pytest.fixture(scope="module")
def whole(new_run) -> Whole:
    run = new_run()
    (ended,) = run.finish()
    order = shards_labelled(ended.stderr)
    assert len(order) == len(set(order)) == NUM_SHARDS
    assert run.leftovers() == []
    utterances = counts_of(ended.stderr, "utterances")
    assert sum(utterances.values()) == NUM_UTTERANCES
    return Whole(run.files(), results_of(run), order, utterances, counts_of(ended.stderr, "steps"))


@pytest.fixture
def run(new_run) -> LabelRun:
    return new_run()


def results_of(run: LabelRun) -> dict[str, Any]:
    return json.loads((run.labels / "done.json").read_text())["results"]


def has(run: LabelRun, shard: str, *endings: str) -> list[bool]:
    """Whether there is ``<shard><ending>``, for each ending."""
    return [(run.labels / (shard.removesuffix(".tar") + ending)).is_file() for ending in endings]


def num_utterances(shards: list[str], whole: Whole) -> int:
    return sum(whole.utterances[shard] for shard in shards)


def unfinished(run: LabelRun, whole: Whole) -> list[str]:
    """Shards without labels of both passes, in the order of one rank."""
    return [shard for shard in whole.order if not all(has(run, shard, ".jsonl", ".second.jsonl"))]


def kept(run: LabelRun) -> dict[str, tuple[int, int]]:
    """The files that no other start may touch: label files with what belongs to them."""
    stems = [path.name.removesuffix(".jsonl") for path in run.labels.glob("*.jsonl")]
    return {
        name: mark
        for name, mark in run.marks().items()
        if name.removesuffix(".jsonl").removesuffix(".hidden.safetensors").removesuffix(".accept.json") in stems
    }


def told(ended: Ended) -> list[str]:
    """What was not just information."""
    return [line for line in ended.stderr.splitlines() if " INFO " not in line]


def assert_whole(run: LabelRun, whole: Whole, *, leftovers: Container[int] = (0,)) -> None:
    """The bytes of an uninterrupted run, and else only so many temporary files: each killed rank may have left one."""
    assert run.files() == whole.files
    assert results_of(run) == whole.results
    left = run.leftovers()
    assert len(left) in leftovers
    assert all(name.startswith(".") and name.endswith(".tmp") for name in left)


def test_an_uninterrupted_run_has_all_kinds_of_files_and_labels_some_twice(whole):
    endings = (".jsonl", ".hidden.safetensors", ".accept.json")
    names = [
        shard.removesuffix(".tar") + part + ending
        for shard in whole.order
        for part in ("", ".second")
        for ending in endings
    ]

    assert sorted([*names, "accept.json", "accept.md", "accept.png"]) == list(whole.files)
    assert whole.results["utterances"] == NUM_UTTERANCES
    assert 10 < whole.results["second_pass"] < NUM_UTTERANCES - 10


@dataclass(frozen=True, slots=True)
class Kill:
    """Where a rank is killed in its second shard, and what there is of that shard then."""

    fault: str
    """``{steps}`` are all of the shard's steps."""
    left: tuple[str, ...]
    """Endings of its files."""
    begins_at_second: bool = False
    """Whether the labels of its first pass are there when the job begins."""
    temporaries: int = 0


FIRST = (".hidden.safetensors", ".jsonl")
SECOND = (".second.hidden.safetensors", ".second.jsonl")
ALL = (*FIRST, ".accept.json", *SECOND, ".second.accept.json")
KILLS = {
    "after the claim": Kill("label.after_claim", ()),
    "at its work": Kill("label.decode,step=5", ()),
    "after the hidden states": Kill("label.after_hidden", FIRST[:1]),
    "before the label file has its name": Kill("label.before_rename", FIRST[:1], temporaries=1),
    "when the label file is there": Kill("label.after_rename", FIRST),
    "at the work of the second pass": Kill("label.decode,step={last_but_one}", (*FIRST, ".accept.json")),
    "after the hidden states of the second pass": Kill("label.after_hidden", (*FIRST, ".accept.json", SECOND[0]), True),
    "before the file of the second pass has its name": Kill(
        "label.before_rename", (*FIRST, ".accept.json", SECOND[0]), True, temporaries=1
    ),
    "when the file of the second pass is there": Kill("label.after_rename", (*FIRST, ".accept.json", *SECOND), True),
    "before it gives up the claim": Kill("label.before_release", ALL),
}


def prepare(run: LabelRun, whole: Whole, shard: str, kill: Kill) -> str:
    """Make what must be there before, and the fault."""
    if kill.begins_at_second:
        run.labels.mkdir()
        for ending in FIRST:
            name = shard.removesuffix(".tar") + ending
            (run.labels / name).write_bytes(whole.files[name])
    point, _, condition = kill.fault.format(last_but_one=whole.steps[shard] - 1).partition(",")
    return ",".join([f"kill@{point}", f"shard={shard}", *([condition] if condition else [])])


@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS)
def test_after_a_kill_another_start_labels_only_what_is_missing(run, whole, kill):
    victim = whole.order[1]
    fault = prepare(run, whole, victim, kill)

    (killed,) = run.start(faults={0: fault}).wait()

    assert killed.code == -signal.SIGKILL
    assert has(run, victim, *ALL) == [ending in kill.left for ending in ALL]
    assert f"claims/{victim}.0.claim" in run.leftovers()
    missing, before = unfinished(run, whole), kept(run)
    assert missing == whole.order[2 if SECOND[1] in kill.left else 1 :]

    (again,) = run.finish(PATIENT)

    assert sorted(shards_labelled(again.stderr)) == sorted(missing)
    assert_whole(run, whole, leftovers=(kill.temporaries,))
    assert {name: run.marks()[name] for name in before} == before


@pytest.mark.parametrize(
    ("rank", "name"),
    [
        (0, "after the claim"),
        (1, "at its work"),
        (0, "before the label file has its name"),
        (1, "before the file of the second pass has its name"),
        (0, "when the label file is there"),
        (1, "before it gives up the claim"),
    ],
)
def test_after_a_kill_of_one_of_two_ranks_two_ranks_label_only_what_is_missing(run, whole, rank, name):
    kill = KILLS[name]
    victim = own_first(whole.order, rank=rank, world_size=2)[1]
    fault = prepare(run, whole, victim, kill)

    ended = run.start(faults={rank: fault, 1 - rank: "sleep=0.02@label.decode"}, ranks=2).wait()

    assert ended[rank].code == -signal.SIGKILL
    assert ended[1 - rank].code not in (0, -signal.SIGKILL)
    assert has(run, victim, *ALL) == [ending in kill.left for ending in ALL]
    missing, before = unfinished(run, whole), kept(run)
    assert 0 < len(missing) < NUM_SHARDS

    again = run.finish(PATIENT, ranks=2)

    assert sum(utterances_labelled(*(rank.stderr for rank in again))) == num_utterances(missing, whole)
    assert_whole(run, whole, leftovers=(kill.temporaries, kill.temporaries + 1))
    assert {name: run.marks()[name] for name in before} == before


def test_after_a_kill_under_the_launcher_all_ranks_and_readers_end_and_another_launch_finishes(run, whole, tmp_path):
    victim = own_first(whole.order, rank=1, world_size=2)[1]
    command = launch_command("launch/label.py", *run.arguments(PATIENT, "read.workers=1"), ranks=2)
    fault = {"QAD_FAULT": f"kill@label.decode,shard={victim},step=5"}
    with Started(command, folder=tmp_path, variables=fault) as started:
        killed = started.wait(LAUNCH_SECONDS)

    assert killed.code == 1
    assert "-9" in killed.stderr
    missing, before = unfinished(run, whole), kept(run)
    assert victim in missing
    assert 0 < len(missing) < NUM_SHARDS

    with Started(command, folder=tmp_path) as started:
        again = started.wait(LAUNCH_SECONDS)

    assert again.code == 0, again.stderr
    assert sum(utterances_labelled(again.stderr)) == num_utterances(missing, whole)
    assert_whole(run, whole, leftovers=range(3))
    assert {name: run.marks()[name] for name in before} == before


def test_sigterm_to_the_launcher_ends_everything_and_another_start_finishes(run, whole, tmp_path):
    command = launch_command("launch/label.py", *run.arguments(PATIENT, "read.workers=1"), ranks=2)
    with Started(command, folder=tmp_path, variables={"QAD_FAULT": "sleep=0.1@label.decode"}) as started:
        deadline = time.monotonic() + LAUNCH_SECONDS
        while len(list(run.labels.glob("*.second.jsonl"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(started.processes()) >= 1 + 2 * 2  # launcher, ranks, readers
        started.process.terminate()
        ended = started.wait(LAUNCH_SECONDS)

    assert ended.code != 0
    missing, before = unfinished(run, whole), kept(run)
    assert 0 < len(missing) < NUM_SHARDS

    (again,) = run.finish(PATIENT)

    assert sorted(shards_labelled(again.stderr)) == sorted(missing)
    assert_whole(run, whole, leftovers=range(3))
    assert {name: run.marks()[name] for name in before} == before


def test_two_jobs_at_once_share_the_shards(run, whole):
    slow = "sleep=0.02@label.decode"
    first = run.start(PATIENT, faults={0: slow})
    second = run.start(PATIENT, ranks=2, faults={0: slow, 1: slow})

    ended = [first.wait(), second.wait()]

    assert [rank.code for job in ended for rank in job] == [0, 0, 0]
    counts = utterances_labelled(*(rank.stderr for job in ended for rank in job))
    assert len(counts) == 3
    assert sum(counts) == NUM_UTTERANCES
    assert min(counts) > 0
    assert set(shards_labelled(ended[0][0].stderr)).isdisjoint(shards_labelled(ended[1][0].stderr))
    assert_whole(run, whole)


def test_a_job_that_comes_late_takes_part_of_the_work(run, whole):
    first = run.start(PATIENT, faults={0: "sleep=0.1@label.decode"})
    first.wait_until(lambda: len(shards_labelled(first.ranks[0].log())) == 1)

    (late,) = run.finish(PATIENT)

    (early,) = first.wait()
    assert early.code == 0
    early_shards, late_shards = shards_labelled(early.stderr), shards_labelled(late.stderr)
    assert early_shards[0] == whole.order[0]
    assert len(late_shards) > 1
    assert sorted([*early_shards, *late_shards]) == sorted(whole.order)
    assert_whole(run, whole)


@pytest.mark.parametrize("step", ["5", "{last_but_one}"], ids=["first pass", "second pass"])
def test_another_job_takes_the_shard_of_a_stopped_one_that_does_no_damage_when_it_goes_on(run, whole, step):
    victim = whole.order[1]
    step = step.format(last_but_one=whole.steps[victim] - 1)
    stale = "label.stale_seconds=1"
    stopped = run.start(stale, faults={0: f"stop@label.decode,shard={victim},step={step}"})
    stopped.wait_until(stopped.ranks[0].is_stopped)
    before = kept(run)

    (other,) = run.finish(stale)

    assert sorted(shards_labelled(other.stderr)) == sorted(whole.order[1:])
    assert_whole(run, whole)
    finished = kept(run)
    assert {name: finished[name] for name in before} == before

    os.kill(stopped.ranks[0].pid, signal.SIGCONT)
    (ended,) = stopped.wait()

    assert ended.code == 0, ended.stderr
    assert shards_labelled(ended.stderr) == whole.order[:2]
    assert_whole(run, whole)
    assert kept(run) == finished


def test_a_stopped_rank_of_two_loses_its_shard_and_its_job_ends_when_it_goes_on(run, whole):
    victim = own_first(whole.order, rank=1, world_size=2)[1]
    stale = "label.stale_seconds=1"
    job = run.start(stale, ranks=2, faults={1: f"stop@label.decode,shard={victim},step=5"})
    job.wait_until(lambda: not unfinished(run, whole))  # its rank 0 takes the shard, and waits then
    assert job.ranks[1].is_stopped()

    (other,) = run.finish(stale)

    assert shards_labelled(other.stderr) == []
    assert victim in shards_labelled(job.ranks[0].log())
    finished = kept(run)
    os.kill(job.ranks[1].pid, signal.SIGCONT)
    assert [rank.code for rank in job.wait()] == [0, 0]
    assert_whole(run, whole)
    assert kept(run) == finished


def test_a_full_disk_is_told_in_one_line_and_leaves_nothing_unfinished(run, whole, tmp_path):
    victim = whole.order[1]
    fault = {"QAD_FAULT": f"enospc@label.before_rename,shard={victim}"}

    full = run_python("launch/label.py", *run.arguments(), folder=tmp_path, variables=fault)

    assert full.code == 1
    assert told(full) == [NO_SPACE.format(run=run.folder)]
    assert run.leftovers() == ["claims"]  # empty: nothing is claimed, no temporary file is left
    assert unfinished(run, whole) == whole.order[1:]
    files = run.files()
    assert files == {name: whole.files[name] for name in files}

    (again,) = run.finish(PATIENT)

    assert shards_labelled(again.stderr) == whole.order[1:]
    assert_whole(run, whole)


def test_a_disk_that_is_full_for_one_rank_ends_the_other_one_too(run, whole):
    faults = {0: "sleep=0.2@label.decode", 1: "enospc@label.before_rename"}
    ended = run.start(ranks=2, faults=faults).wait()

    assert ended[1].code == 1
    assert told(ended[1]) == [f"rank=1 {NO_SPACE.format(run=run.folder)}"]
    assert ended[0].code == -signal.SIGTERM
    assert 0 < len(unfinished(run, whole))

    run.finish(PATIENT, ranks=2)

    assert_whole(run, whole, leftovers=range(2))
