import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shards.errors import ShardError
from shards.verdicts import Judged, Verdict, count, read_verdicts, verdict_path, verdicts_fingerprint, write_verdicts

JUDGED = Judged(
    shard="train-000001.tar", labels_sha256="ab" * 32, settings={"judge": "v1", "filters": {"b": 1, "a": 2.5}}
)
VERDICTS = [
    Verdict(use="all"),
    Verdict(use="nothing", reasons=("loop", "rate")),
    Verdict(use="kl_only", reasons=("language",)),
    Verdict(use="nothing", reasons=("rate", "language")),
]


def written(folder: Path) -> Path:
    path = folder / "train-000001.accept.json"
    write_verdicts(path, JUDGED, VERDICTS)
    return path


@pytest.mark.parametrize(
    ("labels", "verdicts"),
    [
        ("train-000001.jsonl", "train-000001.accept.json"),
        ("train-000001.second.jsonl", "train-000001.second.accept.json"),
        ("a.b.jsonl", "a.b.accept.json"),
    ],
)
def test_verdicts_lie_beside_their_labels(tmp_path: Path, labels: str, verdicts: str) -> None:
    assert verdict_path(tmp_path / labels) == tmp_path / verdicts


def test_verdicts_come_back_in_order(tmp_path: Path) -> None:
    assert read_verdicts(written(tmp_path), JUDGED) == VERDICTS


def test_a_file_of_no_labels_has_no_verdicts(tmp_path: Path) -> None:
    write_verdicts(tmp_path / "a.accept.json", JUDGED, [])

    assert read_verdicts(tmp_path / "a.accept.json", JUDGED) == []


def test_equal_verdicts_give_equal_bytes_with_sorted_names(tmp_path: Path) -> None:
    other_order = replace(JUDGED, settings={"filters": {"a": 2.5, "b": 1}, "judge": "v1"})

    first = written(tmp_path).read_bytes()
    write_verdicts(tmp_path / "b.json", other_order, list(VERDICTS))

    assert (tmp_path / "b.json").read_bytes() == first
    values = json.loads(first)
    assert list(values) == sorted(values)
    assert values["use"] == ["all", "nothing", "kl_only", "nothing"]
    assert values["reasons"] == [[], ["loop", "rate"], ["language"], ["rate", "language"]]
    assert values["labels_sha256"] == "ab" * 32
    assert values["settings"] == JUDGED.settings


def test_nothing_but_the_file_itself_is_left_in_the_folder(tmp_path: Path) -> None:
    written(tmp_path)
    written(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["train-000001.accept.json"]


def test_labels_that_were_not_judged_yet_have_no_verdicts(tmp_path: Path) -> None:
    assert read_verdicts(tmp_path / "none.accept.json", JUDGED) is None


@pytest.mark.parametrize(
    "other",
    [
        replace(JUDGED, labels_sha256="cd" * 32),
        replace(JUDGED, shard="train-000002.tar"),
        replace(JUDGED, settings={"judge": "v2", "filters": {"b": 1, "a": 2.5}}),
        replace(JUDGED, settings={"judge": "v1", "filters": {"b": 1, "a": 2.25}}),
        replace(JUDGED, settings={"judge": "v1", "filters": {"b": 1, "a": 2.5}, "more": None}),
        replace(JUDGED, settings={"judge": "v1"}),
    ],
)
def test_verdicts_on_other_labels_or_by_other_settings_are_none(tmp_path: Path, other: Judged) -> None:
    assert read_verdicts(written(tmp_path), other) is None


def test_settings_may_hold_tuples(tmp_path: Path) -> None:
    judged = replace(JUDGED, settings={"limits": (1, 2)})
    write_verdicts(tmp_path / "a.json", judged, VERDICTS)

    assert read_verdicts(tmp_path / "a.json", judged) == VERDICTS


def test_a_file_of_another_version_is_judged_again(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))

    assert read_verdicts(path, JUDGED) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"use": []}', "\udcff"])
def test_what_holds_no_verdicts_is_damaged(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.accept.json"
    path.write_bytes(text.encode(errors="surrogateescape"))

    with pytest.raises(ShardError, match=r"a\.accept\.json must (be a JSON file|hold verdicts), got .*; "):
        read_verdicts(path, JUDGED)


def test_a_file_that_is_cut_short_is_damaged(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:-40])

    with pytest.raises(ShardError, match=r"must be a JSON file"):
        read_verdicts(path, JUDGED)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["use"].__setitem__(0, "nothing"),
        lambda values: values["use"].__setitem__(0, "some"),
        lambda values: values["reasons"].__setitem__(0, ["loop"]),
        lambda values: values["reasons"][1].reverse(),
        lambda values: [values["use"].reverse(), values["reasons"].reverse()],
        lambda values: [values["use"].pop(), values["reasons"].pop()],
        lambda values: values["counts"]["use"].__setitem__("all", 2),
        lambda values: values.__setitem__("fingerprint", "0" * 64),
    ],
)
def test_changed_verdicts_are_damaged(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = written(tmp_path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))

    with pytest.raises(ShardError, match=r"must have the fingerprint that it names, got another; delete it"):
        read_verdicts(path, JUDGED)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["use"].pop(),
        lambda values: values.pop("use"),
        lambda values: values.pop("fingerprint"),
        lambda values: values.__setitem__("reasons", [1, 2, 3, 4]),
        lambda values: values.__setitem__("use", 7),
    ],
)
def test_columns_that_do_not_fit_are_damaged(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = written(tmp_path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))

    with pytest.raises(ShardError, match=r"must hold a use and reasons for each label"):
        read_verdicts(path, JUDGED)


def test_a_use_that_does_not_exist_is_damaged_even_with_its_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "a.accept.json"
    write_verdicts(path, JUDGED, [Verdict(use="some")])

    with pytest.raises(ShardError, match=r"must have the fingerprint that it names"):
        read_verdicts(path, JUDGED)


def test_the_fingerprint_is_that_of_the_decisions() -> None:
    fingerprint = verdicts_fingerprint(VERDICTS)

    assert fingerprint == verdicts_fingerprint(list(VERDICTS))
    assert len({fingerprint, verdicts_fingerprint(VERDICTS[::-1]), verdicts_fingerprint(VERDICTS[:-1])}) == 3
    assert fingerprint != verdicts_fingerprint([*VERDICTS[:-1], replace(VERDICTS[-1], use="kl_only")])


def test_uses_and_reasons_are_counted() -> None:
    assert count(VERDICTS) == {
        "use": {"all": 1, "kl_only": 1, "nothing": 2},
        "reasons": {"language": 2, "loop": 1, "rate": 2},
    }
