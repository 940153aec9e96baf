"""The teacher's answers for the utterances of one shard, as pseudo-labels: what label does, whichever backend decodes.

What is decoded together depends on utterances and settings only, never on rank or time.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
import torch

from qad_dist.asr.checkpoint import load_processor
from qad_dist.asr.dataset import try_mels_ahead
from qad_dist.asr.groups import utterance_limit
from qad_dist.asr.load import AsrModel, load_teacher, resolve_model_folder
from qad_dist.asr.prompt import Prompt
from qad_dist.asr.transcribe import Decoder, Hypothesis, Request, slot_length
from qad_dist.asr.vllm import AudioRequest, VllmTeacher, open_teacher, transcribe_with_vllm
from qad_dist.asr.vllm_server import gpu_name
from qad_dist.config import RunConfig
from qad_dist.config.label import LabelConfig
from qad_dist.runtime.world import World, device_for
from shards.languages import LANGUAGES
from shards.plan import plan_decoding
from shards.read import Damaged
from shards.schema import UNREADABLE, PseudoLabel, Utterance
from shards.workers import Reader

Loaded = TypeVar("Loaded")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLabels:
    """What came of the utterances of a shard."""

    labels: list[PseudoLabel]
    """In the order of the utterances."""
    hidden_TD: "np.ndarray | None"
    """uint16 ``[T, D]``, the bits of bfloat16: final hidden states of all responses, one behind the other."""
    damaged: list[Damaged]
    """Utterances that cannot be read; their labels say so."""


class Labeller(Protocol):
    """Labels the utterances of one shard."""

    engine: str
    """What computes, with its version."""

    def label(
        self, utterances: Sequence[Utterance], languages: Sequence[str | None], *, on_step: Callable[[], None]
    ) -> ShardLabels:
        """Label utterances.

        Args:
            utterances: Of one shard; none give no labels.
            languages: What the teacher is told of each; None where it is to detect the language.
            on_step: Called now and then while it goes on.
        """
        ...


@contextmanager
def open_labeller(run: RunConfig, reader: Reader, world: World, *, longest_seconds: float) -> Generator[Labeller]:
    """The backend that ``label.backend`` names, with the teacher loaded.

    Args:
        run: The run.
        reader: Of its shards.
        world: Which rank this is.
        longest_seconds: Of the utterances to label.

    Raises:
        QadError: The teacher cannot be loaded or served, or the context cannot stand in its prompt.
    """
    device = device_for(world)
    if run.label.backend == "torch":
        teacher = load_teacher(run.model, device)
        teacher = replace(teacher, prompt=teacher.prompt.with_context(run.label.context))
        yield TorchLabeller(teacher, reader, run.label, longest_seconds=longest_seconds)
        return
    folder = resolve_model_folder(run.model.path, run.model.revision)
    prompt = Prompt.from_processor(load_processor(folder), context=run.label.context)
    with open_teacher(
        run.label,
        run.model,
        folder,
        log_path=run.stage_folder("label") / f"vllm-rank-{world.rank:03d}.log",
        max_length=_max_length(prompt, run.label, longest_seconds),
        gpu=gpu_name(device),
    ) as server:
        yield VllmLabeller(server, prompt, reader, run.label)


class TorchLabeller:
    """The teacher in this process."""

    engine = f"torch {torch.__version__}"

    def __init__(self, teacher: AsrModel, reader: Reader, settings: LabelConfig, *, longest_seconds: float) -> None:
        """Take the memory for all shards.

        Args:
            teacher: Its prompt has the run's context already.
            reader: Of the shards.
            settings: Of the run.
            longest_seconds: Of all utterances to label.
        """
        self._teacher, self._reader, self._settings = teacher, reader, settings
        length = _max_length(teacher.prompt, settings, longest_seconds)
        self._decoder = Decoder(teacher, slots=settings.slots, max_length=length, keep_hidden=settings.hidden_states)

    def label(
        self, utterances: Sequence[Utterance], languages: Sequence[str | None], *, on_step: Callable[[], None]
    ) -> ShardLabels:
        """As :meth:`Labeller.label`."""
        readable = _Readable(utterances, languages, self._settings)
        return readable.gather(self._decoder.decode(self._requests(readable), on_step=on_step))

    def _requests(self, readable: "_Readable") -> Iterator[list[Request]]:
        mels = try_mels_ahead(self._reader, readable.batches(), self._teacher.extractor)
        for batch in readable.sort_out(mels):
            yield [Request(mel_MF, readable.limits[place], readable.languages[place]) for place, mel_MF in batch]


class VllmLabeller:
    """The teacher in a server."""

    def __init__(self, server: VllmTeacher, prompt: Prompt, reader: Reader, settings: LabelConfig) -> None:
        """Take the teacher's prompt with the run's context."""
        self._server, self._prompt, self._reader, self._settings = server, prompt, reader, settings
        self.engine = f"vllm {server.served.version}"

    def label(
        self, utterances: Sequence[Utterance], languages: Sequence[str | None], *, on_step: Callable[[], None]
    ) -> ShardLabels:
        """As :meth:`Labeller.label`; what is decoded together is up to the server, and not always the same."""
        readable = _Readable(utterances, languages, self._settings)
        requests = (
            AudioRequest(audio_A, readable.limits[place], languages[place])
            for batch in readable.sort_out(self._reader.ahead(readable.batches()))
            for place, audio_A in batch
        )
        slots = self._settings.slots
        # A few more than are decoded at once: the next ones are sent while these end.
        in_flight = slots + max(1, slots // 4)
        return readable.gather(
            transcribe_with_vllm(self._server, self._prompt, requests, in_flight=in_flight, on_step=on_step)
        )


class _Readable:
    """The utterances of a shard on their way through a backend: in which order, and which of them can be read."""

    def __init__(self, utterances: Sequence[Utterance], languages: Sequence[str | None], settings: LabelConfig) -> None:
        self._utterances, self.languages = utterances, languages
        self.limits = [utterance_limit(settings, utterance.duration_seconds) for utterance in utterances]
        self._plan = plan_decoding(
            [utterance.duration_seconds for utterance in utterances],
            batch_audio_seconds=settings.batch_audio_seconds,
            max_utterances=max(1, settings.slots // 4),
        )
        self._damaged: dict[int, Damaged] = {}
        self._places: list[int] = []

    def batches(self) -> Iterator[list[Utterance]]:
        """What is read together, longest first."""
        return ([self._utterances[place] for place in batch] for batch in self._plan)

    def sort_out(self, loaded: Iterable[Sequence[Loaded | Damaged]]) -> Iterator[list[tuple[int, Loaded]]]:
        """Place and content of what can be read, batch by batch; requests are numbered in this order."""
        for batch, found in zip(self._plan, loaded, strict=True):
            readable: list[tuple[int, Loaded]] = []
            for place, one in zip(batch, found, strict=True):
                if isinstance(one, Damaged):
                    self._damaged[place] = one
                else:
                    self._places.append(place)
                    readable.append((place, one))
            if readable:
                yield readable

    def gather(self, numbered: Iterable[tuple[int, Hypothesis]]) -> ShardLabels:
        """The labels of all utterances, in their order, from what came of each request."""
        found = {self._places[number]: hypothesis for number, hypothesis in numbered}
        labels = [
            _unreadable(utterance, language, self._damaged[place])
            if place in self._damaged
            else _pseudo_label(utterance, language, found[place])
            for place, (utterance, language) in enumerate(zip(self._utterances, self.languages, strict=True))
        ]
        hidden = [states for place in sorted(found) if (states := found[place].hidden_RD) is not None]
        bits = torch.cat(hidden).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16) if hidden else None
        damaged = [self._damaged[place] for place in sorted(self._damaged)]
        return ShardLabels(labels=labels, hidden_TD=bits, damaged=damaged)


def _max_length(prompt: Prompt, settings: LabelConfig, longest_seconds: float) -> int:
    """Most tokens of a prompt and its response, whichever language is told."""
    names = [None, *LANGUAGES]
    limits = [utterance_limit(settings, longest_seconds)] * len(names)
    return slot_length(prompt, [longest_seconds] * len(names), limits, names)


def _pseudo_label(utterance: Utterance, language: str | None, hypothesis: Hypothesis) -> PseudoLabel:
    return PseudoLabel(
        key=utterance.key,
        token_ids=hypothesis.token_ids,
        text=hypothesis.text,
        language=hypothesis.language,
        prompt_language=language,
        token_logprobs=hypothesis.token_logprobs,
        mean_logprob=sum(hypothesis.token_logprobs) / len(hypothesis.token_logprobs),
        ended_by=hypothesis.ended_by,
        duration_seconds=utterance.duration_seconds,
    )


def _unreadable(utterance: Utterance, language: str | None, damaged: Damaged) -> PseudoLabel:
    return PseudoLabel(
        key=utterance.key,
        token_ids=(),
        text="",
        language=None,
        prompt_language=language,
        token_logprobs=(),
        mean_logprob=None,
        ended_by=UNREADABLE,
        duration_seconds=utterance.duration_seconds,
        error=damaged.reason,
    )
