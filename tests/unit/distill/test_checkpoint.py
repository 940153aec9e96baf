"""Checkpoints of one rank: published whole, pruned, verified before anything is unpickled.

The engine is a small real one (a Linear whose weights go through ``torch.save``); DeepSpeed's is tested with ranks.
"""

import errno
import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qad_dist.distill.checkpoint import (
    STATE,
    Checkpoints,
    TrainingState,
    load_best,
    save_best,
)
from shards.errors import CheckpointError, ShardError, StageError


class LinearEngine:
    """Saves and loads as DeepSpeed does: by pickle, below the folder that it is given."""

    def __init__(self, value: float = 0.0) -> None:
        self.module = nn.Linear(2, 2, bias=False)
        nn.init.constant_(self.module.weight, value)

    def save(self, folder: Path) -> None:
        (folder / "engine").mkdir()
        torch.save(self.module.state_dict(), folder / "engine" / "weights.pt")

    def load(self, folder: Path) -> None:
        self.module.load_state_dict(torch.load(folder / "engine" / "weights.pt", weights_only=False))

    @property
    def value(self) -> float:
        return float(self.module.weight.detach()[0, 0])


class FullDiskEngine(LinearEngine):
    """Fails halfway through its files."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self._error = error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save(self, folder: Path) -> None:
        super().save(folder)
        raise self._error


def state_at(step: int, **changes: Any) -> TrainingState:
    values = {
        "step": step,
        "best_step": step,
        "best_kl": 0.5,
        "world_size": 2,
        "zero_stage": 2,
        "fingerprint": "f" * 64,
    }
    return TrainingState(**{**values, **changes})


def save_steps(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(LinearEngine(step), state_at(step))  # type: ignore[arg-type]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_save_and_load_give_back_engine_and_state(tmp_path: Path) -> None:
    checkpoints, engine = Checkpoints(tmp_path, keep=2), LinearEngine()
    save_steps(checkpoints, 40)

    state = checkpoints.load(engine, tmp_path / "step-000040", expected=state_at(0))  # type: ignore[arg-type]

    assert state == state_at(40)
    assert engine.value == 40
    assert names(tmp_path) == ["step-000040"]
    assert names(tmp_path / "step-000040") == ["engine", "manifest.json", "state.json"]


def test_pruning_leaves_the_newest(tmp_path: Path) -> None:
    save_steps(Checkpoints(tmp_path, keep=2), 20, 40, 60, 80)

    assert names(tmp_path) == ["step-000060", "step-000080"]


def test_pruning_never_takes_the_checkpoint_that_was_resumed_from(tmp_path: Path) -> None:
    save_steps(Checkpoints(tmp_path, keep=2), 20, 40)
    resumed = Checkpoints(tmp_path, keep=2)
    resumed.load(LinearEngine(), tmp_path / "step-000020", expected=state_at(0))  # type: ignore[arg-type]

    save_steps(resumed, 60, 80, 100)

    assert names(tmp_path) == ["step-000020", "step-000080", "step-000100"]


def test_checkpoint_that_was_resumed_from_is_known_by_any_of_its_names(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    resumed = Checkpoints(Path("run"), keep=1)
    save_steps(resumed, 20)
    resumed.load(LinearEngine(), tmp_path / "link" / "step-000020", expected=state_at(0))  # type: ignore[arg-type]

    save_steps(resumed, 40, 60)

    assert names(tmp_path / "run") == ["step-000020", "step-000060"]


def save_best_of(folder: Path, step: int) -> None:
    save_best(folder / "best", {"layers.0.weight": torch.full((2,), float(step))}, step=step, kl_per_token=0.25)


def test_checkpoints_after_the_one_that_training_is_sent_back_to_are_forgotten(tmp_path: Path) -> None:
    save_steps(Checkpoints(tmp_path, keep=3), 20, 40, 60)
    (tmp_path / "step-000060.mine").mkdir()  # a user's copy
    checkpoints = Checkpoints(tmp_path, keep=2)
    state = checkpoints.load(LinearEngine(), tmp_path / "step-000040", expected=state_at(0))  # type: ignore[arg-type]

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
    state = state_at(40, best_step=20)
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
    save_steps(checkpoints, 100, 20)
    checkpoints.save(LinearEngine(), state_at(1_000_000))  # type: ignore[arg-type]
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


def test_full_disk_is_told_and_publishes_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save_steps(checkpoints, 20)

    with pytest.raises(StageError, match=r"must be writable, got 'No space left on device'; make room"):
        checkpoints.save(FullDiskEngine(), state_at(40))  # type: ignore[arg-type]

    assert checkpoints.choose("auto") == tmp_path / "step-000020"
    assert not (tmp_path / "step-000040").exists()


def test_full_disk_in_torchs_own_words_is_told_and_another_failure_keeps_its_traceback(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    torchs = RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/0: x")

    with pytest.raises(StageError, match=r"must be writable, got '.*PytorchStreamWriter failed writing file"):
        checkpoints.save(FullDiskEngine(torchs), state_at(40))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        checkpoints.save(FullDiskEngine(RuntimeError("Connection closed by peer")), state_at(40))  # type: ignore[arg-type]


def test_next_save_replaces_what_a_failed_one_left(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    with pytest.raises(StageError, match="make room"):
        checkpoints.save(FullDiskEngine(), state_at(40))  # type: ignore[arg-type]

    save_steps(checkpoints, 40)

    assert names(tmp_path) == ["step-000040"]
    assert names(tmp_path / "step-000040" / "engine") == ["weights.pt"]


class Payload:
    """Unpickling it makes a file: what a checkpoint from elsewhere could do."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_file_that_was_changed_is_refused_before_it_is_unpickled(tmp_path: Path) -> None:
    checkpoints, engine, marker = Checkpoints(tmp_path, keep=2), LinearEngine(), tmp_path / "was-run"
    save_steps(checkpoints, 20)
    weights = tmp_path / "step-000020" / "engine" / "weights.pt"
    size = weights.stat().st_size
    payload = pickle.dumps(Payload(marker))
    weights.write_bytes(payload + b"\0" * (size - len(payload)))  # of the same size

    with pytest.raises(CheckpointError, match=r"weights\.pt must have sha256 \w{12}, got \w{12}; it is damaged"):
        checkpoints.load(engine, tmp_path / "step-000020", expected=state_at(0))  # type: ignore[arg-type]

    assert not marker.exists()
    with pytest.raises(RuntimeError, match="magic number"):  # the payload is live: without the manifest it would run
        engine.load(tmp_path / "step-000020")
    assert marker.exists()


@pytest.mark.parametrize("name", ["state.json", "engine/weights.pt"])
def test_one_flipped_bit_is_refused(tmp_path: Path, name: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save_steps(checkpoints, 20)
    path = tmp_path / "step-000020" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    with pytest.raises(CheckpointError, match=rf"{name} must have sha256"):
        checkpoints.load(LinearEngine(), tmp_path / "step-000020", expected=state_at(0))  # type: ignore[arg-type]


def test_file_that_is_missing_or_unknown_is_refused(tmp_path: Path) -> None:
    checkpoints, folder = Checkpoints(tmp_path, keep=2), tmp_path / "step-000020"
    save_steps(checkpoints, 20)

    (folder / "engine" / "more.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"more\.pt must be listed in manifest\.json"):
        checkpoints.load(LinearEngine(), folder, expected=state_at(0))  # type: ignore[arg-type]

    (folder / "engine" / "more.pt").unlink()
    (folder / "engine" / "weights.pt").unlink()
    with pytest.raises(CheckpointError, match=r"weights\.pt must have \d+ bytes, got no file"):
        checkpoints.load(LinearEngine(), folder, expected=state_at(0))  # type: ignore[arg-type]


def test_manifest_that_is_no_json_is_refused(tmp_path: Path) -> None:
    checkpoints, folder = Checkpoints(tmp_path, keep=2), tmp_path / "step-000020"
    save_steps(checkpoints, 20)
    (folder / "manifest.json").write_text("{")

    with pytest.raises(ShardError, match=r"manifest\.json must be a JSON file"):
        checkpoints.load(LinearEngine(), folder, expected=state_at(0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "0" * 64}, r"settings and data \(0{12}\), got f{12}; .*train\.resume=none"),
        ({"world_size": 4}, r"must be resumed with world_size 2, got 4; start as many ranks as before"),
        ({"zero_stage": 3}, r"must be resumed with zero_stage 2, got 3; .*same train\.deepspeed"),
    ],
    ids=["fingerprint", "world size", "ZeRO stage"],
)
def test_checkpoint_of_another_run_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    checkpoints, engine = Checkpoints(tmp_path, keep=2), LinearEngine()
    save_steps(checkpoints, 20)

    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(engine, tmp_path / "step-000020", expected=state_at(0, **changes))  # type: ignore[arg-type]

    assert engine.value == 0


def test_best_weights_come_back_and_replace_the_former_best(tmp_path: Path) -> None:
    for step in (0, 20):
        save_best(tmp_path / "best", {"layers.0.weight": torch.full((2,), float(step))}, step=step, kl_per_token=0.25)

    weights = load_best(tmp_path / "best")

    assert list(weights) == ["layers.0.weight"]
    assert weights["layers.0.weight"].tolist() == [20.0, 20.0]
    assert json.loads((tmp_path / "best" / STATE).read_text()) == {"step": 20, "kl_per_token": 0.25}
    assert names(tmp_path) == ["best"]


def test_damaged_best_weights_are_refused(tmp_path: Path) -> None:
    save_best(tmp_path / "best", {"layers.0.weight": torch.ones(8)}, step=0, kl_per_token=0.25)
    path = tmp_path / "best" / "decoder.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in the tensor's data: safetensors itself would not notice
    path.write_bytes(data)

    with pytest.raises(CheckpointError, match=r"decoder\.safetensors must have sha256"):
        load_best(tmp_path / "best")
