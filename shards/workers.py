"""Reading processes: utterances are decoded in parallel and come back in the order that was asked for.

A batch is cut into pieces that cost about as much, and whichever process is free takes the next; its codes, 16 bits a
sample, come back over a pipe of its own. What comes back does not depend on the number of processes. They import no
torch, leave Ctrl-C to their parent and end with it, also if it is killed.
"""

import multiprocessing
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import Empty, SimpleQueue
from typing import NamedTuple, Self

from shards.audio import Samples
from shards.errors import QadError, StageError
from shards.processes import begin_worker
from shards.read import Codes, Damaged, Shards, refuse_damaged, to_samples
from shards.schema import Utterance

_Answer = list[Codes | Damaged]

# Enough for all processes to have work while one batch is in use; more would only fill memory.
_BATCHES_AHEAD = 2
# Of a batch for each process: with only one, all would wait for the slowest.
_PIECES_OF_A_WORKER = 2


class Reader:
    """Reads utterances of some shards in several processes. May be shared between threads; close it at the end."""

    def __init__(self, shards: Shards, *, workers: int = 0) -> None:
        """Take the shards.

        Args:
            shards: What is read.
            workers: Reading processes, started at first use; 0 reads in a thread of this process.
        """
        self._shards, self._num_workers = shards, workers
        self._lock = threading.Lock()
        self._is_closed = False
        self._processes: list[BaseProcess] = []
        self._threads: list[threading.Thread] = []
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, utterances: Iterable[Utterance]) -> list[Samples]:
        """The samples of several utterances, in their order: float32 in [-1, 1], 16 kHz, mono.

        Raises:
            ShardError: For the first utterance that cannot be read.
            StageError: A reading process died.
        """
        return refuse_damaged(self.try_read(utterances))

    def try_read(self, utterances: Iterable[Utterance]) -> list[Samples | Damaged]:
        """As :meth:`read`, with a :class:`Damaged` in the place of each utterance that cannot be read."""
        return self.submit(utterances).result()

    def submit(self, utterances: Iterable[Utterance]) -> "Pending":
        """Begin to read; what goes wrong is told by :meth:`Pending.result`."""
        wanted = list(utterances)
        pieces = []
        with self._lock:  # nothing may come behind the end that close puts there
            self._start()
            for numbers in _cut(wanted, max(1, self._num_workers * _PIECES_OF_A_WORKER)):
                task = _Task([wanted[number] for number in numbers], Future())
                self._tasks.put(task)
                pieces.append((numbers, task.answer))
        return Pending(pieces)

    def ahead(self, batches: Iterable[Iterable[Utterance]]) -> Iterator[list[Samples | Damaged]]:
        """One batch after the other; the next two are read while the present one is in use."""
        pending: deque[Pending] = deque()
        for batch in batches:
            pending.append(self.submit(batch))
            if len(pending) > _BATCHES_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def close(self) -> None:
        """End the processes, whatever they are at: one may be fetching a shard for minutes."""
        with self._lock:
            self._is_closed = True
            with suppress(Empty):
                while (task := self._tasks.get_nowait()) is not None:
                    task.answer.cancel()
            for process in self._processes:
                process.kill()
            for _ in self._threads:
                self._tasks.put(None)
            for waited_for in (*self._threads, *self._processes):
                waited_for.join()

    def _start(self) -> None:
        if self._is_closed:
            raise RuntimeError("a reader that is closed reads nothing")
        if self._threads:
            return
        asks = [self._shards.read_codes]
        if self._num_workers:
            workers = [_Worker.start(self._shards) for _ in range(self._num_workers)]
            self._processes = [worker.process for worker in workers]
            asks = [worker.ask for worker in workers]
        # Daemons: a program that ends without closing its readers is not to wait for them either.
        self._threads = [
            threading.Thread(target=_work, args=(self._tasks, ask), name="reader", daemon=True) for ask in asks
        ]
        for thread in self._threads:
            thread.start()


class Pending:
    """Utterances that are being read."""

    def __init__(self, pieces: Sequence[tuple[Sequence[int], Future[_Answer]]]) -> None:
        """Take the pieces of a batch: which of its utterances, and their codes to come."""
        self._pieces = pieces

    def result(self) -> list[Samples | Damaged]:
        """Wait for all of them; in the order that was asked for.

        Raises:
            StageError: A reading process died.
        """
        found: dict[int, Codes | Damaged] = {}
        for numbers, future in self._pieces:
            found.update(zip(numbers, future.result(), strict=True))
        ordered = (found[number] for number in range(len(found)))
        return [one if isinstance(one, Damaged) else to_samples(one) for one in ordered]


class _Task(NamedTuple):
    utterances: list[Utterance]
    answer: Future[_Answer]


class _Worker(NamedTuple):
    process: BaseProcess
    connection: Connection

    @classmethod
    def start(cls, shards: Shards) -> "_Worker":
        # Spawned, not forked: a fork copies the locks of threads that do not exist in the child.
        context = multiprocessing.get_context("spawn")
        # A pipe of its own: in one that is shared, half an answer of a process that died would keep the others waiting.
        connection, other_end = context.Pipe()
        process = context.Process(target=_serve, args=(shards, other_end), name="reader", daemon=True)
        process.start()
        other_end.close()  # the process has the only one left: when it ends, so does the conversation
        return cls(process, connection)

    def ask(self, utterances: list[Utterance]) -> _Answer:
        try:
            self.connection.send(utterances)
            answer = self.connection.recv()
        except (EOFError, OSError) as cause:
            self.process.join(timeout=5)
            raise StageError(
                f"read.workers must all live, got one that {_ending(self.process)}; if memory ran out set read.workers "
                "lower"
            ) from cause
        if isinstance(answer, Exception):
            raise answer
        return answer


def _work(tasks: "SimpleQueue[_Task | None]", ask: Callable[[list[Utterance]], _Answer]) -> None:
    while (task := tasks.get()) is not None:
        try:
            task.answer.set_result(ask(task.utterances))
        except BaseException as error:  # noqa: BLE001  whatever it is, somebody waits for it
            task.answer.set_exception(error)


def _serve(shards: Shards, connection: Connection) -> None:
    begin_worker()
    with suppress(EOFError, ConnectionError):  # the parent closed the reader, or is gone
        while True:
            utterances = connection.recv()
            try:
                answer = shards.read_codes(utterances)
            except (QadError, OSError) as error:  # any other is a bug of ours, whose traceback is best printed here
                answer = error
            connection.send(answer)


def _cut(utterances: Sequence[Utterance], count: int) -> list[list[int]]:
    """Numbers of the utterances in at most ``count`` pieces of about as many bytes, a shard in as few as possible."""
    order = sorted(range(len(utterances)), key=lambda n: (utterances[n].shard, utterances[n].audio_offset))
    total = sum(utterance.audio_bytes for utterance in utterances)
    pieces: list[list[int]] = [[] for _ in range(count)]
    num_before = 0
    for number in order:
        pieces[min(num_before * count // max(total, 1), count - 1)].append(number)
        num_before += utterances[number].audio_bytes
    return [piece for piece in pieces if piece]


def _ending(process: BaseProcess) -> str:
    code = process.exitcode
    if code is None:
        return "does not answer"
    return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
