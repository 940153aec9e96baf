"""The cache against a real server: whole copies only, one download for all, a bounded size, nothing left behind."""

import hashlib
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shards import cache as module
from shards.cache import Cache
from shards.errors import ConfigError, ShardError, StageError
from shards.read import Damaged, Shards
from tests.helpers.reading import Web, same_tones, serve, write_tones


@pytest.fixture
def web(tmp_path):
    (tmp_path / "web").mkdir()
    with serve(tmp_path / "web") as web:
        yield web


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(module, "_PAUSES_SECONDS", (0.0, 0.0))


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(folder=tmp_path / "cache", max_bytes=1000)


def put(web: Web, name: str, data: bytes) -> dict[str, object]:
    """Lend a file; what a cache is asked for to get it."""
    (web.folder / name).write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    return {"name": name, "location": f"{web.address}/{name}", "sha256": sha256, "num_bytes": len(data)}


def content(number: int, size: int) -> bytes:
    return bytes([number]) * size


def kept(cache: Cache) -> list[bytes]:
    """First byte of each copy, in order; temporary files as b'tmp'."""
    files = [path for path in cache.folder.iterdir() if path.name != ".lock"]
    return sorted(b"tmp" if path.suffix == ".tmp" else path.read_bytes()[:1] for path in files)


def test_a_shard_is_copied_once_and_found_afterwards(web, cache):
    shard = put(web, "a.tar", content(1, 500))

    path = cache.fetch(**shard)
    assert path.read_bytes() == content(1, 500)
    assert cache.fetch(**shard) == pickle.loads(pickle.dumps(cache)).fetch(**shard) == path

    assert web.downloads == {"a.tar": 1}
    assert kept(cache) == [b"\1"]


def test_equal_contents_share_one_copy_whatever_their_name(web, cache):
    first, second = put(web, "a.tar", content(1, 500)), put(web, "b.tar", content(1, 500))

    assert cache.fetch(**first) == cache.fetch(**second)
    assert web.downloads == {"a.tar": 1}


def test_shards_that_were_not_used_for_longest_go_first(web, cache):
    shards = [put(web, f"{number}.tar", content(number, 300)) for number in range(5)]
    for number in (0, 1, 2, 0):  # 0 is used again, so 1 is the oldest
        cache.fetch(**shards[number])

    cache.fetch(**shards[3])
    assert kept(cache) == [b"\0", b"\2", b"\3"]
    cache.fetch(**shards[4])
    assert kept(cache) == [b"\0", b"\3", b"\4"]
    big = put(web, "big.tar", content(9, 1000))
    cache.fetch(**big)
    assert kept(cache) == [b"\x09"]


def test_nothing_but_copies_is_counted_or_removed(web, cache):
    cache.folder.mkdir()
    for name in ("mine.tar", "other.shard", "notes.tmp", "0" * 64 + ".tar"):
        (cache.folder / name).write_bytes(content(7, 900))

    cache.fetch(**put(web, "a.tar", content(1, 600)))
    cache.fetch(**put(web, "b.tar", content(2, 600)))

    names = {path.name for path in cache.folder.iterdir()}
    assert {"mine.tar", "other.shard", "notes.tmp", "0" * 64 + ".tar"} < names
    assert kept(cache) == [b"\2", *[b"\7"] * 3, b"tmp"]


def test_an_open_copy_stays_readable_after_it_made_room(web, cache):
    first, second = put(web, "a.tar", content(1, 800)), put(web, "b.tar", content(2, 800))
    path = cache.fetch(**first)

    with path.open("rb") as file:
        cache.fetch(**second)

        assert not path.exists()
        assert file.read() == content(1, 800)


def test_a_shard_that_is_larger_than_the_cache_names_the_setting(web, cache):
    shard = put(web, "a.tar", content(1, 1001))

    with pytest.raises(ConfigError, match=r"read\.cache_gib must hold a\.tar \(0\.000 GiB\), got 0\.000; raise it"):
        cache.fetch(**shard)
    assert not web.downloads


@pytest.mark.parametrize(
    ("spoil", "told", "downloads"),
    [
        (lambda data: (len(data), data[:-1] + b"x"), r"with sha256 \w{12}, got \w{12}; it is another shard", 1),
        (lambda data: (len(data), data[:100]), r"got", 3),
        (lambda data: (100, data[:100]), r"with 500 bytes, got 100 bytes; it is damaged", 3),
        (lambda data: (501, data + b"x"), r"with 500 bytes, got more; it is damaged", 1),
    ],
    ids=["wrong bytes", "cut answer", "shorter file", "longer file"],
)
def test_what_is_not_the_shard_is_named_and_never_kept(web, cache, spoil, told, downloads):
    shard = put(web, "a.tar", content(1, 500))
    web.spoil = spoil

    with pytest.raises(ShardError, match=rf"{web.address}/a\.tar must be .*a\.tar.*{told}"):
        cache.fetch(**shard)

    assert kept(cache) == []
    assert web.downloads["a.tar"] == downloads
    web.spoil = None
    assert cache.fetch(**shard).read_bytes() == content(1, 500)


def test_an_answer_that_was_cut_once_is_asked_for_again(web, cache):
    shard = put(web, "a.tar", content(1, 500))
    answers = [lambda data: (len(data), data[:100]), lambda data: (len(data), data)]
    web.spoil = lambda data: answers.pop(0)(data)

    assert cache.fetch(**shard).read_bytes() == content(1, 500)


def test_a_shard_that_is_not_there_is_named_at_once(web, cache):
    shard = put(web, "a.tar", content(1, 500))
    (web.folder / "a.tar").unlink()

    with pytest.raises(ShardError, match=rf"{web.address}/a\.tar must be a\.tar, got nothing there; restore it"):
        cache.fetch(**shard)
    assert web.downloads["a.tar"] <= 1
    assert kept(cache) == []


def test_a_server_that_is_gone_is_told_with_the_reason(web, cache):
    shard = put(web, "a.tar", content(1, 500)) | {"location": "http://127.0.0.1:9/a.tar"}

    with pytest.raises(
        ShardError, match=r"http://127\.0\.0\.1:9/a\.tar must be readable as a\.tar, got .*; mend the net"
    ):
        cache.fetch(**shard)
    assert kept(cache) == []


def test_a_copy_that_was_cut_on_the_disk_is_made_again(web, cache):
    shard = put(web, "a.tar", content(1, 500))
    os.truncate(cache.fetch(**shard), 100)

    assert cache.fetch(**shard).read_bytes() == content(1, 500)
    assert web.downloads["a.tar"] == 2


@pytest.mark.parametrize("same", [True, False])
def test_what_an_interrupted_copy_left_is_removed_by_the_next(web, cache, same):
    left, shard = (put(web, f"{number}.tar", content(number, 500)) for number in (1, 2))
    cache.folder.mkdir()
    temporary = cache.folder / f"{(shard if same else left)['sha256']}.tmp"
    temporary.write_bytes(content(9, 900))

    assert cache.fetch(**shard).read_bytes() == content(2, 500)
    assert kept(cache) == [b"\2"]


def test_threads_that_want_one_shard_copy_it_once(web, cache):
    shard = put(web, "a.tar", content(1, 500))
    web.wait_after = 100

    with ThreadPoolExecutor(8) as threads:
        fetches = [threads.submit(cache.fetch, **shard) for _ in range(8)]
        assert web.waiting.wait(30)
        time.sleep(0.05)
        web.go_on.set()
        paths = {fetch.result() for fetch in fetches}

    assert [path.read_bytes() for path in paths] == [content(1, 500)]
    assert web.downloads == {"a.tar": 1}


def test_a_copy_that_another_process_finishes_in_between_is_not_made_again(web, cache, monkeypatch):
    shard = put(web, "a.tar", content(1, 500))
    claimed = module._claimed

    def claim_later(temporary: Path):
        monkeypatch.setattr(module, "_claimed", claimed)
        cache.fetch(**shard)
        return claimed(temporary)

    monkeypatch.setattr(module, "_claimed", claim_later)

    assert cache.fetch(**shard).read_bytes() == content(1, 500)
    assert web.downloads == {"a.tar": 1}
    assert kept(cache) == [b"\1"]


def test_copies_under_way_are_within_the_bound_too(web, cache):
    """Two shards of 600 bytes do not fit into 1,000: the second waits until the first is there, and may go."""
    shards = [put(web, f"{number}.tar", content(number, 600)) for number in range(2)]
    web.wait_after = 100

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cache.fetch, **shards[0])
        assert web.waiting.wait(30)
        second = threads.submit(cache.fetch, **shards[1])
        while len(list(cache.folder.glob("*.tmp"))) < 2:
            time.sleep(0.01)
        time.sleep(0.05)
        assert web.downloads == {"0.tar": 1}
        web.go_on.set()
        first.result()
        assert second.result().read_bytes() == content(1, 600)

    assert kept(cache) == [b"\1"]


def test_a_folder_that_cannot_be_written_is_named(web, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    cache = Cache(folder=tmp_path / "file" / "cache", max_bytes=1000)

    with pytest.raises(StageError, match=r"read\.cache must be a folder for 0\.000 GiB more, got 'Not a directory' in"):
        cache.fetch(**put(web, "a.tar", content(1, 500)))


def test_a_full_disk_is_told_and_leaves_nothing(web, cache, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(StageError, match=r"read\.cache must be a folder for .* got 'No space left on device' in"):
        cache.fetch(**put(web, "a.tar", content(1, 500)))
    assert kept(cache) == []


def test_shards_behind_an_address_are_read_through_the_cache(web, tmp_path):
    utterances = write_tones(web.folder, 9, per_shard=3, address=web.address)
    largest = max(path.stat().st_size for path in web.folder.glob("*.tar"))
    cache = Cache(folder=tmp_path / "cache", max_bytes=largest)  # one at a time
    shards = Shards(web.folder, cache=cache)

    assert same_tones(shards.read(utterances), range(9))
    assert same_tones(shards.read(utterances[6:]), [6, 7, 8])
    assert web.downloads == {f"train-00000{number}.tar": 1 for number in range(3)}
    assert shards.path("train-000002.tar").parent == cache.folder


def test_a_copy_that_another_process_removes_before_it_is_opened_is_fetched_again(web, tmp_path, monkeypatch):
    utterances = write_tones(web.folder, 2, per_shard=2, address=web.address)
    shards = Shards(web.folder, cache=Cache(folder=tmp_path / "cache", max_bytes=1 << 20))
    fetch, num_removed = Cache.fetch, 0

    def fetch_and_lose(self, *args, **kwargs) -> Path:
        nonlocal num_removed
        path = fetch(self, *args, **kwargs)
        if num_removed < 2:
            path.unlink()
            num_removed += 1
        return path

    monkeypatch.setattr(Cache, "fetch", fetch_and_lose)

    assert same_tones(shards.read(utterances), [0, 1])
    assert web.downloads["train-000000.tar"] == 3


def test_a_shard_that_cannot_be_fetched_costs_its_own_utterances_only(web, tmp_path):
    utterances = write_tones(web.folder, 6, per_shard=3, address=web.address)
    shards = Shards(web.folder, cache=Cache(folder=tmp_path / "cache", max_bytes=1 << 20))
    (web.folder / "train-000000.tar").unlink()

    found = shards.try_read(utterances)

    assert [one.key for one in found[:3] if isinstance(one, Damaged)] == ["tone-0", "tone-1", "tone-2"]
    assert all(web.address in one.reason for one in found[:3])
    assert same_tones(found[3:], [3, 4, 5])
