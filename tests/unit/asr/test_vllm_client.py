"""The client of a vLLM server: what it sends, what it takes for an answer, what it does where there is none."""

import socket
import threading
import time
from typing import Any

import numpy as np
import pytest

from qad_dist.asr import vllm_client
from qad_dist.asr.vllm_client import Served, VllmClient, wav_bytes
from shards.errors import ConfigError, ModelError, StageError
from tests.helpers.vllm import Answer, as_answer, scripted_server, sent_samples

END = 7
AUDIO = (np.arange(-800, 800) * 20).astype(np.int16)


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_client, "_WAITS_SECONDS", (0.0, 0.01, 0.01, 0.01))


def right(body: dict[str, Any], number: int) -> Answer:
    return 200, as_answer([1, 5, 5, 2], [3, 4, END])


def ask(client: VllmClient, **changes: Any) -> vllm_client.Generated:
    return client.generate([1, 5, 2], AUDIO, **{"model": "teacher", "max_tokens": 4, "end_id": END, **changes})


def test_request_asks_for_greedy_tokens_that_only_the_end_token_ends():
    with scripted_server(right) as scripted:
        generated = ask(VllmClient(scripted.address))

    (body,) = scripted.requests
    samples, rate, subtype = sent_samples(body)
    assert body["token_ids"] == [1, 5, 2]
    assert body["model"] == "teacher"
    assert body["return_token_ids"] is True
    assert body["sampling_params"] == {
        "temperature": 0.0,
        "max_tokens": 4,
        "logprobs": 0,
        "ignore_eos": True,
        "stop_token_ids": [END],
        "detokenize": False,
    }
    assert (rate, subtype) == (16_000, "PCM_16")
    assert np.array_equal(samples * 32768, AUDIO)
    assert generated.prompt_ids == (1, 5, 5, 2)
    assert generated.token_ids == (3, 4, END)
    assert generated.logprobs == (-0.5, -0.5, -0.5)


@pytest.mark.parametrize(
    ("audio", "subtype"),
    [
        (np.array([-32768, -1, 0, 1, 32767], np.int16), "PCM_16"),
        (np.array([-32768, -1, 0, 1, 32767], np.float32) / 32768, "PCM_16"),
        (np.array([1.0, -1.0, 0.5], np.float32), "FLOAT"),  # 1.0 is above what 16 bits hold
        (np.array([0.1, 1e-6, -0.3], np.float32), "FLOAT"),
    ],
)
def test_audio_is_sent_as_it_is(audio: np.ndarray, subtype: str):
    with scripted_server(right) as scripted:
        VllmClient(scripted.address).generate([1], audio, model="teacher", max_tokens=4, end_id=END)

    samples, _, sent_as = sent_samples(scripted.requests[0])
    expected = audio / np.float32(32768) if audio.dtype == np.int16 else audio
    assert sent_as == subtype
    assert np.array_equal(samples, expected)
    assert len(wav_bytes(np.zeros(100, np.int16))) < len(wav_bytes(np.full(100, 0.1, np.float32)))


def test_connection_is_used_again():
    with scripted_server(right) as scripted:
        client = VllmClient(scripted.address)
        for _ in range(5):
            ask(client)

    assert len(scripted.requests) == 5
    assert scripted.num_connections == 1


def test_connection_that_the_server_has_closed_meanwhile_is_replaced():
    with scripted_server(right) as scripted:
        scripted.closes_after_each = True
        client = VllmClient(scripted.address)
        for _ in range(3):
            assert ask(client).token_ids == (3, 4, END)

    assert len(scripted.requests) == 3


def test_all_connections_that_were_left_open_may_have_been_closed():
    """More of them than there are attempts."""
    together = threading.Barrier(8)

    def first_ones_together(body: dict[str, Any], number: int) -> Answer:
        if number < 8:
            together.wait(20)
        return right(body, number)

    with scripted_server(first_ones_together) as scripted:
        scripted.closes_after_each = True
        client = VllmClient(scripted.address)
        threads = [threading.Thread(target=ask, args=(client,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert ask(client).token_ids == (3, 4, END)

    assert len(scripted.requests) == 9


def test_broken_connection_is_tried_again():
    with scripted_server(lambda body, number: right(body, number) if number == 3 else None) as scripted:
        assert ask(VllmClient(scripted.address)).token_ids == (3, 4, END)

    assert len(scripted.requests) == 4


def test_server_that_always_breaks_off_is_an_error_in_the_end():
    with scripted_server(lambda body, number: None) as scripted:
        with pytest.raises(StageError, match=r"label\.vllm_url must be a running server, got RemoteDisconnected"):
            ask(VllmClient(scripted.address))

    assert len(scripted.requests) == 5


def test_nothing_that_listens_is_an_error_that_names_the_setting():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"

    with pytest.raises(StageError, match=rf"vllm_url must be a running server, got ConnectionRefused.*{address}"):
        VllmClient(address).served()
    assert not VllmClient(address).is_healthy()


def test_loss_of_a_server_that_has_ended_is_told_at_the_first_failure():
    def ended() -> None:
        raise StageError("it ended")

    with scripted_server(lambda body, number: None) as scripted, pytest.raises(StageError, match="it ended"):
        ask(VllmClient(scripted.address, on_lost=ended))

    assert len(scripted.requests) == 1


@pytest.mark.parametrize(
    ("status", "message", "expected"),
    [
        (500, "out of blocks", r"label\.vllm_url must answer POST .*, got 500 from .*: out of blocks"),
        (
            403,
            "endpoints are disabled",
            r"label\.vllm_url .*403: endpoints .*; start it .*--enable-scale-out",
        ),
        (404, "Not Found", r"label\.vllm_url .*404: Not Found; start it .*--enable-scale-out"),
    ],
)
def test_refusal_is_told_and_not_tried_again(status: int, message: str, expected: str):
    with scripted_server(lambda body, number: (status, {"error": {"message": message}})) as scripted:
        with pytest.raises(StageError, match=expected):
            ask(VllmClient(scripted.address))

    assert len(scripted.requests) == 1


def test_answer_that_does_not_come_in_time_is_an_error():
    release = threading.Event()

    def late(body: dict[str, Any], number: int) -> Answer:
        release.wait(30)
        return None

    with scripted_server(late) as scripted:
        with pytest.raises(StageError, match=r"label\.vllm_url must answer within 0\.1 s, got nothing"):
            ask(VllmClient(scripted.address, timeout_seconds=0.1))
        release.set()

    assert len(scripted.requests) == 1


@pytest.mark.parametrize(
    ("token_ids", "finish_reason"),
    [
        ([3, 4, 6], "stop"),  # another token ended it
        ([3, END, 4, END], "stop"),
        ([3, 4, 6], "length"),  # cut before it reached the limit: the server's own limit
        ([3, 4, 6, END], "length"),
        ([3, 4], "abort"),
        ([], "stop"),
    ],
)
def test_response_that_ends_in_another_way_is_refused(token_ids: list[int], finish_reason: str):
    answer = as_answer([1], token_ids, finish_reason=finish_reason)
    with scripted_server(lambda body, number: (200, answer)) as scripted:
        with pytest.raises(ModelError, match=rf"end a response by token 7 or after 4 tokens, got '{finish_reason}'"):
            ask(VllmClient(scripted.address))


@pytest.mark.parametrize(("token_ids", "reason"), [([3, 4, 6, 6], "length"), ([3, 4, 6, END], "stop")])
def test_response_that_reaches_the_limit_is_cut_or_whole(token_ids: list[int], reason: str):
    answer = as_answer([1], token_ids, finish_reason=reason)
    with scripted_server(lambda body, number: (200, answer)) as scripted:
        assert ask(VllmClient(scripted.address)).token_ids == tuple(token_ids)


@pytest.mark.parametrize("logprob", [-9999.0, float("nan"), float("-inf")])
def test_log_probability_that_is_no_number_is_refused(logprob: float):
    with scripted_server(lambda body, number: (200, as_answer([1], [END], logprob=logprob))) as scripted:
        with pytest.raises(ModelError, match="log-probabilities that are numbers"):
            ask(VllmClient(scripted.address))


@pytest.mark.parametrize(
    "answer",
    [{}, {"choices": []}, {**as_answer([1], [END]), "prompt_token_ids": None}, ["no answer"]],
)
def test_answer_without_tokens_is_refused(answer: Any):
    with scripted_server(lambda body, number: (200, answer)) as scripted:
        with pytest.raises(ModelError, match=r"label\.vllm_url must return the tokens of a response, got"):
            ask(VllmClient(scripted.address))


def test_log_probabilities_must_be_as_many_as_tokens():
    answer = as_answer([1], [3, END])
    answer["choices"][0]["logprobs"]["content"].pop()

    with scripted_server(lambda body, number: (200, answer)) as scripted:
        with pytest.raises(ModelError, match="after 2 with 1 log-probabilities"):
            ask(VllmClient(scripted.address))


def test_served_model_is_the_one_that_adapters_belong_to():
    with scripted_server(right) as scripted:
        (model,) = scripted.models["data"]
        scripted.models["data"].insert(0, {**model, "id": "adapter", "root": "/adapter", "parent": "teacher"})

        served = VllmClient(scripted.address).served()

    assert served == Served(version="0.0.1", model="teacher", root="/models/nano", max_length=1000)


def test_other_kind_of_server_is_refused():
    with scripted_server(right) as scripted:
        scripted.models = {"models": ["llama"]}

        with pytest.raises(StageError, match=r"label\.vllm_url must be a vLLM server, got .* with the models"):
            VllmClient(scripted.address).served()


@pytest.mark.parametrize(
    "address", ["127.0.0.1:8000", "ftp://host:8000", "http://host:8000/v1", "http://host:port", "http://", "host"]
)
def test_address_of_another_form_is_refused(address: str):
    with pytest.raises(ConfigError, match=r"label\.vllm_url must be http://host:port, got "):
        VllmClient(address)


def test_abort_ends_requests_in_flight_at_once_and_leaves_the_client_usable():
    arrived, release = threading.Event(), threading.Event()

    def late(body: dict[str, Any], number: int) -> Answer:
        if number == 0:
            arrived.set()
            release.wait(30)
            return None
        return right(body, number)

    errors: list[StageError] = []
    with scripted_server(late) as scripted:
        client = VllmClient(scripted.address)

        def blocked() -> None:
            try:
                ask(client)
            except StageError as error:
                errors.append(error)

        thread = threading.Thread(target=blocked)
        thread.start()
        assert arrived.wait(10)
        begun = time.monotonic()
        client.abort()
        thread.join(10)
        seconds = time.monotonic() - begun
        after = ask(client)
        release.set()

    assert seconds < 5
    assert "broken off" in str(errors[0])
    assert after.token_ids == (3, 4, END)
    assert len(scripted.requests) == 2
