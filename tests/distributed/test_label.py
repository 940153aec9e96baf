"""What the label stage makes does not depend on the number of ranks."""

from pathlib import Path

import pytest

from tests.helpers.label_runs import NUM_UTTERANCES, LabelRun, utterances_labelled

SHARDS = ["heldout-000000", "heldout-000001", *(f"train-{number:06d}" for number in range(5))]
REPORT = ["accept.json", "accept.md"]


def made_by(run: Path, *patterns: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for pattern in patterns for path in sorted((run / "label").glob(pattern))}


@pytest.fixture(scope="module")
def one_rank_labels(forks, digits, tmp_path_factory) -> dict[str, bytes]:
    run = LabelRun(forks, digits, digits.copy_to(tmp_path_factory.mktemp("one-rank") / "run"))
    run.finish()
    return run.files()


def test_two_ranks_write_the_label_files_of_one_byte_for_byte(one_rank_run, two_rank_run):
    patterns = ("*.jsonl", "*.accept.json", *REPORT)
    one, two = (made_by(run.folder, *patterns) for run in (one_rank_run, two_rank_run))

    assert list(one) == [
        *(f"{shard}.jsonl" for shard in SHARDS),
        *(f"{shard}.accept.json" for shard in SHARDS),
        *REPORT,
    ]
    assert two == one


@pytest.mark.parametrize("ranks", [2, 4])
def test_hidden_states_and_a_second_pass_do_not_depend_on_the_number_of_ranks(
    forks, digits, one_rank_labels, tmp_path, ranks
):
    run = LabelRun(forks, digits, digits.copy_to(tmp_path / "run"))

    # Slower than this machine: no rank is through with all before another one has begun.
    ended = run.start(ranks=ranks, faults=dict.fromkeys(range(ranks), "sleep=0.02@label.decode")).wait()

    assert [rank.code for rank in ended] == [0] * ranks
    counts = utterances_labelled(*(rank.stderr for rank in ended))
    assert len(counts) == ranks
    assert min(counts) > 0
    assert sum(counts) == NUM_UTTERANCES
    assert run.files() == one_rank_labels
    endings = (".jsonl", ".hidden.safetensors", ".accept.json")
    assert {shard + part + ending for shard in SHARDS for part in ("", ".second") for ending in endings} < set(
        one_rank_labels
    )
