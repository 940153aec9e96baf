"""A server that speaks vLLM's protocol as far as the client uses it, without any model: its answers are scripted."""

import base64
import io
import json
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import soundfile

from qad_dist.asr.audio_tower import num_audio_tokens
from qad_dist.asr.mel import num_frames
from qad_dist.asr.prompt import Prompt

Answer = tuple[int, Any] | None
"""Status and JSON; None closes the connection without an answer."""


@dataclass
class Scripted:
    """What a server is asked, and how it answers."""

    generate: Callable[[dict[str, Any], int], Answer]
    """Given a request's JSON and its running number, from 0."""
    address: str = ""
    models: Any = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Of the endpoint for tokens."""
    num_connections: int = 0
    closes_after_each: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments: Any, scripted: Scripted) -> None:
        self.scripted = scripted
        super().__init__(*arguments)

    def setup(self) -> None:
        super().setup()
        with self.scripted.lock:
            self.scripted.num_connections += 1

    def do_GET(self) -> None:
        answers = {"/health": {}, "/version": {"version": "0.0.1"}, "/v1/models": self.scripted.models}
        self.answer((200, answers[self.path]) if self.path in answers else (404, {"error": {"message": "Not Found"}}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.scripted.lock:
            number = len(self.scripted.requests)
            self.scripted.requests.append(body)
        self.answer(self.scripted.generate(body, number))

    def answer(self, answer: Answer) -> None:
        if answer is None:
            self.close_connection = True
            return
        data = json.dumps(answer[1]).encode()
        self.send_response(answer[0])
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        # Without a word of it: as a server that has waited long enough for the next request.
        self.close_connection = self.scripted.closes_after_each

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def scripted_server(generate: Callable[[dict[str, Any], int], Answer]) -> Generator[Scripted]:
    """Serve on the loopback interface until the block ends."""
    scripted = Scripted(generate)
    scripted.models = {"data": [{"id": "teacher", "root": "/models/nano", "parent": None, "max_model_len": 1000}]}
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, scripted=scripted))
    server.daemon_threads = True
    scripted.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield scripted
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def sent_samples(body: dict[str, Any]) -> tuple[np.ndarray, int, str]:
    """Audio of a request, its rate, and how it was stored."""
    (part,) = body["content_parts"]
    assert part["type"] == "audio_url"
    head, _, data = part["url"].partition(",")
    assert head == "data:audio/wav;base64"
    with soundfile.SoundFile(io.BytesIO(base64.b64decode(data))) as file:
        return file.read(dtype="float32"), file.samplerate, file.subtype


def as_answer(
    prompt_ids: list[int], token_ids: list[int], *, finish_reason: str = "stop", logprob: float = -0.5
) -> dict[str, Any]:
    """A response as vLLM 0.32 gives it, as far as the client reads it."""
    content = [{"token_id": token, "logprob": logprob, "rank": 1, "top_logprobs": []} for token in token_ids]
    choice = {"index": 0, "finish_reason": finish_reason, "token_ids": token_ids, "logprobs": {"content": content}}
    return {"prompt_token_ids": prompt_ids, "choices": [choice]}


def expanded(body: dict[str, Any], prompt: Prompt) -> list[int]:
    """A request's prompt with as many placeholders as its audio takes."""
    ids = body["token_ids"]
    place = ids.index(prompt.audio_id)
    count = num_audio_tokens(num_frames(len(sent_samples(body)[0])))
    return [*ids[:place], *[prompt.audio_id] * count, *ids[place + 1 :]]
