"""Files and folders that appear whole or not at all, and manifests that notice every change."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from shards.errors import CheckpointError, ShardError, StageError
from shards.storage import (
    MANIFEST,
    atomic_folder,
    atomic_write,
    fingerprint,
    folder_bytes,
    publish_folder,
    read_json,
    settle_interrupted,
    sha256_file,
    verify_manifest,
    write_json,
)


class BrokenError(Exception):
    pass


def write_then_break(path: Path) -> None:
    with atomic_write(path) as file:
        file.write(b"half of it")
        raise BrokenError


def publish_then_break(path: Path) -> None:
    with atomic_folder(path) as temporary:
        (temporary / "half").touch()
        raise BrokenError


def test_file_takes_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "below" / "file"

    with atomic_write(path) as file:
        file.write(b"all of it")
        assert not path.exists()

    assert path.read_bytes() == b"all of it"


def test_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    with pytest.raises(BrokenError):
        write_then_break(path)

    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("file", b"old")]


@pytest.mark.parametrize("target", ["a_file/below", "a_folder", "/proc/nowhere/file"])
def test_place_that_cannot_be_written_is_named(tmp_path: Path, target: str) -> None:
    (tmp_path / "a_file").touch()
    (tmp_path / "a_folder").mkdir()
    path = tmp_path / target  # an absolute target replaces the folder

    with pytest.raises(StageError, match=f"{path} must be writable, got '.+'; choose another run folder"):
        write_json(path, 1)

    assert sorted(found.name for found in tmp_path.iterdir()) == ["a_file", "a_folder"]


def test_folder_appears_with_a_manifest_of_independent_hashes(tmp_path: Path) -> None:
    folder = tmp_path / "published"

    with atomic_folder(folder) as temporary:
        (temporary / "a").write_bytes(b"first")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "b").write_bytes(b"second!")
        assert not folder.exists()

    manifest = json.loads((folder / MANIFEST).read_text())["files"]
    assert manifest == {
        "a": {"bytes": 5, "sha256": hashlib.sha256(b"first").hexdigest()},
        "sub/b": {"bytes": 7, "sha256": hashlib.sha256(b"second!").hexdigest()},
    }
    assert verify_manifest(folder) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_folder_replaces_the_old_one_only_when_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "published"
    with atomic_folder(folder) as temporary:
        (temporary / "old").touch()

    with pytest.raises(BrokenError):
        publish_then_break(folder)
    assert (folder / "old").exists()
    with atomic_folder(folder) as temporary:
        (temporary / "new").touch()

    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "new"]
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_publication_killed_between_its_renames_gives_the_old_folder_back(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "published.v1"
    with atomic_folder(folder) as temporary:
        (temporary / "old").touch()

    def die_at_the_second(source: Path, target: Path, rename=os.replace) -> None:
        if target == folder and source.name.endswith(".tmp"):
            raise BrokenError
        rename(source, target)

    monkeypatch.setattr(os, "replace", die_at_the_second)
    with pytest.raises(BrokenError):
        with atomic_folder(folder) as temporary:
            (temporary / "new").touch()
    monkeypatch.undo()
    assert not folder.exists()
    (tmp_path / ".other.0123abcd.tmp").mkdir()

    settle_interrupted(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["published.v1"]
    assert "old" in verify_manifest(folder)


def test_files_whose_hash_is_known_are_not_read_again_and_the_others_are_hashed(tmp_path: Path) -> None:
    temporary, folder = tmp_path / ".published.tmp", tmp_path / "published"
    (temporary / "sub").mkdir(parents=True)
    (temporary / "known").write_bytes(b"first")
    (temporary / "sub" / "other").write_bytes(b"second!")
    told = hashlib.sha256(b"what the writer has hashed").hexdigest()

    publish_folder(temporary, folder, hashes={"known": told, "elsewhere": "0" * 64})

    assert json.loads((folder / MANIFEST).read_text())["files"] == {
        "known": {"bytes": 5, "sha256": told},
        "sub/other": {"bytes": 7, "sha256": hashlib.sha256(b"second!").hexdigest()},
    }
    with pytest.raises(CheckpointError, match="/known must have sha256"):  # had the writer lied
        verify_manifest(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def remove(folder: Path) -> None:
    (folder / "a").unlink()


def cut(folder: Path) -> None:
    (folder / "a").write_bytes(b"firs")


def flip(folder: Path) -> None:
    (folder / "a").write_bytes(b"firsu")


def add(folder: Path) -> None:
    (folder / "custom.pkl").touch()


def forget(folder: Path) -> None:
    (folder / MANIFEST).unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove, "/a must have 5 bytes, got no file"),
        (cut, "/a must have 5 bytes, got 4"),
        (flip, "/a must have sha256 .*, got .*damaged"),
        (add, "/custom.pkl must be listed in manifest.json, got an unknown file"),
        (forget, "must hold a manifest.json, got none"),
    ],
)
def test_changed_folder_is_refused_by_its_manifest(tmp_path: Path, change, message: str) -> None:
    folder = tmp_path / "published"
    with atomic_folder(folder) as temporary:
        (temporary / "a").write_bytes(b"first")

    change(folder)

    with pytest.raises(CheckpointError, match=message):
        verify_manifest(folder)


def test_equal_values_give_equal_bytes_in_any_order_of_names(tmp_path: Path) -> None:
    write_json(tmp_path / "one", {"b": 1, "a": ["ü"]})
    write_json(tmp_path / "two", {"a": ["ü"], "b": 1})

    assert sha256_file(tmp_path / "one") == sha256_file(tmp_path / "two")
    assert "ü" in (tmp_path / "one").read_text(encoding="utf-8")
    assert fingerprint({"b": 1, "a": 2}) == fingerprint({"a": 2, "b": 1}) != fingerprint({"a": 2, "b": 2})


def test_json_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken").write_text('{"a": ')

    with pytest.raises(ShardError, match="broken must be a JSON file, got Expecting value"):
        read_json(tmp_path / "broken")
    with pytest.raises(ShardError, match="missing must exist, got no such file; run the stage"):
        read_json(tmp_path / "missing")


def test_folder_size_counts_files_at_any_depth_or_those_of_a_kind(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.safetensors").write_bytes(bytes(10))
    (tmp_path / "sub" / "b.json").write_bytes(bytes(3))

    assert folder_bytes(tmp_path) == 13
    assert folder_bytes(tmp_path, suffixes=(".safetensors",)) == 10
