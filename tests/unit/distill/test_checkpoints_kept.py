"""Which checkpoints stay, which one training goes on from, and which best student is then still the best."""

import math
from pathlib import Path

import pytest

from qad_dist.distill.checkpoint import Checkpoints
from shards.errors import CheckpointError
from tests.helpers.checkpoints import load, names, save_best_of, save_steps, state_at


def test_pruning_leaves_the_newest(tmp_path: Path) -> None:
    save_steps(Checkpoints(tmp_path, keep=2), 20, 40, 60, 80)

    assert names(tmp_path) == ["step-000060", "step-000080"]


def test_pruning_never_takes_the_checkpoint_that_was_resumed_from(tmp_path: Path) -> None:
    save_steps(Checkpoints(tmp_path, keep=2), 20, 40)
    resumed = Checkpoints(tmp_path, keep=2)
    load(resumed, tmp_path / "step-000020")

    save_steps(resumed, 60, 80, 100)

    assert names(tmp_path) == ["step-000020", "step-000080", "step-000100"]


def test_checkpoint_that_was_resumed_from_is_known_by_any_of_its_names(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    resumed = Checkpoints(Path("run"), keep=1)
    save_steps(resumed, 20)
    load(resumed, tmp_path / "link" / "step-000020")

    save_steps(resumed, 40, 60)

    assert names(tmp_path / "run") == ["step-000020", "step-000060"]


def test_checkpoints_after_the_one_that_training_is_sent_back_to_are_forgotten(tmp_path: Path) -> None:
    save_steps(Checkpoints(tmp_path, keep=3), 20, 40, 60)
    (tmp_path / "step-000060.mine").mkdir()  # a user's copy
    checkpoints = Checkpoints(tmp_path, keep=2)
    state = load(checkpoints, tmp_path / "step-000040")

    checkpoints.make_agree(state, is_sent_back=True)
    save_steps(checkpoints, 45, 50, 55)

    assert names(tmp_path) == ["step-000040", "step-000050", "step-000055", "step-000060.mine"]
    assert checkpoints.choose("auto") == tmp_path / "step-000055"


def test_new_start_forgets_all_checkpoints_and_the_best(tmp_path: Path) -> None:
    save_steps(Checkpoints(tmp_path, keep=2), 20, 40)
    save_best_of(tmp_path, 0)
    (tmp_path / "metrics.jsonl").write_text("")
    new = state_at(0, best_step=-1, best_kl=math.inf)

    assert Checkpoints(tmp_path, keep=2).make_agree(new, is_sent_back=True) == new
    assert names(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("on_disk", [20, 60, None])
def test_training_that_is_sent_back_keeps_only_the_best_that_its_checkpoint_knows(tmp_path: Path, on_disk) -> None:
    state = state_at(40, best_step=20, best_word_error_rate=0.1, looks_without_better=1)
    if on_disk is not None:
        save_best_of(tmp_path, on_disk)

    agreed = Checkpoints(tmp_path, keep=2).make_agree(state, is_sent_back=True)

    if on_disk == 20:
        assert agreed == state
        assert names(tmp_path) == ["best"]
    else:
        assert agreed == state_at(40, best_step=-1, best_kl=math.inf)
        assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("on_disk", "is_kept", "best_step"),
    [
        pytest.param(20, True, 20, id="the state's"),
        pytest.param(60, True, 20, id="of a step that training will come to again"),
        pytest.param(40, False, -1, id="evaluated anew when training was sent back, then killed"),
        pytest.param(None, False, -1, id="gone"),
    ],
)
def test_training_that_goes_on_keeps_a_best_that_it_will_reach_again(tmp_path: Path, on_disk, is_kept, best_step):
    save_steps(Checkpoints(tmp_path, keep=2), 40)
    if on_disk is not None:
        save_best_of(tmp_path, on_disk)

    agreed = Checkpoints(tmp_path, keep=2).make_agree(state_at(40, best_step=20), is_sent_back=False)

    assert agreed.best_step == best_step
    assert names(tmp_path) == (["best"] if is_kept else []) + ["step-000040"]


def test_complete_lists_published_checkpoints_oldest_first(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=10)
    save_steps(checkpoints, 100, 20, 1_000_000)
    (tmp_path / "step-000030").mkdir()  # never finished
    (tmp_path / ".step-000200.tmp").mkdir()
    (tmp_path / "best").mkdir()

    assert [path.name for path in checkpoints.complete()] == ["step-000020", "step-000100", "step-1000000"]


def test_choose_takes_the_newest_none_or_the_named_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=5)
    assert checkpoints.choose("auto") is None

    save_steps(checkpoints, 20, 40)
    (tmp_path / "step-000060").mkdir()  # a kill left it without its manifest

    assert checkpoints.choose("auto") == tmp_path / "step-000040"
    assert checkpoints.choose("none") is None
    assert checkpoints.choose(str(tmp_path / "step-000020")) == tmp_path / "step-000020"


def test_choose_refuses_a_path_that_is_no_complete_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-000060").mkdir()

    with pytest.raises(CheckpointError, match=r"train\.resume must be auto, none or a complete checkpoint, got .*60'"):
        Checkpoints(tmp_path, keep=2).choose(str(tmp_path / "step-000060"))
