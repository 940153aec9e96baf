"""Greedy decoding in batches against qwen-asr's ``generate``, clip by clip."""

from typing import Any

import numpy as np
import pytest
import torch

from qad_dist.asr.load import AsrModel
from qad_dist.asr.transcribe import Hypothesis, transcribe
from shards.schema import ENDED_BY_END_TOKEN, ENDED_BY_LENGTH
from tests.helpers.qwen import Samples, digit_entries, mels_of, noise, reference_response_logits, reference_tokens

LIMIT = 48


@pytest.fixture(scope="module")
def audios(clips: list[Samples]) -> list[Samples]:
    """Speech of all languages, clips below half a second and below one, and 7 s of what no speaker says."""
    short = [clips[0][:5_000], clips[4][:9_000], clips[5][:12_000], clips[6][:15_900]]
    return [*clips, *short, noise(7 * 16_000, seed=0), noise(9_000, seed=1)]


@pytest.fixture(scope="module")
def hypotheses(nano: AsrModel, audios: list[Samples]) -> list[Hypothesis]:
    return transcribe(nano, mels_of(nano, audios), max_response_tokens=LIMIT)


def test_tokens_are_those_of_qwen_asr_clip_by_clip(
    nano: AsrModel, reference: Any, audios: list[Samples], hypotheses: list[Hypothesis]
) -> None:
    expected = [reference_tokens(reference, nano, audio, max_new_tokens=LIMIT) for audio in audios]

    assert [list(hypothesis.token_ids) for hypothesis in hypotheses] == expected
    assert sum(len(audio) < 16_000 for audio in audios) >= 5
    assert len({tuple(tokens) for tokens in expected}) >= 20  # not the same answer to everything


def test_log_probabilities_are_those_of_a_teacher_forced_pass(
    nano: AsrModel, reference: Any, audios: list[Samples], hypotheses: list[Hypothesis]
) -> None:
    for audio, hypothesis in zip(audios, hypotheses, strict=True):
        logits_RV = reference_response_logits(reference, nano, audio, hypothesis.token_ids)
        targets = torch.tensor(hypothesis.token_ids)[:, None]

        expected = logits_RV.log_softmax(-1).gather(1, targets).squeeze(1)

        torch.testing.assert_close(torch.tensor(hypothesis.token_logprobs), expected, rtol=0, atol=2e-4)


def test_text_and_language_are_what_is_spoken(hypotheses: list[Hypothesis]) -> None:
    said = [(hypothesis.text, hypothesis.language) for hypothesis in hypotheses]
    spoken = [(entry["text"], entry["language"]) for entry in digit_entries(24)]

    right = sum(a == b for a, b in zip(said, spoken, strict=False))

    assert right >= 18  # the teacher makes 6 % errors in the digits of voices that it does not know


def test_neighbours_and_order_do_not_change_a_response(
    nano: AsrModel, audios: list[Samples], hypotheses: list[Hypothesis]
) -> None:
    order = np.random.default_rng(0).permutation(len(audios)).tolist()

    for part in (order[:1], order[1:4], order[4:]):
        again = transcribe(nano, mels_of(nano, [audios[i] for i in part]), max_response_tokens=LIMIT)

        assert [hypothesis.token_ids for hypothesis in again] == [hypotheses[i].token_ids for i in part]
        for i, hypothesis in zip(part, again, strict=True):
            np.testing.assert_allclose(hypothesis.token_logprobs, hypotheses[i].token_logprobs, rtol=0, atol=2e-4)


def test_equal_batches_give_equal_bits(nano: AsrModel, audios: list[Samples]) -> None:
    first, second = (transcribe(nano, mels_of(nano, audios[:9]), max_response_tokens=LIMIT) for _ in range(2))

    assert first == second


def test_every_response_ends_with_its_end_token_or_is_cut(nano: AsrModel, hypotheses: list[Hypothesis]) -> None:
    for hypothesis in hypotheses:
        assert nano.prompt.end_id not in hypothesis.token_ids[:-1]
        ended = hypothesis.token_ids[-1] == nano.prompt.end_id
        assert hypothesis.ended_by == (ENDED_BY_END_TOKEN if ended else ENDED_BY_LENGTH)
        assert len(hypothesis.token_logprobs) == len(hypothesis.token_ids) <= LIMIT


def test_response_that_reaches_the_limit_is_cut_and_marked(
    nano: AsrModel, clips: list[Samples], hypotheses: list[Hypothesis]
) -> None:
    """A response that ends exactly at the limit is whole."""
    by_length = sorted(range(len(clips)), key=lambda i: len(hypotheses[i].token_ids))
    short, long = by_length[0], by_length[-1]
    limit = len(hypotheses[short].token_ids)
    assert limit < len(hypotheses[long].token_ids)

    whole, cut = transcribe(nano, mels_of(nano, [clips[short], clips[long]]), max_response_tokens=limit)

    assert whole.token_ids == hypotheses[short].token_ids
    assert whole.ended_by == ENDED_BY_END_TOKEN
    assert cut.token_ids == hypotheses[long].token_ids[:limit]
    assert len(cut.token_logprobs) == limit
    assert cut.ended_by == ENDED_BY_LENGTH
    assert hypotheses[long].text.startswith(cut.text)


def test_silence_and_the_shortest_utterance_are_transcribed_like_the_reference(nano: AsrModel, reference: Any) -> None:
    audios = [np.zeros(1_600, np.float32), np.zeros(20_000, np.float32), noise(800, seed=0)]

    hypotheses = transcribe(nano, mels_of(nano, audios), max_response_tokens=16)

    expected = [reference_tokens(reference, nano, audio, max_new_tokens=16) for audio in audios]
    assert [list(hypothesis.token_ids) for hypothesis in hypotheses] == expected
