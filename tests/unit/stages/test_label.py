"""The label stage with a teacher that answers at once: what is labelled again, what is left alone, what is counted."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from qad_dist.asr.transcribe import Hypothesis
from qad_dist.config import LabelConfig, ModelConfig, PackConfig, ReadConfig, RunConfig
from qad_dist.runtime.record import begin_stage, finish_stage
from qad_dist.stages import label as stage
from shards.errors import ModelError, ShardError
from shards.index import read_utterances
from shards.labels import read_labels
from shards.read import refuse_damaged
from tests.helpers.packing import pack_tones
from tests.helpers.tones import make_recordings, number_of

NAMES = ["heldout-000000.jsonl", "train-000000.jsonl", "train-000001.jsonl"]


def transcribe(teacher: object, audios: list, *, max_response_tokens: int) -> list[Hypothesis]:
    """A tone's number as its only token; those above 5 never end."""
    numbers = [number_of(audio) for audio in audios]
    return [
        Hypothesis(
            token_ids=(number, 1),
            token_logprobs=(-0.5, -0.25),
            text=str(number),
            language="English" if number % 2 else None,
            ended_by="length" if number > 5 else "end_token",
        )
        for number in numbers
    ]


@pytest.fixture
def run(tmp_path: Path, nano_folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    config = RunConfig(
        run=str(tmp_path / "run"),
        model=ModelConfig(path=str(nano_folder)),
        pack=PackConfig(inputs=[str(tmp_path / "in")]),
        read=ReadConfig(workers=0),
        label=LabelConfig(batch_audio_seconds=5),
    )
    recordings = make_recordings(tmp_path / "in", 12)
    begin_stage(config, "pack")
    pack_tones(recordings, config.stage_folder("pack"), utterances_per_shard=5)
    finish_stage(config, "pack", results={})
    monkeypatch.setattr(stage, "load_teacher", lambda *_: SimpleNamespace(folder=nano_folder, extractor=None))
    monkeypatch.setattr(stage, "mels_ahead", lambda reader, batches, _: map(refuse_damaged, reader.ahead(batches)))
    monkeypatch.setattr(stage, "transcribe", transcribe)
    return config


def refuse(*_: object) -> None:
    raise ModelError("the teacher must not be loaded")


def state_of(run: RunConfig) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.stage_folder("label").iterdir()}


def test_each_utterance_gets_its_own_label_in_the_order_of_its_shard(run: RunConfig) -> None:
    stage.run(run)

    found = [label for name in NAMES for label in read_labels(run.stage_folder("label") / name)[1]]
    shards = sorted(read_utterances(run.stage_folder("pack")), key=lambda utterance: utterance.shard)
    assert [label.key for label in found] == [utterance.key for utterance in shards]
    assert all(label.key == f"tone-{label.token_ids[0]}" for label in found)


def test_results_count_every_label_and_each_file_is_read_once_for_it(run, monkeypatch) -> None:
    reads: list[str] = []

    def note(path: Path, **options: str) -> object:
        reads.append(path.name)
        return read_labels(path, **options)

    monkeypatch.setattr(stage, "read_labels", note)

    stage.run(run)

    assert sorted(reads) == NAMES
    results = json.loads((run.stage_folder("label") / "done.json").read_text())["results"]
    seconds = sum(utterance.duration_seconds for utterance in read_utterances(run.stage_folder("pack")))
    assert results.pop("audio_hours") == pytest.approx(seconds / 3600)
    assert results.pop("teacher")
    assert results == {
        "utterances": 12,
        "response_tokens": 24,
        "runaway": 6,
        "utterances_by_language": {"English": 6, "None": 6},
    }


def test_finished_stage_is_left_alone_without_loading_the_teacher(run, monkeypatch) -> None:
    stage.run(run)
    before = state_of(run)
    monkeypatch.setattr(stage, "load_teacher", refuse)

    stage.run(run)

    assert state_of(run) == before


def test_teacher_that_cannot_be_loaded_leaves_the_record_where_it_was(run, monkeypatch) -> None:
    stage.run(run)
    before = state_of(run)
    monkeypatch.setattr(stage, "load_teacher", refuse)

    with pytest.raises(ModelError):
        stage.run(run.model_copy(update={"label": LabelConfig(batch_audio_seconds=6)}))

    assert state_of(run) == before


def test_deleted_label_file_is_made_again_and_the_others_stay(run: RunConfig) -> None:
    stage.run(run)
    before = state_of(run)
    (run.stage_folder("label") / NAMES[1]).unlink()

    stage.run(run)

    after = state_of(run)
    assert after[NAMES[1]][1] == before[NAMES[1]][1]
    assert [after[NAMES[number]] for number in (0, 2)] == [before[NAMES[number]] for number in (0, 2)]


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data.replace(b"-0.5", b"-0.6", 1)])
def test_damaged_label_file_with_a_good_header_is_work_to_do(
    run: RunConfig, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    stage.run(run)
    before = state_of(run)
    path = run.stage_folder("label") / NAMES[2]
    path.write_bytes(damage(path.read_bytes()))
    (run.stage_folder("label") / "done.json").unlink()  # as after an interruption

    with pytest.raises(ShardError, match="must h"):
        stage.verify(run)
    stage.run(run)

    after = state_of(run)
    assert after[NAMES[2]][1] == before[NAMES[2]][1]
    assert [after[NAMES[number]] for number in (0, 1)] == [before[NAMES[number]] for number in (0, 1)]
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "train-000001.jsonl must h" in warning and "labelled again" in warning
