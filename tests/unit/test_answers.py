"""Answers on disk: group by group until all are there, then a file that others read; made from what, and whole."""

import json
import logging
from pathlib import Path

import pytest

from qad_dist.answers import Answer, Answered, AnswerFiles
from qad_dist.text.predictions import read_predictions
from shards.errors import ShardError
from tests.helpers.answers import answer, utterance

KEYS = {0: ["c", "a"], 1: ["b", "d"]}
ORDER = ["a", "b", "c", "d"]
UTTERANCES = [utterance(f"text of {key}", key=key, duration_seconds=1.5) for key in ORDER]


def answers_of(keys: list[str]) -> list[Answer]:
    # Numbers that have no short decimal form, and text that has all that a line of JSON must escape.
    return [answer(f'"{key}"\n\u2028é', key=key, language=None, tokens=3, kl=1 / 3, agreements=2) for key in keys]


def written(files: AnswerFiles, about: str = "x") -> None:
    for number, keys in KEYS.items():
        files.write_group("qad", about, number, Answered(answers=answers_of(keys), seconds=0.25, served_bytes=7))


def test_groups_become_one_file_in_the_order_of_the_set(tmp_path: Path) -> None:
    files = AnswerFiles(tmp_path)
    written(files)

    gathered = files.gather("qad", "x", KEYS, ORDER)
    files.write("qad", "x", gathered, UTTERANCES)

    assert gathered.answers == answers_of(ORDER)
    assert (gathered.seconds, gathered.served_bytes) == (0.5, 7)
    assert files.read("qad", "x", UTTERANCES) == gathered
    assert not (tmp_path / "groups" / "qad").exists()


def test_a_missing_group_is_left_to_do_and_those_that_are_there_are_not(tmp_path: Path) -> None:
    files = AnswerFiles(tmp_path)
    assert files.missing("qad", "x", KEYS) == [0, 1]
    files.write_group("qad", "x", 1, Answered(answers=answers_of(KEYS[1]), seconds=1.0))

    assert files.missing("qad", "x", KEYS) == [0]
    with pytest.raises(ShardError, match=r"000000\.json must exist, got none; score again"):
        files.gather("qad", "x", KEYS, ORDER)


@pytest.mark.parametrize("damage", ["other run", "other group", "cut", "not JSON", "a field less"])
def test_a_group_of_something_else_or_damaged_is_made_again(tmp_path: Path, damage: str) -> None:
    files = AnswerFiles(tmp_path)
    written(files)
    path = tmp_path / "groups" / "qad" / "000001.json"
    told = json.loads(path.read_text())
    if damage == "other run":
        written(files, about="y")
    elif damage == "other group":
        path.write_bytes((tmp_path / "groups" / "qad" / "000000.json").read_bytes())
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "not JSON":
        path.write_bytes(b"\xff\xfe")
    else:
        del told["answers"][0]["text"]
        path.write_text(json.dumps(told))

    assert files.missing("qad", "x", KEYS) == ([0, 1] if damage == "other run" else [1])


@pytest.mark.parametrize("damage", ["other run", "a bit", "a line less", "no note", "other set"])
def test_a_file_of_something_else_or_damaged_does_not_count(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    files, about, utterances = AnswerFiles(tmp_path), "x", UTTERANCES
    files.write("qad", "x", Answered(answers=answers_of(ORDER), seconds=1.0), UTTERANCES)
    path = files.predictions("qad")
    if damage == "other run":
        about = "y"
    elif damage == "a bit":
        content = bytearray(path.read_bytes())
        content[30] ^= 1
        path.write_bytes(content)
    elif damage == "a line less":
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    elif damage == "no note":
        (tmp_path / "qad.json").unlink()
    else:
        utterances = UTTERANCES[:3]

    with caplog.at_level(logging.INFO):
        assert files.read("qad", about, utterances) is None
    assert bool(caplog.records) == (damage != "no note")


def test_the_file_is_one_of_predictions_in_the_leaderboards_form(tmp_path: Path) -> None:
    files = AnswerFiles(tmp_path)
    files.write("qad", "x", Answered(answers=answers_of(ORDER), seconds=1.0), UTTERANCES)

    first = json.loads(files.predictions("qad").read_text(encoding="utf-8").split("\n")[0])
    assert list(first)[:5] == ["audio_filepath", "duration", "time", "text", "pred_text"]
    assert [first[name] for name in list(first)[:5]] == ["a.flac", 1.5, None, "text of a", '"a"\n\u2028é']
    found = read_predictions(files.predictions("qad"))
    assert [(one.key, one.text, one.language) for one in found.values()] == [
        (one.key, one.text, "English") for one in answers_of(ORDER)
    ]


def test_predictions_from_elsewhere_have_no_costs(tmp_path: Path) -> None:
    files = AnswerFiles(tmp_path)
    answered = Answered(answers=[Answer(key=key, text="x", language="English") for key in ORDER], seconds=None)

    files.write("other", "x", answered, UTTERANCES)

    assert files.read("other", "x", UTTERANCES) == answered
