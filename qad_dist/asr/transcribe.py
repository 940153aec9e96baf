"""Greedy decoding of any number of utterances, with the log-probability of every token.

Prompts go through the model packed, one batch after the other; what they begin is decoded in slots, and the next batch
begins as soon as slots enough are free, so that short responses do not wait for long ones. What is decoded together
follows from the requests and the tokens, never from time.

The end token comes from the tokenizer: ``generate`` of the reference model has the real model's ids built in and does
not stop on a checkpoint with another vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qad_dist.asr.audio_tower import num_audio_tokens
from qad_dist.asr.collate import Example, collate, num_packed_tokens
from qad_dist.asr.load import AsrModel
from qad_dist.asr.prompt import Prompt
from qad_dist.asr.slots import RUNNING, Response, Slots, StepGraphs
from shards.schema import ENDED_BY_END_TOKEN, ENDED_BY_LENGTH

ALWAYS_ALLOWED_TOKENS = 32
"""Of a response, however short its audio."""


@dataclass(frozen=True, slots=True)
class _Schedule:
    """How steps are taken on a device."""

    steps: int
    """Between two looks at what has ended."""
    positions: int
    """What slots attend to is rounded up to whole so many positions."""
    is_static: bool
    """Whether all slots take part in every step, so that one graph can be replayed; or those in use."""


# On the CPU a look costs nothing and every row counts; a GPU works ahead of the host, and captures a graph per length.
_ON_CPU = _Schedule(steps=1, positions=16, is_static=False)
_ON_GPU = _Schedule(steps=8, positions=128, is_static=True)

_WORTH_MOVING = 8
"""Slots are closed up when one in so many is free: moving an utterance costs about as much as a step of it."""


@dataclass(frozen=True, slots=True)
class Request:
    """An utterance to transcribe."""

    mel_MF: Tensor
    """From :func:`~qad_dist.asr.mel.log_mels`."""
    max_response_tokens: int
    """A response that reaches it is cut and marked ``length``; at least 1."""
    language: str | None = None
    """What the model is told; None leaves it to name the language itself."""


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """What a model wrote for one utterance."""

    token_ids: tuple[int, ...]
    """The response as generated, end token included if it came."""
    token_logprobs: tuple[float, ...]
    """Natural log-probability of each."""
    text: str
    language: str | None
    ended_by: str
    hidden_RD: Tensor | None = field(default=None, compare=False, repr=False)
    """If asked for, what the LM head read to choose each token: final hidden states, in the model's dtype, on the
    host."""


def response_limit(duration_seconds: float, *, max_response_tokens: int, max_tokens_per_second: float) -> int:
    """Most tokens of an utterance's response, so that one runaway does not hold a slot for long.

    Args:
        duration_seconds: Of its audio.
        max_response_tokens: Of any response.
        max_tokens_per_second: Allowed for each second, beside :data:`ALWAYS_ALLOWED_TOKENS`.
    """
    return min(max_response_tokens, ALWAYS_ALLOWED_TOKENS + math.ceil(max_tokens_per_second * duration_seconds))


def slot_length(
    prompt: Prompt, durations: Sequence[float], limits: Sequence[int], languages: Sequence[str | None]
) -> int:
    """Longest prompt with its longest response: ``max_length`` of :func:`decode`.

    Args:
        prompt: The model's.
        durations: Seconds of each utterance.
        limits: Most tokens of its response.
        languages: What the model is told of it.
    """
    return max(
        num_packed_tokens(prompt, duration_seconds=duration, num_response_tokens=limit, language=language)
        for duration, limit, language in zip(durations, limits, languages, strict=True)
    )


def transcribe(model: AsrModel, mels: Sequence[Tensor], *, max_response_tokens: int) -> list[Hypothesis]:
    """Decode utterances together, greedily, in automatic language mode.

    Args:
        model: Teacher or student.
        mels: ``[M, F]`` each, from :func:`~qad_dist.asr.mel.log_mels`; at least one. All are begun at once.
        max_response_tokens: A response that reaches it is cut and marked ``length``.

    Returns:
        One hypothesis per utterance, in order.
    """
    longest = max(model.prompt.num_prompt_tokens(num_audio_tokens(mel_MF.shape[1])) for mel_MF in mels)
    requests = [Request(mel_MF, max_response_tokens) for mel_MF in mels]
    found = dict(decode(model, [requests], slots=len(requests), max_length=longest + max_response_tokens))
    return [found[number] for number in range(len(requests))]


def decode(
    model: AsrModel,
    batches: Iterable[Sequence[Request]],
    *,
    slots: int,
    max_length: int,
    keep_hidden: bool = False,
    on_step: Callable[[], None] | None = None,
) -> Iterator[tuple[int, Hypothesis]]:
    """Decode utterances greedily as they come: :meth:`Decoder.decode` of a decoder that is used once."""
    decoder = Decoder(model, slots=slots, max_length=max_length, keep_hidden=keep_hidden)
    return decoder.decode(batches, on_step=on_step)


@dataclass(frozen=True, slots=True)
class _Utterance:
    """What the host knows of an utterance in a slot."""

    number: int
    num_prompt_tokens: int
    begun: int
    """The step before which it began."""
    language: str | None


class Decoder:
    """A model with its slots: they, and what a GPU has captured, serve any number of calls, one at a time.

    Which utterance is in which slot, and how far it may have come, is known without asking the device.
    """

    def __init__(self, model: AsrModel, *, slots: int, max_length: int, keep_hidden: bool = False) -> None:
        """Take the memory.

        Args:
            model: Teacher or student.
            slots: Utterances that are decoded at once.
            max_length: Most tokens of a prompt and its response, from :func:`slot_length`.
            keep_hidden: Whether hypotheses have their ``hidden_RD``.
        """
        is_cpu = model.device.type == "cpu"
        self._schedule = _ON_CPU if is_cpu else _ON_GPU
        self._model, self._num_slots = model, slots
        self._max_length = _rounded_up(max_length, self._schedule.positions)
        self._slots = Slots(model, num_slots=slots, max_length=self._max_length, keep_hidden=keep_hidden)
        # Quantizers may ask the device for values, which no graph can hold.
        is_plain = all(type(m) is nn.Linear for m in model.decoder.modules() if isinstance(m, nn.Linear))
        self._step = StepGraphs(self._slots) if is_plain and not is_cpu else self._slots.step
        self._num_begun = self._num_steps = 0
        self._running: dict[int, _Utterance] = {}

    @torch.no_grad()
    def decode(
        self, batches: Iterable[Sequence[Request]], *, on_step: Callable[[], None] | None = None
    ) -> Iterator[tuple[int, Hypothesis]]:
        """Decode utterances greedily as they come.

        Args:
            batches: What goes through the model together as prompts; one with more requests than slots is parted. The
                next one is taken when the one before it has begun. Utterances of similar length waste least.
            on_step: Called with each step.

        Yields:
            The running number of a request, from 0, and its hypothesis, as they end.
        """
        self._num_begun = self._num_steps = 0
        self._running.clear()
        waiting = _parted(batches, self._num_slots)
        batch = next(waiting, None)
        while True:
            while batch and len(batch) <= self._num_slots - len(self._running):
                self._begin(batch)
                batch = next(waiting, None)
            if not self._running:
                return
            if batch is None and not self._schedule.is_static:
                self._close_up()
            self._go_on(on_step)
            yield from self._ended()

    def _begin(self, requests: Sequence[Request]) -> None:
        """Choose the first token of these responses."""
        slots = [slot for slot in range(self._num_slots) if slot not in self._running][: len(requests)]
        prompts = collate(
            [Example(key="", mel_MF=r.mel_MF, response_ids=(), prompt_language=r.language) for r in requests],
            prompt=self._model.prompt,
        )
        lengths, stops = prompts.cu_seqlens_U1.diff().tolist(), []
        for slot, request, length in zip(slots, requests, lengths, strict=True):
            end = length + request.max_response_tokens
            assert length < end <= self._max_length, f"got {length} to {end} tokens for {self._max_length} positions"
            stops.append(end - 1)
            self._running[slot] = _Utterance(self._num_begun, length, self._num_steps, request.language)
            self._num_begun += 1
        self._slots.start(slots, prompts, stops)

    def _longest(self) -> int:
        """A position that no utterance is beyond."""
        return max(u.num_prompt_tokens + self._num_steps - u.begun for u in self._running.values())

    def _go_on(self, on_step: Callable[[], None] | None) -> None:
        """Step until the next look."""
        steps = self._schedule.steps
        length = min(_rounded_up(self._longest() + steps, self._schedule.positions), self._max_length)
        num_slots = self._num_slots if self._schedule.is_static else max(self._running) + 1
        for _ in range(steps):
            self._step(num_slots, length)
            if on_step is not None:
                on_step()
        self._num_steps += steps

    def _ended(self) -> Iterator[tuple[int, Hypothesis]]:
        """Take out what has ended."""
        last = self._slots.last_positions(max(self._running) + 1)
        ended = [slot for slot in self._running if last[slot] != RUNNING]
        if not ended:
            return
        utterances = [self._running.pop(slot) for slot in ended]
        spans = [range(u.num_prompt_tokens, last[slot] + 1) for slot, u in zip(ended, utterances, strict=True)]
        for utterance, response in zip(utterances, self._slots.responses(ended, spans), strict=True):
            yield utterance.number, self._hypothesis(response, utterance.language)

    def _close_up(self) -> None:
        """Move the last utterances to the free slots before them, when nothing else will come there."""
        num_running, num_used = len(self._running), max(self._running) + 1
        if (num_used - num_running) * _WORTH_MOVING < num_used:
            return
        free = [slot for slot in range(num_running) if slot not in self._running]
        moved = [slot for slot in self._running if slot >= num_running]
        self._slots.move(moved, free, self._longest() + 1)
        for source, target in zip(moved, free, strict=True):
            self._running[target] = self._running.pop(source)

    def _hypothesis(self, response: Response, language: str | None) -> Hypothesis:
        prompt = self._model.prompt
        text, language = prompt.parse(response.token_ids, language=language)
        ended = ENDED_BY_END_TOKEN if response.token_ids[-1] == prompt.end_id else ENDED_BY_LENGTH
        ids, logprobs = tuple(response.token_ids), tuple(response.logprobs)
        return Hypothesis(ids, logprobs, text, language, ended, response.hidden_RD)


def _parted(batches: Iterable[Sequence[Request]], size: int) -> Iterator[Sequence[Request]]:
    """The same, no batch larger than ``size`` and none empty."""
    for batch in batches:
        for start in range(0, len(batch), size):
            yield batch[start : start + size]


def _rounded_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
