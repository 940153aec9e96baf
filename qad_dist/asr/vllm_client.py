"""A vLLM server, spoken to in tokens: the ids of a prompt and its audio go in, the ids of the response come out.

vLLM's endpoint for chats renders prompts by itself, and cannot tell this model the language. Its endpoint for tokens
(``/inference/v1/generate``) takes prompt ids as they are and only puts the audio's placeholders in, so that the prompt
is this project's to the last token; what vLLM made of it comes back and is compared.
"""

import base64
import contextlib
import http.client
import io
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import soundfile

from shards.errors import ConfigError, ModelError, StageError
from shards.read import Codes
from shards.schema import SAMPLE_RATE_HZ

URL = "label.vllm_url"
"""The setting that names a server, for messages."""
START = "vllm serve MODEL --enable-scale-out"
"""What starts a server that this client can talk to."""

GENERATE = "/inference/v1/generate"

# Before the next attempt, where a connection was refused or broke.
_WAITS_SECONDS = (0.0, 0.5, 2.0, 5.0)
_HEALTH_SECONDS = 5.0
_INT16_SCALE = 1 << 15
# What vLLM tells in the place of a log-probability that is no number.
_NO_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a server says of itself."""

    version: str
    """Of vLLM."""
    model: str
    """The name by which requests ask for it."""
    root: str
    """The folder or hub id that it was loaded from, on the server's machine."""
    max_length: int
    """Most tokens of prompt and response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One response."""

    prompt_ids: tuple[int, ...]
    """The prompt with the placeholders of the audio in place."""
    token_ids: tuple[int, ...]
    """The response, end token included if it came."""
    logprobs: tuple[float, ...]
    """Natural log-probability of each of its tokens."""


class VllmClient:
    """Asks one server. Threads may share it: each request in flight has a connection of its own."""

    def __init__(
        self, address: str, *, timeout_seconds: float = 1800.0, on_lost: Callable[[], None] = lambda: None
    ) -> None:
        """Take an address; nothing is sent yet.

        Args:
            address: ``http://host:port``, ``https://host:port``, or ``unix:`` and the path of a socket.
            timeout_seconds: How long one answer may take.
            on_lost: Called where a connection fails, before another attempt; raises if there is no use in it.

        Raises:
            ConfigError: The address has another form.
        """
        self.address = address
        self._connector = _connector(address)
        self._timeout_seconds = timeout_seconds
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []
        self._busy: set[http.client.HTTPConnection] = set()
        self._aborts = 0

    def is_healthy(self) -> bool:
        """Whether the server answers, and is ready."""
        connection = self._connector(_HEALTH_SECONDS)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def served(self) -> Served:
        """What the server serves.

        Raises:
            StageError: It cannot be reached, or is no vLLM server.
        """
        version, models = self._ask("GET", "/version"), self._ask("GET", "/v1/models")
        try:
            # Adapters come behind the model, and have it as parent.
            model = next(entry for entry in models["data"] if entry.get("parent") is None)
            return Served(
                version=str(version["version"]),
                model=str(model["id"]),
                root=str(model["root"]),
                max_length=int(model["max_model_len"]),
            )
        except (KeyError, TypeError, ValueError, StopIteration) as cause:
            raise StageError(
                f"{URL} must be a vLLM server, got {self.address} with the models {json.dumps(models)[:200]}; "
                f"start one: {START}"
            ) from cause

    def generate(
        self, prompt_ids: Sequence[int], audio: Codes, *, model: str, max_tokens: int, end_id: int
    ) -> Generated:
        """The greedy response to one utterance.

        Args:
            prompt_ids: With one placeholder where the audio goes.
            audio: 16 kHz, mono: int16, or float32 in [-1, 1].
            model: Name of the model, from :meth:`served`.
            max_tokens: A response that reaches it is cut.
            end_id: Ends the response, and nothing else does.

        Raises:
            ModelError: What comes back is no response to that.
            StageError: The server cannot be reached, or refuses.
        """
        part = {"type": "audio_url", "url": "data:audio/wav;base64," + base64.b64encode(wav_bytes(audio)).decode()}
        sampling = {
            "temperature": 0.0,
            "max_tokens": max_tokens,
            "logprobs": 0,  # of the chosen tokens alone
            # The checkpoint's generation_config.json may name other tokens that end a response.
            "ignore_eos": True,
            "stop_token_ids": [end_id],
            "detokenize": False,
        }
        body = {
            "model": model,
            "token_ids": list(prompt_ids),
            "content_parts": [part],
            "sampling_params": sampling,
            "return_token_ids": True,
        }
        answer = self._ask("POST", GENERATE, json.dumps(body).encode())
        return _generated(answer, max_tokens=max_tokens, end_id=end_id)

    def abort(self) -> None:
        """Break off the requests in flight, which then fail at once. Others can follow."""
        with self._lock:
            self._aborts += 1
            for connection in self._busy:
                if connection.sock is not None:
                    with contextlib.suppress(OSError):  # it may have been closed meanwhile
                        connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Break off what is in flight and close all connections."""
        self.abort()
        with self._lock:
            while self._idle:
                self._idle.pop().close()

    def _ask(self, method: str, path: str, body: bytes | None = None) -> Any:
        """The JSON that the server answers with."""
        status, data = self._request(method, path, body)
        try:
            answer = json.loads(data)
        except ValueError:
            answer = None
        if status == http.HTTPStatus.OK and answer is not None:
            return answer
        told = _message(answer, data)
        if path == GENERATE and status in (http.HTTPStatus.FORBIDDEN, http.HTTPStatus.NOT_FOUND):
            raise StageError(f"{URL} must be a server with {GENERATE}, got {status}: {told}; start it as {START}")
        raise StageError(
            f"{URL} must answer {method} {path}, got {status} from {self.address}: {told}; see the server's log"
        )

    def _request(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        """Status and body of an answer. A connection that is refused or breaks is tried again: asking twice is safe."""
        aborts = self._aborts
        for attempt, wait in enumerate((*_WAITS_SECONDS, None)):
            # One that was left open may have been closed by the server; a second attempt wants a new one.
            connection = self._take(reuse=attempt == 0)
            try:
                return self._answer(connection, method, path, body)
            except TimeoutError as cause:
                raise StageError(
                    f"{URL} must answer within {self._timeout_seconds:g} s, got nothing from {self.address}; "
                    "see the server's log, or lower label.slots"
                ) from cause
            except (OSError, http.client.HTTPException) as cause:
                if aborts != self._aborts:
                    raise StageError(f"{URL} must be asked again, got broken off at {self.address}") from cause
                self._on_lost()
                if wait is None:
                    raise StageError(
                        f"{URL} must be a running server, got {type(cause).__name__} ({cause}) from {self.address}; "
                        f"start one: {START}"
                    ) from cause
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _answer(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None
    ) -> tuple[int, bytes]:
        try:
            connection.request(method, path, body, {} if body is None else {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read()
        except BaseException:
            with self._lock:
                self._busy.discard(connection)
            connection.close()
            raise
        with self._lock:
            self._busy.discard(connection)
            self._idle.append(connection)
        return response.status, data

    def _take(self, *, reuse: bool) -> http.client.HTTPConnection:
        with self._lock:
            connection = self._idle.pop() if reuse and self._idle else self._connector(self._timeout_seconds)
            self._busy.add(connection)
        return connection


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a socket in the file system, which nobody else on the machine can open."""

    def __init__(self, path: str, *, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Open the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def wav_bytes(audio: Codes) -> bytes:
    """A WAV file of exactly these audio samples: 16 bits where they are, else float32."""
    codes = audio
    if audio.dtype != np.int16:
        scaled = audio.astype(np.float64) * _INT16_SCALE
        rounded = np.clip(np.rint(scaled), -_INT16_SCALE, _INT16_SCALE - 1)
        codes = rounded.astype(np.int16) if np.array_equal(rounded, scaled) else audio
    buffer = io.BytesIO()
    subtype = "PCM_16" if codes.dtype == np.int16 else "FLOAT"
    soundfile.write(buffer, codes, SAMPLE_RATE_HZ, subtype=subtype, format="WAV")
    return buffer.getvalue()


def _connector(address: str) -> Callable[[float], http.client.HTTPConnection]:
    """What makes connections to an address, given their timeout in seconds."""
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        return lambda timeout: _UnixConnection(path, timeout=timeout)
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or parts.scheme not in ("http", "https") or parts.path.strip("/") or parts.query:
        raise ConfigError(f"{URL} must be http://host:port, got {address!r}; leave out what follows the port")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return lambda timeout: kind(host, port, timeout=timeout)


def _generated(answer: Any, *, max_tokens: int, end_id: int) -> Generated:
    try:
        choice = answer["choices"][0]
        found = Generated(
            prompt_ids=tuple(map(int, answer["prompt_token_ids"])),
            token_ids=tuple(map(int, choice["token_ids"])),
            logprobs=tuple(float(entry["logprob"]) for entry in choice["logprobs"]["content"]),
        )
        ended = choice["finish_reason"]
    except (KeyError, IndexError, TypeError, ValueError) as cause:
        raise ModelError(
            f"{URL} must return the tokens of a response, got {json.dumps(answer)[:200]}; use a newer vLLM"
        ) from cause
    tokens = len(found.token_ids)
    whole = ended == "stop" and found.token_ids[-1:] == (end_id,) and end_id not in found.token_ids[:-1]
    cut = ended == "length" and tokens == max_tokens and end_id not in found.token_ids
    if not (whole or cut) or len(found.logprobs) != tokens:
        raise ModelError(
            f"{URL} must end a response by token {end_id} or after {max_tokens} tokens, got {ended!r} after {tokens} "
            f"with {len(found.logprobs)} log-probabilities; start it with a larger --max-model-len"
        )
    if wrong := [value for value in found.logprobs if not math.isfinite(value) or value <= _NO_LOGPROB]:
        raise ModelError(f"{URL} must return log-probabilities that are numbers, got {wrong[0]}; use another dtype")
    return found


def _message(answer: Any, data: bytes) -> str:
    """What an answer says that is none."""
    if isinstance(answer, dict) and isinstance(error := answer.get("error"), dict):
        return str(error.get("message"))[:300]
    return data[:300].decode(errors="replace")
