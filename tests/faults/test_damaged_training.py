"""Shards that are damaged after they were labelled: training goes on without what is lost, up to a limit."""

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


def quarantined(run: Path) -> list[str]:
    files = sorted((run / "train" / "quarantine").iterdir())
    return sorted({json.loads(line)["key"] for file in files for line in file.read_text().splitlines()})


def test_training_goes_on_without_utterances_that_cannot_be_read(digits, damaged) -> None:
    run, lost = damaged

    ended = train(digits, run, "read.max_quarantined_share=0.04")

    assert ended.code == 0, ended.stderr
    results = json.loads((run / "train" / "done.json").read_text())["results"]
    lines = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    assert (results["step"], results["quarantined"]) == (4, 2)
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
