"""Training that was killed and started again, or moved to other ranks, ends as training that was not."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.digits import DigitsRun
from tests.helpers.forking import ForkServer
from tests.helpers.launching import LIMIT_SECONDS, ROOT, Ended, Started, launch_command

LAST = "step-000006"
END_SECONDS = 120
"""Within which all processes are gone when one rank was killed. The launcher gives the other ranks 30 s."""

# In the order of a run, so that each start comes to its point: what is killed, and the step to go on from.
KILLS = [
    ("train.after_read,step=1,rank=1", 0),
    ("checkpoint.after_gather,step=2,rank=0", 0),
    ("checkpoint.before_part,step=2,rank=1", 0),
    ("checkpoint.after_part,step=2,rank=0", 0),
    ("checkpoint.before_publish,step=2,rank=0", 0),
    ("checkpoint.after_publish,step=2,rank=0", 2),
    ("train.after_forward,step=2,rank=1", 2),
    ("train.after_backward,step=3,rank=0", 2),
    ("train.after_step,step=5,rank=1", 4),
]
ELASTIC = ["train.ce_weight=1", "train.keep_checkpoints=4"]
"""Far from 0 a loss does not follow every rounding of a quantized weight; the KL of these students would."""


@dataclass(frozen=True, slots=True)
class Start:
    """What one start of training left."""

    codes: list[int]
    """Of the ranks."""
    log: str
    """Of rank 0."""
    complete: list[str]
    """Checkpoints, afterwards."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A run folder and the starts that made it, the last of which came to the end."""

    folder: Path
    starts: list[Start]


def start(
    forks: ForkServer,
    digits: DigitsRun,
    run: Path,
    *settings: str,
    ranks: int = 2,
    kill: str | None = None,
) -> Start:
    """Train until the end, or until the rank that the kill names is dead."""
    point, _, rank = (kill or "").rpartition(",rank=")
    faults = {int(rank): f"kill@{point}"} if kill else {}
    arguments = ["--config", digits.config, "--set", f"run={run}", *settings]
    ended = forks.start("train", *arguments, ranks=ranks, faults=faults).wait()
    return Start([rank.code for rank in ended], ended[0].stderr, complete_checkpoints(run))


def complete_checkpoints(run: Path) -> list[str]:
    return sorted(path.parent.name for path in (run / "train").glob("step-*/manifest.json"))


@pytest.fixture(scope="module")
def killed_everywhere(forks, digits, two_rank_run, tmp_path_factory) -> Trained:
    """Killed at every point of a step and of a checkpoint, one after the other."""
    run = two_rank_run.copy_to(tmp_path_factory.mktemp("killed") / "run", "pack", "label", "quantize")
    starts = [start(forks, digits, run, kill=point) for point, _ in KILLS]
    # As a kill leaves a checkpoint that comes between the two renames of its publication.
    newest = run / "train" / starts[-1].complete[-1]
    newest.rename(newest.with_name(f".{newest.name}.0a1b2c3d.old"))
    starts.append(start(forks, digits, run))
    assert starts[-1].codes == [0, 0], starts[-1].log
    return Trained(run, starts)


@pytest.fixture(scope="module")
def launched(digits, two_rank_run, tmp_path_factory) -> tuple[Path, list[Ended]]:
    """By accelerate, as a user does: one rank killed in its fourth step, then once more to the end."""
    folder = tmp_path_factory.mktemp("launched")
    run = two_rank_run.copy_to(folder / "run", "pack", "label", "quantize")
    command = launch_command("launch/train.py", "--config", digits.config, "--set", f"run={run}", ranks=2)
    ended = []
    for fault in ({"QAD_FAULT": "kill@train.after_backward,step=4,rank=1"}, {}):
        with Started(command, folder=folder / "output", variables=fault) as started:
            ended.append(started.wait(LIMIT_SECONDS + END_SECONDS))
    return run, ended


@pytest.fixture(scope="module")
def sent_back(forks, digits, two_rank_run, tmp_path_factory) -> Trained:
    """A finished training that was sent back to step 4, checkpoints of a longer one being there."""
    run = two_rank_run.copy_to(tmp_path_factory.mktemp("sent-back") / "run", "pack", "label", "quantize", "train")
    shutil.copytree(run / "train" / LAST, run / "train" / "step-000099")
    settings = [f"train.resume={run}/train/step-000004", "train.checkpoint_every=1"]
    return Trained(run, [start(forks, digits, run, *settings)])


@pytest.fixture(scope="module")
def uninterrupted(forks, digits, two_rank_run, tmp_path_factory) -> Trained:
    """Under ZeRO-2 on two ranks, with the settings of those that change ranks or engine on their way."""
    run = two_rank_run.copy_to(tmp_path_factory.mktemp("uninterrupted") / "run", "pack", "label", "quantize")
    return Trained(run, [start(forks, digits, run, *ELASTIC)])


@pytest.fixture(scope="module", params=["ranks", "engines"])
def moved(request, forks, digits, uninterrupted, tmp_path_factory) -> Trained:
    """From its checkpoint of step 2 on: two steps on one rank or under DDP, two on two ranks or under ZeRO-3."""
    run = tmp_path_factory.mktemp("moved") / "run"
    shutil.copytree(uninterrupted.folder, run)
    zero3 = f"train.deepspeed={ROOT / 'configs' / 'deepspeed' / 'zero3.json'}"
    ranks, first, second = (1, [], []) if request.param == "ranks" else (2, ["train.deepspeed=null"], [zero3])
    back = [f"train.resume={run}/train/step-000002"]
    kill = "checkpoint.after_publish,step=4,rank=0"
    starts = [
        start(forks, digits, run, *ELASTIC, *back, *first, ranks=ranks, kill=kill),
        start(forks, digits, run, *ELASTIC, *second),
    ]
    return Trained(run, starts)


@pytest.fixture(scope="module")
def refused(forks, digits, two_rank_run, tmp_path_factory) -> dict[str, Ended]:
    """Starts on finished checkpoints that must not be resumed, by what is wrong."""
    folder = tmp_path_factory.mktemp("refused")
    ended = {}
    for name, settings in (("changed", ["train.learning_rate=2e-4"]), ("damaged", [])):
        run = two_rank_run.copy_to(folder / name, "pack", "label", "quantize", "train")
        if name == "damaged":
            flip_a_byte(run / "train" / LAST / "rank-001.safetensors")
        arguments = ["--config", digits.config, "--set", f"run={run}", *settings]
        (ended[name],) = forks.start("train", *arguments).wait()
    return ended


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lines_of(run: Path) -> list[dict[str, float]]:
    """Of ``metrics.jsonl``, without what depends on the machine."""
    lines = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k and "memory" not in k} for line in lines]


def checkpoint_of(run: Path, name: str = LAST) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whichever rank wrote them."""
    files = sorted((run / "train" / name).glob("rank-*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def results_of(run: Path) -> dict[str, object]:
    return json.loads((run / "train" / "done.json").read_text())["results"]


def assert_bits_are_those_of(run: Path, expected: Path) -> None:
    for file in ("best/decoder.safetensors", "student/model.safetensors"):
        assert (run / "train" / file).read_bytes() == (expected / "train" / file).read_bytes(), file
    found, wanted = checkpoint_of(run), checkpoint_of(expected)
    assert set(found) == set(wanted)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    assert results_of(run) == results_of(expected)
    records = [json.loads((of / "train" / "done.json").read_text()) for of in (run, expected)]
    assert records[0]["fingerprint"] == records[1]["fingerprint"]


def test_all_starts_train_on_two_ranks_under_deepspeed_zero_2(killed_everywhere, launched, two_rank_run):
    logs = [one.log for one in killed_everywhere.starts] + [ended.stderr for ended in launched[1]]

    for log in (two_rank_run.log, *logs):
        assert "event=engine sharding=ZeRO-2 type=DEEPSPEED ranks=2" in log


def test_training_has_moved_the_weights(two_rank_run):
    """Else equal weights would tell nothing."""
    trained = load_file(two_rank_run.folder / "train" / "student" / "model.safetensors")
    calibrated = load_file(two_rank_run.folder / "quantize" / "student" / "model.safetensors")

    moved = [name for name in trained if not torch.equal(trained[name], calibrated[name])]
    assert len(moved) == 21
    assert all(name.endswith("_proj.weight") for name in moved)


@pytest.mark.parametrize("number", range(len(KILLS)), ids=[point for point, _ in KILLS])
def test_start_after_a_kill_goes_on_from_the_newest_complete_checkpoint(killed_everywhere, number):
    point, step = KILLS[number]
    killed, following = killed_everywhere.starts[number : number + 2]

    assert killed.codes[int(point[-1])] == -9
    assert 0 not in killed.codes
    assert killed.complete == [f"step-{done:06d}" for done in (2, 4) if done <= step]
    assert (f"event=resumed step={step} " in following.log) == (step > 0)
    assert ("event=resumed" in following.log) == (step > 0)


def test_training_that_was_killed_everywhere_ends_with_the_same_bits(killed_everywhere, two_rank_run):
    """Weights, masters, both moments and the choice of the best."""
    assert_bits_are_those_of(killed_everywhere.folder, two_rank_run.folder)
    assert len(checkpoint_of(two_rank_run.folder)) == 21 * 3


def test_training_that_was_killed_everywhere_writes_each_line_of_the_metrics_once(killed_everywhere, two_rank_run):
    found, expected = (lines_of(run.folder) for run in (killed_everywhere, two_rank_run))

    assert [line["step"] for line in expected] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert found == expected


def test_nothing_is_left_of_what_was_interrupted(killed_everywhere, two_rank_run):
    found, expected = (
        sorted(path.name for path in (run.folder / "train").iterdir()) for run in (killed_everywhere, two_rank_run)
    )

    assert found == expected
    assert not [name for name in found if name.startswith(".")]


def test_death_of_a_rank_ends_the_launcher_with_an_error_and_the_next_launch_finishes(launched, two_rank_run):
    run, (killed, finished) = launched

    assert killed.code != 0
    assert finished.code == 0, finished.stderr
    assert "event=resumed step=" in finished.stderr
    assert_bits_are_those_of(run, two_rank_run.folder)


def test_training_that_is_sent_back_ends_with_the_same_bits_and_without_the_steps_after_it(sent_back, two_rank_run):
    (only,) = sent_back.starts

    assert only.codes == [0, 0], only.log
    assert "event=resumed step=4 " in only.log
    assert only.complete == ["step-000004", "step-000005", LAST]
    assert_bits_are_those_of(sent_back.folder, two_rank_run.folder)


def test_moved_training_went_on_under_other_ranks_or_engines(moved, uninterrupted):
    first, second = moved.starts
    engines = [
        next(line.split("event=engine ")[1] for line in one.log.splitlines() if "event=engine " in line)
        for one in (*uninterrupted.starts, first, second)
    ]

    assert first.codes[0] == -9
    assert second.codes == [0, 0], second.log
    assert "event=resumed step=2 " in first.log
    assert "event=resumed step=4 " in second.log
    assert engines[0].startswith("sharding=ZeRO-2 type=DEEPSPEED ranks=2 ")
    expected = {
        1: ("sharding=ZeRO-2 type=DEEPSPEED ranks=1 ", "sharding=ZeRO-2 type=DEEPSPEED ranks=2 "),
        2: ("sharding=DDP type=MULTI_CPU ranks=2 ", "sharding=ZeRO-3 type=DEEPSPEED ranks=2 "),
    }[len(first.codes)]
    assert (engines[1].startswith(expected[0]), engines[2].startswith(expected[1])) == (True, True), engines


def test_moved_training_sees_the_same_global_batches_and_losses(moved, uninterrupted):
    found, expected = (lines_of(run.folder) for run in (moved, uninterrupted))

    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, wanted in zip(found, expected, strict=True):
        assert line.get("response_tokens") == wanted.get("response_tokens")
        for name in ("loss", "ce", "heldout_ce_per_token", "gradient_norm"):
            if name in wanted:
                assert line[name] == pytest.approx(wanted[name], rel=1e-5), (name, line["step"])


def test_moved_training_ends_with_the_same_weights(moved, uninterrupted):
    """As far as sums in another order let it."""
    found, expected = (checkpoint_of(run.folder) for run in (moved, uninterrupted))
    start = checkpoint_of(uninterrupted.folder, "step-000002")

    assert set(found) == set(expected)
    masters = [name for name in expected if name.endswith("/weight")]
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    # 1.4e-9 seen of masters and 1.6e-7 of moments under other engines, nothing at all on other ranks.
    assert max(errors[name] for name in masters) <= 1e-6, errors
    assert max(errors.values()) <= 1e-5, errors
    assert min(relative_error(start[name], expected[name]) for name in masters) > 1e-5  # they have moved


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("changed", "/train/step-000006 must come from this run's settings and data ("),
        ("damaged", "/train/step-000006/rank-001.safetensors must have sha256 "),
    ],
)
def test_checkpoint_of_other_settings_or_with_a_flipped_bit_is_refused_in_one_line(refused, name, line):
    ended = refused[name]
    told = [text for text in ended.stderr.splitlines() if "event=" not in text]

    assert ended.code == 1
    assert len(told) == 1
    assert line in told[0]
    assert "event=resumed" not in ended.stderr


def test_best_student_of_a_stopped_training_is_published_scored_and_gives_way_to_the_last(
    forks, digits, two_rank_run, tmp_path
):
    run = two_rank_run.copy_to(tmp_path / "run", "pack", "label", "quantize")
    arguments = ["--config", digits.config, "--set", f"run={run}"]

    (early,) = forks.start("train", "publish", *arguments).wait()
    start(forks, digits, run, kill="checkpoint.after_publish,step=4,rank=0")
    (published,) = forks.start("train", "publish", *arguments).wait()
    (scored,) = forks.start("score", *arguments).wait()
    meanwhile = results_of(run)
    student, calibrated = (load_file(run / stage / "student" / "model.safetensors") for stage in ("train", "quantize"))
    best = load_file(run / "train" / "best" / "decoder.safetensors")
    best_step = json.loads((run / "train" / "best" / "state.json").read_text())["step"]
    finished = start(forks, digits, run)

    assert early.code == 1 and "train/best must hold a student, got none yet" in early.stderr
    assert (published.code, scored.code) == (0, 0), published.stderr + scored.stderr
    assert "event=answered section=own system=qad utterances=15" in scored.stderr
    assert (meanwhile["is_final"], meanwhile["best_step"]) == (False, best_step)
    assert best_step == 4
    decoder = {f"thinker.model.{name}": tensor for name, tensor in best.items()}
    assert {name for name in student if not torch.equal(student[name], calibrated[name])} <= set(decoder)
    assert all(torch.equal(student[name], tensor) for name, tensor in decoder.items())
    assert finished.codes == [0, 0], finished.log
    assert "event=resumed step=4 " in finished.log
    assert results_of(run)["is_final"] is True
    assert_bits_are_those_of(run, two_rank_run.folder)
