"""Scores when ranks die, files are damaged or systems come later: answers are kept, and the bytes are the same.

Real programs, the nano teacher and its students; 15 utterances in 4 groups.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.digits import NUM_TEST, DigitsRun, FinishedRun
from tests.helpers.forking import ForkServer, Job
from tests.helpers.launching import Ended

STAGES = ("pack", "label", "quantize", "train")
NOTES = ("speed.json", "done.json", "own/teacher.json", "own/ptq.json", "own/qad.json")
"""What tells how long it took."""


@pytest.fixture
def run(two_rank_run: FinishedRun, tmp_path: Path) -> Path:
    """A trained run without scores."""
    return two_rank_run.copy_to(tmp_path / "run", *STAGES)


def start(forks: ForkServer, digits: DigitsRun, run: Path, *settings: str, ranks: int = 1, fault: str = "") -> Job:
    arguments = ["--config", str(digits.config), "--set", f"run={run}", *settings]
    faults = dict.fromkeys(range(ranks), fault) if fault else None
    return forks.start("score", *arguments, ranks=ranks, faults=faults)


def score(forks: ForkServer, digits: DigitsRun, run: Path, *settings: str) -> Ended:
    (ended,) = start(forks, digits, run, *settings).wait()
    assert ended.code == 0, ended.stderr
    return ended


def files_of(run: Path) -> dict[str, bytes]:
    folder = run / "score"
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if name not in NOTES}


def answered(ended: Ended) -> list[str]:
    """The systems that were decoded, as the log tells them."""
    lines = [line for line in ended.stderr.splitlines() if "event=answered" in line]
    return [line.partition("system=")[2].split()[0] for line in lines]


def decoded(ended: Ended) -> list[int]:
    """Utterances that were decoded in this start, a number for each system."""
    lines = [line for line in ended.stderr.splitlines() if "event=progress stage=score" in line]
    return [int(line.partition("utterances=")[2].split()[0]) for line in lines]


@pytest.mark.parametrize("action", ["kill", "enospc", "raise"])
def test_a_start_that_dies_between_two_groups_goes_on_there(forks, digits, two_rank_run, run, action) -> None:
    died = start(forks, digits, run, fault=f"{action}@score.group,system=ptq,group=1").wait()

    again = score(forks, digits, run)

    assert died[0].code != 0
    assert answered(died[0]) == ["teacher"]
    assert answered(again) == ["ptq", "qad"]
    assert decoded(again) == [NUM_TEST - 2 * 4, NUM_TEST]  # two groups of four were on disk
    assert files_of(run) == files_of(two_rank_run.folder)


def test_a_start_on_two_ranks_of_which_one_dies_goes_on_with_what_both_have_done(
    forks, digits, two_rank_run, run
) -> None:
    died = start(forks, digits, run, ranks=2, fault="kill@score.group,system=qad,group=3").wait()

    again = score(forks, digits, run)

    assert all(ended.code != 0 for ended in died)
    assert answered(again) == ["qad"]
    assert files_of(run) == files_of(two_rank_run.folder)


@pytest.mark.parametrize("damaged", ["own/ptq.jsonl", "own/ptq.json"])
def test_damaged_answers_are_made_again_and_no_others(forks, digits, two_rank_run, run, damaged) -> None:
    score(forks, digits, run)
    path = run / "score" / damaged
    path.write_bytes(path.read_bytes()[:-9])

    again = score(forks, digits, run)

    assert answered(again) == ["ptq"]
    assert files_of(run) == files_of(two_rank_run.folder)


def test_a_finished_score_is_judged_again_without_decoding(forks, digits, run) -> None:
    score(forks, digits, run)

    again = score(forks, digits, run, "score.margin=5", "score.worst_utterances=1")

    told = json.loads((run / "score" / "score.json").read_text())
    assert answered(again) == []
    assert told["margin"] == 5
    assert len(json.loads((run / "score" / "own" / "worst.json").read_text())) == 1


def test_a_student_that_was_trained_again_is_decoded_again(forks, digits, two_rank_run, run) -> None:
    score(forks, digits, run)
    shutil.rmtree(run / "train" / "student")
    shutil.copytree(run / "quantize" / "student", run / "train" / "student")

    again = score(forks, digits, run)

    assert answered(again) == ["qad"]
    told = json.loads((run / "score" / "score.json").read_text())["sections"]["own"]["systems"]
    assert told["qad"] == told["ptq"]
