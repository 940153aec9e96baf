"""Label files do not depend on the number of ranks."""

from pathlib import Path

import pytest

from tests.helpers.launching import launch

LABEL_FILES = ["heldout-000000", "heldout-000001", *(f"train-{number:06d}" for number in range(5))]


def label_files(run: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in sorted((run / "label").glob("*.jsonl"))}


@pytest.fixture(scope="module")
def three_rank_labels(digits, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("three-ranks")
    run = digits.copy_to(folder / "run")
    arguments = ["3", digits.config, run, "label"]
    program = "tests/helpers/run_stages.py"
    ended = launch(program, *arguments, ranks=3, folder=folder / "output")
    assert ended.code == 0, ended.stderr
    return run


def test_two_ranks_write_the_label_files_of_one_byte_for_byte(one_rank_run, two_rank_run):
    one, two = label_files(one_rank_run.folder), label_files(two_rank_run.folder)

    assert list(one) == LABEL_FILES
    assert two == one


def test_three_ranks_write_the_label_files_of_one_byte_for_byte(one_rank_run, three_rank_labels):
    assert label_files(three_rank_labels) == label_files(one_rank_run.folder)
