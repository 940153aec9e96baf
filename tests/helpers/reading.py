"""Shards written without pack: tones by number, in tars of our own or elsewhere, and a server that lends them."""

import hashlib
import io
import multiprocessing
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.audio import encode_flac
from shards.cache import Cache
from shards.index import IndexWriter, make_entry
from shards.schema import Utterance
from tests.helpers.tones import make_tone


def tone_of(number: int) -> npt.NDArray[np.float32]:
    """What utterance ``tone-<number>`` holds: 0.3 to 0.44 s, as 16 bits keep it."""
    tone = make_tone(number, seconds=0.3 + 0.02 * (number % 8))
    return (np.rint(tone * 32768) / 32768).astype(np.float32)


def write_tones(
    folder: Path, count: int, *, per_shard: int, same_length: bool = False, address: str | None = None
) -> list[Utterance]:
    """An index of ``tone-0`` and so on, ``per_shard`` in each ``train-00000n.tar``.

    Args:
        folder: Gets the index, and the tars.
        count: Of utterances.
        per_shard: Utterances in each tar.
        same_length: All last 0.3 s, so that they also lie at the same places.
        address: Where the tars are said to be, if not in the folder.
    """
    shards = {}
    for number in range(0, count, per_shard):
        members = {
            f"tone-{n}.flac": encode_flac(make_tone(n, seconds=0.3) if same_length else tone_of(n))
            for n in range(number, min(count, number + per_shard))
        }
        shards[f"train-{number // per_shard:06d}.tar"] = members
    seconds = {f"tone-{n}": 0.3 if same_length else len(tone_of(n)) / 16_000 for n in range(count)}
    return write_shards(folder, shards, seconds=seconds, address=address)


def write_shards(
    folder: Path,
    shards: Mapping[str, Mapping[str, bytes]],
    *,
    seconds: Mapping[str, float],
    address: str | None = None,
    tar_format: int = tarfile.USTAR_FORMAT,
) -> list[Utterance]:
    """An index of these tars, given each member's name and bytes; the key is the base name up to its first dot.

    Args:
        folder: Gets the index, and the tars.
        shards: Members by the tar's name.
        seconds: Duration of each key.
        address: Where the tars are said to be, if not in the folder.
        tar_format: As the tarfile module calls it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    every: list[Utterance] = []
    with IndexWriter(folder) as index:
        for shard, members in shards.items():
            with tarfile.open(folder / shard, "w", format=tar_format) as tar:
                for name, data in members.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
            with tarfile.open(folder / shard) as tar:
                utterances = [_utterance(shard, member, seconds) for member in tar]
            data = (folder / shard).read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            location = None if address is None else f"{address}/{shard}"
            entry = make_entry(utterances, name=shard, num_bytes=len(data), sha256=digest, location=location)
            index.add(entry, utterances)
            every += utterances
    return every


def _utterance(shard: str, member: tarfile.TarInfo, seconds: Mapping[str, float]) -> Utterance:
    key = member.name.rpartition("/")[2].partition(".")[0]
    return Utterance(
        key=key,
        shard=shard,
        audio_name=member.name,
        audio_offset=member.offset_data,
        audio_bytes=member.size,
        json_offset=0,
        json_bytes=0,
        duration_seconds=seconds[key],
        start_seconds=0.0,
        recording=key,
        split="train",
        language=None,
        speaker=None,
        reference=None,
        source="tones",
    )


def same_tones(found: Sequence[object], numbers: Sequence[int]) -> bool:
    """Whether these are the samples of those tones, to the bit."""
    return len(found) == len(numbers) and all(
        isinstance(one, np.ndarray) and one.dtype == np.float32 and np.array_equal(one, tone_of(number))
        for one, number in zip(found, numbers, strict=True)
    )


class Web:
    """A web server of a folder's files; counts who asks for them, and can be made to answer badly."""

    def __init__(self, folder: Path) -> None:
        """Serve ``folder``; :func:`serve` starts it."""
        self.folder = folder
        self.address = ""
        self.downloads: Counter[str] = Counter()
        self.spoil: Callable[[bytes], tuple[int, bytes]] | None = None
        """Makes of a file's bytes the length that is promised and the bytes that are sent."""
        self.wait_after: int | None = None
        """Bytes after which an answer waits for :attr:`go_on`."""
        self.waiting = threading.Event()
        self.go_on = threading.Event()


@contextmanager
def serve(folder: Path) -> Iterator[Web]:
    """A :class:`Web` in threads of this process."""
    web = Web(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(is_wanted=False)

        def do_GET(self) -> None:
            self._answer(is_wanted=True)

        def _answer(self, *, is_wanted: bool) -> None:
            path = web.folder / self.path.lstrip("/")
            if is_wanted:
                web.downloads[path.name] += 1
            if not path.is_file():
                self.send_error(404)
                return
            data = path.read_bytes()
            length, sent = (len(data), data) if web.spoil is None else web.spoil(data)
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            if is_wanted:
                self._send(sent)

        def _send(self, data: bytes) -> None:
            try:
                if web.wait_after is not None:
                    self.wfile.write(data[: web.wait_after])
                    self.wfile.flush()
                    web.waiting.set()
                    web.go_on.wait(60)
                    data = data[web.wait_after :]
                self.wfile.write(data)
            except OSError:
                pass  # who asked was killed

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        web.go_on.set()
        server.shutdown()
        server.server_close()


def fetch_in_process(cache: Cache, *, name: str, location: str, sha256: str, num_bytes: int) -> BaseProcess:
    """A process, started, that fetches one shard and ends; its exit code is 0 if it could."""
    process = multiprocessing.get_context("spawn").Process(
        target=_fetch, args=(cache, name, location, sha256, num_bytes), daemon=True
    )
    process.start()
    return process


def _fetch(cache: Cache, name: str, location: str, sha256: str, num_bytes: int) -> None:
    cache.fetch(name, location, sha256=sha256, num_bytes=num_bytes)
