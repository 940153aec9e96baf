"""Start programs as a user does, on one rank or several; every start has a time limit and leaves no process behind."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

ROOT = Path(__file__).parent.parent.parent

LIMIT_SECONDS = 600
"""Of one start. Most end in 15 s on an idle machine; only a hang takes that long."""

MARK = "QAD_TEST_START"
"""Environment variable by which all processes of one start are known, also when their parent is gone."""


@dataclass(frozen=True, slots=True)
class Ended:
    """What a program left."""

    code: int
    stdout: str
    stderr: str
    seconds: float


class Started:
    """A running program with all its descendants; leaving the block ends whatever still runs.

    Output goes to files: a pipe that a forgotten descendant holds open would never end.
    """

    def __init__(self, command: Sequence[str], *, folder: Path, variables: dict[str, str] | None = None) -> None:
        """Start it.

        Args:
            command: Its words.
            folder: Of output files and of what DeepSpeed compiles; made if missing.
            variables: Added to the environment.
        """
        self._mark = uuid.uuid4().hex
        self._begun = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self._stdout, self._stderr = folder / f"stdout-{self._mark}", folder / f"stderr-{self._mark}"
        environment = {**_environment(folder), MARK: self._mark, **(variables or {})}
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr)

    def wait(self, limit_seconds: float) -> Ended:
        """Wait for the end of the program and of all that it started.

        Raises:
            TimeoutError: Something still ran at the limit; it was killed.
        """
        deadline = self._begun + limit_seconds
        while self.process.poll() is None or self.processes():
            if time.monotonic() > deadline:
                killed = self.kill()
                raise TimeoutError(f"{killed} still ran after {limit_seconds} s:\n{self._stderr.read_text()[-4000:]}")
            time.sleep(0.05)
        seconds = time.monotonic() - self._begun
        return Ended(self.process.returncode, self._stdout.read_text(), self._stderr.read_text(), seconds)

    def processes(self) -> list[psutil.Process]:
        """All that still runs of this start, the program itself included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:  # it ended meanwhile, or is not ours to look at
                continue
        return found

    def rank(self, rank: int, *, limit_seconds: float) -> psutil.Process:
        """The process of one rank, as soon as it is there; not one that it has started to read for it.

        Raises:
            TimeoutError: It did not come.
        """
        deadline = time.monotonic() + limit_seconds
        while time.monotonic() < deadline:
            for process in self.processes():
                try:
                    parent = process.parent()
                    if process.environ().get("RANK") == str(rank) and parent and "RANK" not in parent.environ():
                        return process
                except psutil.Error:
                    continue
            time.sleep(0.05)
        raise TimeoutError(f"rank {rank} did not start in {limit_seconds} s:\n{self._stderr.read_text()[-4000:]}")

    def kill(self) -> list[str]:
        """End everything at once; returns the command lines of what was killed."""
        killed = []
        for process in self.processes():
            try:
                killed.append(" ".join(process.cmdline()))
                process.kill()
            except psutil.Error:
                continue
        self.process.wait()
        return killed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()


def run_python(
    *arguments: str | Path,
    folder: Path,
    limit_seconds: float = LIMIT_SECONDS,
    variables: dict[str, str] | None = None,
) -> Ended:
    """Run ``python *arguments`` in the project's folder."""
    with Started([sys.executable, *map(str, arguments)], folder=folder, variables=variables) as started:
        return started.wait(limit_seconds)


def launch_command(program: str | Path, *arguments: str | Path, ranks: int) -> list[str]:
    """The words that start a program on several ranks of the CPU, as the README says."""
    options = ["--config_file", "configs/accelerate/cpu.yaml", "--num_processes", str(ranks)]
    return [sys.executable, "-m", "accelerate.commands.launch", *options, str(program), *map(str, arguments)]


def launch(
    program: str | Path, *arguments: str | Path, ranks: int, folder: Path, limit_seconds: float = LIMIT_SECONDS
) -> Ended:
    """Run a program on several ranks of the CPU."""
    with Started(launch_command(program, *arguments, ranks=ranks), folder=folder) as started:
        return started.wait(limit_seconds)


def children_that_run(word: str, *, recursive: bool = False) -> list[psutil.Process]:
    """Children of this process that have ``word`` in their command line.

    Other tests' may be among them, ended and not waited for, which have none.
    """
    found = []
    for child in psutil.Process().children(recursive=recursive):
        with suppress(psutil.NoSuchProcess):  # a zombie is one
            if word in child.cmdline():
                found.append(child)
    return found


def _environment(folder: Path) -> dict[str, str]:
    launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU")
    return {
        **{name: value for name, value in os.environ.items() if name not in launchers},
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TORCH_EXTENSIONS_DIR": str(folder / "torch_extensions"),
    }
