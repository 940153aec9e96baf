"""Scores do not depend on the number of ranks."""

import json

from tests.helpers.digits import FinishedRun


def score_without_paths(run: FinishedRun) -> dict[str, object]:
    """``score.json`` without the folders of the systems, and all predictions."""
    score = json.loads((run.folder / "score" / "score.json").read_text())
    for system in score["systems"].values():
        del system["path"]
    predictions = {path.name: path.read_text() for path in sorted((run.folder / "score").glob("*.jsonl"))}
    return {"score": score, **predictions}


def test_two_ranks_score_as_one_does(one_rank_run, two_rank_run):
    one, two = score_without_paths(one_rank_run), score_without_paths(two_rank_run)

    assert set(one["score"]["systems"]) == {"teacher", "ptq", "qad"}
    assert one["score"]["systems"]["qad"]["overall"]["kl_per_token"] > 0
    assert sorted(one) == ["ptq.jsonl", "qad.jsonl", "score", "teacher.jsonl"]
    assert two == one
