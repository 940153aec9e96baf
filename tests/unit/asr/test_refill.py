"""In which slots utterances are decoded, and when the next ones begin."""

from collections.abc import Generator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from qad_dist.asr.load import AsrModel
from qad_dist.asr.slots import Slots
from qad_dist.asr.transcribe import Hypothesis, Request, decode, transcribe
from tests.helpers.decoding import assert_same, in_batches, in_order, requests_for
from tests.helpers.qwen import Samples, mels_of, noise

LIMIT = 48
MAX_LENGTH = 500


@pytest.fixture(scope="module")
def audios(clips: list[Samples]) -> list[Samples]:
    """Speech, and 7 s of what no speaker says, in an order in which neither lengths nor languages are sorted."""
    audios = [*clips, *(clip[:12_000] for clip in clips[:10]), noise(7 * 16_000, seed=0)]
    return [audios[i] for i in np.random.default_rng(0).permutation(len(audios))]


@pytest.fixture(scope="module")
def hypotheses(nano: AsrModel, audios: list[Samples]) -> list[Hypothesis]:
    return transcribe(nano, mels_of(nano, audios), max_response_tokens=LIMIT)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every run of prompts (with their number) and every step (with its slots), in their order."""
    events: list[tuple[str, int]] = []
    start, step = Slots.start, Slots.step

    def counting_start(self: Any, slots: Sequence[int], *args: Any) -> None:
        events.append(("start", len(slots)))
        start(self, slots, *args)

    def counting_step(self: Any, num_slots: int, length: int) -> None:
        events.append(("step", num_slots))
        step(self, num_slots, length)

    monkeypatch.setattr(Slots, "start", counting_start)
    monkeypatch.setattr(Slots, "step", counting_step)
    return events


def test_free_slots_are_refilled_while_others_go_on(
    nano: AsrModel, audios: list[Samples], hypotheses: list[Hypothesis], counted: list[tuple[str, int]]
) -> None:
    requests = requests_for(nano, audios)
    heartbeats: list[int] = []
    lengths = [len(hypothesis.token_ids) for hypothesis in hypotheses]

    batches = in_batches(requests, 2)
    list(decode(nano, batches, slots=8, max_length=MAX_LENGTH, on_step=lambda: heartbeats.append(len(counted))))

    steps = [number for kind, number in counted if kind == "step"]
    starts = [number for kind, number in counted if kind == "start"]
    assert starts == [2] * 17 + [1]
    assert counted[:4] == [("start", 2)] * 4  # all slots are filled before the first step
    assert len(steps) == len(heartbeats)
    # Batches of 8 that wait for their longest take more: here nobody waits but for the end.
    static = sum(max(part) - 1 for part in in_batches(lengths, 8))
    assert len(steps) < static
    assert len(steps) >= -(-sum(length - 1 for length in lengths) // 8)
    assert max(steps) == 8
    # Behind the last start the slots in use become fewer, as utterances end.
    last = max(i for i, event in enumerate(counted) if event[0] == "start")
    tail = [number for _, number in counted[last + 1 :]]
    assert all(a >= b for a, b in pairwise(tail))
    assert tail[0] >= 7
    assert tail[-1] == 1


def test_slots_are_closed_up_when_nothing_is_left_to_begin(
    nano: AsrModel, audios: list[Samples], hypotheses: list[Hypothesis], counted: list[tuple[str, int]]
) -> None:
    """The last of eight goes on alone, in the first slot, when the others have ended by their limit."""
    by_length = sorted(range(len(audios)), key=lambda i: len(hypotheses[i].token_ids))[-8:]
    whole = [hypotheses[i].token_ids for i in by_length]
    mels = mels_of(nano, [audios[i] for i in by_length])
    requests = [Request(mel_MF, 3) for mel_MF in mels[:-1]] + [Request(mels[-1], LIMIT)]

    found = in_order(decode(nano, [requests], slots=8, max_length=MAX_LENGTH))

    assert [hypothesis.token_ids for hypothesis in found] == [ids[:3] for ids in whole[:-1]] + [whole[-1]]
    assert [number for kind, number in counted if kind == "step"] == [8, 8] + [1] * (len(whole[-1]) - 3)
    assert len(whole[-1]) > 12


def test_next_batch_is_taken_only_when_the_one_before_it_has_begun(nano: AsrModel, audios: list[Samples]) -> None:
    taken: list[int] = []
    requests = requests_for(nano, audios[:12])

    def batches() -> Generator[list[Request]]:
        for number in range(6):
            taken.append(number)
            yield requests[2 * number : 2 * number + 2]

    found = decode(nano, batches(), slots=4, max_length=MAX_LENGTH)
    next(found)

    assert 2 < len(taken) < 6  # two have begun, another waits: what is read ahead stays bounded
    assert len(list(found)) == 11


def test_batch_with_more_requests_than_slots_is_parted(
    nano: AsrModel, audios: list[Samples], hypotheses: list[Hypothesis], counted: list[tuple[str, int]]
) -> None:
    requests = requests_for(nano, audios[:8])

    found = in_order(decode(nano, [requests], slots=3, max_length=MAX_LENGTH))

    assert_same(found, hypotheses[:8])
    assert [number for kind, number in counted if kind == "start"] == [3, 3, 2]
