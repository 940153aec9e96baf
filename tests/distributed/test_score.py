"""Scores do not depend on the number of ranks."""

import json
import re
from pathlib import Path

import pytest

from tests.helpers.digits import NUM_TEST, DigitsRun, FinishedRun, score_on_four_ranks

NOT_EQUAL = {"done.json", "speed.json", "own/teacher.json", "own/ptq.json", "own/qad.json"}
"""What tells how long it took, or of the folder; of the last three all but the time is compared."""


@pytest.fixture(scope="module")
def four_rank_run(digits: DigitsRun, two_rank_run: FinishedRun, tmp_path_factory) -> FinishedRun:
    return score_on_four_ranks(digits, two_rank_run, tmp_path_factory.mktemp("four-ranks"))


def files_of(run: FinishedRun) -> dict[str, bytes]:
    folder = run.folder / "score"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def notes_of_what_was_written(files: dict[str, bytes]) -> dict[str, dict[str, object]]:
    notes = {name: json.loads(files[name]) for name in files if name.startswith("own/") and name in NOT_EQUAL}
    for note in notes.values():
        assert note.pop("seconds") > 0
        del note["about"]  # one rank has made its own PTQ student, whose pickled state has other bytes
    return notes


def test_one_two_and_four_ranks_write_the_same_bytes(one_rank_run, two_rank_run, four_rank_run) -> None:
    one, two, four = (files_of(run) for run in (one_rank_run, two_rank_run, four_rank_run))

    assert {"score.json", "score.md", "score.png", "own/qad.jsonl", "own/worst.md", "own/worst.json"} <= one.keys()
    for name in one.keys() - NOT_EQUAL:
        assert one[name] == two[name] == four[name], name
    assert one.keys() == two.keys() == four.keys()
    assert notes_of_what_was_written(one) == notes_of_what_was_written(two) == notes_of_what_was_written(four)


def test_every_rank_had_a_share(four_rank_run: FinishedRun) -> None:
    """Four groups of each system, one on each rank."""
    told = re.findall(r"rank=(\d) event=progress stage=score utterances=(\d+) ", four_rank_run.log)

    assert sorted(told) == sorted((str(rank), number) for rank, number in enumerate("4443") for _ in range(3))


def test_the_score_is_of_all_systems_and_utterances(one_rank_run: FinishedRun) -> None:
    score = json.loads((one_rank_run.folder / "score" / "score.json").read_text())

    section = score["sections"]["own"]
    assert set(section["systems"]) == {"teacher", "ptq", "qad"}
    assert (section["num_utterances"], section["num_in_all"], section["num_references"]) == (NUM_TEST,) * 3
    assert section["systems"]["qad"]["overall"]["kl_per_token"] > 0
    assert section["systems"]["teacher"]["overall"]["kl_per_token"] is None
    lines = Path(one_rank_run.folder / "score" / "own" / "qad.jsonl").read_text(encoding="utf-8").splitlines()
    errors = sum(section["systems"]["qad"]["overall"][kind] for kind in ("substitutions", "deletions", "insertions"))
    assert len(lines) == NUM_TEST
    assert errors == pytest.approx(section["systems"]["qad"]["overall"]["error_rate"] * sum_of_tokens(lines))


def sum_of_tokens(lines: list[str]) -> int:
    """Words, or in Chinese characters."""
    spoken = [(line["text"], line["language"]) for line in map(json.loads, lines)]
    return sum(len(text.replace(" ", "") if language == "Chinese" else text.split()) for text, language in spoken)
