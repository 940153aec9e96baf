"""Labels by vLLM instead of this project's own decoding: its server, its client, and what must hold between them.

Tokens, log-probabilities and prompt are in the same terms as :mod:`qad_dist.asr.transcribe` has them. The kernels are
others, and what vLLM computes together depends on time: where two tokens are nearly equal, another one may be chosen
than here, or than the last time.
"""

import contextlib
import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from qad_dist.asr.audio_tower import CHUNK_FRAMES, num_audio_tokens
from qad_dist.asr.checkpoint import load_config
from qad_dist.asr.mel import num_frames
from qad_dist.asr.prompt import Prompt
from qad_dist.asr.transcribe import Hypothesis
from qad_dist.asr.vllm_client import START, URL, Generated, Served, VllmClient
from qad_dist.asr.vllm_server import VllmServer
from qad_dist.config.label import LabelConfig
from qad_dist.config.model import ModelConfig
from shards.errors import ConfigError, ModelError
from shards.read import Codes
from shards.schema import ENDED_BY_END_TOKEN, ENDED_BY_LENGTH

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AudioRequest:
    """One utterance to transcribe."""

    audio_A: Codes
    """16 kHz, mono: int16, or float32 in [-1, 1]."""
    max_response_tokens: int
    """A response that reaches it is cut and marked ``length``."""
    language: str | None = None
    """What the prompt tells; None in automatic mode."""


@dataclass(frozen=True, slots=True)
class VllmTeacher:
    """A server that serves the teacher."""

    client: VllmClient
    served: Served


@contextlib.contextmanager
def open_teacher(
    settings: LabelConfig, model: ModelConfig, folder: Path, *, log_path: Path, max_length: int, gpu: str | None
) -> Generator[VllmTeacher]:
    """The server that ``label.vllm_url`` names, or one of this rank's own, which ends with the block.

    Args:
        settings: ``label.vllm_url``, or else ``label.vllm_python``, and ``label.slots``.
        model: The teacher.
        folder: Its folder, from :func:`~qad_dist.asr.load.resolve_model_folder`.
        log_path: Where a server of its own writes what it does.
        max_length: Most tokens of prompt and response that will be asked for.
        gpu: For a server of its own, from :func:`~qad_dist.asr.vllm_server.gpu_name`.

    Raises:
        ConfigError: Audio attention that vLLM does not have.
        ModelError: Another model is served.
        StageError: No server answers.
    """
    if model.audio_attention != "windowed":
        raise ConfigError(
            f"model.audio_attention must be windowed with label.backend vllm, got {model.audio_attention}; "
            "set label.backend torch"
        )
    with contextlib.ExitStack() as stack:
        if settings.vllm_url is not None:
            client = stack.enter_context(contextlib.closing(VllmClient(settings.vllm_url)))
        else:
            assert settings.vllm_python is not None, "the config asks for one of them"
            server = VllmServer(
                settings.vllm_python,
                folder,
                log_path=log_path,
                dtype=model.dtype,
                max_length=max_length,
                slots=settings.slots,
                config=load_config(folder),
                gpu=gpu,
            )
            client = stack.enter_context(server).client
        served = client.served()
        if settings.vllm_url is not None:
            check_served(served, path=model.path, folder=folder, max_length=max_length)
        log.info("event=vllm version=%s address=%s", served.version, client.address)
        yield VllmTeacher(client, served)


def check_served(served: Served, *, path: str, folder: Path, max_length: int) -> None:
    """See that a server is of use, as far as it tells: its machine may have the model under another path.

    Args:
        served: What it says of itself.
        path: The teacher, as ``model.path`` names it.
        folder: Its folder.
        max_length: Most tokens of prompt and response that will be asked for.

    Raises:
        ModelError: The model has another name, or takes fewer tokens.
    """
    same_place = Path(served.root).exists() and folder.exists() and Path(served.root).samefile(folder)
    if not same_place and Path(served.root).name not in {Path(path).name, folder.name}:
        raise ModelError(f"{URL} must serve {path}, got {served.root}; start it as {START.replace('MODEL', path)}")
    if served.max_length < max_length:
        raise ModelError(
            f"{URL} must take {max_length} tokens of prompt and response, got {served.max_length}; "
            f"start it with --max-model-len {max_length}, or lower label.max_response_tokens"
        )


def transcribe_with_vllm(
    teacher: VllmTeacher,
    prompt: Prompt,
    requests: Iterable[AudioRequest],
    *,
    in_flight: int,
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, Hypothesis]]:
    """Transcribe utterances, greedily; yields each with its running number as it ends.

    Args:
        teacher: From :func:`open_teacher`.
        prompt: The teacher's, with the run's context.
        requests: Read one by one, as earlier ones end: at most ``in_flight`` are in memory.
        in_flight: How many the server has at once; a few more than it decodes at once keep it busy.
        on_step: Called after each response.

    Raises:
        ModelError: The server makes another prompt of an utterance, or a response that is none.
        StageError: The server is lost.
    """
    numbered = enumerate(requests)
    coming, company = next(numbered, None), 0
    pending: dict[Future[Hypothesis], int] = {}
    executor = ThreadPoolExecutor(in_flight, thread_name_prefix="vllm")
    try:
        while True:
            while coming is not None and len(pending) < in_flight:
                if pending and _company(coming[1]) != company:
                    break
                company = _company(coming[1])
                pending[executor.submit(_transcribe, teacher, prompt, coming[1])] = coming[0]
                coming = next(numbered, None)
            if not pending:
                return
            for future in sorted(wait(pending, return_when=FIRST_COMPLETED).done, key=pending.__getitem__):
                number, hypothesis = pending.pop(future), future.result()
                on_step()
                yield number, hypothesis
    finally:
        if pending:  # an error, or the caller has had enough
            executor.shutdown(wait=False, cancel_futures=True)
            teacher.client.abort()
        executor.shutdown()


def _company(request: AudioRequest) -> int:
    """Frames of an utterance shorter than one chunk of the audio tower, for all others those of a chunk.

    vLLM pads a chunk to the longest of all utterances that it encodes together, and what is padded is not what it was
    alone: log-probabilities of such an utterance were up to 0.34 off (0.32, the embedded teacher). Only utterances of
    one company are therefore in flight together; longest first, there are few changes.
    """
    return min(num_frames(len(request.audio_A)), CHUNK_FRAMES)


def _transcribe(teacher: VllmTeacher, prompt: Prompt, request: AudioRequest) -> Hypothesis:
    language = request.language
    expected = prompt.build(num_audio_tokens(num_frames(len(request.audio_A))), language=language)
    needed = len(expected) + request.max_response_tokens
    if needed > teacher.served.max_length:
        raise ModelError(
            f"{URL} must take {needed} tokens of prompt and response, got {teacher.served.max_length}; "
            f"start it with --max-model-len {needed}"
        )
    generated = teacher.client.generate(
        prompt.build(1, language=language),
        request.audio_A,
        model=teacher.served.model,
        max_tokens=request.max_response_tokens,
        end_id=prompt.end_id,
    )
    if list(generated.prompt_ids) != expected:
        raise ModelError(
            f"{URL} must put {len(expected)} prompt tokens before a response, got {len(generated.prompt_ids)} "
            f"{'others' if len(generated.prompt_ids) == len(expected) else ''}; serve the same checkpoint by vLLM 0.32"
        )
    return _hypothesis(prompt, generated, language)


def _hypothesis(prompt: Prompt, generated: Generated, language: str | None) -> Hypothesis:
    text, named = prompt.parse(generated.token_ids, language=language)
    ended = ENDED_BY_END_TOKEN if generated.token_ids[-1] == prompt.end_id else ENDED_BY_LENGTH
    return Hypothesis(
        token_ids=generated.token_ids,
        token_logprobs=generated.logprobs,
        text=text,
        language=named,
        ended_by=ended,
    )
