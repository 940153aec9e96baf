import json
from dataclasses import replace
from pathlib import Path

import pytest

from shards.errors import ShardError
from shards.labels import LabelHeader, label_path, read_labels, write_labels
from shards.schema import PseudoLabel

HEADER = LabelHeader(shard="train-000001.tar", shard_sha256="ab" * 32, teacher="cd" * 32, settings={"b": 1, "a": [2.5]})
LABELS = [
    PseudoLabel(
        key=f"k{number}",
        token_ids=(1, 2, 151645),
        text="xin chào\u2028\n",
        language=None if number else "Vietnamese",
        token_logprobs=(-0.1, -1 / 3, -1.2345678901234567e-9),
        mean_logprob=-0.1 - number / 7,
        ended_by="end_token",
        duration_seconds=1.25,
    )
    for number in range(3)
]


def test_labels_come_back_exactly(tmp_path):
    path = label_path(tmp_path, HEADER.shard)

    write_labels(path, HEADER, LABELS)

    assert path == tmp_path / "train-000001.jsonl"
    assert read_labels(path) == (HEADER, LABELS)


def test_equal_labels_give_equal_bytes_with_sorted_names(tmp_path):
    write_labels(tmp_path / "a.jsonl", HEADER, LABELS)
    write_labels(tmp_path / "b.jsonl", replace(HEADER, settings={"a": [2.5], "b": 1}), LABELS)

    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_bytes().splitlines()]
    assert all(list(row) == sorted(row) for row in rows)
    assert [row.get("key") for row in rows] == [None, "k0", "k1", "k2"]


def test_a_shard_without_utterances_has_a_file_with_a_header(tmp_path):
    write_labels(tmp_path / "a.jsonl", HEADER, [])

    assert read_labels(tmp_path / "a.jsonl") == (HEADER, [])


def test_a_missing_file_cannot_be_read(tmp_path):
    with pytest.raises(ShardError, match=r"none\.jsonl must be readable.*run the label stage"):
        read_labels(tmp_path / "none.jsonl")


@pytest.mark.parametrize("first", [b"", b"\n", b"[]\n", b"{}\n", b'{"version": 1}\n', b"\xff\n"])
def test_a_file_without_a_header_is_refused(tmp_path: Path, first):
    (tmp_path / "a.jsonl").write_bytes(first)

    with pytest.raises(ShardError, match=r"a\.jsonl must begin with a header"):
        read_labels(tmp_path / "a.jsonl")


def test_a_header_of_another_version_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"version": 2}\n')

    with pytest.raises(ShardError, match=r"must be of version 1, got 2"):
        read_labels(tmp_path / "a.jsonl")
