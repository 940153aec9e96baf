"""A real vLLM server with the embedded teacher, where QAD_VLLM_PYTHON names the Python of an environment with vLLM.

Servers take about half a minute to start. Loopback only; each ends with its test, whatever happens.
"""

import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from qad_dist.asr.checkpoint import load_config
from qad_dist.asr.load import AsrModel
from qad_dist.asr.vllm import VllmTeacher, open_teacher
from qad_dist.asr.vllm_server import VllmServer
from qad_dist.config.label import LabelConfig
from qad_dist.config.model import ModelConfig
from shards.errors import StageError
from shards.schema import ENDED_BY_LENGTH
from tests.benchmarks.label_vllm import MAX_LENGTH, Clip, by_this_project, by_vllm, differences, make_clips
from tests.helpers.launching import Started
from tests.helpers.qwen import NANO, digit_entries, load

PYTHON = os.environ.get("QAD_VLLM_PYTHON", "")

pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="needs vLLM: set QAD_VLLM_PYTHON to the Python of its environment"),
    pytest.mark.slow,
]

IN_FLIGHT = 32
# Float32 on both sides, through other kernels. Farthest seen: 1.2e-5.
LOGPROB_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def teacher() -> AsrModel:
    torch.set_num_threads(1)
    return load()


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmTeacher]:
    settings = LabelConfig(backend="vllm", vllm_python=PYTHON, slots=IN_FLIGHT)
    model = ModelConfig(path=str(NANO), dtype="float32")
    log_path = tmp_path_factory.mktemp("vllm") / "vllm.log"
    with open_teacher(settings, model, NANO, log_path=log_path, max_length=MAX_LENGTH, gpu=None) as opened:
        yield opened


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    speech = os.environ.get("QAD_SPEECH_DIR")
    return make_clips(Path(speech) if speech else None)


def test_server_says_what_it_serves(vllm: VllmTeacher):
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", vllm.served.version)
    assert vllm.served.root == str(NANO)
    assert vllm.served.max_length == MAX_LENGTH


def test_server_is_reached_from_this_machine_alone(vllm: VllmTeacher):
    assert vllm.client.address.startswith("unix:")
    processes = [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    addresses = {
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }

    assert any("vllm" in " ".join(process.cmdline()).lower() for process in processes)
    assert addresses <= {"127.0.0.1", "::1"}


def test_tokens_are_this_projects_but_for_near_ties(teacher: AsrModel, vllm: VllmTeacher, clips: list[Clip]):
    ours = by_this_project(teacher, clips)

    theirs = by_vllm(teacher, vllm, clips, in_flight=IN_FLIGHT)

    assert len(clips) >= 100
    assert sum(clip.seconds >= 8 for clip in clips) >= 20
    assert sum(clip.seconds < 1 for clip in clips) >= 9
    unlike = differences(teacher, clips, ours, [hypothesis.token_ids for hypothesis in theirs])
    assert all(difference.is_near_tie for difference in unlike), unlike
    assert len(unlike) <= len(clips) // 50
    for own, other in zip(ours, theirs, strict=True):
        if own.token_ids == other.token_ids:
            assert (own.text, own.language, own.ended_by) == (other.text, other.language, other.ended_by)
            np.testing.assert_allclose(own.token_logprobs, other.token_logprobs, rtol=0, atol=LOGPROB_TOLERANCE)


def test_what_is_in_flight_together_does_not_change_a_response(teacher: AsrModel, vllm: VllmTeacher, clips: list[Clip]):
    """Clips below a second and others, one by one and many at once."""
    chosen = [*clips[:40], *clips[80:90]]
    chosen += [Clip(f"{clip.key}-cut", clip.kind, clip.audio_A[: 5_000 + 300 * i]) for i, clip in enumerate(clips[:30])]

    alone, together = (by_vllm(teacher, vllm, chosen, in_flight=count) for count in (1, IN_FLIGHT))

    unlike = differences(teacher, chosen, alone, [hypothesis.token_ids for hypothesis in together])
    assert all(difference.is_near_tie for difference in unlike), unlike
    for own, other in zip(alone, together, strict=True):
        if own.token_ids == other.token_ids:
            np.testing.assert_allclose(own.token_logprobs, other.token_logprobs, rtol=0, atol=LOGPROB_TOLERANCE)


def test_told_language_and_context_are_in_the_prompt(teacher: AsrModel, vllm: VllmTeacher, clips: list[Clip]):
    """The client refuses a prompt that is not this project's to the last token, so that all of them were."""
    chosen = clips[:80]
    languages = [entry["language"] for entry in digit_entries(80)]
    told = AsrModel(
        teacher.model, teacher.processor, teacher.prompt.with_context("digits: one, two"), NANO, teacher.audio_attention
    )
    ours = by_this_project(told, chosen, languages=languages)

    theirs = by_vllm(told, vllm, chosen, in_flight=IN_FLIGHT, languages=languages)

    tokens = [hypothesis.token_ids for hypothesis in theirs]
    unlike = differences(told, chosen, ours, tokens, languages=languages)
    assert all(difference.is_near_tie for difference in unlike), unlike
    assert len(unlike) <= 2
    assert {h.language for h in theirs if h.text} == set(languages)
    assert sum(a != h.token_ids for a, h in zip(tokens, by_this_project(teacher, chosen), strict=True)) == 80


def test_response_is_cut_at_its_limit(teacher: AsrModel, vllm: VllmTeacher, clips: list[Clip]):
    chosen = clips[:8]
    whole = by_vllm(teacher, vllm, chosen, in_flight=8)

    cut = by_vllm(teacher, vllm, chosen, in_flight=8, limit=4)

    assert [hypothesis.token_ids for hypothesis in cut] == [hypothesis.token_ids[:4] for hypothesis in whole]
    assert {hypothesis.ended_by for hypothesis in cut} == {ENDED_BY_LENGTH}


def test_server_that_cannot_start_tells_why(tmp_path: Path):
    server = VllmServer(
        PYTHON,
        NANO,
        log_path=tmp_path / "vllm.log",
        dtype="float32",
        max_length=1_000_000,  # more than the model's positions
        slots=1,
        config=load_config(NANO),
    )

    with pytest.raises(
        StageError, match=r"label\.vllm_python must be .* exit code 1: .*max_model_len.*; see .*vllm\.log"
    ):
        server.__enter__()


@pytest.mark.parametrize("victims", ["owner", "guard", "owner, guard and server"])
def test_nothing_is_left_of_a_server_when_a_process_is_killed(victims: str, tmp_path: Path):
    program = f"""
import time
from pathlib import Path
from qad_dist.asr.checkpoint import load_config
from qad_dist.asr.vllm_server import VllmServer
folder, here = Path({str(NANO)!r}), Path({str(tmp_path)!r})
options = dict(dtype="float32", max_length=640, slots=4, config=load_config(folder))
with VllmServer({PYTHON!r}, folder, log_path=here / "vllm.log", **options):
    (here / "started").touch()
    time.sleep(600)
"""
    with Started([sys.executable, "-c", program], folder=tmp_path) as started:
        owner = psutil.Process(started.process.pid)
        while not (tmp_path / "started").exists():
            assert started.process.poll() is None, "it ended early"
            time.sleep(0.1)
        guard, *below = owner.children(recursive=True)
        assert len(below) >= 3  # server, engine, worker
        try:
            for name, process in {"owner": owner, "guard": guard, "server": below[0]}.items():
                if name in victims:
                    process.kill()

            deadline = time.monotonic() + 60
            while alive := [process for process in [guard, *below] if runs(process)]:
                assert time.monotonic() < deadline, alive
                time.sleep(0.1)
        finally:
            for process in filter(runs, below):
                process.kill()


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
