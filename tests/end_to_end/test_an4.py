"""Human speech: all of AN4 through five programs, on two ranks, trained with ZeRO-3."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.launching import Ended, run_python

pytestmark = pytest.mark.speech

FEW_STEPS = [
    *("train.deepspeed=configs/deepspeed/zero3.json", "train.steps=4", "train.warmup_steps=1"),
    *("train.evaluate_every=4", "train.checkpoint_every=4", "train.log_every=2", "quantize.calibration_utterances=64"),
]

TEACHER_WER = 0.576
"""Of the embedded teacher on these 65 utterances, from its README: float32, greedy, automatic language."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The run and how its programs ended."""

    run: Path
    ended: Ended

    def results(self, stage: str) -> dict:
        return json.loads((self.run / stage / "done.json").read_text())["results"]


@pytest.fixture(scope="module")
def finished(speech, tmp_path_factory) -> Finished:
    folder = tmp_path_factory.mktemp("an4")
    assert (speech / "an4" / "manifest.jsonl").is_file()
    arguments = ["--config", "configs/an4.yaml", "--to", "score", "--set", f"run={folder}/run", *FEW_STEPS]
    ended = run_python("launch/run.py", *arguments, folder=folder / "output", limit_seconds=800)
    assert ended.code == 0, ended.stderr
    return Finished(folder / "run", ended)


def test_every_utterance_of_the_corpus_is_packed_in_its_own_split(finished):
    index = json.loads((finished.run / "pack" / "index.json").read_text())
    by_split = dict.fromkeys(("train", "heldout", "test"), 0)
    for shard in index["shards"]:
        by_split[shard["name"].partition("-")[0]] += shard["num_utterances"]

    assert by_split == {"train": 835, "heldout": 113, "test": 65}
    assert finished.results("pack")["num_rejected"] == 0


def test_every_training_and_heldout_utterance_is_labelled_and_ends_by_itself(finished):
    labelled = finished.results("label")

    assert labelled["utterances"] == 835 + 113
    assert labelled["runaway"] == 0
    assert labelled["utterances_by_language"] == {"English": 948}


def test_training_ran_on_two_ranks_under_deepspeed_zero_3(finished):
    log = finished.ended.stderr
    kl = [float(text) for text in re.findall(r"event=evaluate step=\d+ heldout_kl=(\S+)", log)]

    assert "rank=0 event=engine sharding=ZeRO-3 type=DEEPSPEED ranks=2 trained_weights=589824" in log
    assert "event=checkpoint step=4 " in log
    assert len(kl) == 2
    # INT8 of this teacher, calibrated with audio, is some thousandths of a nat away; a few steps leave it there.
    assert all(0 < value < 0.01 for value in kl)


def test_teacher_makes_as_many_errors_as_its_readme_says(finished):
    teacher = overall_row(finished.run, "teacher")

    assert (teacher["utterances"], teacher["unit"], teacher["reference_tokens"]) == (65, "WER", 373)
    assert teacher["error_rate"] == pytest.approx(TEACHER_WER, abs=0.015)
    assert teacher["language_accuracy"] == 1.0


@pytest.mark.parametrize("system", ["ptq", "qad"])
def test_quantized_students_stay_near_the_teacher(finished, system):
    row = overall_row(finished.run, system)

    assert row["utterances"] == 65
    assert 0 < row["kl_per_token"] < 0.02
    assert row["agreement"] > 0.95
    # 373 words: 11 of them are 3 points.
    assert row["error_rate"] == pytest.approx(TEACHER_WER, abs=0.04)


def overall_row(run, system):
    score = json.loads((run / "score" / "score.json").read_text())
    return score["sections"]["own"]["systems"][system]["overall"]
