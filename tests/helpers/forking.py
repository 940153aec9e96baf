"""Start programs by forking one process that has imported the libraries: a start costs a second instead of ten.

It is also the program that forks:

    python tests/helpers/forking.py ADDRESS

Each start is a process of its own with the program's own command line, to be killed, stopped and waited for like any
other. Several ranks meet through a file; when one of them fails, the others are ended as the launcher does.
"""

import importlib
import os
import runpy
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import psutil

from tests.helpers.launching import ROOT, Ended, Started

LIMIT_SECONDS = 300
"""Of one start, and of the imports. Most take a few seconds on an idle machine; only a hang takes that long."""


@dataclass(slots=True)
class Rank:
    """One process of a job."""

    pid: int
    stdout: Path
    stderr: Path
    code: int | None = None
    """As :attr:`subprocess.Popen.returncode`, once it is known."""

    def log(self) -> str:
        """What it has written to stderr so far."""
        return self.stderr.read_text(encoding="utf-8") if self.stderr.exists() else ""

    def is_stopped(self) -> bool:
        """Whether it was stopped by a signal and has not gone on."""
        return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED


@dataclass(slots=True)
class Job:
    """A program that was started on some ranks."""

    ranks: list[Rank]
    poll: Callable[[int], int | None]
    begun: float = field(default_factory=time.monotonic)

    def wait(self, limit_seconds: float = LIMIT_SECONDS) -> list[Ended]:
        """Wait for all ranks; once one has failed, the others are ended.

        Raises:
            TimeoutError: One still ran at the limit.
        """
        self.wait_until(lambda: not self._running(), limit_seconds=limit_seconds)
        seconds = time.monotonic() - self.begun
        return [Ended(rank.code or 0, rank.stdout.read_text(), rank.log(), seconds) for rank in self.ranks]

    def wait_until(self, is_so: Callable[[], bool], *, limit_seconds: float = LIMIT_SECONDS) -> None:
        """Wait for something that the job brings about; as :meth:`wait`."""
        deadline = time.monotonic() + limit_seconds
        while not is_so():
            if time.monotonic() > deadline:
                logs = "\n".join(rank.log()[-4000:] for rank in self.ranks)
                raise TimeoutError(f"ranks {self._running()} still ran after {limit_seconds} s:\n{logs}")
            time.sleep(0.02)

    def _running(self) -> list[int]:
        for rank in self.ranks:
            if rank.code is None:
                rank.code = self.poll(rank.pid)
        running = [number for number, rank in enumerate(self.ranks) if rank.code is None]
        if running and any(rank.code for rank in self.ranks):
            for number in running:
                os.kill(self.ranks[number].pid, signal.SIGTERM)
        return running


class ForkServer:
    """The process that forks. Leaving the block ends it and all that it started."""

    def __init__(self, folder: Path) -> None:
        """Start it and wait until it has imported everything.

        Args:
            folder: Of outputs; made if missing.

        Raises:
            RuntimeError: It ended before it was ready.
        """
        self._folder = folder
        address = f"\0qad-{uuid.uuid4().hex}"  # no file: names of files in deep folders are too long for a socket
        command = [sys.executable, "tests/helpers/forking.py", address[1:]]
        self._started = Started(command, folder=folder)
        deadline = time.monotonic() + LIMIT_SECONDS
        while True:
            try:
                self._connection: Connection = Client(address, "AF_UNIX")
                return
            except ConnectionRefusedError:
                if self._started.process.poll() is not None or time.monotonic() > deadline:
                    self._started.kill()
                    logs = "".join(path.read_text() for path in folder.glob("stderr-*"))
                    raise RuntimeError(f"the process that forks did not begin:\n{logs}") from None
                time.sleep(0.05)

    def start(
        self, program: str, *arguments: str | Path, ranks: int = 1, faults: Mapping[int, str] | None = None
    ) -> Job:
        """Start ``python launch/<program>.py *arguments`` on some ranks.

        Args:
            program: Such as ``label``.
            arguments: Its words.
            ranks: How many processes.
            faults: ``QAD_FAULT`` of some of them, by rank.
        """
        name = self._folder / uuid.uuid4().hex
        started = []
        for rank in range(ranks):
            variables = _variables(rank, ranks)
            if faults and rank in faults:
                variables["QAD_FAULT"] = faults[rank]
            stdout, stderr = (name.with_suffix(f".{rank}.{stream}") for stream in ("stdout", "stderr"))
            request = {
                "arguments": [str(ROOT / "launch" / f"{program}.py"), *map(str, arguments)],
                "variables": variables,
                "store": str(name.with_suffix(".store")),
                "stdout": str(stdout),
                "stderr": str(stderr),
            }
            started.append(Rank(self._ask(request), stdout, stderr))
        return Job(started, self._ask)

    def _ask(self, request: Any) -> Any:
        self._connection.send(request)
        return self._connection.recv()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._started.kill()
        self._connection.close()


def main(address: str) -> None:
    import accelerate  # noqa: F401
    import deepspeed  # noqa: F401  these take seconds in training, and
    import matplotlib.figure  # noqa: F401  this takes part of one

    from qad_dist.stages import label, train  # noqa: F401

    children: set[int] = set()
    with Listener(f"\0{address}", "AF_UNIX") as listener, listener.accept() as connection:
        try:
            while True:
                request = connection.recv()
                if isinstance(request, int):
                    pid, status = os.waitpid(request, os.WNOHANG)
                    children.discard(pid)
                    connection.send(os.waitstatus_to_exitcode(status) if pid else None)
                    continue
                if (pid := os.fork()) == 0:
                    _become(request)
                children.add(pid)
                connection.send(pid)
        except EOFError:  # the tests are gone
            for pid in children:
                os.kill(pid, signal.SIGKILL)


def _variables(rank: int, ranks: int) -> dict[str, str]:
    """What a launcher sets; of the address accelerate only looks whether it is there."""
    if ranks == 1:
        return {}
    places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    return {**places, "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


def _become(request: dict[str, Any]) -> NoReturn:
    """Be that program until it ends."""
    code = 1
    try:
        with open(os.devnull) as nothing, open(request["stdout"], "w") as out, open(request["stderr"], "w") as err:
            for stream, number in ((nothing, 0), (out, 1), (err, 2)):
                os.dup2(stream.fileno(), number)
        os.environ.update(request["variables"])
        from shards import faults

        importlib.reload(faults)  # which reads the environment
        _join(request["store"])
        sys.argv = request["arguments"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001  as the interpreter: nothing may return into the process that forks
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _join(store: str) -> None:
    """Meet the other ranks; not at the launcher's address, as there is no launcher."""
    import torch.distributed as dist

    from qad_dist.runtime.world import current_world

    world = current_world()
    if world.world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=world.rank, world_size=world.world_size)
        assert dist.get_world_size() == world.world_size


if __name__ == "__main__":
    main(sys.argv[1])
