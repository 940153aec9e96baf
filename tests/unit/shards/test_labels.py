import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards import faults
from shards.errors import ShardError
from shards.faults import FaultError
from shards.hidden import HiddenFile, hidden_path
from shards.labels import (
    LabelHeader,
    changes,
    label_path,
    read_label_file,
    read_labels,
    second_path,
    write_labels,
)
from shards.schema import PseudoLabel
from shards.storage import sha256_file

HEADER = LabelHeader(shard="train-000001.tar", shard_sha256="ab" * 32, teacher="cd" * 32, settings={"b": 1, "a": [2.5]})
LABELS = [
    PseudoLabel(
        key=f"k{number}",
        token_ids=(1, 2, 151645),
        text="xin chào\u2028\n",
        language=None if number else "Vietnamese",
        prompt_language="Vietnamese" if number == 2 else None,
        token_logprobs=(-0.1, -1 / 3, -1.2345678901234567e-9),
        mean_logprob=-0.1 - number / 7,
        ended_by="length" if number == 1 else "end_token",
        duration_seconds=1.25,
    )
    for number in range(3)
]
UNREADABLE = PseudoLabel(
    key="k3",
    token_ids=(),
    text="",
    language=None,
    token_logprobs=(),
    mean_logprob=None,
    ended_by="unreadable",
    duration_seconds=2.5,
    error="train-000001.tar: 'k3' must be FLAC, got b'' there",
)
STATES = np.arange(9 * 4, dtype=np.uint16).reshape(9, 4)


def rewrite(path: Path, change: Callable[[dict[str, Any]], object], *, line: int) -> None:
    """Change a line of a label file and leave its count and hash right, as another program might have written it."""
    lines = [json.loads(text) for text in path.read_text().split("\n")[:-1]]
    change(lines[line])
    body = "".join(json.dumps(values) + "\n" for values in lines[1:])
    lines[0]["labels_sha256"] = sha256_of(body)
    path.write_text(json.dumps(lines[0]) + "\n" + body)


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_labels_come_back_exactly(tmp_path):
    path = label_path(tmp_path, HEADER.shard)

    digest = write_labels(path, HEADER, [*LABELS, UNREADABLE])

    assert path == tmp_path / "train-000001.jsonl"
    assert read_labels(path) == (HEADER, [*LABELS, UNREADABLE])
    found = read_label_file(path)
    assert (found.path, found.header, found.labels) == (path, HEADER, [*LABELS, UNREADABLE])
    assert found.sha256 == digest == sha256_file(path)
    assert found.num_tokens == 9


def test_equal_labels_give_equal_bytes_with_sorted_names(tmp_path):
    write_labels(tmp_path / "a.jsonl", HEADER, LABELS)
    write_labels(tmp_path / "b.jsonl", replace(HEADER, settings={"a": [2.5], "b": 1}), LABELS)

    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_bytes().splitlines()]
    assert all(list(row) == sorted(row) for row in rows)
    assert [row.get("key") for row in rows] == [None, "k0", "k1", "k2"]
    assert [row["num_tokens"] for row in rows[1:]] == [3, 3, 3]


def test_a_shard_without_utterances_has_a_file_with_a_header(tmp_path):
    write_labels(tmp_path / "a.jsonl", HEADER, [])

    assert read_labels(tmp_path / "a.jsonl") == (HEADER, [])


def test_a_missing_file_cannot_be_read(tmp_path):
    with pytest.raises(ShardError, match=r"none\.jsonl must be readable.*run the label stage"):
        read_labels(tmp_path / "none.jsonl")


@pytest.mark.parametrize("first", [b"", b"\n", b"[]\n", b"{}\n", b'{"version": 2}\n', b"\xff\n"])
def test_a_file_without_a_header_is_refused(tmp_path: Path, first):
    (tmp_path / "a.jsonl").write_bytes(first)

    with pytest.raises(ShardError, match=r"a\.jsonl must begin with a header"):
        read_labels(tmp_path / "a.jsonl")


def test_a_header_of_another_version_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"version": 1}\n')

    with pytest.raises(ShardError, match=r"must be of version 2, got 1; delete it and label again"):
        read_labels(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"num_tokens": 2}, "3 tokens where num_tokens is 2"),
        ({"token_ids": [1, 2], "num_tokens": 2}, "a log-probability for each token, got 3 of 2"),
        ({"token_logprobs": [-1.0]}, "a log-probability for each token, got 1 of 3"),
        ({"ended_by": "eos"}, "ended_by must be one of end_token, length, unreadable, got 'eos'"),
        ({"ended_by": "unreadable"}, "must be unreadable, and nothing else, got 3 in unreadable"),
        ({"token_ids": [], "token_logprobs": [], "num_tokens": 0, "mean_logprob": None}, "got 0 in length"),
        ({"token_ids": [], "token_logprobs": [], "num_tokens": 0}, "got 0 in length"),
        ({"mean_logprob": None}, "got 3 in length"),
        ({"error": "too loud"}, "must have an error and no text, and nothing else, got 'too loud'"),
        ({"extra": 1}, "unexpected keyword argument 'extra'"),
    ],
)
def test_a_line_that_is_no_pseudo_label_is_named(tmp_path, change, rule):
    path = tmp_path / "a.jsonl"
    write_labels(path, HEADER, LABELS)
    rewrite(path, lambda values: values.update(change), line=2)

    with pytest.raises(ShardError, match=rf"a\.jsonl:3 must hold a pseudo-label, got .*{rule}.*; delete it and label"):
        read_labels(path)


@pytest.mark.parametrize("change", [{"error": None}, {"text": "heard"}, {"mean_logprob": -1.0}])
def test_an_unreadable_utterance_has_an_error_and_nothing_else(tmp_path, change):
    path = tmp_path / "a.jsonl"
    write_labels(path, HEADER, [UNREADABLE])
    rewrite(path, lambda values: values.update(change), line=1)

    with pytest.raises(ShardError, match=r"a\.jsonl:2 must hold a pseudo-label, got what .*unreadable.* nothing else"):
        read_labels(path)


def test_a_missing_field_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    write_labels(path, HEADER, LABELS)
    rewrite(path, lambda values: values.pop("num_tokens"), line=1)

    with pytest.raises(ShardError, match=r"a\.jsonl:2 must hold a pseudo-label, got 'num_tokens'"):
        read_labels(path)


def test_an_utterance_that_is_labelled_twice_is_refused(tmp_path):
    write_labels(tmp_path / "a.jsonl", HEADER, [*LABELS, LABELS[0]])

    with pytest.raises(ShardError, match="must label each utterance once, got one twice"):
        read_labels(tmp_path / "a.jsonl")


def test_labels_that_break_a_rule_are_not_written(tmp_path):
    with pytest.raises(AssertionError, match="k1: there must be a log-probability for each token"):
        write_labels(tmp_path / "a.jsonl", HEADER, [LABELS[0], replace(LABELS[1], token_ids=(1,))])

    assert list(tmp_path.iterdir()) == []


def test_a_second_pass_names_the_file_whose_labels_it_gives_anew(tmp_path):
    first, second = label_path(tmp_path, HEADER.shard), second_path(tmp_path, HEADER.shard)
    digest = write_labels(first, HEADER, LABELS)
    write_labels(second, replace(HEADER, first_sha256=digest), LABELS[1:2])

    assert second == tmp_path / "train-000001.second.jsonl"
    assert read_label_file(second, first_sha256=digest).labels == LABELS[1:2]
    with pytest.raises(ShardError, match=f"must hold a second pass of 000000000000, got one of {digest[:12]}; label"):
        read_label_file(second, first_sha256="0" * 64)
    with pytest.raises(ShardError, match=f"must hold labels of a first pass, got one of {digest[:12]}"):
        read_labels(second)
    with pytest.raises(ShardError, match=f"must hold a second pass of {digest[:12]}, got one of nothing"):
        read_label_file(first, first_sha256=digest)


def test_labels_of_another_shard_are_refused(tmp_path):
    write_labels(tmp_path / "a.jsonl", HEADER, LABELS)

    assert read_labels(tmp_path / "a.jsonl", shard_sha256=HEADER.shard_sha256)[1] == LABELS
    with pytest.raises(ShardError, match="must label the shard that is in the index, got another one; label again"):
        read_labels(tmp_path / "a.jsonl", shard_sha256="0" * 64)


def test_labels_count_only_with_their_hidden_states(tmp_path):
    path = label_path(tmp_path, HEADER.shard)
    write_labels(path, HEADER, [*LABELS, UNREADABLE], states_TD=STATES)

    digest = sha256_file(hidden_path(path))
    assert read_labels(path) == (replace(HEADER, hidden=HiddenFile(sha256=digest, width=4)), [*LABELS, UNREADABLE])

    hidden_path(path).write_bytes(hidden_path(path).read_bytes()[:-1])
    with pytest.raises(ShardError, match=r"000001\.hidden\.safetensors must have \d+ bytes, got \d+; delete its label"):
        read_labels(path)
    hidden_path(path).unlink()
    with pytest.raises(ShardError, match=r"000001\.hidden\.safetensors must be readable, got 'No such file"):
        read_labels(path)


@pytest.mark.parametrize(
    ("point", "left"),
    [
        ("label.after_hidden", ["train-000001.hidden.safetensors"]),
        ("label.before_rename", ["train-000001.hidden.safetensors"]),
        ("label.after_rename", ["train-000001.hidden.safetensors", "train-000001.jsonl"]),
    ],
)
def test_the_label_file_appears_last(tmp_path, monkeypatch, point, left):
    monkeypatch.setattr(faults, "_TEXT", f"raise@{point},shard=train-000001.tar")

    with pytest.raises(FaultError):
        write_labels(label_path(tmp_path, HEADER.shard), HEADER, LABELS, states_TD=STATES)

    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_labels_without_hidden_states_remove_those_of_earlier_ones(tmp_path):
    path = label_path(tmp_path, HEADER.shard)
    write_labels(path, HEADER, LABELS, states_TD=STATES)
    write_labels(path, HEADER, LABELS)

    assert [path.name for path in tmp_path.iterdir()] == ["train-000001.jsonl"]
    assert read_labels(path)[0] == HEADER


def test_hidden_states_must_be_as_many_as_tokens(tmp_path):
    with pytest.raises(AssertionError):
        write_labels(tmp_path / "a.jsonl", HEADER, LABELS, states_TD=STATES[1:])

    assert list(tmp_path.iterdir()) == []


def test_engine_and_hidden_states_are_no_change_nor_is_what_json_makes_of_settings(tmp_path):
    header = replace(HEADER, settings={"splits": ("train", "heldout"), "nested": {"x": None}, "empty": {}})
    write_labels(tmp_path / "a.jsonl", replace(header, engine="torch 2.13"), LABELS, states_TD=STATES)

    found = read_labels(tmp_path / "a.jsonl")[0]
    assert found.engine == "torch 2.13" and found.hidden is not None
    assert changes(found, header) == []


def test_changes_are_told_by_dotted_names_with_both_values():
    found = replace(HEADER, settings={"dtype": "bfloat16", "vllm": {"version": "0.14"}, "old": 1, "same": [1]})
    wanted = LabelHeader(
        shard="train-000002.tar",
        shard_sha256="0" * 64,
        teacher="1" * 64,
        settings={"dtype": "float32", "vllm": {"version": "0.15", "tokens": 448}, "same": [1], "one": True},
    )

    assert changes(found, wanted) == [
        "shard is 'train-000002.tar', was 'train-000001.tar'",
        "shard_sha256 is 000000000000, was abababababab",
        "teacher is 111111111111, was cdcdcdcdcdcd",
        "settings.dtype is 'float32', was 'bfloat16'",
        "settings.one is True, was nothing",
        "settings.vllm.tokens is 448, was nothing",
        "settings.vllm.version is '0.15', was '0.14'",
        "settings.old is nothing, was 1",
    ]
    assert changes(HEADER, replace(HEADER, first_sha256="2" * 64)) == ["first_sha256 is 222222222222, was nothing"]


def test_one_and_true_and_nothing_and_an_empty_section_are_different_settings():
    assert changes(replace(HEADER, settings={"a": 1}), replace(HEADER, settings={"a": True})) == [
        "settings.a is True, was 1"
    ]
    assert changes(replace(HEADER, settings={}), replace(HEADER, settings={"a": {}})) == [
        "settings.a is {}, was nothing"
    ]
