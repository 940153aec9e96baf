"""The systems of a score: which there are, what they are made from, and how they are loaded to decode."""

from pathlib import Path

import pytest
import torch

from qad_dist.config import RunConfig
from qad_dist.pairing import save_student, share_if_equal
from qad_dist.quant.folded import FoldedLinear
from qad_dist.quant.int8 import Int8Linear
from qad_dist.quant.state import enable_checkpointing
from qad_dist.systems import System, find_systems, load_system
from shards.errors import ConfigError, ModelError
from tests.helpers.quantized import INT8, copied, pack_with_own_responses, quantize
from tests.helpers.qwen import NANO

CPU = torch.device("cpu")


def run_of(folder: Path, **score: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": str(folder),
            "model": {"path": str(NANO), "dtype": "float32"},
            "pack": {"inputs": ["unused"]},
            "score": {"students": [], **score},
        }
    )


@pytest.fixture(scope="module")
def student_folder(nano, clips, tmp_path_factory) -> Path:
    enable_checkpointing()
    student = quantize(
        copied(nano), pack_with_own_responses(nano, clips[:4]), pack_with_own_responses(nano, clips[4:6])
    )
    folder = tmp_path_factory.mktemp("student") / "student"
    save_student(student, INT8, folder, dtype="float32")
    return folder


def loaded(run: RunConfig, name: str):
    (system,) = [one for one in find_systems(run) if one.name == name]
    return load_system(run, system, audio_attention="windowed", device=CPU)


def test_systems_come_in_the_order_teacher_students_others(tmp_path: Path) -> None:
    run = run_of(tmp_path, students=["qad", "ptq"], systems={"z": str(NANO), "a": "x/{set}.jsonl"})

    found = find_systems(run)

    assert [system.name for system in found] == ["teacher", "qad", "ptq", "z", "a"]
    assert [system.path for system in found] == [
        *(str(NANO), "train/student", "quantize/student", str(NANO), "x/{set}.jsonl")
    ]
    assert [system.folder for system in found] == [
        *(NANO, tmp_path / "train" / "student", tmp_path / "quantize" / "student", NANO, None)
    ]


def test_a_system_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"^score\.systems\.other must be a folder with config\.json, got '.*nothing'; "
    ):
        find_systems(run_of(tmp_path, systems={"other": str(tmp_path / "nothing")}))


def test_predictions_are_a_file_for_each_set(tmp_path: Path) -> None:
    system = System(name="other", path=f"{tmp_path}/{{set}}.jsonl", folder=None)
    (tmp_path / "a.jsonl").write_text("1")
    (tmp_path / "b.jsonl").write_text("2")

    assert system.fingerprint("a") != system.fingerprint("b")
    with pytest.raises(
        ConfigError, match=rf"^score\.systems\.other must be a file of predictions, got {tmp_path}/c\.jsonl"
    ):
        system.fingerprint("c")
    assert system.disk_bytes() is None


def test_a_student_is_folded_and_answers_with_the_teachers_frozen_parts(student_folder, tmp_path: Path) -> None:
    run = run_of(tmp_path, systems={"other": str(student_folder)})

    student, num_bytes = loaded(run, "other")
    teacher, teacher_bytes = loaded(run, "teacher")

    linears = {type(m) for name, m in student.decoder.layers.named_modules() if name.endswith("_proj")}
    assert linears == {FoldedLinear}
    # A byte for each of the decoder's weights, 4 for each output channel; the rest in bfloat16.
    quantized = [m.weight for name, m in teacher.decoder.layers.named_modules() if name.endswith("_proj")]
    rest = sum(p.numel() for p in teacher.model.parameters()) - sum(w.numel() for w in quantized)
    assert num_bytes == sum(w.numel() + 4 * len(w) for w in quantized) + 2 * rest
    assert teacher_bytes is None
    assert share_if_equal(teacher, student)
    assert student.audio_tower is teacher.audio_tower


def test_a_student_computes_in_integers_where_it_is_asked_to(student_folder, tmp_path: Path) -> None:
    run = run_of(tmp_path, systems={"other": str(student_folder)}, arithmetic="int8")

    student, num_bytes = loaded(run, "other")

    assert {type(m) for name, m in student.decoder.layers.named_modules() if name.endswith("_proj")} == {Int8Linear}
    assert num_bytes is not None


def test_a_model_with_other_frozen_weights_keeps_its_own(nano) -> None:
    other = copied(nano)
    with torch.no_grad():
        other.model.thinker.audio_tower.conv_out.weight[0, 0] += 1

    assert not share_if_equal(nano, other)
    assert other.audio_tower is not nano.audio_tower


def test_a_quantized_teacher_is_refused(student_folder, tmp_path: Path) -> None:
    run = run_of(tmp_path)
    system = System(name="teacher", path="x", folder=student_folder)

    with pytest.raises(ModelError, match="must have no modelopt_state"):
        load_system(run, system, audio_attention="windowed", device=CPU)


def test_what_is_stored_is_weights_and_quantizer_state(student_folder) -> None:
    system = System(name="x", path="x", folder=student_folder)

    names = ("model.safetensors", "modelopt_state.pth")
    assert system.disk_bytes() == sum((student_folder / name).stat().st_size for name in names)
