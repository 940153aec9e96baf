"""Training that was killed and started again ends with the bits of training that was not."""

import json
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.digits import DigitsRun
from tests.helpers.launching import LIMIT_SECONDS, Ended, Started, launch_command

LAST = "step-000006"
END_SECONDS = 120
"""Within which all processes are gone when one rank was killed. The launcher gives the other ranks 30 s."""

TIMES = ("tokens_per_second", "audio_seconds_per_second", "seconds_per_step")


@dataclass(frozen=True, slots=True)
class Killed:
    """A start that was ended by the death of one rank."""

    checkpoints: list[str]
    """Complete ones, afterwards."""
    code: int
    log: str
    seconds_to_end: float


@dataclass(frozen=True, slots=True)
class Resumed:
    """Training in three starts: killed behind step 2, killed behind step 4, finished."""

    folder: Path
    killed: list[Killed]
    log: str


def start_training(digits: DigitsRun, run: Path, output: Path, *settings: str) -> Started:
    arguments = ["--config", str(digits.config), "--set", f"run={run}", *settings]
    return Started(launch_command("launch/train.py", *arguments, ranks=2), folder=output)


def complete_checkpoints(run: Path) -> list[str]:
    return sorted(path.parent.name for path in (run / "train").glob("step-*/manifest.json"))


def kill_a_rank_behind(checkpoint: str, digits: DigitsRun, run: Path, output: Path) -> Killed:
    """Start training and kill rank 1 as soon as ``checkpoint`` is published."""
    with start_training(digits, run, output) as started:
        victim = started.rank(1, limit_seconds=LIMIT_SECONDS)
        deadline = time.monotonic() + LIMIT_SECONDS
        while checkpoint not in complete_checkpoints(run):
            assert time.monotonic() < deadline, f"no {checkpoint} after {LIMIT_SECONDS} s"
            assert started.process.poll() is None, "training ended before it could be killed"
            time.sleep(0.005)
        victim.send_signal(signal.SIGKILL)
        killed_at = time.monotonic()
        ended = started.wait(LIMIT_SECONDS + END_SECONDS)
        seconds = time.monotonic() - killed_at
    return Killed(complete_checkpoints(run), ended.code, ended.stderr, seconds)


@pytest.fixture(scope="module")
def resumed(digits, two_rank_run, tmp_path_factory) -> Resumed:
    folder = tmp_path_factory.mktemp("resumed")
    run = two_rank_run.copy_to(folder / "run", "pack", "label", "quantize")
    killed = [kill_a_rank_behind(name, digits, run, folder / "output") for name in ("step-000002", "step-000004")]
    with start_training(digits, run, folder / "output") as started:
        ended = started.wait(LIMIT_SECONDS)
    assert ended.code == 0, ended.stderr
    return Resumed(run, killed, ended.stderr)


@pytest.fixture(scope="module")
def sent_back(digits, two_rank_run, tmp_path_factory) -> tuple[Path, str]:
    """Folder and log of a finished training that was sent back to step 4, checkpoints of a longer one being there."""
    folder = tmp_path_factory.mktemp("sent-back")
    run = two_rank_run.copy_to(folder / "run", "pack", "label", "quantize", "train")
    shutil.copytree(run / "train" / LAST, run / "train" / "step-000099")
    settings = [f"train.resume={run}/train/step-000004", "train.checkpoint_every=1"]
    with start_training(digits, run, folder / "output", *settings) as started:
        ended = started.wait(LIMIT_SECONDS)
    assert ended.code == 0, ended.stderr
    return run, ended.stderr


@pytest.fixture(scope="module")
def refused(digits, two_rank_run, tmp_path_factory) -> dict[str, Ended]:
    """Starts on finished checkpoints that must not be resumed, by what is wrong."""
    folder = tmp_path_factory.mktemp("refused")
    started = {}
    for name, settings in (("changed", ["train.learning_rate=2e-4"]), ("ranks", []), ("damaged", [])):
        run = two_rank_run.copy_to(folder / name, "pack", "label", "quantize", "train")
        if name == "ranks":  # as a kill leaves it that came between the two renames of a publication
            (run / "train" / LAST).rename(run / "train" / f".{LAST}.0a1b2c3d.old")
        if name == "damaged":
            flip_a_byte(next((run / "train" / LAST / "engine").glob("*optim_states.pt")))
        command = [sys.executable, "launch/train.py", "--config", str(digits.config), "--set", f"run={run}", *settings]
        started[name] = Started(command, folder=folder / name / "output")
    try:
        return {name: program.wait(LIMIT_SECONDS) for name, program in started.items()}
    finally:
        for program in started.values():
            program.kill()


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def metrics_without_times(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def assert_equal_states(found: object, expected: object, where: str) -> None:
    """Compare what DeepSpeed wrote, tensor by tensor, bit by bit."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert set(found) == set(expected), where
        for name in expected:
            assert_equal_states(found[name], expected[name], f"{where}.{name}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_equal_states(one, other, f"{where}[{number}]")
    elif isinstance(expected, (int, float, str, bool)):
        assert found == expected, where


def test_all_starts_train_on_two_ranks_under_deepspeed_zero_2(resumed, two_rank_run):
    for log in (two_rank_run.log, *(killed.log for killed in resumed.killed), resumed.log):
        assert "event=engine type=DEEPSPEED zero_stage=2 ranks=2" in log


def test_death_of_one_rank_ends_all_processes_and_is_an_error(resumed):
    for killed in resumed.killed:
        assert killed.code != 0
        assert killed.seconds_to_end < END_SECONDS


def test_each_start_continues_at_the_newest_complete_checkpoint(resumed):
    first, second = resumed.killed

    assert LAST not in first.checkpoints + second.checkpoints
    assert "event=resumed" not in first.log
    assert f"event=resumed step={int(first.checkpoints[-1][-6:])} " in second.log
    assert f"event=resumed step={int(second.checkpoints[-1][-6:])} " in resumed.log


@pytest.mark.parametrize("file", ["best/decoder.safetensors", "student/model.safetensors"])
def test_resumed_training_ends_with_the_same_weights_bit_for_bit(resumed, two_rank_run, file):
    found, expected = (run.folder / "train" / file for run in (resumed, two_rank_run))

    assert found.read_bytes() == expected.read_bytes()


def test_training_has_moved_the_weights(two_rank_run):
    """Else equal weights would tell nothing."""
    trained = load_file(two_rank_run.folder / "train" / "student" / "model.safetensors")
    calibrated = load_file(two_rank_run.folder / "quantize" / "student" / "model.safetensors")

    moved = [name for name in trained if not torch.equal(trained[name], calibrated[name])]
    assert len(moved) == 21
    assert all(name.endswith("_proj.weight") for name in moved)


def test_resumed_training_ends_with_the_same_masters_and_moments_bit_for_bit(resumed, two_rank_run):
    engines = [run.folder / "train" / LAST / "engine" for run in (resumed, two_rank_run)]
    names = [sorted(path.name for path in engine.iterdir()) for engine in engines]

    assert names[0] == names[1]
    assert len(names[0]) == 3
    for name in names[0]:
        found, expected = (torch.load(engine / name, weights_only=False) for engine in engines)
        assert_equal_states(found, expected, name)


def test_resumed_training_writes_each_line_of_the_metrics_once(resumed, two_rank_run):
    found, expected = (metrics_without_times(run.folder) for run in (resumed, two_rank_run))

    assert [line["step"] for line in expected] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert found == expected


def test_resumed_training_chooses_the_same_step(resumed, two_rank_run):
    found, expected = (json.loads((run.folder / "train" / "done.json").read_text()) for run in (resumed, two_rank_run))

    assert found["results"] == expected["results"]
    assert found["fingerprint"] == expected["fingerprint"]


def test_training_that_is_sent_back_ends_with_the_same_bits_and_without_the_steps_after_it(sent_back, two_rank_run):
    run, log = sent_back

    assert "event=resumed step=4 " in log
    assert complete_checkpoints(run) == ["step-000004", "step-000005", LAST]
    for file in ("best/decoder.safetensors", "student/model.safetensors"):
        assert (run / "train" / file).read_bytes() == (two_rank_run.folder / "train" / file).read_bytes()
    found, expected = (json.loads((of / "train" / "done.json").read_text()) for of in (run, two_rank_run.folder))
    assert found["results"] == expected["results"]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("ranks", "/train/step-000006 must be resumed with world_size 2, got 1; start as many ranks as before with "),
        ("changed", "/train/step-000006 must come from this run's settings and data ("),
        ("damaged", "_optim_states.pt must have sha256 "),
    ],
)
def test_checkpoint_of_other_ranks_or_settings_or_with_a_flipped_bit_is_refused_in_one_line(refused, name, line):
    ended = refused[name]
    told = [text for text in ended.stderr.splitlines() if "event=" not in text]

    assert ended.code == 1
    assert len(told) == 1
    assert line in told[0]
    assert "event=resumed" not in ended.stderr
