"""Scores: counts are summed over utterances and divided once."""

import json
import logging
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qad_dist.asr.transcribe import Hypothesis
from qad_dist.config import RunConfig
from qad_dist.runtime.world import World
from qad_dist.stages import score
from qad_dist.stages.score import Outcome, _counts, _described, _row
from shards.errors import ShardError
from shards.schema import ENDED_BY_END_TOKEN, ENDED_BY_LENGTH, TEST, Utterance


def utterance(reference: str | None, *, language: str | None = "English") -> Utterance:
    return Utterance(
        key="u",
        shard="s.tar",
        audio_name="u.flac",
        audio_offset=0,
        audio_bytes=1,
        json_offset=0,
        json_bytes=1,
        duration_seconds=1.0,
        start_seconds=0.0,
        recording="u",
        split=TEST,
        language=language,
        speaker=None,
        reference=reference,
        source="x",
    )


def outcome(
    number: int,
    text: str,
    *,
    language: str | None = "English",
    tokens: int = 4,
    kl: float | None = None,
    agreements: int | None = None,
    ended_by: str = ENDED_BY_END_TOKEN,
) -> Outcome:
    hypothesis = Hypothesis((1,) * tokens, (0.0,) * tokens, text, language, ended_by)
    return Outcome(number=number, hypothesis=hypothesis, counts=None, kl=kl, agreements=agreements)


def counted(utterances: list[Utterance], outcomes: list[Outcome]) -> list[Outcome]:
    """With the errors of each, as the rank that decoded it counts them."""
    return [replace(o, counts=_counts(utterances[o.number], o.hypothesis)) for o in outcomes]


def row(utterances: list[Utterance], outcomes: list[Outcome], answers: list[Outcome] | None = None) -> dict[str, Any]:
    return _row(counted(utterances, outcomes), utterances, answers or outcomes, rate_unit="WER")


def test_errors_are_summed_before_they_are_divided() -> None:
    """One word wrong of 1, none of 10: 1 / 11, not the mean of 100 % and 0 %."""
    utterances = [utterance("yes"), utterance("a b c d e f g h i j")]

    scored = row(utterances, [outcome(0, "no"), outcome(1, "a b c d e f g h i j")])

    assert (scored["substitutions"], scored["deletions"], scored["insertions"]) == (1, 0, 0)
    assert scored["reference_tokens"] == 11
    assert scored["error_rate"] == pytest.approx(1 / 11)
    assert scored["utterances"] == 2


def test_each_kind_of_error_is_counted_by_itself() -> None:
    utterances = [utterance("one two three"), utterance("four"), utterance("five six")]

    scored = row(utterances, [outcome(0, "one three"), outcome(1, "four four"), outcome(2, "nine six")])

    assert (scored["substitutions"], scored["deletions"], scored["insertions"]) == (1, 1, 1)
    assert scored["error_rate"] == pytest.approx(3 / 6)


def test_utterances_without_a_reference_do_not_enter_the_rate() -> None:
    utterances = [utterance("one two"), utterance(None)]
    outcomes = [outcome(0, "one"), outcome(1, "so many words that nobody asked for", kl=2.0, agreements=4)]

    scored = row(utterances, outcomes)

    assert scored["error_rate"] == 0.5
    assert (scored["insertions"], scored["reference_tokens"]) == (0, 2)
    assert scored["utterances"] == 2


def test_words_heard_in_silence_are_inserted() -> None:
    """An empty reference says that nothing was said."""
    utterances = [utterance("one two"), utterance(""), utterance("")]

    scored = row(utterances, [outcome(0, "one"), outcome(1, "thank you"), outcome(2, "")])

    assert (scored["insertions"], scored["deletions"], scored["reference_tokens"]) == (2, 1, 2)
    assert scored["error_rate"] == 3 / 2


def test_kl_and_agreement_are_means_over_the_teachers_tokens() -> None:
    """The teacher wrote 3 and 7 tokens, whatever the system's own responses are long."""
    utterances = [utterance("a"), utterance("b")]
    answers = [outcome(0, "a", tokens=3), outcome(1, "b", tokens=7)]
    outcomes = [outcome(0, "a", tokens=50, kl=0.5, agreements=3), outcome(1, "b", tokens=1, kl=1.5, agreements=5)]

    scored = row(utterances, outcomes, answers)

    assert scored["response_tokens"] == 10
    assert scored["kl_per_token"] == pytest.approx(0.2)
    assert scored["agreement"] == pytest.approx(0.8)


def test_distance_that_was_not_measured_everywhere_is_none() -> None:
    """The teacher itself, and systems with another LM head."""
    utterances = [utterance("a"), utterance("b")]

    scored = row(utterances, [outcome(0, "a", kl=0.0, agreements=4), outcome(1, "b")])

    assert scored["kl_per_token"] is None
    assert scored["agreement"] is None


def test_language_accuracy_counts_only_utterances_of_known_language() -> None:
    utterances = [utterance("a"), utterance("b"), utterance("c", language=None)]
    outcomes = [outcome(0, "a"), outcome(1, "b", language="German"), outcome(2, "c", language="Thai")]

    assert row(utterances, outcomes)["language_accuracy"] == 0.5
    assert row([utterance("c", language=None)], [outcome(0, "c")])["language_accuracy"] is None


def test_response_without_a_language_is_not_the_right_one() -> None:
    assert row([utterance("a")], [outcome(0, "a", language=None)])["language_accuracy"] == 0.0


def test_runaway_responses_are_counted() -> None:
    utterances = [utterance("a"), utterance("b")]

    scored = row(utterances, [outcome(0, "a a a", ended_by=ENDED_BY_LENGTH), outcome(1, "b")])

    assert scored["runaway"] == 1


@pytest.fixture
def described(tmp_path: Path) -> dict[str, Any]:
    """A system scored on two English, one Chinese and one utterance of unknown language."""
    (tmp_path / "model.safetensors").write_bytes(b"0" * 100)
    (tmp_path / "modelopt_state.pth").write_bytes(b"0" * 20)
    (tmp_path / "tokenizer.json").write_bytes(b"0" * 7)
    utterances = [
        utterance("one two"),
        utterance("一二三", language="Chinese"),
        utterance("three four"),
        utterance("five", language=None),
    ]
    outcomes = [
        outcome(0, "one", kl=0.4, agreements=4),
        outcome(1, "一二", language="Chinese", kl=0.1, agreements=3),
        outcome(2, "three four", kl=0.0, agreements=4),
        outcome(3, "five", kl=0.3, agreements=4),
    ]
    return _described(tmp_path, 42, utterances, counted(utterances, outcomes), outcomes)


def test_languages_are_scored_by_themselves_in_their_own_unit(described: dict[str, Any]) -> None:
    languages = described["languages"]

    assert list(languages) == ["Chinese", "English", "unknown"]
    assert {name: row["unit"] for name, row in languages.items()} == {
        "Chinese": "CER",
        "English": "WER",
        "unknown": "WER",
    }
    assert languages["Chinese"]["error_rate"] == pytest.approx(1 / 3)  # a character of three
    assert languages["English"]["error_rate"] == pytest.approx(1 / 4)
    assert languages["English"]["kl_per_token"] == pytest.approx(0.4 / 8)
    assert languages["unknown"]["error_rate"] == 0


def test_overall_row_is_the_sum_of_the_languages(described: dict[str, Any]) -> None:
    overall, languages = described["overall"], described["languages"].values()

    for name in ("substitutions", "deletions", "insertions", "reference_tokens", "utterances", "response_tokens"):
        assert overall[name] == sum(row[name] for row in languages), name
    assert overall["error_rate"] == pytest.approx(2 / 8)
    assert overall["kl_per_token"] == pytest.approx(0.8 / 16)
    assert overall["unit"] == "WER/CER"


def test_size_on_disk_is_of_weights_and_quantizer_state(described: dict[str, Any]) -> None:
    assert described["disk_bytes"] == 120
    assert described["served_bytes"] == 42


def run_of(folder: Path, **systems: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": str(folder),
            "model": {"path": "unused"},
            "pack": {"inputs": ["unused"]},
            "score": {"systems": systems, "splits": [TEST], "batch_audio_seconds": 2.0},
        }
    )


class Model:
    """A model of which only the head is looked at; it can be watched."""

    def __init__(self, head: float) -> None:
        self.model, self.folder, self.extractor = None, Path("unused"), None
        self.head_weight_VD = torch.full((3, 2), head)


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Every utterance is heard as one word, at a distance of 0.5; counts what is called how often."""
    calls: dict[str, int] = {"equal": 0, "count_errors": 0}

    def counting(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    heard = Hypothesis((1, 2), (0.0, 0.0), "word", "English", ENDED_BY_END_TOKEN)
    monkeypatch.setattr(score, "mels_ahead", lambda reader, batches, extractor: batches)
    monkeypatch.setattr(score, "transcribe", lambda _, mels, **__: [heard] * len(mels))
    monkeypatch.setattr(score, "_distances", lambda *args: [(0.5, 2)] * len(args[3]))
    monkeypatch.setattr(torch, "equal", counting("equal", torch.equal))
    monkeypatch.setattr(score, "count_errors", counting("count_errors", score.count_errors))
    return calls


def test_errors_are_counted_once_and_heads_compared_once(tmp_path: Path, decodes: dict[str, int]) -> None:
    """Whatever number of batches there are, and however often the counts are used."""
    run, world = run_of(tmp_path), World(rank=0, local_rank=0, world_size=1)
    utterances = [utterance(reference) for reference in ("word", "", None, "other words", "word")]
    answers = [outcome(number, "word", tokens=2) for number in range(5)]

    outcomes = score._score_system(run, "qad", Model(1.0), (Model(1.0), answers), utterances, None, world)  # type: ignore[arg-type]
    described = _described(tmp_path, None, utterances, outcomes, answers)
    score._write_predictions(run, "qad", utterances, outcomes)

    assert decodes == {"equal": 1, "count_errors": 4}
    assert described["overall"]["kl_per_token"] == 0.25
    overall = described["overall"]
    assert [overall[name] for name in ("substitutions", "deletions", "insertions", "reference_tokens")] == [1, 1, 1, 4]
    lines = [json.loads(line) for line in (tmp_path / "score" / "qad.jsonl").read_text().splitlines()]
    assert [line.get("insertions") for line in lines] == [0, 1, None, 0, 0]


@pytest.mark.usefixtures("decodes")
def test_no_distance_to_a_teacher_with_another_head(tmp_path: Path) -> None:
    world = World(rank=0, local_rank=0, world_size=1)
    answers = [outcome(0, "word")]

    (found,) = score._score_system(
        run_of(tmp_path), "x", Model(1.0), (Model(2.0), answers), [utterance("a")], None, world
    )  # type: ignore[arg-type]

    assert (found.kl, found.agreements) == (None, None)


def test_one_student_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Model]] = []

    def load(*_: Any, **__: Any) -> Model:
        assert [model for model in loaded if model() is not None] == []
        loaded.append(weakref.ref(model := Model(1.0)))
        return model

    monkeypatch.setattr(score, "load_model", load)
    monkeypatch.setattr(score, "load_teacher", lambda *_: Model(1.0))
    monkeypatch.setattr(score, "_utterances", lambda _: [utterance("a")])
    left_out = "require_stage begin_stage verify_manifest enable_checkpointing fold_weights _described"
    for name in (*left_out.split(), "_write_predictions", "_write"):
        monkeypatch.setattr(score, name, lambda *_: None)
    monkeypatch.setattr(score, "_score_system", lambda *_: [])
    monkeypatch.setattr(score, "open_reader", nullcontext)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")

    score.run(run_of(tmp_path, other=str(tmp_path / "other")))

    assert len(loaded) == 3  # ptq, qad and the other


def test_dry_run_names_systems_and_downloads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(score, "_utterances", lambda _: [utterance("a")])
    monkeypatch.setattr(score, "resolve_model_folder", lambda *_, **__: pytest.fail("went to the hub"))

    with caplog.at_level(logging.INFO):
        score.dry_run(run_of(tmp_path, other="org/model"))

    assert "systems=['teacher', 'ptq', 'qad', 'other']" in caplog.text


@pytest.mark.parametrize(("references", "is_scored"), [([None, None], False), ([None, ""], True), (["a"], True)])
def test_sets_without_any_reference_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, references: list[str | None], is_scored: bool
) -> None:
    monkeypatch.setattr(score, "read_utterances", lambda _, splits: [utterance(reference) for reference in references])

    if is_scored:
        assert len(score._utterances(run_of(tmp_path))) == len(references)
    else:
        with pytest.raises(ShardError, match=r"must name splits with references, got .*2 utterances, none"):
            score._utterances(run_of(tmp_path))
