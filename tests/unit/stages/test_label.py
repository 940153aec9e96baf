"""The label stage with a teacher that answers at once: what is labelled again, what is left alone, what is counted.

The teacher hears the number of a tone. What is under test is the stage: the real teacher labels in tests/distributed,
tests/faults and tests/end_to_end.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qad_dist.asr.labeller import ShardLabels
from qad_dist.config import RunConfig, load_run
from qad_dist.runtime.record import begin_stage, finish_stage
from qad_dist.stages import label as stage
from shards.errors import ModelError, ShardError
from shards.hidden import HiddenStates, hidden_path
from shards.index import read_index, read_utterances
from shards.labels import LabelFile, label_path, read_label_file, second_path
from shards.read import Damaged
from shards.schema import UNREADABLE, PseudoLabel, Utterance
from shards.verdicts import stored_verdicts
from shards.workers import Reader
from tests.helpers.packing import pack_tones
from tests.helpers.tones import make_recordings, number_of

SHARDS = ["heldout-000000.tar", "train-000000.tar", "train-000001.tar"]
LABEL_FILES = [f"{shard.removesuffix('.tar')}.jsonl" for shard in SHARDS]
NUM_RECORDINGS = 12
WIDTH = 3


class TonesTeacher:
    """A tone's number as its only token before the end; numbers above 5 never end, unless the language is told.

    The language of odd numbers is English, as their source says for even ones; for those it says Vietnamese.
    """

    engine = "tones 1"

    def __init__(self, reader: Reader, *, hidden: bool) -> None:
        self._reader, self._hidden = reader, hidden
        self.asked: list[list[tuple[str, str | None]]] = []

    def label(
        self, utterances: Sequence[Utterance], languages: Sequence[str | None], *, on_step: Callable[[], None]
    ) -> ShardLabels:
        self.asked.append([(u.key, language) for u, language in zip(utterances, languages, strict=True)])
        labels: list[PseudoLabel] = []
        damaged: list[Damaged] = []
        for utterance, language, audio in zip(utterances, languages, self._reader.try_read(utterances), strict=True):
            on_step()
            shared = {"key": utterance.key, "prompt_language": language, "duration_seconds": utterance.duration_seconds}
            if isinstance(audio, Damaged):
                damaged.append(audio)
                empty = {"token_ids": (), "text": "", "language": None, "token_logprobs": (), "mean_logprob": None}
                labels.append(PseudoLabel(**shared, **empty, ended_by=UNREADABLE, error=audio.reason))
                continue
            number = number_of(audio)
            labels.append(
                PseudoLabel(
                    **shared,
                    token_ids=(number, 1),
                    text=f"tone {number}",
                    language=language or "English",
                    token_logprobs=(-0.5, -0.25),
                    mean_logprob=-0.375,
                    ended_by="length" if number > 5 and language is None else "end_token",
                )
            )
        tokens = [token for label in labels for token in label.token_ids]
        hidden = np.repeat(np.array(tokens, np.uint16)[:, None], WIDTH, axis=1) if self._hidden else None
        return ShardLabels(labels=labels, hidden_TD=hidden, damaged=damaged)


@pytest.fixture
def teachers(monkeypatch: pytest.MonkeyPatch) -> list[TonesTeacher]:
    """The teachers that were loaded."""
    loaded: list[TonesTeacher] = []

    @contextmanager
    def load(run: RunConfig, reader: Reader, world: object, *, longest_seconds: float) -> Iterator[TonesTeacher]:
        assert 0.3 <= longest_seconds <= 0.45
        loaded.append(TonesTeacher(reader, hidden=run.label.hidden_states))
        yield loaded[-1]

    monkeypatch.setattr(stage, "open_labeller", load)
    return loaded


@pytest.fixture
def change(tmp_path: Path, nano_folder: Path, teachers: list[TonesTeacher]) -> Callable[..., RunConfig]:
    """The run's config with some settings changed; its shards are packed."""
    config = tmp_path / "run.yaml"
    sections = {
        "run": str(tmp_path / "run"),
        "model": {"path": str(nano_folder)},
        "pack": {"inputs": [str(tmp_path / "in")]},
        "read": {"workers": 0, "max_quarantined_share": 0.1},
        "label": {"stale_seconds": 1},
    }
    config.write_text(json.dumps(sections))
    run = load_run(config)
    recordings = make_recordings(tmp_path / "in", NUM_RECORDINGS)
    begin_stage(run, "pack")
    pack_tones(recordings, run.stage_folder("pack"), utterances_per_shard=5)
    finish_stage(run, "pack", results={})
    return lambda *overrides: load_run(config, list(overrides))


@pytest.fixture
def run(change: Callable[..., RunConfig]) -> RunConfig:
    return change()


def refuse(*_: object, **__: object) -> None:
    raise ModelError("the teacher must not be loaded")


def state_of(run: RunConfig) -> dict[str, tuple[int, bytes]]:
    files = (path for path in run.stage_folder("label").iterdir() if path.is_file())
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def files_of(run: RunConfig) -> list[LabelFile]:
    return [read_label_file(label_path(run.stage_folder("label"), shard)) for shard in SHARDS]


def asked_by(teachers: Sequence[TonesTeacher]) -> list[int]:
    """How many utterances of each shard were labelled, over all starts."""
    return [len(asked) for teacher in teachers for asked in teacher.asked]


def results_of(run: RunConfig) -> dict[str, Any]:
    return json.loads((run.stage_folder("label") / "done.json").read_text())["results"]


def damage(run: RunConfig, *places: int) -> None:
    """Overwrite the audio of some utterances of the second training shard."""
    folder = run.stage_folder("pack")
    own = [utterance for utterance in read_utterances(folder) if utterance.shard == SHARDS[2]]
    with (folder / SHARDS[2]).open("r+b") as tar:
        for place in places:
            tar.seek(own[place].audio_offset)
            tar.write(b"\0" * own[place].audio_bytes)


def test_each_utterance_gets_its_own_label_in_the_order_of_its_shard(run: RunConfig) -> None:
    stage.run(run)

    found = [label for file in files_of(run) for label in file.labels]
    shards = sorted(read_utterances(run.stage_folder("pack")), key=lambda utterance: utterance.shard)
    assert [label.key for label in found] == [utterance.key for utterance in shards]
    assert len(found) == NUM_RECORDINGS
    assert all(label.key == f"tone-{label.token_ids[0]}" for label in found)
    assert {file.header.engine for file in files_of(run)} == {"tones 1"}


def test_results_count_every_label_and_its_use(run: RunConfig) -> None:
    stage.run(run)

    results = results_of(run)
    seconds = sum(utterance.duration_seconds for utterance in read_utterances(run.stage_folder("pack")))
    assert results.pop("audio_hours") == pytest.approx(seconds / 3600)
    assert results.pop("teacher")
    assert results == {
        "utterances": 12,
        "response_tokens": 24,
        "runaway": 6,
        "second_pass": 0,
        "unreadable": 0,
        "used": {"all": 3, "kl_only": 3, "nothing": 6},  # 0, 2 and 4; 1, 3 and 5 of another language; the runaways
        "utterances_by_language": {"English": 12},
    }


def test_report_and_verdicts_stand_beside_the_labels(run: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    stage.run(run)

    folder = run.stage_folder("label")
    assert json.loads((folder / "accept.json").read_text())["reasons"]["runaway"]["utterances"] == 6
    assert "runaway" in (folder / "accept.md").read_text()
    assert (folder / "accept.png").read_bytes().startswith(b"\x89PNG")
    assert "12 labels" in capsys.readouterr().out
    for file in files_of(run):
        for label, verdict in zip(file.labels, stored_verdicts(file), strict=True):
            assert ("runaway" in verdict.reasons) == (label.token_ids[0] > 5)


def test_finished_stage_is_left_alone_without_loading_the_teacher(run, monkeypatch) -> None:
    stage.run(run)
    before = state_of(run)
    monkeypatch.setattr(stage, "open_labeller", refuse)

    stage.run(run)

    assert state_of(run) == before


def test_teacher_that_cannot_be_loaded_leaves_the_record_where_it_was(run, change, monkeypatch) -> None:
    stage.run(run)
    before = state_of(run)
    monkeypatch.setattr(stage, "open_labeller", refuse)

    with pytest.raises(ModelError):
        stage.run(change("label.batch_audio_seconds=6"))

    assert state_of(run) == before


def test_deleted_label_file_is_made_again_and_the_others_stay(run: RunConfig) -> None:
    stage.run(run)
    before = state_of(run)
    (run.stage_folder("label") / LABEL_FILES[1]).unlink()

    stage.run(run)

    after = state_of(run)
    assert after[LABEL_FILES[1]][1] == before[LABEL_FILES[1]][1]
    assert [after[LABEL_FILES[number]] for number in (0, 2)] == [before[LABEL_FILES[number]] for number in (0, 2)]


@pytest.mark.parametrize("hurt", [lambda data: data[:-9], lambda data: data.replace(b"-0.5", b"-0.6", 1)])
def test_damaged_label_file_with_a_good_header_is_work_to_do(
    run: RunConfig, caplog: pytest.LogCaptureFixture, hurt: Callable[[bytes], bytes]
) -> None:
    stage.run(run)
    before = state_of(run)
    path = run.stage_folder("label") / LABEL_FILES[2]
    path.write_bytes(hurt(path.read_bytes()))
    (run.stage_folder("label") / "done.json").unlink()  # as after an interruption

    with pytest.raises(ShardError, match="must h"):
        stage.verify(run)
    stage.run(run)

    after = state_of(run)
    assert after[LABEL_FILES[2]][1] == before[LABEL_FILES[2]][1]
    assert [after[LABEL_FILES[number]] for number in (0, 1)] == [before[LABEL_FILES[number]] for number in (0, 1)]
    assert any("train-000001.jsonl must h" in message for message in caplog.messages)


def test_changed_setting_labels_everything_again_and_says_which(run, change, teachers, caplog) -> None:
    stage.run(run)
    caplog.clear()

    stage.run(change("label.slots=7"))

    assert asked_by(teachers) == [4, 4, 4] * 2
    told = {message for message in caplog.messages if "settings.slots is 7, was 128" in message}
    assert len(told) == len(SHARDS)


def test_changed_filter_judges_again_without_loading_the_teacher(run, change, monkeypatch) -> None:
    stage.run(run)
    before = state_of(run)
    monkeypatch.setattr(stage, "open_labeller", refuse)

    stage.run(change("label.filters.runaway.action=none", "label.filters.language.action=none"))

    assert {name: state_of(run)[name] for name in LABEL_FILES} == {name: before[name] for name in LABEL_FILES}
    assert results_of(run)["used"] == {"all": 12, "kl_only": 0, "nothing": 0}


def test_judge_needs_no_world_and_gives_the_verdicts_of_a_whole_run(run, change, monkeypatch) -> None:
    stage.run(change("label.filters.runaway.action=none"))
    monkeypatch.setattr(stage, "open_labeller", refuse)

    stage.judge(run)
    by_judge = state_of(run)
    (run.stage_folder("label") / "done.json").unlink()
    stage.run(run)

    accepted = [f"{shard.removesuffix('.tar')}.accept.json" for shard in SHARDS]
    assert results_of(run)["used"] == {"all": 3, "kl_only": 3, "nothing": 6}
    assert {name: state_of(run)[name] for name in accepted} == {name: by_judge[name] for name in accepted}


def test_hours_beyond_the_limit_are_left_unlabelled_and_more_of_them_label_only_the_rest(change, teachers) -> None:
    few = change("label.max_hours_per_language=0.0003")  # 1.08 s of each language in each split
    stage.run(few)

    labelled = {label.key for file in _existing(few) for label in file.labels}
    table = list(read_utterances(few.stage_folder("pack"), splits=["train", "heldout"]))
    for split in ("train", "heldout"):
        for language in ("English", "Vietnamese"):
            own = [u for u in table if (u.split, u.language) == (split, language)]
            seconds = np.cumsum([0.0, *(u.duration_seconds for u in own)])[:-1]
            assert [u.key in labelled for u in own] == (seconds < 1.08).tolist()
    assert results_of(few)["utterances"] == len(labelled) < NUM_RECORDINGS
    stage.verify(few)

    stage.run(change("label.max_hours_per_language=0.0004"))

    assert sum(asked_by(teachers[1:])) < NUM_RECORDINGS


def _existing(run: RunConfig) -> list[LabelFile]:
    return [read_label_file(path) for path in sorted(run.stage_folder("label").glob("*-00000?.jsonl"))]


def test_second_pass_tells_the_language_of_what_was_rejected(change, teachers) -> None:
    run = change("label.second_pass=manifest")
    stage.run(run)

    again = dict(pair for asked in teachers[0].asked for pair in asked if pair[1] is not None)
    # All that a filter objects to: the runaways, and odd numbers, which are Vietnamese.
    assert set(again) == {f"tone-{number}" for number in range(NUM_RECORDINGS) if number > 5 or number % 2}
    assert {key: language for key, language in again.items() if key in ("tone-7", "tone-8")} == {
        "tone-7": "Vietnamese",
        "tone-8": "English",
    }
    first = files_of(run)[2]
    second = read_label_file(second_path(run.stage_folder("label"), SHARDS[2]), first_sha256=first.sha256)
    assert all(label.prompt_language is not None for label in second.labels)
    assert results_of(run)["used"] == {"all": 12, "kl_only": 0, "nothing": 0}
    assert results_of(run)["second_pass"] == len(again)
    assert results_of(run)["runaway"] == 0
    stage.verify(run)


def test_second_pass_of_labels_that_are_there_makes_only_that(run, change, teachers) -> None:
    stage.run(run)
    before = state_of(run)

    stage.run(change("label.second_pass=manifest"))

    assert {name: state_of(run)[name] for name in LABEL_FILES} == {name: before[name] for name in LABEL_FILES}
    assert all(language is not None for asked in teachers[1].asked for _, language in asked)


def test_told_language_comes_from_the_source(change, teachers) -> None:
    stage.run(change("label.language=manifest"))

    for asked in teachers[0].asked:
        assert all(language == ("Vietnamese" if int(key[5:]) % 2 else "English") for key, language in asked)


def test_hidden_states_lie_in_the_order_of_the_labels(change) -> None:
    run = change("label.hidden_states=true")
    stage.run(run)

    for file in files_of(run):
        assert file.header.hidden is not None
        rows = HiddenStates(hidden_path(file.path), file.header.hidden, num_tokens=file.num_tokens)
        tokens = [token for label in file.labels for token in label.token_ids]
        assert rows.rows(0, file.num_tokens).tolist() == [[token] * WIDTH for token in tokens]


def test_labels_without_hidden_states_are_made_again_if_these_are_asked_for(run, change, teachers) -> None:
    stage.run(run)
    stage.run(change("label.hidden_states=true"))
    stage.run(run)  # labels with hidden states are as good as labels without

    assert len(teachers) == 2


def test_utterance_that_cannot_be_read_has_a_label_that_says_so(run: RunConfig) -> None:
    damage(run, 1)

    stage.run(run)

    labels = files_of(run)[2].labels
    assert [label.ended_by == UNREADABLE for label in labels] == [False, True, False, False]
    assert labels[1].error is not None and "must be FLAC" in labels[1].error
    assert results_of(run)["unreadable"] == 1
    assert stored_verdicts(files_of(run)[2])[1].reasons == (UNREADABLE,)


def test_too_much_that_cannot_be_read_stops_before_there_are_labels(run: RunConfig) -> None:
    damage(run, 0, 3)

    with pytest.raises(ShardError, match=r"^read\.max_quarantined_share must cover .* \(at most 1 of 12 utterances\)"):
        stage.run(run)

    assert not label_path(run.stage_folder("label"), SHARDS[2]).exists()
    assert not (run.stage_folder("label") / "done.json").exists()


def test_shard_of_which_nothing_can_be_read_is_an_error_however_small_it_is(change) -> None:
    run = change("read.max_quarantined_share=1")
    (run.stage_folder("pack") / SHARDS[0]).unlink()

    with pytest.raises(ShardError, match=r"heldout-000000\.tar must be readable"):
        stage.run(run)

    assert not label_path(run.stage_folder("label"), SHARDS[0]).exists()


def test_verify_names_a_label_file_of_another_shard(run: RunConfig) -> None:
    stage.run(run)
    one, other = (label_path(run.stage_folder("label"), shard) for shard in SHARDS[1:])
    other.write_bytes(one.read_bytes())

    with pytest.raises(ShardError, match=r"train-000001\.jsonl must label the shard that is in the index"):
        stage.verify(run)


def test_verify_names_a_shard_without_verdicts(run: RunConfig) -> None:
    stage.run(run)
    (run.stage_folder("label") / "train-000000.accept.json").unlink()

    with pytest.raises(ShardError, match=r"train-000000\.accept\.json must hold the verdicts on train-000000\.jsonl"):
        stage.verify(run)


def test_all_shards_are_labelled_whichever_a_dead_rank_had_claimed(run: RunConfig) -> None:
    # As a killed process on another machine would leave it: nobody is left to count up.
    claims = run.stage_folder("label") / stage.CLAIMS
    claims.mkdir(parents=True)
    owner = {"boot": "another", "name": "rank-0-dead", "namespace": "n", "pid": 1, "started": "1"}
    (claims / f"{SHARDS[1]}.0.claim").write_text(json.dumps(owner))

    stage.run(run)

    assert len(files_of(run)) == len(read_index(run.stage_folder("pack")).shards)
    assert not claims.exists()
