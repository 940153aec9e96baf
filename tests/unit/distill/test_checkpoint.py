"""Checkpoints of one rank: written beside training, published whole, pruned, verified before they are read.

The engine is plain gradient descent; real ones are tested with ranks.
"""

import hashlib
import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qad_dist.distill import checkpoint as module
from qad_dist.distill.checkpoint import STATE, Checkpoints, load_best, save_best
from shards import faults
from shards.errors import CheckpointError, ShardError, StageError
from shards.storage import write_manifest
from tests.helpers.checkpoints import engine_of, load, names, save_best_of, save_steps, state_at, value_of
from tests.helpers.states import PlainEngine

PART = "rank-000.safetensors"


def test_save_and_load_give_back_weights_moments_updates_and_state(tmp_path: Path) -> None:
    checkpoints, engine = Checkpoints(tmp_path, keep=2), engine_of()
    saved = state_at(40, skipped=3, best_kl=0.1 + 0.2, best_word_error_rate=1 / 3, looks_without_better=2)
    checkpoints.save(engine_of(1.5, moment=0.25), saved)  # type: ignore[arg-type]
    checkpoints.settle(wait=True)

    state = load(checkpoints, tmp_path / "step-000040", engine=engine)

    assert state == saved
    assert value_of(engine) == 1.5
    assert [float(tensor.max()) for tensor in engine.moments.values()] == [0.25, 0.25]
    assert engine.updates == 37
    assert names(tmp_path) == ["step-000040"]
    assert names(tmp_path / "step-000040") == ["manifest.json", PART, "state.json"]


def test_files_hold_whole_float32_tensors_by_name_and_no_pickle(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save_steps(checkpoints, 7)

    found = load_file(tmp_path / "step-000007" / PART)

    shapes = {"down": [2, 3], "up": [3, 2]}
    expected = {f"{name}/{key}": shape for name, shape in shapes.items() for key in ("weight", "exp_avg", "exp_avg_sq")}
    assert {name: list(tensor.shape) for name, tensor in found.items()} == expected
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    manifest = json.loads((tmp_path / "step-000007" / "manifest.json").read_text())["files"]
    for name in (PART, STATE):
        content = (tmp_path / "step-000007" / name).read_bytes()
        assert manifest[name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_equal_states_make_equal_files(tmp_path: Path) -> None:
    for folder in (tmp_path / "one", tmp_path / "two"):
        save_steps(Checkpoints(folder, keep=2), 20)

    one, two = (
        (folder / "step-000020" / "manifest.json").read_bytes() for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Parts are written once this is set."""
    is_free = threading.Event()

    def save_file(tensors: dict[str, Tensor], path: Path, write: Callable[..., None] = module.save_file) -> None:
        assert is_free.wait(60)
        write(tensors, path)

    monkeypatch.setattr(module, "save_file", save_file)
    return is_free


def test_training_goes_on_while_a_checkpoint_is_written_and_it_holds_what_was(
    tmp_path: Path, slow_disk: threading.Event
) -> None:
    checkpoints, engine = Checkpoints(tmp_path, keep=2), engine_of(1.0)

    checkpoints.save(engine, state_at(20))  # type: ignore[arg-type]
    for weight in engine.weights.values():  # the next step, before a byte is written
        weight.data.fill_(2.0)
    checkpoints.settle(wait=False)
    before = names(tmp_path)
    slow_disk.set()
    checkpoints.settle(wait=True)

    assert before == [".step-000020.tmp"]
    assert names(tmp_path) == ["step-000020"]
    load(checkpoints, tmp_path / "step-000020", engine=engine)
    assert value_of(engine) == 1.0


def test_checkpoint_is_published_without_waiting_once_it_is_written(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(engine_of(), state_at(20))  # type: ignore[arg-type]
    checkpoints._writing.hash.result()  # type: ignore[union-attr]  # the thread has done its part

    checkpoints.settle(wait=False)

    assert names(tmp_path) == ["step-000020"]


def test_next_checkpoint_waits_for_the_one_before(tmp_path: Path, slow_disk: threading.Event) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(engine_of(), state_at(20))  # type: ignore[arg-type]
    threading.Timer(0.3, slow_disk.set).start()

    checkpoints.save(engine_of(), state_at(40))  # type: ignore[arg-type]

    assert "step-000020" in names(tmp_path)
    checkpoints.settle(wait=True)
    assert names(tmp_path) == ["step-000020", "step-000040"]


def test_step_that_has_a_checkpoint_is_not_written_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save_steps(checkpoints, 20)
    before = (tmp_path / "step-000020").stat().st_ino

    save_steps(checkpoints, 20)

    assert (tmp_path / "step-000020").stat().st_ino == before
    assert names(tmp_path) == ["step-000020"]


def test_settling_without_a_checkpoint_has_no_effect(tmp_path: Path) -> None:
    for wait in (True, False):
        Checkpoints(tmp_path, keep=2).settle(wait=wait)

    assert names(tmp_path) == []


def fill_disk(monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    monkeypatch.setattr(faults, "_TEXT", f"enospc@{point}")


@pytest.mark.parametrize("is_at_end", [True, False], ids=["at the end", "at the next checkpoint"])
def test_full_disk_is_told_and_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch, is_at_end) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save_steps(checkpoints, 20)
    fill_disk(monkeypatch, "checkpoint.before_part,step=40,rank=0")
    checkpoints.save(engine_of(), state_at(40))  # type: ignore[arg-type]
    find_out = partial(checkpoints.settle, wait=True) if is_at_end else partial(save_steps, checkpoints, 60)

    with pytest.raises(StageError, match=r"/rank-000\.safetensors must be writable, got 'No space.*make room") as told:
        find_out()

    assert told.value.is_shared
    assert checkpoints.choose("auto") == tmp_path / "step-000020"
    assert load(checkpoints, tmp_path / "step-000020") == state_at(20)
    assert names(tmp_path) == [".step-000040.tmp", "step-000020"]


def test_file_that_cannot_be_written_is_told_in_the_words_of_the_machine(tmp_path: Path) -> None:
    """A folder in its place: safetensors' own error has no errno."""
    (tmp_path / "rank-000.safetensors").mkdir()

    with pytest.raises(StageError, match=r"rank-000\.safetensors must be writable, got '.*Is a directory .*make room"):
        module._write_part(tmp_path / "rank-000.safetensors", {"x/weight": torch.ones(1)}, step=1)


def test_folder_that_cannot_be_made_is_told_before_anything_is_gathered(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(StageError, match=r"file/\.step-000001\.tmp must be writable, got 'Not a directory'"):
        Checkpoints(tmp_path / "file", keep=2).save(engine_of(), state_at(1))  # type: ignore[arg-type]


def test_disk_that_is_full_when_it_is_published_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save_steps(checkpoints, 20)
    fill_disk(monkeypatch, "checkpoint.before_publish,step=40")

    with pytest.raises(StageError, match=r"/step-000040 must be writable, got 'No space left on device'; make room"):
        save_steps(checkpoints, 40)

    assert checkpoints.complete() == [tmp_path / "step-000020"]


def test_next_save_replaces_what_a_failed_one_left(tmp_path: Path, monkeypatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    fill_disk(monkeypatch, "checkpoint.before_part")
    with pytest.raises(StageError, match="make room"):
        save_steps(checkpoints, 40)
    (tmp_path / ".step-000040.tmp" / "rank-001.safetensors").write_bytes(b"of more ranks")
    monkeypatch.undo()

    save_steps(checkpoints, 40)

    assert names(tmp_path) == ["step-000040"]
    assert names(tmp_path / "step-000040") == ["manifest.json", PART, "state.json"]


def test_bug_in_the_thread_that_writes_keeps_its_traceback(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(faults, "_TEXT", "raise@checkpoint.before_part")

    with pytest.raises(faults.FaultError, match=r"checkpoint\.before_part"):
        save_steps(Checkpoints(tmp_path, keep=2), 40)


@pytest.mark.parametrize("name", ["state.json", PART])
def test_one_flipped_bit_is_refused_before_anything_is_loaded(tmp_path: Path, name: str) -> None:
    checkpoints, engine = Checkpoints(tmp_path, keep=2), engine_of()
    save_steps(checkpoints, 20)
    path = tmp_path / "step-000020" / name
    data = bytearray(path.read_bytes())
    data[-5] ^= 1  # of a tensor's values: safetensors itself would not notice
    path.write_bytes(data)

    with pytest.raises(CheckpointError, match=rf"{name} must have sha256 \w{{12}}, got \w{{12}}; it is damaged"):
        load(checkpoints, tmp_path / "step-000020", engine=engine)

    assert value_of(engine) == 0


def test_file_that_is_missing_or_unknown_is_refused(tmp_path: Path) -> None:
    checkpoints, folder = Checkpoints(tmp_path, keep=2), tmp_path / "step-000020"
    save_steps(checkpoints, 20)

    (folder / "custom_checkpoint_0.pkl").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"custom_checkpoint_0\.pkl must be listed in manifest\.json"):
        load(checkpoints, folder)

    (folder / "custom_checkpoint_0.pkl").unlink()
    (folder / PART).unlink()
    with pytest.raises(CheckpointError, match=r"rank-000\.safetensors must have \d+ bytes, got no file"):
        load(checkpoints, folder)


def test_manifest_that_is_no_json_is_refused(tmp_path: Path) -> None:
    checkpoints, folder = Checkpoints(tmp_path, keep=2), tmp_path / "step-000020"
    save_steps(checkpoints, 20)
    (folder / "manifest.json").write_text("{")

    with pytest.raises(ShardError, match=r"manifest\.json must be a JSON file"):
        load(checkpoints, folder)


def test_checkpoint_of_another_run_is_refused_by_name(tmp_path: Path) -> None:
    checkpoints, engine = Checkpoints(tmp_path, keep=2), engine_of()
    save_steps(checkpoints, 20)

    with pytest.raises(CheckpointError, match=r"settings and data \(0{12}\), got f{12}; .*train\.resume=none"):
        load(checkpoints, tmp_path / "step-000020", engine=engine, fingerprint="0" * 64)

    assert value_of(engine) == 0


@pytest.mark.parametrize("change", ["more", "less"])
def test_state_of_another_version_is_refused_by_its_entries(tmp_path: Path, change: str) -> None:
    checkpoints, folder = Checkpoints(tmp_path, keep=2), tmp_path / "step-000020"
    save_steps(checkpoints, 20)
    state = json.loads((folder / STATE).read_text())
    if change == "more":
        state["world_size"] = 2
    else:
        del state["skipped"]
    (folder / STATE).write_text(json.dumps(state))
    write_manifest(folder)

    with pytest.raises(CheckpointError, match=r"state\.json must have the entries .*, got .*another version wrote it"):
        load(checkpoints, folder)


def test_checkpoint_that_lacks_a_weight_is_refused_by_its_name(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save_steps(checkpoints, 20)
    other = PlainEngine(gate=nn.Parameter(torch.zeros(1)))

    with pytest.raises(CheckpointError, match="step-000020 must hold the decoder weight gate, got none; "):
        load(checkpoints, tmp_path / "step-000020", engine=other)


def test_tensors_are_found_in_the_files_of_any_number_of_ranks(tmp_path: Path) -> None:
    """Each rank wrote every fifth parameter, as five would have; a name may hold what stands between names and keys."""
    folder, names_of = tmp_path / "step-000020", [f"layers.{i}/a.weight" for i in range(7)]
    folder.mkdir()
    for rank in range(5):
        own = {
            f"{name}/{key}": torch.full((2,), number + place / 10)
            for number, name in enumerate(names_of)
            if number % 5 == rank
            for place, key in enumerate(("weight", "exp_avg", "exp_avg_sq"))
        }
        module.save_file(own, folder / f"rank-{rank:03d}.safetensors")
    (folder / STATE).write_text(json.dumps(module.asdict(state_at(20))))
    write_manifest(folder)
    engine = PlainEngine(**{name: nn.Parameter(torch.zeros(2)) for name in names_of})

    load(Checkpoints(tmp_path, keep=2), folder, engine=engine)

    for number, name in enumerate(names_of):
        assert engine.weights[name].tolist() == [number] * 2
        torch.testing.assert_close(engine.moments[name], torch.full((2,), number + 0.1))


def test_best_weights_come_back_and_replace_the_former_best(tmp_path: Path) -> None:
    for step in (0, 20):
        save_best_of(tmp_path, step)

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
