"""A run on a few of the embedded spoken digits: each stage takes seconds."""

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.helpers.launching import ROOT, launch, run_python

LANGUAGES = ("English", "Chinese", "German", "Vietnamese", "Arabic")
TEACHER = ROOT / "tests" / "assets" / "nano-teacher"
NUM_TRAIN, NUM_HELDOUT, NUM_TEST = 40, 15, 15


@dataclass(frozen=True, slots=True)
class DigitsRun:
    """A config and its packed shards."""

    manifest: Path
    config: Path
    pack: Path
    """``<run>/pack``."""

    def copy_to(self, run: Path) -> Path:
        """Begin another run with these shards."""
        shutil.copytree(self.pack, run / "pack")
        return run


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """The folder of a run and what its programs logged."""

    folder: Path
    log: str

    def copy_to(self, run: Path, *stages: str) -> Path:
        """Begin another run with some of its stages."""
        for stage in stages:
            shutil.copytree(self.folder / stage, run / stage)
        return run


def make_digits(folder: Path) -> DigitsRun:
    """Write manifest and config, and pack them with the program."""
    manifest = write_digits(folder)
    config = write_config(folder, manifest)
    ended = run_python("launch/pack.py", "--config", config, folder=folder / "output")
    assert ended.code == 0, ended.stderr
    return DigitsRun(manifest, config, folder / "run" / "pack")


def run_on_two_ranks(digits: DigitsRun, folder: Path) -> FinishedRun:
    """Label, quantize, train and score on two ranks."""
    run = digits.copy_to(folder / "run")
    arguments = ["2", digits.config, run, "label", "quantize", "train", "score"]
    program = "tests/helpers/run_stages.py"
    ended = launch(program, *arguments, ranks=2, folder=folder / "output")
    assert ended.code == 0, ended.stderr
    return FinishedRun(run, ended.stderr)


def run_on_one_rank(digits: DigitsRun, trained: FinishedRun, folder: Path) -> FinishedRun:
    """Label, quantize and score on one rank, the student being that of ``trained``."""
    run = trained.copy_to(digits.copy_to(folder / "run"), "train")
    arguments = ["1", digits.config, run, "label", "quantize", "score"]
    ended = run_python("tests/helpers/run_stages.py", *arguments, folder=folder / "output")
    assert ended.code == 0, ended.stderr
    return FinishedRun(run, ended.stderr)


def score_on_four_ranks(digits: DigitsRun, trained: FinishedRun, folder: Path) -> FinishedRun:
    """Score on four ranks, the students being those of ``trained``."""
    run = trained.copy_to(digits.copy_to(folder / "run"), "label", "quantize", "train")
    program = "tests/helpers/run_stages.py"
    ended = launch(program, "4", digits.config, run, "score", ranks=4, folder=folder / "output")
    assert ended.code == 0, ended.stderr
    return FinishedRun(run, ended.stderr)


def write_digits(folder: Path) -> Path:
    """Write a manifest of 40 train, 15 heldout and 15 test utterances in 5 languages, with absolute paths."""
    source = ROOT / "tests" / "assets" / "digits"
    wanted = {"train": NUM_TRAIN, "heldout": NUM_HELDOUT, "test": NUM_TEST}
    taken: Counter[tuple[str, str]] = Counter()
    lines = []
    for line in (source / "manifest.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        place = (entry["split"], entry["language"])
        if entry["language"] in LANGUAGES and taken[place] < wanted[entry["split"]] // len(LANGUAGES):
            taken[place] += 1
            # Without keys of their own they would have those of their paths: other shards in each checkout.
            own = {"key": Path(entry["audio"]).stem, "audio": str(source / entry["audio"])}
            lines.append(json.dumps({**entry, **own}, ensure_ascii=False) + "\n")
    assert len(lines) == NUM_TRAIN + NUM_HELDOUT + NUM_TEST
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "manifest.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_config(folder: Path, manifest: Path) -> Path:
    """Write the YAML of a float32 run: 7 label shards, 3 micro-batches a step, 3 steps an epoch, ZeRO-2."""
    config = {
        "run": str(folder / "run"),
        "model": {"path": str(TEACHER), "dtype": "float32"},
        "pack": {"inputs": [str(manifest)], "holdout": 0, "utterances_per_shard": 8, "processes": 1},
        "read": {"workers": 1},
        "label": {"batch_audio_seconds": 20},
        "quantize": {"calibration_utterances": 24, "micro_batch_tokens": 1024},
        "train": {
            "deepspeed": str(ROOT / "configs" / "deepspeed" / "zero2.json"),
            "steps": 6,
            "micro_batch_tokens": 320,
            "micro_batches_per_step": 3,
            "learning_rate": 3e-5,
            "warmup_steps": 1,
            "evaluate_every": 2,
            "evaluate_utterances": NUM_HELDOUT,
            "checkpoint_every": 2,
            "log_every": 1,
            "keep": "last",  # so few steps are not always nearer to the teacher than none
        },
        "score": {"batch_audio_seconds": 20, "slots": 4, "num_resamples": 1000},  # 4 groups
        "export": {"verify_utterances": 3},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path
