"""Stored hidden states: of each labelled utterance its own, whichever file and pass they are in."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from shards.errors import ShardError
from shards.hidden import hidden_path
from shards.index import read_index, read_utterances
from shards.labelled import LabelledTable, read_labelled
from shards.labels import LabelFile, LabelHeader, label_path, read_label_file, second_path, write_labels
from shards.schema import PseudoLabel, Utterance
from shards.stored_states import StoredStates
from shards.verdicts import ALL, NOTHING, Verdict
from tests.helpers.reading import write_tones

NUM_UTTERANCES = 8
SECOND = (1, 5)
"""Numbers of the utterances whose second label is the better one."""


def number_of(utterance: Utterance) -> int:
    return int(utterance.key.removeprefix("tone-"))


def label_of(utterance: Utterance, *, num_tokens: int) -> PseudoLabel:
    return PseudoLabel(
        key=utterance.key,
        token_ids=tuple(range(num_tokens)),
        text="",
        language="English",
        prompt_language=None,
        token_logprobs=(-0.5,) * num_tokens,
        mean_logprob=-0.5,
        ended_by="end_token",
        duration_seconds=utterance.duration_seconds,
    )


def states_of(utterances: Sequence[Utterance], labels: Sequence[PseudoLabel], *, second: int) -> np.ndarray:
    """Of each token: the number of its utterance, its place, and which pass it is of."""
    rows = [
        (number_of(utterance), place, second)
        for utterance, label in zip(utterances, labels, strict=True)
        for place in range(label.num_tokens)
    ]
    return np.array(rows, np.uint16)


def label(folder: Path, *, hidden: bool = True) -> None:
    """Label files of both passes: utterance ``n`` has ``n + 1`` tokens, in the second pass ``n + 3``, backwards."""
    utterances = list(read_utterances(folder / "pack"))
    for entry in read_index(folder / "pack").shards:
        own = [utterance for utterance in utterances if utterance.shard == entry.name]
        header = LabelHeader(shard=entry.name, shard_sha256=entry.sha256, teacher="t", settings={})
        labels = [label_of(utterance, num_tokens=number_of(utterance) + 1) for utterance in own]
        states_TD = states_of(own, labels, second=0) if hidden else None
        path = label_path(folder / "label", entry.name)
        first_sha256 = write_labels(path, header, labels, states_TD=states_TD)
        again = [utterance for utterance in own[::-1] if number_of(utterance) in (*SECOND, 2)]
        header = LabelHeader(
            shard=entry.name, shard_sha256=entry.sha256, teacher="t", settings={}, first_sha256=first_sha256
        )
        labels = [label_of(utterance, num_tokens=number_of(utterance) + 3) for utterance in again]
        states_TD = states_of(again, labels, second=1) if hidden and again else None
        write_labels(second_path(folder / "label", entry.name), header, labels, states_TD=states_TD)


def table(folder: Path) -> LabelledTable:
    def verdicts(file: LabelFile) -> list[Verdict]:
        is_second = file.header.first_sha256 is not None
        bad = [f"tone-{number}" for number in SECOND] if not is_second else []
        return [Verdict(use=NOTHING, reasons=("x",)) if one.key in bad else Verdict(use=ALL) for one in file.labels]

    return read_labelled(folder / "pack", folder / "label", split="train", verdicts=verdicts, second_pass=True).rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tones(tmp_path / "pack", NUM_UTTERANCES, per_shard=3)
    label(tmp_path)
    return tmp_path


def test_each_row_has_the_states_of_its_own_tokens_from_the_pass_that_it_is_of(folder: Path) -> None:
    rows = table(folder)
    stored = StoredStates(folder / "pack", folder / "label")

    assert len(rows) == NUM_UTTERANCES
    for place in [5, 0, 7, 1, 2, 3, 6, 4, 5]:  # in any order, and again
        number = number_of(rows[place][0])
        is_second = number in SECOND
        found = stored.rows(rows, place)
        assert found.dtype == np.uint16
        assert found.tolist() == [[number, token, is_second] for token in range(number + (3 if is_second else 1))]


def test_rows_that_were_taken_from_a_table_find_theirs(folder: Path) -> None:
    rows = table(folder).take([6, 1, 4])
    stored = StoredStates(folder / "pack", folder / "label")

    assert [int(stored.rows(rows, place)[0, 0]) for place in range(3)] == [6, 1, 4]


def test_only_the_files_that_are_asked_for_are_opened_and_each_once(folder: Path) -> None:
    rows = table(folder)
    stored = StoredStates(folder / "pack", folder / "label")
    for name in ("train-000001", "train-000002"):
        hidden_path(label_path(folder / "label", f"{name}.tar")).unlink()

    stored.rows(rows, 0)
    label_path(folder / "label", "train-000000.tar").unlink()

    assert stored.rows(rows, 2)[:, 0].tolist() == [2, 2, 2]


def test_labels_without_states_are_named(folder: Path) -> None:
    label(folder, hidden=False)

    with pytest.raises(
        ShardError, match=r"train-000000\.jsonl must have hidden states beside it, got none; label again"
    ):
        StoredStates(folder / "pack", folder / "label").rows(table(folder), 0)


def test_states_of_other_labels_are_refused(folder: Path) -> None:
    rows = table(folder)
    names = [hidden_path(label_path(folder / "label", f"train-00000{number}.tar")) for number in range(2)]
    names[1].replace(names[0])

    with pytest.raises(ShardError, match=r"train-000000\.hidden\.safetensors must have \d+ bytes, got \d+;"):
        StoredStates(folder / "pack", folder / "label").rows(rows, 0)


def test_label_file_of_another_shard_is_refused(folder: Path) -> None:
    rows = table(folder)
    own, other = (label_path(folder / "label", f"train-00000{number}.tar") for number in range(2))
    for path in (own, hidden_path(own)):
        path.write_bytes((folder / "label" / path.name.replace(own.stem, other.stem)).read_bytes())
    assert read_label_file(own).labels  # by themselves they are sound

    with pytest.raises(ShardError, match=r"train-000000\.jsonl must"):
        StoredStates(folder / "pack", folder / "label").rows(rows, 0)
