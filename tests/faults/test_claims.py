"""Claims between real processes: who gets which shard, and what becomes of it when some are killed or stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shards.claims import Owner

# Works as a rank does: each task is begun, takes a while with beats, and is done by a rename.
_WORKER = """
import os, sys, time
from pathlib import Path
from shards.claims import Claims

folder, name, stale, seconds, *tasks = sys.argv[1:]
folder = Path(folder)
with Claims(folder / "claims", name, float(stale)) as claims:
    for task in claims.take(tasks, lambda task: (folder / "done" / task).exists()):
        with open(folder / "begun", "a") as file:
            file.write(f"{task} {name}\\n")
        print(task, flush=True)
        end = time.monotonic() + float(seconds)
        while time.monotonic() < end:
            time.sleep(0.005)
            claims.beat()
        temporary = folder / "done" / f".{task}.{os.getpid()}"
        temporary.write_text(f"result of {task}")
        os.replace(temporary, folder / "done" / task)
print("end", flush=True)
"""

_RENAMED = """
import json
from dataclasses import asdict
from shards.claims import Owner
print(json.dumps(asdict(Owner.of_this_process("child"))))
open("/proc/self/comm", "w").write("a) Z 1 2 (b")
print(json.dumps(asdict(Owner.of_this_process("child"))))
"""

_OWNER = """
import json, time
from dataclasses import asdict
from shards.claims import Owner
print(json.dumps(asdict(Owner.of_this_process("child"))), flush=True)
time.sleep(60)
"""


def move_elsewhere(folder: Path, claim: str) -> None:
    """Make a claim one of a machine that nothing is known about."""
    path = folder / "claims" / claim
    path.write_text(json.dumps(json.loads(path.read_text()) | {"boot": "another"}))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_name_of_a_program_does_not_hide_when_it_was_started():
    with subprocess.Popen([sys.executable, "-c", _RENAMED], stdout=subprocess.PIPE, text=True) as process:
        output, _ = process.communicate(timeout=60)
    before, after = (json.loads(line) for line in output.splitlines())

    assert before["started"] == after["started"]
    assert int(before["started"]) > 0


def test_a_stopped_process_lives_and_one_that_nobody_waited_for_is_dead():
    with subprocess.Popen([sys.executable, "-c", _OWNER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        owner = Owner(**json.loads(process.stdout.readline()))
        assert owner.pid == process.pid
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert not owner.is_known_dead()

        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert owner.is_known_dead()


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start processes that share 40 tasks; all are ended with the test."""
    (tmp_path / "done").mkdir()
    started = []

    def start(name: str, *, stale: float = 1.0, seconds: float = 0.02, fault: str | None = None, first: int = 0):
        tasks = [f"task-{(number + first) % 40}.tar" for number in range(40)]
        environment = {name: value for name, value in os.environ.items() if name != "QAD_FAULT"}
        command = [sys.executable, "-c", _WORKER, str(tmp_path), name, str(stale), str(seconds), *tasks]
        process = subprocess.Popen(
            command, env=environment | ({"QAD_FAULT": fault} if fault else {}), stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def begun_in(folder: Path) -> Counter[str]:
    return Counter(line.split()[0] for line in (folder / "begun").read_text().splitlines())


def finish(folder: Path, processes: list[subprocess.Popen[str]], *, within: float = 60) -> None:
    """Wait for these; then all 40 tasks must be done, and nothing else be left."""
    for process in processes:
        output, _ = process.communicate(timeout=within)
        assert (process.returncode, output.split()[-1]) == (0, "end")
    assert names_in(folder / "done") == sorted(f"task-{number}.tar" for number in range(40))
    assert all((folder / "done" / name).read_text() == f"result of {name}" for name in names_in(folder / "done"))
    assert not (folder / "claims").exists()


def test_processes_that_share_the_work_do_each_task_once(tmp_path, workers):
    finish(tmp_path, [workers(f"rank-{rank}", first=10 * rank, stale=20) for rank in range(4)])

    assert begun_in(tmp_path) == {f"task-{number}.tar": 1 for number in range(40)}


def test_a_process_that_comes_late_from_another_job_does_each_task_once_too(tmp_path, workers):
    first = workers("rank-0", seconds=0.05, stale=20)
    for _ in range(3):
        first.stdout.readline()

    finish(tmp_path, [first, workers("rank-0", first=20, stale=20)])

    assert begun_in(tmp_path) == {f"task-{number}.tar": 1 for number in range(40)}
    assert len({line.split()[0] for line in (tmp_path / "begun").read_text().splitlines()}) == 40


@pytest.mark.parametrize("point", ["label.after_claim", "label.before_release"])
def test_others_finish_what_a_killed_process_began(tmp_path, workers, point):
    victim = workers("victim", fault=f"kill@{point},shard=task-3.tar", stale=60)
    rest = [workers(f"rank-{rank}", first=13 * rank, stale=20) for rank in (1, 2)]

    finish(tmp_path, rest, within=19)  # without waiting: this machine knows that it is dead

    assert victim.wait(timeout=60) == -signal.SIGKILL
    assert set(begun_in(tmp_path).values()) == {1}  # killed before it began, or after it was done


def test_a_process_killed_at_its_work_costs_that_work_once_more(tmp_path, workers):
    victim = workers("victim", seconds=0.05)
    rest = [workers(f"rank-{rank}", first=13 * rank, seconds=0.05, stale=20) for rank in (1, 2)]
    for _ in range(3):
        victim.stdout.readline()
    victim.kill()

    finish(tmp_path, rest)

    begun = begun_in(tmp_path)
    assert len(begun) == 40 and sum(begun.values()) <= 41


def test_a_stopped_process_loses_its_task_and_breaks_nothing_when_it_goes_on(tmp_path, workers):
    victim = workers("victim", fault="stop@label.after_claim,shard=task-2.tar")
    _, status = os.waitpid(victim.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)

    finish(tmp_path, [workers("rank-1", first=13)])
    victim.send_signal(signal.SIGCONT)
    finish(tmp_path, [victim])

    begun = begun_in(tmp_path)
    assert begun.pop("task-2.tar") == 2
    assert set(begun.values()) == {1}


def test_a_process_killed_on_another_machine_is_waited_for_by_its_count(tmp_path, workers):
    victim = workers("victim", fault="stop@label.after_claim,shard=task-2.tar")
    os.waitpid(victim.pid, os.WUNTRACED)
    move_elsewhere(tmp_path, "task-2.tar.0.claim")
    victim.kill()
    victim.wait()
    begun = time.monotonic()

    finish(tmp_path, [workers("rank-1", stale=1.0)])

    assert time.monotonic() - begun >= 1.0
    assert set(begun_in(tmp_path).values()) == {1}
