from pathlib import Path

from shards.corpus import list_corpus
from shards.sources import read_found
from tests.helpers.corpora import write_lines


def keys_by_path(folder: Path, *inputs: Path) -> dict[str, str]:
    found = read_found([str(path) for path in inputs], default_language=None, spool=folder / "spool")
    return {one.path: one.key for one in list_corpus(found, folder / "corpus.arrow")}


def test_equal_keys_are_told_apart_alike_in_any_order(tmp_path):
    first = write_lines(tmp_path / "one" / "m.jsonl", {"audio": "a b.wav"}, {"audio": "a_b.flac"}, {"audio": "c.wav"})
    second = write_lines(tmp_path / "two" / "m.jsonl", {"audio": "a_b.wav"})

    forwards = keys_by_path(tmp_path, first, second)
    backwards = keys_by_path(tmp_path, second, first)

    assert forwards == backwards
    assert len(set(forwards.values())) == 4
    assert forwards[str(tmp_path / "one/c.wav")] == "c"
    assert all(key.startswith("a_b-") for path, key in forwards.items() if not path.endswith("c.wav"))


def test_equal_names_in_sources_of_equal_names_are_told_apart_alike_in_any_order(tmp_path):
    inputs = [write_lines(tmp_path / part / "set" / "m.jsonl", {"audio": "a.wav"}) for part in ("x", "y", "z")]

    forwards = keys_by_path(tmp_path, *inputs)
    backwards = keys_by_path(tmp_path, *inputs[::-1])

    assert forwards == backwards
    first, second, third = (forwards[str(tmp_path / part / "set" / "a.wav")] for part in ("x", "y", "z"))
    assert (second, third) == (f"{first}-2", f"{first}-3")
