"""Shards that are damaged after they were labelled, and disks that are full: what is lost, and what is not."""

import json
from pathlib import Path

import pytest

from shards.index import read_utterances
from shards.schema import HELDOUT, TRAIN
from tests.helpers.damage import spoil
from tests.helpers.digits import DigitsRun, FinishedRun
from tests.helpers.launching import Ended, launch

SETTINGS = ["read.workers=1", "train.steps=4", "train.evaluate_every=4", "train.checkpoint_every=4"]


@pytest.fixture
def damaged(two_rank_run: FinishedRun, tmp_path: Path) -> tuple[Path, list[str]]:
    """A run that is ready to be trained, and the keys of two utterances, one of them held out, that are damaged."""
    run = two_rank_run.copy_to(tmp_path / "run", "pack", "label", "quantize")
    lost = [read_utterances(run / "pack", splits=[split])[2] for split in (TRAIN, HELDOUT)]
    for utterance in lost:
        spoil(run / "pack", utterance)
    return run, sorted(utterance.key for utterance in lost)


def train(digits: DigitsRun, run: Path, *settings: str) -> Ended:
    arguments = ["--config", digits.config, "--set", f"run={run}", *SETTINGS, *settings]
    return launch("launch/train.py", *arguments, ranks=2, folder=run / "output")


def results_of(run: Path) -> dict[str, object]:
    return json.loads((run / "train" / "done.json").read_text())["results"]


def quarantined(run: Path) -> list[str]:
    files = sorted((run / "train" / "quarantine").iterdir())
    return sorted({json.loads(line)["key"] for file in files for line in file.read_text().splitlines()})


def test_training_goes_on_without_utterances_that_cannot_be_read(digits, damaged) -> None:
    run, lost = damaged

    ended = train(digits, run, "read.max_quarantined_share=0.04")

    assert ended.code == 0, ended.stderr
    results = results_of(run)
    lines = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    assert (results["step"], results["skipped"], results["quarantined"]) == (4, 0, 2)
    assert [line["quarantined"] for line in lines if "kl" in line][-1] == 2
    assert [line["step"] for line in lines if "kl" in line] == [1, 2, 3, 4]
    assert quarantined(run) == lost


def test_training_stops_on_all_ranks_with_one_line_when_too_much_is_lost(digits, damaged) -> None:
    run, lost = damaged

    ended = train(digits, run, "read.max_quarantined_share=0")

    told = "read.max_quarantined_share must cover what cannot be read, got 0 (at most 0 of 55 utterances)"
    assert ended.code == 1
    assert ended.stderr.count(told) == 1
    assert "Traceback" not in ended.stderr.partition(told)[0]
    assert not (run / "train" / "done.json").exists()
    assert set(quarantined(run)) <= set(lost)


@pytest.mark.parametrize(
    ("rank", "point", "file"),
    [(1, "before_part", "rank-001.safetensors"), (0, "before_publish", "step-000006")],
    ids=["of one rank while it writes", "of rank 0 while it publishes"],
)
def test_full_disk_is_told_on_all_ranks_and_leaves_the_checkpoint_before(
    forks, digits, two_rank_run, tmp_path: Path, rank: int, point: str, file: str
) -> None:
    """The checkpoint of step 6 cannot be written; with room, training goes on from step 4 to the same end."""
    run = two_rank_run.copy_to(tmp_path / "run", "pack", "label", "quantize", "train")
    arguments = ["--config", digits.config, "--set", f"run={run}", f"train.resume={run}/train/step-000004"]

    full = forks.start("train", *arguments, ranks=2, faults={rank: f"enospc@checkpoint.{point},step=6"}).wait()
    left = sorted(path.parent.name for path in (run / "train").glob("step-*/manifest.json"))
    again = forks.start("train", *arguments[:-1], ranks=2).wait()

    told = [line for ended in full for line in ended.stderr.splitlines() if "must be writable" in line]
    assert full[0].code == 1
    assert full[1].code in (1, -15)  # rank 0 may have ended first; then the other is ended as by the launcher
    assert len(told) == 1  # of all ranks together
    assert f"{file} must be writable, got 'No space left on device'; make room and start again" in told[0]
    assert left == ["step-000004"]
    assert [ended.code for ended in again] == [0, 0]
    assert "event=resumed step=4 " in again[0].stderr
    assert results_of(run) == results_of(two_rank_run.folder)
    best, expected = (of / "train" / "best" / "decoder.safetensors" for of in (run, two_rank_run.folder))
    assert best.read_bytes() == expected.read_bytes()
