"""Server processes: how they are started, and that none is left, whoever dies. Small programs stand for vLLM."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from qad_dist.asr import vllm_guard, vllm_server, vllm_start
from qad_dist.asr.checkpoint import load_config
from qad_dist.asr.vllm_client import VllmClient
from qad_dist.asr.vllm_server import VllmServer, cache_bytes, gpu_name
from shards.errors import ConfigError, StageError
from tests.helpers.launching import children_that_run

SERVE = """
import json, os, socketserver, sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if Path(sys.argv[0]).with_name("ready").exists() else 503)
        self.end_headers()
    def address_string(self):
        return "client"

seen = {"words": sys.argv[1:], "environment": dict(os.environ)}
Path(sys.argv[0]).with_name("seen.json").write_text(json.dumps(seen))
path = sys.argv[sys.argv.index("--uds") + 1]
socketserver.ThreadingUnixStreamServer(path, Handler).serve_forever()
"""
"""Stands for a Python that runs vLLM."""

FAMILY = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN if "stubborn" in sys.argv else signal.SIG_DFL)
if len(sys.argv) > 2:
    subprocess.Popen([sys.executable, __file__, *sys.argv[2:]], start_new_session="apart" in sys.argv)
open(f"{__file__}.{os.getpid()}", "w").close()
time.sleep(600 if sys.argv[1] != "brief" else 0.3)
sys.exit(3)
"""
"""A process with one child for each word behind the first, each the child of the one before."""


def write_program(path: Path, text: str) -> Path:
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def until(condition: Callable[[], bool], *, limit_seconds: float = 20.0) -> None:
    deadline = time.monotonic() + limit_seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def server_of(program: Path, nano_folder: Path, **changes: Any) -> VllmServer:
    arguments: dict[str, Any] = {
        "log_path": program.parent / "logs" / "vllm.log",
        "dtype": "float32",
        "max_length": 640,
        "slots": 16,
        "config": load_config(nano_folder),
    }
    return VllmServer(str(program), nano_folder, **{**arguments, **changes})


@pytest.fixture
def serving(tmp_path: Path) -> Path:
    """A program that serves at once."""
    (tmp_path / "ready").touch()
    return write_program(tmp_path / "python", SERVE)


def test_server_is_reached_and_ends_with_its_block(serving: Path, nano_folder: Path):
    with server_of(serving, nano_folder) as server:
        address = server.client.address
        assert VllmClient(address).is_healthy()
        (guard,) = children_that_run(vllm_guard.__file__)
        processes = [guard, *guard.children(recursive=True)]

    assert len(processes) == 2
    assert not any(process.is_running() for process in processes)
    assert not Path(address.removeprefix("unix:")).parent.exists()


def test_server_listens_on_a_socket_that_only_this_user_opens(serving: Path, nano_folder: Path):
    with server_of(serving, nano_folder) as server:
        path = Path(server.client.address.removeprefix("unix:"))

        assert stat.S_ISSOCK(path.stat().st_mode)
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_server_gets_the_model_and_nothing_of_the_launcher(
    serving: Path, nano_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "PYTHONPATH"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")

    with server_of(serving, nano_folder, gpu="GPU-1234"):
        seen = json.loads((serving.parent / "seen.json").read_text())

    environment, words = seen["environment"], seen["words"]
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "PYTHONPATH"} & set(environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-1234"
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["VLLM_HOST_IP"] == "127.0.0.1"
    assert words[:3] == ["-I", "-u", vllm_start.__file__]
    options = dict(pairwise(words))
    assert options["--model"] == str(nano_folder)
    assert options["--dtype"] == "float32"
    assert options["--max-model-len"] == "640"
    assert options["--max-num-seqs"] == "16"
    assert options["--generation-config"] == "vllm"
    assert "--enable-scale-out" in words
    assert not {"--host", "--port", "--enforce-eager", "--kv-cache-memory-bytes"} & set(words)


def test_cache_on_the_cpu_has_room_for_all_slots(serving: Path, nano_folder: Path):
    with server_of(serving, nano_folder):
        words = json.loads((serving.parent / "seen.json").read_text())["words"]

    # 16 slots of 5 blocks and one block; 128 tokens each; keys and values, 3 layers, 2 heads of 32, 4 bytes.
    assert words[words.index("--kv-cache-memory-bytes") + 1] == str((16 * 5 + 1) * 128 * 2 * 3 * 2 * 32 * 4)
    assert "--enforce-eager" in words


def test_cache_grows_by_whole_blocks(nano_folder: Path):
    config = load_config(nano_folder).thinker_config.text_config

    sizes = [cache_bytes(config, dtype="bfloat16", max_length=length, slots=2) for length in (1, 128, 129, 256)]

    block = 128 * 2 * 3 * 2 * 32 * 2
    assert sizes == [3 * block, 3 * block, 5 * block, 5 * block]


def test_server_is_waited_for(tmp_path: Path, nano_folder: Path):
    program = write_program(tmp_path / "python", SERVE)
    getting_ready = f"import time; time.sleep(1); open({str(tmp_path / 'ready')!r}, 'w').close()"
    ready = subprocess.Popen([sys.executable, "-c", getting_ready])

    with server_of(program, nano_folder) as server:
        assert ready.poll() == 0 or (tmp_path / "ready").exists()
        assert server.client.is_healthy()
    ready.wait()


def test_server_that_does_not_get_ready_is_an_error(tmp_path: Path, nano_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vllm_server, "START_SECONDS", 1.0)
    program = write_program(tmp_path / "python", SERVE)

    with pytest.raises(StageError, match=r"label\.vllm_python must start a server within 1 s.*vllm\.log"):
        server_of(program, nano_folder).__enter__()

    assert not children_that_run(str(program), recursive=True)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import vllm_of_which_there_is_none", "exit code 1: ModuleNotFoundError: No module named 'vllm_of_which"),
        ("print('first'); print('no room'); raise SystemExit(4)", r"exit code 4: first \| no room; see .*vllm\.log"),
        ("import os; os.kill(os.getpid(), 9)", "exit code 137: nothing; see"),
    ],
)
def test_server_that_ends_early_tells_its_last_words(text: str, told: str, tmp_path: Path, nano_folder: Path):
    program = write_program(tmp_path / "python", text)

    with pytest.raises(StageError, match=rf"label\.vllm_python must be .*, got {told}"):
        server_of(program, nano_folder).__enter__()


ENGINE = "(EngineCore pid=14716) ERROR 11-25 21:54:52 [core.py:133] "
SERVER = "(APIServer pid=14573) "


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (
            [
                f"{SERVER}WARNING 11-25 22:30:00 [utils.py:255] This can cause errors like `OSError: [Errno 24]`.",
                "pydantic_core.ValidationError: 1 validation error for ModelConfig",
                "  Value error, User-specified max_model_len (1000000) is too large",
                "    For further information visit https://errors.pydantic.dev",
            ],
            "pydantic_core.ValidationError: 1 validation error for ModelConfig Value error, User-specified "
            "max_model_len (1000000) is too large",
        ),
        (
            [
                f"{ENGINE}Traceback (most recent call last):",
                f"{ENGINE}torch.OutOfMemoryError: CUDA out of memory.",
                "",
                f"{SERVER}  File entry.py, line 10, in main",
                f"{SERVER}RuntimeError: Engine core initialization failed. See root cause above.",
            ],
            "torch.OutOfMemoryError: CUDA out of memory. | "
            "RuntimeError: Engine core initialization failed. See root cause above.",
        ),
        (["Killed by the scheduler", "good bye"], "Killed by the scheduler | good bye"),
    ],
)
def test_last_words_are_the_last_errors(lines: list[str], told: str, tmp_path: Path, nano_folder: Path):
    (tmp_path / "text").write_text("\n".join(lines))
    program = write_program(tmp_path / "python", "print(open(__file__[:-6] + 'text').read()); raise SystemExit(1)")

    with pytest.raises(StageError) as error:
        server_of(program, nano_folder).__enter__()

    assert f"got exit code 1: {told}; see " in str(error.value)


def test_loss_of_the_server_is_told_by_its_client(serving: Path, nano_folder: Path):
    with server_of(serving, nano_folder) as server:
        (guard,) = children_that_run(vllm_guard.__file__)
        guard.children()[0].kill()
        until(lambda: not running(guard.pid))

        with pytest.raises(StageError, match="got exit code 137: "):
            server.client.served()


def test_python_that_does_not_exist_is_refused(nano_folder: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"label\.vllm_python must be a Python that has vLLM, got '.*nowhere'"):
        server_of(tmp_path / "nowhere", nano_folder).__enter__()


def test_cpu_has_no_gpu_name():
    assert gpu_name(torch.device("cpu")) is None


class Family:
    """A guarded command with descendants, and the owner of its guard."""

    def __init__(self, folder: Path, *words: str, grace_seconds: float = 5.0) -> None:
        program = folder / "family.py"
        program.write_text(FAMILY)
        owner = (
            "import json, os, subprocess, sys, time\n"
            f"guard = subprocess.Popen([sys.executable, '-I', '-S', {vllm_guard.__file__!r}], stdin=subprocess.PIPE)\n"
            f"order = {{'owner': os.getpid(), 'grace_seconds': {grace_seconds},\n"
            f"         'command': [sys.executable, {str(program)!r}, *{list(words)!r}]}}\n"
            "guard.stdin.write(json.dumps(order).encode() + b'\\n'); guard.stdin.close()\n"
            "print(guard.pid, flush=True)\n"
            "sys.exit(guard.wait())"
        )
        self.owner = subprocess.Popen([sys.executable, "-S", "-c", owner], stdout=subprocess.PIPE, text=True)
        assert self.owner.stdout is not None
        self.guard = int(self.owner.stdout.readline())
        until(lambda: len(list(folder.glob("family.py.*"))) == len(words))
        self.members = [int(path.suffix[1:]) for path in folder.glob("family.py.*")]

    def all_ended(self) -> bool:
        return not any(map(running, [self.guard, *self.members]))


@pytest.mark.parametrize("words", [("plain",), ("plain", "plain", "plain")])
def test_all_that_was_started_ends_when_the_owner_is_killed(words: tuple[str, ...], tmp_path: Path):
    family = Family(tmp_path, *words)
    assert all(map(running, family.members))

    os.kill(family.owner.pid, signal.SIGKILL)
    family.owner.wait()

    until(family.all_ended)


def test_processes_that_leave_the_group_or_ignore_the_request_are_killed(tmp_path: Path):
    family = Family(tmp_path, "plain", "apart", "stubborn", "plain", grace_seconds=0.5)

    os.kill(family.owner.pid, signal.SIGKILL)
    family.owner.wait()

    until(family.all_ended)


def test_rest_of_the_family_ends_when_the_command_does(tmp_path: Path):
    family = Family(tmp_path, "brief", "plain", "apart", grace_seconds=0.5)

    assert family.owner.wait(20) == 3  # the command's exit code
    until(family.all_ended)


def test_guard_ends_all_when_it_is_told_to(tmp_path: Path):
    family = Family(tmp_path, "plain", "plain")

    os.kill(family.guard, signal.SIGTERM)

    assert family.owner.wait(20) == 128 + signal.SIGTERM
    until(family.all_ended)


def test_command_dies_with_its_guard(tmp_path: Path):
    family = Family(tmp_path, "plain")

    os.kill(family.guard, signal.SIGKILL)

    family.owner.wait(20)
    until(family.all_ended)


def test_owner_that_goes_on_keeps_its_command(tmp_path: Path):
    family = Family(tmp_path, "plain")
    time.sleep(1.0)

    assert running(family.guard)
    assert all(map(running, family.members))
    family.owner.kill()
    family.owner.wait()
    until(family.all_ended)


@pytest.mark.parametrize("forks", [False, True])
def test_process_of_the_server_ends_with_the_one_that_started_it(forks: bool, tmp_path: Path):
    """Started as multiprocessing does it, which imports the main file by another name; or forked."""
    body = (
        "import os, runpy, time\n"
        f"runpy.run_path({vllm_start.__file__!r}, run_name='__mp_main__')\n"
        f"{'os.fork()' if forks else ''}\n"
        f"open({str(tmp_path)!r} + f'/{{os.getpid()}}', 'w').close()\n"
        "time.sleep(600)"
    )
    parent_body = f"import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', {body!r}]).wait()"
    parent = subprocess.Popen([sys.executable, "-S", "-c", parent_body])
    until(lambda: len(list(tmp_path.iterdir())) == 1 + forks)
    members = [int(path.name) for path in tmp_path.iterdir()]
    time.sleep(1.5)
    assert all(map(running, members))

    if forks:  # the one between them, whose child is the other
        (first,) = psutil.Process(parent.pid).children()
        first.kill()
        until(lambda: not any(map(running, members)))
    parent.kill()
    parent.wait()

    until(lambda: not any(map(running, members)))


def test_import_of_the_start_does_nothing():
    program = f"import threading, runpy; runpy.run_path({vllm_start.__file__!r}); print(threading.active_count())"

    assert subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True).stdout == "1\n"
