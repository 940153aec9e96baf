"""Greedy decoding in slots against qwen-asr's ``generate``, clip by clip."""

from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qad_dist.asr import transcribe as transcribe_module
from qad_dist.asr.audio_tower import num_audio_tokens
from qad_dist.asr.load import AsrModel
from qad_dist.asr.transcribe import (
    Decoder,
    Hypothesis,
    Request,
    decode,
    response_limit,
    slot_length,
    transcribe,
)
from shards.schema import ENDED_BY_END_TOKEN, ENDED_BY_LENGTH
from tests.helpers.clips import recorded_clips
from tests.helpers.decoding import assert_same, in_batches, in_order, requests_for
from tests.helpers.qwen import (
    Samples,
    digit_entries,
    digit_mixes,
    mels_of,
    noise,
    reference_response_logits,
    reference_tokens,
    windows,
)

LIMIT = 48
MAX_LENGTH = 500
MIX_SECONDS = (8.0, 8.7, 13.3, 21.0, 30.0)


@pytest.fixture(scope="module")
def audios(clips: list[Samples]) -> list[Samples]:
    """Speech of all languages, clips below half a second and below one, long mixes, and 7 s of what no speaker says."""
    short = [clips[0][:5_000], clips[4][:9_000], clips[5][:12_000], clips[6][:15_900]]
    return [*clips, *short, *digit_mixes(MIX_SECONDS), noise(7 * 16_000, seed=0), noise(9_000, seed=1)]


@pytest.fixture(scope="module")
def windowed(reference: Any) -> Generator[Any]:
    """qwen-asr with the windows of its audio tower."""
    with windows(reference):
        yield reference


@pytest.fixture(scope="module")
def hypotheses(nano: AsrModel, audios: list[Samples]) -> list[Hypothesis]:
    return transcribe(nano, mels_of(nano, audios), max_response_tokens=LIMIT)


def test_tokens_are_those_of_qwen_asr_clip_by_clip(
    nano: AsrModel, windowed: Any, audios: list[Samples], hypotheses: list[Hypothesis]
) -> None:
    expected = [reference_tokens(windowed, nano, audio, max_new_tokens=LIMIT) for audio in audios]

    assert [list(hypothesis.token_ids) for hypothesis in hypotheses] == expected
    assert sum(len(audio) < 16_000 for audio in audios) >= 5
    assert sum(len(audio) >= 8 * 16_000 for audio in audios) == len(MIX_SECONDS)
    assert len({tuple(tokens) for tokens in expected}) >= 20  # not the same answer to everything


@pytest.mark.speech
def test_tokens_of_recorded_speech_are_those_of_qwen_asr(nano: AsrModel, windowed: Any, speech: Path) -> None:
    audios = recorded_clips(speech, num_short=40, num_long=12)
    requests = requests_for(nano, audios, limit=96)

    hypotheses = in_order(decode(nano, in_batches(requests, 4), slots=16, max_length=MAX_LENGTH))

    expected = [reference_tokens(windowed, nano, audio, max_new_tokens=96) for audio in audios]
    assert [list(hypothesis.token_ids) for hypothesis in hypotheses] == expected
    assert sum(8 * 16_000 <= len(audio) <= 30 * 16_000 for audio in audios) >= 12


def test_log_probabilities_are_those_of_a_teacher_forced_pass(
    nano: AsrModel, windowed: Any, audios: list[Samples], hypotheses: list[Hypothesis]
) -> None:
    for audio, hypothesis in zip(audios, hypotheses, strict=True):
        logits_RV = reference_response_logits(windowed, nano, audio, hypothesis.token_ids)
        targets = torch.tensor(hypothesis.token_ids)[:, None]

        expected = logits_RV.log_softmax(-1).gather(1, targets).squeeze(1)

        torch.testing.assert_close(torch.tensor(hypothesis.token_logprobs), expected, rtol=0, atol=1e-4)


def test_text_and_language_are_what_is_spoken(hypotheses: list[Hypothesis]) -> None:
    said = [(hypothesis.text, hypothesis.language) for hypothesis in hypotheses]
    spoken = [(entry["text"], entry["language"]) for entry in digit_entries(24)]

    right = sum(a == b for a, b in zip(said, spoken, strict=False))

    assert right >= 18  # the teacher makes 6 % errors in the digits of voices that it does not know


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_responses_do_not_depend_on_the_number_of_slots(
    nano: AsrModel, audios: list[Samples], hypotheses: list[Hypothesis], slots: int
) -> None:
    requests = requests_for(nano, audios)

    found = in_order(decode(nano, in_batches(requests, 5), slots=slots, max_length=MAX_LENGTH))

    assert_same(found, hypotheses)
    assert [hypothesis.text for hypothesis in found] == [hypothesis.text for hypothesis in hypotheses]


def test_responses_do_not_depend_on_order_and_batch_mates(
    nano: AsrModel, audios: list[Samples], hypotheses: list[Hypothesis]
) -> None:
    order = np.random.default_rng(0).permutation(len(audios)).tolist()
    requests = requests_for(nano, [audios[i] for i in order])
    batches = [requests[:1], requests[1:4], [], requests[4:12], requests[12:13], requests[13:]]

    found = in_order(decode(nano, batches, slots=8, max_length=MAX_LENGTH))

    assert_same(found, [hypotheses[i] for i in order])


def test_steps_as_a_gpu_takes_them_give_the_same_responses(
    nano: AsrModel, audios: list[Samples], hypotheses: list[Hypothesis], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All slots in every step, eight steps between two looks."""
    monkeypatch.setattr(transcribe_module, "_ON_CPU", transcribe_module._ON_GPU)
    requests = requests_for(nano, audios)

    found = in_order(decode(nano, in_batches(requests, 4), slots=8, max_length=MAX_LENGTH, keep_hidden=True))

    assert_same(found, hypotheses)
    assert [len(hypothesis.hidden_RD) for hypothesis in found] == [len(h.token_ids) for h in hypotheses]  # type: ignore[arg-type]


def test_equal_requests_give_equal_bits_in_equal_order(nano: AsrModel, audios: list[Samples]) -> None:
    requests = requests_for(nano, audios)

    first, second = (list(decode(nano, in_batches(requests, 3), slots=7, max_length=MAX_LENGTH)) for _ in range(2))

    assert first == second
    assert [number for number, _ in first] != sorted(number for number, _ in first)  # as they end


def test_decoder_serves_one_call_after_the_other_even_if_one_breaks_off(
    nano: AsrModel, audios: list[Samples], hypotheses: list[Hypothesis]
) -> None:
    decoder = Decoder(nano, slots=6, max_length=MAX_LENGTH)
    requests = requests_for(nano, audios)

    next(decoder.decode(in_batches(requests[20:], 3)))
    for part in (slice(0, 9), slice(9, 35)):
        found = in_order(decoder.decode(in_batches(requests[part], 3)))

        assert_same(found, hypotheses[part])


@pytest.mark.parametrize("language", ["German", "English", "Cantonese"])
def test_told_language_gives_the_tokens_of_qwen_asr_that_is_told_it(
    nano: AsrModel, windowed: Any, audios: list[Samples], language: str
) -> None:
    chosen = audios[:12:3] + audios[-4:-2]
    requests = [Request(mel_MF, LIMIT, language) for mel_MF in mels_of(nano, chosen)]

    found = in_order(decode(nano, [requests], slots=6, max_length=MAX_LENGTH))

    expected = [reference_tokens(windowed, nano, a, max_new_tokens=LIMIT, language=language) for a in chosen]
    assert [list(hypothesis.token_ids) for hypothesis in found] == expected
    for hypothesis in found:
        assert hypothesis.language == (language if hypothesis.text else None)
        assert not hypothesis.text.startswith("language ")
    logits_RV = reference_response_logits(windowed, nano, chosen[0], found[0].token_ids, language=language)
    logprobs_R = logits_RV.log_softmax(-1).gather(1, torch.tensor(found[0].token_ids)[:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor(found[0].token_logprobs), logprobs_R, rtol=0, atol=1e-4)


def test_told_and_automatic_languages_share_a_batch(
    nano: AsrModel, audios: list[Samples], hypotheses: list[Hypothesis]
) -> None:
    mels = mels_of(nano, audios[:6])
    told = in_order(decode(nano, [[Request(m, LIMIT, "Thai") for m in mels]], slots=6, max_length=MAX_LENGTH))
    mixed = [Request(mel_MF, LIMIT, "Thai" if i % 2 else None) for i, mel_MF in enumerate(mels)]

    found = in_order(decode(nano, in_batches(mixed, 4), slots=4, max_length=MAX_LENGTH))

    assert_same(found, [told[i] if i % 2 else hypotheses[i] for i in range(6)])


def test_context_gives_the_tokens_of_qwen_asr_with_that_context(
    nano: AsrModel, windowed: Any, audios: list[Samples]
) -> None:
    context = "seven, drei, 五"
    model = replace(nano, prompt=nano.prompt.with_context(context))

    found = transcribe(model, mels_of(model, audios[:6]), max_response_tokens=LIMIT)

    expected = [reference_tokens(windowed, model, a, max_new_tokens=LIMIT, context=context) for a in audios[:6]]
    assert [list(hypothesis.token_ids) for hypothesis in found] == expected


def test_hidden_states_are_what_the_head_reads(
    nano: AsrModel, audios: list[Samples], hypotheses: list[Hypothesis]
) -> None:
    requests = requests_for(nano, audios)

    found = in_order(decode(nano, in_batches(requests, 4), slots=9, max_length=MAX_LENGTH, keep_hidden=True))

    assert_same(found, hypotheses)
    for hypothesis in found:
        hidden_RD = hypothesis.hidden_RD
        assert hidden_RD is not None
        assert hidden_RD.shape == (len(hypothesis.token_ids), 128)
        logprobs_RV = (hidden_RD @ nano.head_weight_VD.T).log_softmax(-1)
        chosen_R = logprobs_RV.gather(1, torch.tensor(hypothesis.token_ids)[:, None]).squeeze(1)
        assert logprobs_RV.argmax(-1).tolist() == list(hypothesis.token_ids)
        np.testing.assert_allclose(chosen_R, hypothesis.token_logprobs, rtol=0, atol=1e-5)
    assert {hypothesis.hidden_RD for hypothesis in hypotheses} == {None}


def test_hidden_states_have_the_dtype_of_the_model(load_nano: Callable[..., AsrModel], clips: list[Samples]) -> None:
    model = load_nano(dtype="bfloat16")
    requests = requests_for(model, clips[:3])

    found = in_order(decode(model, [requests], slots=3, max_length=MAX_LENGTH, keep_hidden=True))

    assert {hypothesis.hidden_RD.dtype for hypothesis in found} == {torch.bfloat16}  # type: ignore[union-attr]
    for hypothesis in found:
        logprobs_RV = (hypothesis.hidden_RD.float() @ model.head_weight_VD.float().T).log_softmax(-1)  # type: ignore[union-attr]
        chosen_R = logprobs_RV.gather(1, torch.tensor(hypothesis.token_ids)[:, None]).squeeze(1)
        np.testing.assert_allclose(chosen_R, hypothesis.token_logprobs, rtol=0, atol=1e-5)


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


def test_each_request_has_its_own_limit(nano: AsrModel, clips: list[Samples], hypotheses: list[Hypothesis]) -> None:
    limits = [1, 2, 5, LIMIT, 3, 1, LIMIT, 7]
    requests = [Request(m, limit) for m, limit in zip(mels_of(nano, clips[:8]), limits, strict=True)]

    found = in_order(decode(nano, in_batches(requests, 3), slots=3, max_length=MAX_LENGTH))

    whole = [hypothesis.token_ids for hypothesis in hypotheses[:8]]
    assert [h.token_ids for h in found] == [ids[:limit] for ids, limit in zip(whole, limits, strict=True)]
    assert [h.ended_by == ENDED_BY_LENGTH for h in found] == [limit < LIMIT for limit in limits]


def test_request_fits_exactly_into_its_slot_and_a_longer_one_is_refused(
    nano: AsrModel, clips: list[Samples], hypotheses: list[Hypothesis]
) -> None:
    # The CPU rounds up to 16 positions: a response that is cut where a whole number of them ends fills its slot.
    mels = mels_of(nano, clips)
    prompts = [nano.prompt.num_prompt_tokens(num_audio_tokens(mel_MF.shape[1])) for mel_MF in mels]
    limits = [-length % 16 for length in prompts]
    i = next(i for i, limit in enumerate(limits) if 2 < limit < len(hypotheses[i].token_ids))
    length, limit = prompts[i] + limits[i], limits[i]
    other = next(j for j, prompt in enumerate(prompts) if j != i and prompt < length - 2)
    requests = [Request(mels[i], limit), Request(mels[other], 2)]

    found = in_order(decode(nano, [requests], slots=2, max_length=length, keep_hidden=True))

    whole, of_other = hypotheses[i].token_ids, hypotheses[other].token_ids
    assert [hypothesis.token_ids for hypothesis in found] == [whole[:limit], of_other[:2]]
    for wrong in (limit + 1, 0):
        with pytest.raises(AssertionError, match=rf"got \d+ to {length - limit + wrong} tokens for {length} positions"):
            list(decode(nano, [[Request(mels[i], wrong)]], slots=2, max_length=length))


def test_response_that_is_an_end_token_alone_is_whole(
    nano: AsrModel, clips: list[Samples], hypotheses: list[Hypothesis]
) -> None:
    """The first token is looked at like any other one: here it is the end of all responses but one."""
    (first,) = {hypothesis.token_ids[0] for hypothesis in hypotheses[:24]}
    second = hypotheses[3].token_ids[1]
    for end_id, number in ((first, 1), (second, 2)):
        model = replace(nano, prompt=replace(nano.prompt, end_id=end_id))

        found = in_order(decode(model, [requests_for(nano, clips[:4])], slots=4, max_length=MAX_LENGTH))

        assert found[3].token_ids == hypotheses[3].token_ids[:number]
        assert found[3].ended_by == ENDED_BY_END_TOKEN
        assert found[3].text == ("" if number == 1 else nano.prompt.parse([first])[0])


def test_nothing_to_decode_yields_nothing(nano: AsrModel) -> None:
    assert list(decode(nano, [], slots=2, max_length=64)) == []
    assert list(decode(nano, [[], []], slots=2, max_length=64)) == []


def test_silence_and_the_shortest_utterance_are_transcribed_like_the_reference(nano: AsrModel, reference: Any) -> None:
    audios = [np.zeros(1_600, np.float32), np.zeros(20_000, np.float32), noise(800, seed=0)]

    hypotheses = transcribe(nano, mels_of(nano, audios), max_response_tokens=16)

    expected = [reference_tokens(reference, nano, audio, max_new_tokens=16) for audio in audios]
    assert [list(hypothesis.token_ids) for hypothesis in hypotheses] == expected


@pytest.mark.parametrize(
    ("seconds", "limit"),
    [(0.1, 35), (1.0, 57), (2.0, 82), (2.001, 83), (10.0, 282), (16.64, 448), (30.0, 448), (600.0, 448)],
)
def test_limit_grows_with_the_audio_up_to_the_longest_response(seconds: float, limit: int) -> None:
    """32 tokens for any, 25 for each second."""
    assert response_limit(seconds, max_response_tokens=448, max_tokens_per_second=25.0) == limit


def test_slot_length_is_that_of_the_longest_prompt_with_its_response(nano: AsrModel) -> None:
    prompt = nano.prompt
    automatic = prompt.num_prompt_tokens(0)
    told = prompt.num_prompt_tokens(0, language="Cantonese")

    # 1 s is 13 audio tokens, 2.5 s 26 + 7.
    assert slot_length(prompt, [1.0], [57], [None]) == automatic + 13 + 57
    assert slot_length(prompt, [1.0, 2.5], [57, 5], [None, None]) == automatic + 13 + 57
    assert slot_length(prompt, [1.0, 2.5], [57, 94], ["Cantonese", None]) == automatic + 33 + 94
    assert slot_length(prompt, [1.0, 1.0], [57, 57], [None, "Cantonese"]) == told + 13 + 57
