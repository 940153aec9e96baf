"""Utterances through a vLLM server to hypotheses: prompts, order, what is in flight together, errors."""

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qad_dist.asr.checkpoint import load_processor
from qad_dist.asr.mel import num_frames
from qad_dist.asr.prompt import Prompt
from qad_dist.asr.vllm import AudioRequest, VllmTeacher, check_served, open_teacher, transcribe_with_vllm
from qad_dist.asr.vllm_client import Served, VllmClient
from qad_dist.config.label import LabelConfig
from qad_dist.config.model import ModelConfig
from shards.errors import ConfigError, ModelError, StageError
from shards.schema import ENDED_BY_END_TOKEN, ENDED_BY_LENGTH
from tests.helpers.vllm import Answer, Scripted, as_answer, expanded, scripted_server, sent_samples

LIMIT = 40


@pytest.fixture(scope="module")
def prompt(nano_folder: Path) -> Prompt:
    return Prompt.from_processor(load_processor(nano_folder))


@pytest.fixture
def settings() -> LabelConfig:
    return LabelConfig(backend="vllm", vllm_python="python")


class Spoken:
    """A server that answers each utterance with its number of frames, and notes what is in flight together.

    The first requests come in groups: none of a group is answered before all of it have arrived.
    """

    def __init__(
        self, prompt: Prompt, *, tag: str = "language English<asr_text>", groups: Sequence[int] = (), delay: float = 0.0
    ) -> None:
        self.prompt, self.tag, self.delay = prompt, tag, delay
        self.together: list[list[int]] = []
        self._complete = [end for end, size in zip(accumulate(groups), groups, strict=True) for _ in range(size)]
        self._now: list[int] = []
        self._num_arrived = 0
        self._changed = threading.Condition()

    def __call__(self, body: dict[str, Any], number: int) -> Answer:
        frames = num_frames(len(sent_samples(body)[0]))
        with self._changed:
            self._now.append(frames)
            self._num_arrived += 1
            self.together.append(sorted(self._now, reverse=True))
            self._changed.notify_all()
            if number < len(self._complete):
                assert self._changed.wait_for(lambda: self._num_arrived >= self._complete[number], timeout=20)
        # The answers come in another order than the requests.
        time.sleep(self.delay * (3 - number % 3))
        with self._changed:
            self._now.remove(frames)
        ids = self.prompt.tokenizer(f"{self.tag}{frames}")["input_ids"]
        return 200, as_answer(expanded(body, self.prompt), [*ids, self.prompt.end_id])


@contextmanager
def teacher_of(generate: Any, *, max_length: int = 1000) -> Generator[tuple[VllmTeacher, Scripted]]:
    with scripted_server(generate) as scripted:
        served = Served(version="0.0.1", model="teacher", root="/models/nano", max_length=max_length)
        yield VllmTeacher(VllmClient(scripted.address), served), scripted


def requests_of(frames: list[int], language: str | None = None) -> list[AudioRequest]:
    return [AudioRequest(np.full(count * 160, 100, np.int16), LIMIT, language) for count in frames]


def test_each_utterance_gets_its_own_response(prompt: Prompt):
    frames = [500 - 3 * i for i in range(40)]
    steps = 0

    def on_step() -> None:
        nonlocal steps
        steps += 1

    with teacher_of(Spoken(prompt, delay=0.002)) as (teacher, _):
        found = list(transcribe_with_vllm(teacher, prompt, requests_of(frames), in_flight=7, on_step=on_step))

    assert sorted(number for number, _ in found) == list(range(40))
    assert [hypothesis.text for _, hypothesis in sorted(found, key=lambda one: one[0])] == list(map(str, frames))
    assert {hypothesis.language for _, hypothesis in found} == {"English"}
    assert {hypothesis.ended_by for _, hypothesis in found} == {ENDED_BY_END_TOKEN}
    assert all(len(h.token_logprobs) == len(h.token_ids) and h.token_ids[-1] == prompt.end_id for _, h in found)
    assert steps == 40


def test_nothing_to_transcribe_is_nothing(prompt: Prompt):
    with teacher_of(Spoken(prompt)) as (teacher, scripted):
        assert list(transcribe_with_vllm(teacher, prompt, [], in_flight=3)) == []

    assert scripted.requests == []


def test_prompt_has_one_placeholder_and_the_context(prompt: Prompt):
    told = prompt.with_context("four, five")

    with teacher_of(Spoken(told)) as (teacher, scripted):
        list(transcribe_with_vllm(teacher, told, requests_of([120]), in_flight=1))

    assert scripted.requests[0]["token_ids"] == told.build(1)
    assert scripted.requests[0]["token_ids"] != prompt.build(1)
    assert scripted.requests[0]["sampling_params"]["max_tokens"] == LIMIT


def test_told_language_is_in_the_prompt_and_all_of_the_response_is_text(prompt: Prompt):
    with teacher_of(Spoken(prompt, tag="")) as (teacher, scripted):
        requests = requests_of([120], "German")
        ((_, hypothesis),) = transcribe_with_vllm(teacher, prompt, requests, in_flight=1)

    assert scripted.requests[0]["token_ids"] == prompt.build(1, language="German")
    assert (hypothesis.text, hypothesis.language) == ("120", "German")


def test_response_that_reaches_the_limit_is_marked(prompt: Prompt):
    def cut(body: dict[str, Any], number: int) -> Answer:
        return 200, as_answer(expanded(body, prompt), [65] * LIMIT, finish_reason="length")

    with teacher_of(cut) as (teacher, _):
        ((_, hypothesis),) = transcribe_with_vllm(teacher, prompt, requests_of([120]), in_flight=1)

    assert hypothesis.ended_by == ENDED_BY_LENGTH
    assert hypothesis.token_ids == (65,) * LIMIT


def test_no_more_are_in_flight_or_read_than_asked_for(prompt: Prompt):
    """One more is read, to see whether it may go along."""
    num_read = 0

    def reading() -> Iterator[AudioRequest]:
        nonlocal num_read
        for request in requests_of([200 + i for i in range(30)]):
            num_read += 1
            yield request

    spoken = Spoken(prompt, groups=[4])
    with teacher_of(spoken) as (teacher, _):
        found = transcribe_with_vllm(teacher, prompt, reading(), in_flight=4)
        next(found)
        read_at_first = num_read
        num_yielded = 1 + sum(1 for _ in found)

    assert read_at_first == 5
    assert max(map(len, spoken.together)) == 4
    assert num_yielded == num_read == 30


def test_utterances_below_a_second_are_in_flight_with_their_like_only(prompt: Prompt):
    """In vLLM the answer to such an utterance depends on the longest that is encoded with it."""
    groups = [[300, 200, 101, 100], [99, 99, 99], [98], [60, 60], [150], [60], [120, 100]]
    frames = [count for group in groups for count in group]
    spoken = Spoken(prompt, groups=[len(group) for group in groups])

    with teacher_of(spoken) as (teacher, _):
        found = dict(transcribe_with_vllm(teacher, prompt, requests_of(frames), in_flight=4))

    assert [found[i].text for i in range(len(frames))] == list(map(str, frames))
    assert all(group in spoken.together for group in groups)
    for together in spoken.together:
        assert min(together) >= 100 or len(set(together)) == 1, together


def test_other_prompt_than_ours_is_refused(prompt: Prompt):
    def one_less(body: dict[str, Any], number: int) -> Answer:
        ids = expanded(body, prompt)
        ids.remove(prompt.audio_id)
        return 200, as_answer(ids, [prompt.end_id])

    with teacher_of(one_less) as (teacher, _):
        with pytest.raises(ModelError, match=r"label\.vllm_url must put 42 prompt tokens .*, got 41"):
            list(transcribe_with_vllm(teacher, prompt, requests_of([120]), in_flight=1))


def test_utterance_that_does_not_fit_is_refused_before_it_is_sent(prompt: Prompt):
    num_tokens = len(prompt.build(16)) + LIMIT  # 16 audio tokens in 120 frames

    with teacher_of(Spoken(prompt), max_length=num_tokens - 1) as (teacher, scripted):
        with pytest.raises(ModelError, match=rf"must take {num_tokens} tokens .*--max-model-len {num_tokens}"):
            list(transcribe_with_vllm(teacher, prompt, requests_of([120]), in_flight=1))
        assert scripted.requests == []

    with teacher_of(Spoken(prompt), max_length=num_tokens) as (teacher, _):
        assert len(list(transcribe_with_vllm(teacher, prompt, requests_of([120]), in_flight=1))) == 1


def test_error_ends_all_at_once_though_others_are_in_flight(prompt: Prompt):
    release = threading.Event()

    def stuck(body: dict[str, Any], number: int) -> Answer:
        if number == 3:
            return 500, {"error": {"message": "broken"}}
        release.wait(30)
        return None

    with teacher_of(stuck) as (teacher, scripted):
        begun = time.monotonic()
        with pytest.raises(StageError, match="broken"):
            list(transcribe_with_vllm(teacher, prompt, requests_of([200] * 9), in_flight=4))
        seconds = time.monotonic() - begun
        release.set()

    assert seconds < 10
    assert len(scripted.requests) == 4


def test_error_of_what_reads_the_audio_is_passed_on(prompt: Prompt):
    def reading() -> Iterator[AudioRequest]:
        yield from requests_of([200])
        raise OSError("disk gone")

    with teacher_of(Spoken(prompt)) as (teacher, _), pytest.raises(OSError, match="disk gone"):
        list(transcribe_with_vllm(teacher, prompt, reading(), in_flight=4))


@pytest.mark.parametrize(
    ("root", "path"),
    [
        ("Qwen/Qwen3-ASR-0.6B", "Qwen/Qwen3-ASR-0.6B"),
        ("/elsewhere/Qwen3-ASR-0.6B", "Qwen/Qwen3-ASR-0.6B"),
        ("Qwen/Qwen3-ASR-0.6B", "/data/Qwen3-ASR-0.6B"),
        ("/data/Qwen3-ASR-0.6B/", "/data/Qwen3-ASR-0.6B"),
    ],
)
def test_server_with_the_teachers_name_is_taken(root: str, path: str, tmp_path: Path):
    served = Served(version="0.0.1", model="m", root=root, max_length=640)

    check_served(served, path=path, folder=tmp_path / "snapshots" / "5eb144179a02", max_length=640)


def test_server_of_the_same_folder_under_another_name_is_taken(nano_folder: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(nano_folder)
    served = Served(version="0.0.1", model="m", root=str(tmp_path / "link"), max_length=640)

    check_served(served, path=str(nano_folder), folder=nano_folder, max_length=640)


@pytest.mark.parametrize("other", ["Qwen/Qwen3-ASR-1.7B", "/models/nano"])
def test_server_of_another_model_is_refused(other: str, nano_folder: Path):
    served = Served(version="0.0.1", model="m", root=other, max_length=640)

    with pytest.raises(ModelError, match=rf"label\.vllm_url must serve .*nano-teacher, got {other}; start it as vllm"):
        check_served(served, path=str(nano_folder), folder=nano_folder, max_length=640)


def test_server_that_takes_too_few_tokens_is_refused(nano_folder: Path):
    served = Served(version="0.0.1", model="m", root=str(nano_folder), max_length=639)

    with pytest.raises(ModelError, match=r"must take 640 tokens .*, got 639; start it with --max-model-len 640"):
        check_served(served, path=str(nano_folder), folder=nano_folder, max_length=640)


def test_full_audio_attention_is_refused(settings: LabelConfig, nano_folder: Path, tmp_path: Path):
    model = ModelConfig(path=str(nano_folder), audio_attention="full")

    with pytest.raises(
        ConfigError, match=r"model\.audio_attention must be windowed with label\.backend vllm, got full"
    ):
        with open_teacher(settings, model, nano_folder, log_path=tmp_path / "log", max_length=640, gpu=None):
            pass


def test_running_server_is_opened_by_its_address(nano_folder: Path, tmp_path: Path, prompt: Prompt):
    with scripted_server(Spoken(prompt)) as scripted:
        scripted.models["data"][0]["root"] = str(nano_folder)
        settings = LabelConfig(backend="vllm", vllm_url=scripted.address)
        model = ModelConfig(path=str(nano_folder))

        with open_teacher(settings, model, nano_folder, log_path=tmp_path / "log", max_length=640, gpu=None) as teacher:
            found = dict(transcribe_with_vllm(teacher, prompt, requests_of([123]), in_flight=2))

    assert teacher.served.version == "0.0.1"
    assert found[0].text == "123"
    assert list(tmp_path.iterdir()) == []
