"""The score section: test sets by path or by settings, names that are free, and how the page of settings shows them."""

from pathlib import Path
from typing import Any

import pytest

from qad_dist.config import dump_run, load_run
from qad_dist.config.page import settings_table
from qad_dist.config.score import ScoreConfig, TestSetConfig, is_predictions

RUN = "{run: runs/a, model: {path: m}, pack: {inputs: [a.jsonl]}, score: %s}"


def test_set_may_be_a_path_or_settings() -> None:
    section = ScoreConfig.model_validate(
        {"sets": {"a": "/a", "b": {"path": "/b", "splits": ["dev"], "source": "nemo"}}}
    )

    assert section.sets["a"] == TestSetConfig(path="/a", source="auto", language=None, splits=None)
    assert section.sets["b"] == TestSetConfig(path="/b", source="nemo", language=None, splits=["dev"])


def test_sets_keep_their_order_and_their_settings_through_a_saved_config(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN % "{sets: {z: /z, b: {path: /b, language: vi}, a: /a}}")
    run = load_run(path)
    (tmp_path / "again.yaml").write_text(dump_run(run))

    again = load_run(tmp_path / "again.yaml")

    assert again == run
    assert list(again.score.sets) == ["z", "b", "a"]


@pytest.mark.parametrize("kind", ["sets", "systems"])
@pytest.mark.parametrize(
    "name", ["own", "teacher", "ptq", "qad", "sets", "groups", "worst", "Mine", "a.b", "a/b", ".."]
)
def test_name_that_is_taken_or_no_name_is_refused(kind: str, name: str) -> None:
    with pytest.raises(ValueError, match=rf"score\.{kind} names must match \[a-z0-9_-\]\+ .*, got '{name}'; rename it"):
        ScoreConfig.model_validate({kind: {name: "/a"}})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"splits": []}, r"score\.splits must name a split where score\.sets is empty, got \[\]; name one of them"),
        ({"splits": ["dev"]}, r"splits\.0"),
        ({"max_utterances": 1}, "max_utterances"),
        ({"audio_attention": []}, "audio_attention"),
        ({"audio_attention": ["half"]}, "audio_attention"),
        ({"students": ["teacher"]}, "students"),
        ({"arithmetic": "int4"}, "arithmetic"),
        ({"margin": -0.1}, "margin"),
        ({"num_resamples": 999}, "num_resamples"),
        ({"worst_utterances": -1}, "worst_utterances"),
        ({"sets": {"a": {"source": "nemo"}}}, r"sets\.a\.path"),
        ({"sets": {"a": {"path": "/a", "source": "tar"}}}, r"sets\.a\.source"),
        ({"sets": {"a": {"path": "/a", "split": "dev"}}}, r"sets\.a\.split"),
        ({"sets": ["/a"]}, "sets"),
    ],
    ids=str,
)
def test_value_outside_its_range_is_refused_by_name(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ScoreConfig.model_validate(settings)


def test_sets_may_stand_alone() -> None:
    assert ScoreConfig.model_validate({"splits": [], "sets": {"a": "/a"}}).splits == []


@pytest.mark.parametrize(
    ("path", "expected"),
    [("a/whisper.jsonl", True), ("{set}/w.jsonl", True), ("Qwen/Qwen3-ASR-1.7B", False), ("a.jsonl/model", False)],
)
def test_system_is_a_file_of_predictions_by_its_suffix(path: str, expected: bool) -> None:
    assert is_predictions(path) is expected


def test_page_shows_test_sets_as_a_section_with_a_table_of_its_own() -> None:
    lines = settings_table().splitlines()

    (row,) = [line for line in lines if line.startswith("| `score.sets` |")]
    assert row.startswith("| `score.sets` | dict[str, section] | `{}` | Further test sets: name to path, or to the ")
    start = lines.index("## `score.sets.<name>:`")
    assert lines[start + 2] == "A test set that lies outside the run."
    names = [line.split("`")[1] for line in lines[start + 6 : start + 10]]
    assert names == [f"score.sets.<name>.{name}" for name in TestSetConfig.model_fields]
    assert lines[start + 6].startswith("| `score.sets.<name>.path` | str | required | ")
    assert (lines[start - 1], lines[start + 10]) == ("", "")
    assert not any("BeforeValidator" in line or "TestSetConfig" in line for line in lines)
