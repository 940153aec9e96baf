"""Shards that are damaged, disappear or cannot be fetched; reading processes and programs that are killed."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from shards import read as module
from shards.cache import Cache
from shards.errors import StageError
from shards.index import read_utterances
from shards.read import Damaged, Shards
from shards.workers import Reader
from tests.helpers.decoders import decode_after_removing
from tests.helpers.reading import fetch_in_process, same_tones, serve, tone_of, write_tones

FIRST, SECOND = "train-000000.tar", "train-000001.tar"


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Tones 0 to 5 and 6 to 11 in two shards."""
    write_tones(tmp_path / "pack", 12, per_shard=6)
    return tmp_path / "pack"


def cut(folder: Path) -> list[int]:
    """Cut a shard within the audio of its fourth utterance."""
    utterance = read_utterances(folder)[3]
    os.truncate(folder / FIRST, utterance.audio_offset + utterance.audio_bytes // 2)
    return [3, 4, 5]


def empty(folder: Path) -> list[int]:
    os.truncate(folder / FIRST, 0)
    return [0, 1, 2, 3, 4, 5]


def remove(folder: Path) -> list[int]:
    (folder / SECOND).unlink()
    return [6, 7, 8, 9, 10, 11]


def replace_by_a_folder(folder: Path) -> list[int]:
    (folder / SECOND).unlink()
    (folder / SECOND).mkdir()
    return [6, 7, 8, 9, 10, 11]


def swap(folder: Path) -> list[int]:
    (folder / FIRST).rename(folder / "other")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "other").rename(folder / SECOND)
    return list(range(12))


def overwrite(folder: Path) -> list[int]:
    """As a disk does that loses a sector in the middle of a member."""
    utterance = read_utterances(folder)[7]
    write_at(folder / SECOND, utterance.audio_offset + utterance.audio_bytes // 2, bytes(512))
    return [7]


def garble_header(folder: Path) -> list[int]:
    write_at(folder / SECOND, read_utterances(folder)[8].audio_offset - 512, b"tone-7.flac")
    return [8]


def pack_others(folder: Path) -> list[int]:
    """A pack of other recordings, some as long, in the place of the one that was indexed."""
    write_tones(folder.parent / "others", 13, per_shard=7)
    (folder.parent / "others" / FIRST).replace(folder / FIRST)
    (folder.parent / "others" / SECOND).replace(folder / SECOND)
    return list(range(6, 12))  # the first shard begins with the same six


def write_at(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


DAMAGES = (cut, empty, remove, replace_by_a_folder, swap, overwrite, garble_header, pack_others)


def split(found: list, numbers: list[int]) -> tuple[list[int], bool]:
    """Numbers of the damaged ones, and whether all others are the tones that they should be."""
    bad = [number for number, one in zip(numbers, found, strict=True) if isinstance(one, Damaged)]
    assert [one.key for one in found if isinstance(one, Damaged)] == [f"tone-{number}" for number in bad]
    good = [number for number in numbers if number not in bad]
    return sorted(bad), same_tones([one for one in found if not isinstance(one, Damaged)], good)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", DAMAGES, ids=[damage.__name__ for damage in DAMAGES])
def test_damage_costs_the_utterances_that_it_hit_and_no_others(packed, damage, workers):
    utterances = list(read_utterances(packed))
    order = np.random.default_rng(0).permutation(12).tolist()
    bad = damage(packed)

    with Reader(Shards(packed), workers=workers) as reader:
        found = reader.try_read([utterances[number] for number in order])

    assert split(found, order) == (bad, True)
    for one in found:
        if isinstance(one, Damaged):
            assert one.shard in (FIRST, SECOND)
            assert f"{packed / one.shard}" in one.reason


def test_no_flipped_bit_in_an_utterance_gives_other_samples(packed):
    """Bits that nothing is decoded from, such as of checksums' and tables' padding, may flip unseen."""
    utterance = read_utterances(packed)[2]
    shards, expected = Shards(packed), tone_of(2)
    data = (packed / FIRST).read_bytes()[utterance.audio_offset :][: utterance.audio_bytes]
    random = np.random.default_rng(0)
    positions = [*range(42), *random.integers(42, len(data), 150).tolist()]

    num_noticed = 0
    for position in positions:
        flipped = data[position] ^ (1 << int(random.integers(8)))
        write_at(packed / FIRST, utterance.audio_offset + position, bytes([flipped]))
        (found,) = shards.try_read([utterance])
        write_at(packed / FIRST, utterance.audio_offset + position, data[position : position + 1])
        if isinstance(found, Damaged):
            num_noticed += 1
        else:
            np.testing.assert_array_equal(found, expected)

    assert num_noticed > 150
    assert same_tones(shards.read([utterance]), [2])


def test_a_shard_that_disappears_between_two_batches_is_damage_from_then_on(packed):
    utterances = read_utterances(packed)

    with Reader(Shards(packed), workers=1) as reader:
        assert same_tones(reader.read(utterances), range(12))
        (packed / FIRST).unlink()
        found = reader.try_read(utterances)

    assert split(found, list(range(12))) == (list(range(6)), True)
    assert "must be readable, got 'No such file or directory'; pack again" in found[0].reason


def test_a_shard_that_disappears_while_it_is_read_is_read_to_its_end(packed):
    shards = Shards(packed, decode=partial(decode_after_removing, packed / FIRST))

    assert same_tones(shards.read(read_utterances(packed)[:6]), range(6))
    assert not (packed / FIRST).exists()


def test_what_the_machine_lacks_is_not_blamed_on_an_utterance(packed, monkeypatch):
    def refuse(path: str, flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)

    monkeypatch.setattr(module, "_open_without_waiting", refuse)

    with pytest.raises(OSError, match="Too many open files"):
        Shards(packed).try_read(read_utterances(packed))


def test_a_disk_that_cannot_read_a_sector_costs_one_utterance(packed, monkeypatch):
    utterances = list(read_utterances(packed))
    open_file = open

    class Failing:
        def __init__(self, file):
            self._file, self._offset = file, 0

        def __enter__(self):
            return self

        def __exit__(self, *_: object):
            self._file.close()

        def seek(self, offset: int) -> None:
            self._offset = offset
            self._file.seek(offset)

        def read(self, size: int) -> bytes:
            if self._offset == utterances[1].audio_offset - 512:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return self._file.read(size)

    monkeypatch.setattr(module, "open", lambda *args, **kwargs: Failing(open_file(*args, **kwargs)), raising=False)

    found = Shards(packed).try_read(utterances)

    assert split(found, list(range(12))) == ([1], True)
    assert f"{packed / FIRST} must be readable, got 'Input/output error'" in found[1].reason


def test_two_processes_that_want_one_shard_copy_it_once_and_a_killed_one_hands_it_over(tmp_path):
    data = bytes(range(256)) * 4
    (tmp_path / "web").mkdir()
    (tmp_path / "web/a.tar").write_bytes(data)
    cache = Cache(folder=tmp_path / "cache", max_bytes=2000)
    with serve(tmp_path / "web") as web:
        shard = {
            "name": "a.tar",
            "location": f"{web.address}/a.tar",
            "sha256": hashlib.sha256(data).hexdigest(),
            "num_bytes": len(data),
        }
        web.wait_after = 100
        first = fetch_in_process(cache, **shard)
        assert web.waiting.wait(60)
        second = fetch_in_process(cache, **shard)
        second.join(1.0)
        assert second.is_alive()
        assert web.downloads == {"a.tar": 1}

        first.kill()
        web.wait_after = None
        second.join(60)

        assert second.exitcode == 0
        assert web.downloads == {"a.tar": 2}
        assert cache.fetch(**shard).read_bytes() == data
    assert {path.suffix for path in cache.folder.iterdir()} == {"", ".shard"}


@pytest.mark.timeout(60)
def test_a_worker_that_is_killed_at_a_fault_point_ends_the_reading(packed):
    code = f"""
from pathlib import Path
from shards.index import read_utterances
from shards.read import Shards
from shards.workers import Reader

if __name__ == "__main__":
    folder = Path({str(packed)!r})
    utterances = read_utterances(folder)
    with Reader(Shards(folder), workers=2) as reader:
        print(len(reader.read(utterances[6:])), flush=True)
        reader.read(utterances)
"""
    script = packed / "script.py"
    script.write_text(code)

    finished = run_script(script, QAD_FAULT=f"kill@read.shard,shard={FIRST}")

    assert finished.stdout == "6\n"
    assert f"{StageError.__name__}: read.workers must all live, got one that ended by signal 9" in finished.stderr


def run_script(script: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    variables = {**os.environ, "PYTHONPATH": str(root), **environment}
    return subprocess.run([sys.executable, script], env=variables, capture_output=True, text=True, timeout=60)


_READ_FOR_EVER = """
import sys
from functools import partial
from pathlib import Path
from shards.index import read_utterances
from shards.read import Shards
from shards.workers import Reader
from tests.helpers.decoders import decode_slowly

if __name__ == "__main__":
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    utterances = read_utterances(folder)
    reader = Reader(Shards(folder, decode=partial(decode_slowly, seconds)), workers=2)
    pending = reader.submit(utterances) if seconds else reader.read(utterances)
    print(*(process.pid for process in reader._processes), flush=True)
    sys.stdin.read()
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seconds", ["0", "3600"], ids=["idle", "busy"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_program_however_it_ends(packed, seconds, end):
    script = packed / "script.py"
    script.write_text(_READ_FOR_EVER)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, script, packed, seconds]
    program = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # A shell starts what it leaves in the background deaf to Ctrl-C, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert program.stdout is not None
    workers = [int(pid) for pid in program.stdout.readline().split()]
    assert len(workers) == 2
    assert all(map(is_alive, workers))

    # Python misses a signal that comes between its last look and the system call that waits: then another one is due.
    for _ in range(6):
        program.send_signal(end)
        with suppress(subprocess.TimeoutExpired):
            program.wait(timeout=10)
            break

    wait_until(lambda: not any(map(is_alive, workers)))
    program.kill()
    program.communicate()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # a zombie's is empty
    except OSError:
        return False
