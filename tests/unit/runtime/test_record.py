"""Records of stages: when a stage counts as finished, and what makes it stale."""

import json
import os
import shutil
from pathlib import Path

import pytest

from qad_dist.config import RunConfig, load_run
from qad_dist.runtime.record import (
    STAGES,
    begin_stage,
    finish_stage,
    is_finished,
    model_fingerprint,
    require_stage,
    stage_inputs,
    stages_read,
)
from shards.errors import StageError
from tests.helpers.digits import TEACHER


@pytest.fixture
def load(tmp_path: Path):
    (tmp_path / "manifest.jsonl").write_text('{"audio": "a.wav"}\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"run: {tmp_path}/run\nmodel: {{path: {tmp_path}/model}}\npack: {{inputs: [{tmp_path}/manifest.jsonl]}}\n"
    )
    return lambda *overrides: load_run(config, list(overrides))


def finish(run: RunConfig, *stages: str) -> None:
    for stage in stages:
        begin_stage(run, stage)
        finish_stage(run, stage, results={"name": stage})


def finished(run: RunConfig) -> list[str]:
    return [stage for stage in STAGES if is_finished(run, stage)]


def test_stages_read_only_stages_before_them(load):
    for position, stage in enumerate(STAGES):
        assert set(stages_read(load(), stage)) <= set(STAGES[:position])


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ([], ("pack", "quantize", "train")),
        (["score.students=[ptq]"], ("pack", "quantize")),
        (["score.students=[]"], ("pack",)),
        (["score.students=[qad]", "score.splits=[]", "score.sets={a: /a}"], ("train",)),
    ],
)
def test_score_reads_the_stages_that_it_is_asked_to_compare(load, settings, stages):
    assert stages_read(load(*settings), "score") == stages


def test_nothing_is_finished_in_an_empty_run_and_everything_after_all_stages(load):
    assert finished(load()) == []

    finish(load(), *STAGES)

    assert finished(load()) == list(STAGES)


def test_recordings_that_are_gone_leave_all_that_was_made_of_them_finished(load, tmp_path):
    finish(load(), *STAGES)
    (tmp_path / "manifest.jsonl").unlink()

    assert finished(load()) == list(STAGES)

    (tmp_path / "manifest.jsonl").write_text('{"audio": "b.wav"}\n')
    assert finished(load()) == []


def test_record_holds_what_a_reader_needs_to_know(load):
    finish(load(), "pack")

    record = json.loads((load().stage_folder("pack") / "done.json").read_text())

    assert record["stage"] == "pack"
    assert record["results"] == {"name": "pack"}
    assert record["config"] == load().model_dump(mode="json")
    assert record["versions"]["pydantic"].startswith("2.")
    assert record["command"]
    assert require_stage(load(), "pack") == record


@pytest.mark.parametrize(
    ("override", "still_finished"),
    [
        ("score.max_response_tokens=99", ["pack", "label", "quantize", "train", "export"]),
        ("export.verify_utterances=2", ["pack", "label", "quantize", "train", "score"]),
        ("train.learning_rate=1", ["pack", "label", "quantize"]),
        ("model.audio_attention=full", ["pack"]),
        ("pack.holdout=0.5", []),
        ("seed=9", []),
        ("pack.processes=3", list(STAGES)),
        ("pack.max_rejected_share=0.5", list(STAGES)),
        ("train.resume=none", list(STAGES)),
        ("read.workers=1", list(STAGES)),
    ],
)
def test_change_of_a_setting_unfinishes_its_stage_and_those_that_read_it_once_it_is_made_again(
    load, override, still_finished
):
    finish(load(), *STAGES)
    changed = load(override)

    for stage in STAGES:  # as the runner does: make what is not finished, then look at the next
        if stage not in still_finished and not is_finished(changed, stage):
            break
        assert (stage in still_finished) == is_finished(changed, stage)
    for stage in STAGES:
        if not is_finished(changed, stage):
            finish(changed, stage)

    made = {stage for stage in STAGES if _config_of(load(), stage) == changed.model_dump(mode="json")}
    expected = {stage for stage in STAGES if stage not in still_finished}
    # Whatever reads a stage that was made again is made again, too.
    for stage in STAGES:
        if set(stages_read(load(), stage)) & expected:
            expected.add(stage)
    assert made == expected


def test_changed_input_files_unfinish_the_stages_that_read_them(load, tmp_path):
    finish(load(), *STAGES)

    (tmp_path / "model" / "model.safetensors").write_bytes(b"x")
    assert finished(load()) == ["pack"]

    (tmp_path / "manifest.jsonl").write_text('{"audio": "b.wav"}\n')
    assert finished(load()) == []


def test_later_stages_do_not_look_at_recordings_again(load, tmp_path):
    finish(load(), "pack")
    (tmp_path / "manifest.jsonl").unlink()

    assert require_stage(load(), "pack")["results"] == {"name": "pack"}


def test_beginning_a_stage_again_takes_its_record_back_and_keeps_what_lies_there(load):
    finish(load(), "pack")
    folder = load().stage_folder("pack")
    (folder / "part.tar").write_text("kept")

    assert begin_stage(load(), "pack") == folder

    assert not is_finished(load(), "pack")
    assert sorted(path.name for path in folder.iterdir()) == ["part.tar"]


def test_missing_stage_is_named_with_the_command_that_makes_it(load):
    finish(load(), "pack")

    with pytest.raises(StageError, match=r"/run/label must be finished .*, got no done\.json; run `accelerate launch"):
        require_stage(load(), "label")
    with pytest.raises(StageError, match=r"/run/label/done\.json must exist, got no such file; run `accelerate launch"):
        stage_inputs(load(), "quantize")


def test_stage_made_with_other_settings_is_refused_with_their_names(load):
    finish(load(), "pack", "label")

    message = r"/run/label must be made with this config, got other values of label\.splits, seed; run `.*` again or"
    with pytest.raises(StageError, match=message):
        require_stage(load("label.splits=[train]", "seed=5"), "label")


def test_stage_made_with_a_setting_that_is_gone_is_refused_with_its_name(load):
    splits = "pack.splits={train: train, dev: heldout, test: test}"
    finish(load(splits), "pack")

    fewer = load("pack.splits={train: train, dev: heldout}")

    assert not is_finished(fewer, "pack")
    with pytest.raises(StageError, match=r"/run/pack must be made .*, got other values of pack\.splits\.test; run"):
        require_stage(fewer, "pack")


def test_stage_made_from_an_earlier_packing_is_refused(load):
    finish(load(), "pack", "label")
    finish(load("pack.holdout=0.5"), "pack")

    with pytest.raises(StageError, match=r"/run/label must be made .*, got other values of stages\.pack; run"):
        require_stage(load("pack.holdout=0.5"), "label")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_write_permission_is_refused_by_permission(load, tmp_path):
    (tmp_path / "run").mkdir(mode=0o500)

    with pytest.raises(StageError, match=r"/run/pack/\.writable must be writable, got 'Permission denied'"):
        begin_stage(load(), "pack")


def test_run_folder_that_is_a_file_is_refused(load, tmp_path):
    (tmp_path / "run").write_text("")

    with pytest.raises(StageError, match=r"must be writable, got 'Not a directory'; choose another run folder"):
        begin_stage(load(), "pack")


def _config_of(run: RunConfig, stage: str) -> dict[str, object]:
    return json.loads((run.stage_folder(stage) / "done.json").read_text())["config"]


def test_record_is_made_of_what_the_stage_read_when_it_began(load):
    begin_stage(load(), "pack")
    changed = load("seed=5")

    finish_stage(changed, "pack", results={})

    assert is_finished(load(), "pack")
    assert not is_finished(changed, "pack")


def test_stage_is_not_finished_when_an_earlier_one_is_to_be_done_again(load):
    finish(load(), "pack", "label")
    assert is_finished(load(), "label")

    assert not is_finished(load("pack.holdout=0.5"), "label")


def test_teacher_of_the_same_sizes_but_other_contents_is_another_one(load):
    finish(load(), "pack", "label")
    config = Path(load().model.path) / "config.json"

    config.write_text("[]")  # as long as before

    assert is_finished(load(), "pack")
    assert not is_finished(load(), "label")


def test_link_to_nothing_in_a_folder_of_recordings_is_part_of_its_name(load):
    folder = Path(load().run).parent / "recordings"
    folder.mkdir()
    (folder / "gone.flac").symlink_to(folder / "nowhere.flac")

    run = load(f"pack.inputs=[{folder}]")
    finish(run, "pack")
    first = stage_inputs(run, "pack")
    (folder / "other.flac").symlink_to(folder / "nowhere.flac")
    finish(run, "pack")

    assert stage_inputs(run, "pack") != first


def test_recording_whose_name_is_not_utf8_is_part_of_a_folders_name(load):
    folder = Path(load().run).parent / "recordings"
    folder.mkdir()
    run = load(f"pack.inputs=[{folder}]")
    fingerprints = set()

    for name in (b"a.wav", b"\xff.wav", b"\xfe.wav"):
        (folder / os.fsdecode(name)).write_bytes(b"x")
        begin_stage(run, "pack")
        finish_stage(run, "pack", results={})
        assert is_finished(run, "pack")
        fingerprints.add(require_stage(run, "pack")["fingerprint"])

    assert len(fingerprints) == 3


def test_folder_of_recordings_is_walked_once_until_a_stage_begins_or_ends_or_pack_is_done_elsewhere(load, monkeypatch):
    folder = Path(load().run).parent / "recordings"
    folder.mkdir()
    (folder / "a.wav").write_bytes(b"x")
    run = load(f"pack.inputs=[{folder}]")
    finish(run, *STAGES)
    walk, walked = os.walk, []
    monkeypatch.setattr(os, "walk", lambda top: walked.append(top) or walk(top))

    assert finished(run) == list(STAGES)
    assert len(walked) == 1

    (folder / "b.wav").write_bytes(b"x")
    begin_stage(run, "export")
    assert finished(run) == []  # the new recording is seen
    assert len(walked) == 2
    finish_stage(run, "export", results={})
    assert finished(run) == []
    assert len(walked) == 3

    (folder / "b.wav").unlink()
    done = run.stage_folder("pack") / "done.json"
    os.utime(done, ns=(0, 0))  # as another process leaves it
    assert finished(run) == list(STAGES)
    assert len(walked) == 4


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TEACHER, tmp_path / "copied"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "chat_template.jinja", "tokenizer.json"])
def test_fingerprint_notices_one_flipped_byte(copied, name):
    assert model_fingerprint(copied) == model_fingerprint(TEACHER)  # wherever it lies
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(data)

    assert model_fingerprint(copied) != model_fingerprint(TEACHER)


def test_fingerprint_notices_a_renamed_file_but_no_readme(copied):
    (copied / "README.md").write_text("other words")
    assert model_fingerprint(copied) == model_fingerprint(TEACHER)

    (copied / "merges.txt").rename(copied / "merged.txt")

    assert model_fingerprint(copied) != model_fingerprint(TEACHER)
