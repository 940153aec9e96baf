"""A vLLM server of this rank alone: started from vLLM's own environment, reached by a socket that only this user opens.

It ends with the block that uses it, and with this process, however that ends: see :mod:`qad_dist.asr.vllm_guard`.
"""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from qad_dist.asr import vllm_guard, vllm_start
from qad_dist.asr.vllm_client import VllmClient
from shards.errors import ConfigError, StageError

log = logging.getLogger(__name__)

PYTHON = "label.vllm_python"
"""The setting that names vLLM's environment, for messages."""
MODEL_NAME = "teacher"
"""By which requests ask for it."""

START_SECONDS = 1200.0
"""How long a server may take until it answers: it loads the weights and, on a GPU, compiles."""

GRACE_SECONDS = 10.0
"""For its end, then it is killed."""

_POLL_SECONDS = 0.2
_TOLD_LINES = 3
# Before each line of a process, and of its log.
_PREFIX = re.compile(r"^(\(\w+ pid=\d+\) )?(ERROR [\d-]+ [\d:]+ \[[^\]]+\] )?")
_ERROR = re.compile(r"[\w.]*(Error|Exception)(: |$)")
# Of a block of vLLM's key/value cache on the CPU.
_BLOCK_TOKENS = 128
# A path of a socket is cut above 107 bytes.
_LONGEST_SOCKET_PATH = 100

# What launchers say to ranks is not for the server, and modules of this environment are none of its own.
_NOT_FOR_SERVERS = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV"),
)
_FOR_SERVERS = {
    "VLLM_HOST_IP": "127.0.0.1",  # its parts talk to each other there, and nowhere else
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # as many threads as OMP_NUM_THREADS, like this process
}


class VllmServer:
    """One server, from the beginning of a ``with`` block to its end."""

    def __init__(
        self,
        python: str,
        model_folder: Path,
        *,
        log_path: Path,
        dtype: str,
        max_length: int,
        slots: int,
        config: Any,
        gpu: str | None = None,
    ) -> None:
        """Describe a server; nothing is started yet.

        Args:
            python: Of an environment that has vLLM.
            model_folder: The checkpoint.
            log_path: What the server writes; its folder is made if missing.
            dtype: ``bfloat16``, ``float16`` or ``float32``.
            max_length: Most tokens of prompt and response.
            slots: Most utterances that are decoded at once.
            config: The checkpoint's, from :func:`~qad_dist.asr.checkpoint.load_config`.
            gpu: From :func:`gpu_name`; None where vLLM computes on the CPU.
        """
        self._python, self._log_path, self._gpu = python, log_path, gpu
        self._options = _options(model_folder, dtype=dtype, max_length=max_length, slots=slots)
        if gpu is None:
            # Compiling takes longer than most labelling on a CPU; by itself the cache would take most of the memory.
            num_bytes = cache_bytes(config.thinker_config.text_config, dtype=dtype, max_length=max_length, slots=slots)
            self._options += ["--enforce-eager", "--kv-cache-memory-bytes", str(num_bytes)]
        self._guard: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._client: VllmClient | None = None

    @property
    def client(self) -> VllmClient:
        """What talks to it."""
        assert self._client is not None, "a server is started by its with block"
        return self._client

    def __enter__(self) -> Self:
        """Start it and wait until it answers.

        Raises:
            ConfigError: ``label.vllm_python`` is no program.
            StageError: The server ended, or did not answer in :data:`START_SECONDS`.
        """
        if shutil.which(self._python) is None:
            raise ConfigError(f"{PYTHON} must be a Python that has vLLM, got {self._python!r}; name one that exists")
        self._folder = _socket_folder()
        socket_path = self._folder / "vllm.sock"
        try:
            log.info("event=starting_vllm python=%s log=%s", self._python, self._log_path)
            self._guard = self._start(socket_path)
            self._client = VllmClient(f"unix:{socket_path}", on_lost=self._check_alive)
            self._wait()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def _start(self, socket_path: Path) -> "subprocess.Popen[bytes]":
        variables = _FOR_SERVERS if self._gpu is None else {**_FOR_SERVERS, "CUDA_VISIBLE_DEVICES": self._gpu}
        command = [
            # Not a dictionary for the guard: this way nothing here reads the environment.
            *("env", *(word for name in _NOT_FOR_SERVERS for word in ("-u", name))),
            *(f"{name}={value}" for name, value in variables.items()),
            # Isolated: beside the program lie modules of this project, which are not for vLLM to import.
            *(self._python, "-I", "-u", vllm_start.__file__),
            *("--uds", str(socket_path), *self._options),
        ]
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        with self._log_path.open("wb") as log_file:
            guard = subprocess.Popen(
                [sys.executable, "-I", "-S", vllm_guard.__file__],
                stdin=subprocess.PIPE,
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,  # Ctrl-C is for this process, which ends the server when it is done with it
            )
        assert guard.stdin is not None
        with guard.stdin:
            order = {"owner": os.getpid(), "grace_seconds": GRACE_SECONDS, "command": command}
            guard.stdin.write(json.dumps(order).encode() + b"\n")
        return guard

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self.client.is_healthy():
            self._check_alive()
            if time.monotonic() > deadline:
                raise StageError(
                    f"{PYTHON} must start a server within {START_SECONDS:.0f} s, got no answer; see {self._log_path}"
                )
            time.sleep(_POLL_SECONDS)

    def _check_alive(self) -> None:
        """See that the server runs.

        Raises:
            StageError: It has ended; tells its last words.
        """
        if self._guard is None or (code := self._guard.poll()) is None:
            return
        raise StageError(
            f"{PYTHON} must be a Python whose vLLM serves the model, got exit code {code}: "
            f"{_last_words(self._log_path)}; see {self._log_path}"
        )

    def _end(self) -> None:
        if self._client is not None:
            self._client.close()
        if self._guard is not None:
            self._guard.terminate()
            self._guard.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._client = self._guard = self._folder = None


def gpu_name(device: torch.device) -> str | None:
    """A GPU as ``CUDA_VISIBLE_DEVICES`` of any process takes it, whatever this one sees; None for the CPU."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None


def cache_bytes(text_config: Any, *, dtype: str, max_length: int, slots: int) -> int:
    """Size of the key/value cache in which ``slots`` utterances of the longest kind have room. Pure."""
    blocks = slots * -(-max_length // _BLOCK_TOKENS)
    values = 2 * text_config.num_hidden_layers * text_config.num_key_value_heads * text_config.head_dim
    # One block more: vLLM keeps it for itself.
    return (blocks + 1) * _BLOCK_TOKENS * values * getattr(torch, dtype).itemsize


def _options(model_folder: Path, *, dtype: str, max_length: int, slots: int) -> list[str]:
    return [
        *("--model", str(model_folder), "--served-model-name", MODEL_NAME),
        *("--dtype", dtype, "--max-model-len", str(max_length), "--max-num-seqs", str(slots)),
        "--enable-scale-out",  # the endpoint for tokens
        *("--generation-config", "vllm"),  # not the checkpoint's: its settings are for chats
        # Prompts have only their first few tokens in common, and no clip comes twice.
        *("--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"),
        "--disable-uvicorn-access-log",
    ]


def _socket_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="qad-vllm-"))
    if len(os.fsencode(folder)) <= _LONGEST_SOCKET_PATH - len("/vllm.sock"):
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="qad-vllm-", dir="/tmp"))


def _last_words(log_path: Path) -> str:
    """The last errors in a log, in one line; its end where there is none."""
    text = log_path.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in (_PREFIX.sub("", line).strip() for line in text.splitlines()) if line]
    # pydantic says what is wrong in the line below. The first of several errors is often the cause of the others.
    errors = [
        " ".join(lines[n : n + (2 if "validation error" in line else 1)])[:400]
        for n, line in enumerate(lines)
        if _ERROR.match(line)
    ]
    told = list(dict.fromkeys(errors)) or lines
    return " | ".join(told[-_TOLD_LINES:]) or "nothing"
