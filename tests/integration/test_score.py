"""Other sets, systems, prompts and attention modes than a run's own: the program, the nano teacher, a few digits."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.digits import TEACHER, DigitsRun
from tests.helpers.forking import ForkServer
from tests.helpers.launching import Ended

SECTIONS = ["own-windowed", "other-windowed", "own-full", "other-full"]


@pytest.fixture
def run(digits: DigitsRun, tmp_path: Path) -> Path:
    return digits.copy_to(tmp_path / "run")


@pytest.fixture
def other(digits: DigitsRun, tmp_path: Path) -> list[dict[str, Any]]:
    """The lines of a manifest of six utterances, the fourth without its text."""
    lines = [json.loads(line) for line in digits.manifest.read_text(encoding="utf-8").splitlines()]
    chosen = [line for line in lines if line["split"] == "heldout"][:6]
    del chosen[3]["text"]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chosen), encoding="utf-8")
    return chosen


def score(forks: ForkServer, digits: DigitsRun, run: Path, *settings: str) -> Ended:
    arguments = ["--config", digits.config, "--set", f"run={run}", "score.students=[]", *settings]
    (ended,) = forks.start("score", *arguments).wait()
    return ended


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "score" / "score.json").read_text(encoding="utf-8"))


def lines_of(run: Path, section: str, system: str) -> list[dict[str, Any]]:
    path = run / "score" / section / f"{system}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def write_predictions(folder: Path, name: str, lines: list[dict[str, Any]], *, wrong: int = 0) -> None:
    """The references, a few in English with a word more; keyed by the names of the audio files."""
    folder.mkdir(exist_ok=True)
    rows = [
        {"audio_filepath": f"clips/{line['key']}.wav", "text": line["text"], "pred_text": line["text"]}
        for line in lines
    ]
    # Keys follow from paths, so which lines come first does too; Chinese would count each letter of the word.
    english = [row for row, line in zip(rows, lines, strict=True) if line["language"] == "English" and line["text"]]
    for row in english[:wrong]:
        row["pred_text"] += " more"
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_sets_systems_and_modes_stand_side_by_side(forks, digits, run, other, tmp_path) -> None:
    settings = [
        f"score.sets={{other: {tmp_path}/other.jsonl}}",
        "score.audio_attention=[windowed, full]",
        "score.language=manifest",
    ]
    first = score(forks, digits, run, *settings)
    assert first.code == 0, first.stderr
    for name in ("own", "other"):
        write_predictions(tmp_path / "predictions", name, lines_of(run, f"{name}-windowed", "teacher"), wrong=2)
    systems = f"score.systems={{same: {TEACHER}, elsewhere: '{tmp_path}/predictions/{{set}}.jsonl'}}"

    second = score(forks, digits, run, *settings, systems)

    assert second.code == 0, second.stderr
    told = result(run)
    assert list(told["sections"]) == sorted(SECTIONS)
    facts = ("audio_attention", "num_utterances", "num_references")
    assert {name: [section[fact] for fact in facts] for name, section in told["sections"].items()} == {
        **{f"own-{mode}": [mode, 15, 15] for mode in ("windowed", "full")},
        **{f"other-{mode}": [mode, 6, 5] for mode in ("windowed", "full")},
    }
    assert (told["decoding"]["language"], told["dtype"], told["normalizer"]) == ("manifest", "float32", "norm_v1")
    assert "event=answered section=own-full system=teacher" not in second.stderr  # they were there
    for name in SECTIONS:
        rows = {system: both["overall"] for system, both in told["sections"][name]["systems"].items()}
        teacher, same = lines_of(run, name, "teacher"), lines_of(run, name, "same")
        assert [line["pred_text"] for line in same] == [line["pred_text"] for line in teacher]
        assert rows["same"]["kl_per_token"] == pytest.approx(0, abs=1e-6)
        assert rows["same"]["agreement"] == 1.0
        assert (rows["elsewhere"]["insertions"], rows["elsewhere"]["substitutions"]) == (2, 0)
        assert rows["elsewhere"]["kl_per_token"] is None
        assert rows["teacher"]["language_accuracy"] is None  # it was told
        assert [line["detected_language"] for line in teacher] == [line["language"] for line in teacher]
    spoken = {line["text"]: line["language"] for line in other if "text" in line}
    assert {line["text"]: line["language"] for line in lines_of(run, "other-full", "teacher") if line["text"]} == spoken


def test_a_subset_is_the_same_for_all_and_is_told(forks, digits, run) -> None:
    ended = score(forks, digits, run, "score.max_utterances=4", f"score.systems={{same: {TEACHER}}}")

    assert ended.code == 0, ended.stderr
    section = result(run)["sections"]["own"]
    assert (section["num_utterances"], section["num_in_all"]) == (4, 15)
    assert "own: 4 utterances (a random subset of 15)" in ended.stdout
    keys = [[line["key"] for line in lines_of(run, "own", system)] for system in ("teacher", "same")]
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == 4


def test_the_context_stands_in_the_prompt_of_every_system(forks, digits, run) -> None:
    ended = score(forks, digits, run, "score.context=seven eight nine", f"score.systems={{same: {TEACHER}}}")

    assert ended.code == 0, ended.stderr
    rows = result(run)["sections"]["own"]["systems"]
    assert rows["same"]["overall"]["kl_per_token"] == pytest.approx(0, abs=1e-6)
    assert "greedy, with context" in (run / "score" / "score.md").read_text(encoding="utf-8")


def test_predictions_that_lack_an_utterance_are_refused_by_name(forks, digits, run, tmp_path) -> None:
    assert score(forks, digits, run).code == 0
    lines = lines_of(run, "own", "teacher")
    write_predictions(tmp_path / "predictions", "own", lines[1:])

    ended = score(forks, digits, run, f"score.systems={{elsewhere: {tmp_path}/predictions/own.jsonl}}")

    assert ended.code == 1
    (line,) = [line for line in ended.stderr.splitlines() if "ERROR" in line or "must have a line" in line]
    assert "predictions/own.jsonl must have a line for each utterance of own, got none for 1 of 15, first " in line
    assert lines[0]["key"] in line


def test_a_damaged_utterance_stops_the_score_and_names_itself(forks, digits, run) -> None:
    (shard,) = sorted((run / "pack").glob("test-000001.tar"))
    content = bytearray(shard.read_bytes())
    begin = content.index(b"fLaC")
    content[begin + 4000 : begin + 4400] = bytes(400)
    shard.write_bytes(content)

    ended = score(forks, digits, run)

    assert ended.code == 1
    assert "test-000001.tar" in ended.stderr
    assert not (run / "score" / "done.json").exists()
