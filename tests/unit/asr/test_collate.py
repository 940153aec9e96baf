"""Packed batches and the decoder on them, against qwen-asr's unpacked forward pass."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qad_dist.asr.audio_tower import num_audio_tokens
from qad_dist.asr.collate import Example, collate, num_packed_tokens
from qad_dist.asr.decoder import DecoderStack, embed, response_states
from qad_dist.asr.load import AsrModel
from qad_dist.batch import Batch
from tests.helpers.qwen import Samples, mels_of, noise, reference_inputs, reference_response_logits


@pytest.fixture(scope="module")
def audios(clips: list[Samples]) -> list[Samples]:
    """Real speech of 0.5 to 5 s, and 11 s of noise."""
    return [clips[0], clips[7], clips[3], clips[16][:15_000], noise(7_000, seed=1), noise(11 * 16_000, seed=2)]


@pytest.fixture(scope="module")
def examples(nano: AsrModel, audios: list[Samples]) -> list[Example]:
    """With responses that the model would and would not give."""
    tokenizer, random = nano.processor.tokenizer, np.random.default_rng(0)
    responses = [
        tokenizer("language English<asr_text>three<|im_end|>")["input_ids"],
        tokenizer("language None<asr_text><|im_end|>")["input_ids"],
        random.integers(0, 1000, 23).tolist(),
        random.integers(0, 1000, 2).tolist(),
        [nano.prompt.end_id],
        random.integers(0, 1000, 40).tolist(),
    ]
    return [
        Example(key=f"clip-{i}", mel_MF=mel_MF, response_ids=response)
        for i, (mel_MF, response) in enumerate(zip(mels_of(nano, audios), responses, strict=True))
    ]


def pack(model: AsrModel, examples: Sequence[Example]) -> Batch:
    return collate(examples, prompt=model.prompt)


@torch.no_grad()
def states_of(model: AsrModel, batch: Batch) -> Tensor:
    return response_states(DecoderStack(model.decoder.layers), embed(model, batch), model.decoder.norm)


def test_each_row_predicts_its_target_as_in_the_unpacked_reference(
    nano: AsrModel, reference: Any, audios: list[Samples], examples: list[Example]
) -> None:
    """Below 8 s; beyond, the reference lacks the tower's windows."""
    short = examples[:5]
    batch = pack(nano, short)

    logits_RV = states_of(nano, batch) @ nano.head_weight_VD.T

    logprobs_R = logits_RV.log_softmax(-1).gather(1, batch.targets_R[:, None]).squeeze(1)
    split_R = logprobs_R.split([len(example.response_ids) for example in short])
    for audio, example, found in zip(audios, short, split_R, strict=False):
        expected_RV = reference_response_logits(reference, nano, audio, example.response_ids)
        targets = torch.tensor(list(example.response_ids))
        expected = expected_RV.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_full_attention_rows_equal_the_reference_beyond_eight_seconds(
    load_nano: Any, reference: Any, audios: list[Samples], examples: list[Example]
) -> None:
    model, long = load_nano(audio_attention="full"), examples[5]
    batch = pack(model, [examples[0], long])

    logits_RV = states_of(model, batch)[len(examples[0].response_ids) :] @ model.head_weight_VD.T

    expected_RV = reference_response_logits(reference, model, audios[5], long.response_ids)
    torch.testing.assert_close(logits_RV.log_softmax(-1), expected_RV.log_softmax(-1), rtol=0, atol=2e-4)


def test_batch_holds_prompts_and_responses_one_behind_the_other(
    nano: AsrModel, audios: list[Samples], examples: list[Example]
) -> None:
    batch = pack(nano, examples[:3])

    prompts = [reference_inputs(nano, audio)["input_ids"][0].tolist() for audio in audios[:3]]
    sequences = [[*prompt, *example.response_ids] for prompt, example in zip(prompts, examples, strict=False)]
    lengths = [len(sequence) for sequence in sequences]
    assert batch.keys == ("clip-0", "clip-1", "clip-2")
    assert batch.input_ids_N.tolist() == [token for sequence in sequences for token in sequence]
    assert batch.position_ids_N.tolist() == [position for length in lengths for position in range(length)]
    assert batch.cu_seqlens_U1.tolist() == [0, lengths[0], lengths[0] + lengths[1], sum(lengths)]
    assert batch.cu_seqlens_U1.dtype == torch.int32
    assert (batch.num_tokens, batch.num_utterances, batch.num_rows) == (sum(lengths), 3, len(batch.targets_R))


def test_told_language_stands_in_the_prompt_and_responses_follow_it(
    nano: AsrModel, reference: Any, audios: list[Samples], examples: list[Example]
) -> None:
    languages = ("Thai", None, "Macedonian")
    told = [replace(example, prompt_language=name) for example, name in zip(examples, languages, strict=False)]

    batch = pack(nano, told)

    prompts = [
        reference_inputs(nano, audio, language=name)["input_ids"][0].tolist()
        for audio, name in zip(audios, languages, strict=False)
    ]
    lengths = [len(prompt) + len(example.response_ids) for prompt, example in zip(prompts, told, strict=True)]
    sequences = [[*prompt, *example.response_ids] for prompt, example in zip(prompts, told, strict=True)]
    assert batch.input_ids_N.tolist() == [token for sequence in sequences for token in sequence]
    assert torch.equal(batch.input_ids_N[batch.rows_R + 1], batch.targets_R)
    assert [
        num_packed_tokens(
            nano.prompt,
            duration_seconds=len(audio) / 16_000,
            num_response_tokens=len(example.response_ids),
            language=example.prompt_language,
        )
        for audio, example in zip(audios, told, strict=False)
    ] == lengths
    found = (states_of(nano, batch) @ nano.head_weight_VD.T).log_softmax(-1)[: len(told[0].response_ids)]
    expected = reference_response_logits(reference, nano, audios[0], told[0].response_ids, language="Thai")
    torch.testing.assert_close(found, expected.log_softmax(-1), rtol=0, atol=2e-4)


def test_prompts_without_responses_are_a_batch_without_rows(nano: AsrModel, audios: list[Samples]) -> None:
    batch = pack(nano, [Example(key="", mel_MF=mel_MF, response_ids=()) for mel_MF in mels_of(nano, audios[:2])])

    prompts = [reference_inputs(nano, audio)["input_ids"][0].tolist() for audio in audios[:2]]
    assert batch.input_ids_N.tolist() == prompts[0] + prompts[1]
    assert (batch.num_rows, batch.weighted_rows) == (0, 0)
    assert states_of(nano, batch).shape == (0, 128)


def test_rows_are_all_response_tokens_and_nothing_else(
    nano: AsrModel, audios: list[Samples], examples: list[Example]
) -> None:
    batch = pack(nano, examples)

    assert batch.targets_R.tolist() == [token for example in examples for token in example.response_ids]
    assert torch.equal(batch.input_ids_N[batch.rows_R + 1], batch.targets_R)  # each row's target follows it
    assert batch.weighted_rows == batch.num_rows == len(set(batch.rows_R.tolist()))
    starts = batch.cu_seqlens_U1[:-1].tolist()
    for start, audio in zip(starts, audios, strict=True):
        prompt_length = reference_inputs(nano, audio)["input_ids"].shape[1]
        rows = [row - start for row in batch.rows_R.tolist() if start <= row < start + prompt_length]
        assert rows == [prompt_length - 1]  # of the prompt, only its last position predicts the response


def test_audio_positions_are_the_placeholders_and_as_many_as_audio_tokens(
    nano: AsrModel, examples: list[Example]
) -> None:
    batch = pack(nano, examples)

    ids = batch.input_ids_N.tolist()
    assert batch.audio_positions_P.tolist() == [i for i, token in enumerate(ids) if token == 1022]
    assert len(batch.audio_positions_P) == sum(num_audio_tokens(n) for n in batch.mel_lengths_U.tolist())
    assert batch.mel_MF.shape == (128, int(batch.mel_lengths_U.sum()))


def test_response_that_holds_the_audio_placeholder_gets_no_audio(nano: AsrModel, clips: list[Samples]) -> None:
    """A model can emit any token; its own placeholder in a response must not shift the audio of the batch."""
    first, second = mels_of(nano, clips[:2])
    odd = Example(key="odd", mel_MF=first, response_ids=[5, nano.prompt.audio_id, 7])
    batch = pack(nano, [odd, Example(key="next", mel_MF=second, response_ids=[5])])

    audio_tokens = sum(num_audio_tokens(n) for n in batch.mel_lengths_U.tolist())
    assert len(batch.audio_positions_P) == audio_tokens
    assert not set(batch.audio_positions_P.tolist()) & set((batch.rows_R + 1).tolist())


def test_weights_are_repeated_for_each_row_of_their_utterance(nano: AsrModel, clips: list[Samples]) -> None:
    first, second = mels_of(nano, clips[:2])
    batch = pack(
        nano,
        [
            Example(key="a", mel_MF=first, response_ids=[1, 2, 3], kl_weight=0.5, ce_weight=2.0),
            Example(key="b", mel_MF=second, response_ids=[4], kl_weight=0.25, ce_weight=0.0),
        ],
    )

    assert batch.kl_weight_R.tolist() == [0.5, 0.5, 0.5, 0.25]
    assert batch.ce_weight_R.tolist() == [2.0, 2.0, 2.0, 0.0]


def test_packed_states_equal_one_by_one(nano: AsrModel, examples: list[Example]) -> None:
    packed = states_of(nano, pack(nano, examples))

    alone = torch.cat([states_of(nano, pack(nano, [example])) for example in examples])

    torch.testing.assert_close(packed, alone, rtol=0, atol=5e-5)  # states reach 20


def test_other_audio_of_one_utterance_changes_its_rows_only(nano: AsrModel, examples: list[Example]) -> None:
    before = states_of(nano, pack(nano, examples))
    other = Example(key="clip-2", mel_MF=examples[2].mel_MF.flip(1), response_ids=examples[2].response_ids)

    after = states_of(nano, pack(nano, [*examples[:2], other, *examples[3:]]))

    lengths = [len(example.response_ids) for example in examples]
    changes = [float((a - b).abs().max()) for a, b in zip(before.split(lengths), after.split(lengths), strict=True)]
    assert changes[2] > 0.1
    assert max(changes[:2] + changes[3:]) < 1e-5


def test_later_response_tokens_do_not_reach_back(nano: AsrModel, examples: list[Example]) -> None:
    changed = Example(
        key="clip-2", mel_MF=examples[2].mel_MF, response_ids=[*examples[2].response_ids[:10], *range(200, 213)]
    )

    before, after = (states_of(nano, pack(nano, [examples[0], e, examples[3]])) for e in (examples[2], changed))

    start = len(examples[0].response_ids)
    differs = ((before - after).abs().amax(1) > 1e-4).tolist()
    assert differs[: start + 11] == [False] * (start + 11)  # row 10 predicts token 10 and has seen only 0 to 9
    assert all(differs[start + 11 : start + 23])
    assert not any(differs[start + 23 :])


def test_rotary_angles_are_those_of_the_batchs_positions(nano: AsrModel, examples: list[Example]) -> None:
    """Attention only sees differences of positions, so that the angles themselves are looked at."""
    batch = pack(nano, examples[:3])

    embedded = embed(nano, batch)

    inverse_E = 1e6 ** (-torch.arange(0, 32, 2) / 32)
    angles_NE = (batch.position_ids_N[:, None] * inverse_E).repeat(1, 2)
    torch.testing.assert_close(embedded.cos_1NE[0], angles_NE.cos(), rtol=0, atol=1e-4)
    torch.testing.assert_close(embedded.sin_1NE[0], angles_NE.sin(), rtol=0, atol=1e-4)
    starts = batch.cu_seqlens_U1[:-1].long()
    assert (embedded.cos_1NE[0, starts] == 1).all()


def test_gradient_reaches_hidden_states_at_response_rows_only(nano: AsrModel, examples: list[Example]) -> None:
    """Whatever a model says at a prompt position cannot enter the loss."""
    batch = pack(nano, examples[:3])
    outputs: list[Tensor] = []

    def stack(hidden_ND: Tensor, *_: Any) -> tuple[Tensor]:
        outputs.append(hidden_ND.clone().requires_grad_())
        return (outputs[0],)

    response_states(stack, embed(nano, batch), nano.decoder.norm).square().sum().backward()

    touched = outputs[0].grad.abs().sum(1).nonzero().squeeze(1)
    assert touched.tolist() == batch.rows_R.tolist()


@pytest.mark.parametrize("num_samples", [800, 7_999, 8_000, 8_159, 15_999, 16_000, 16_001, 40_000, 131_071])
@pytest.mark.parametrize("response", [[1], [1, 2, 3, 4, 5]])
def test_packed_length_is_known_without_the_audio(nano: AsrModel, num_samples: int, response: list[int]) -> None:
    example = Example(key="x", mel_MF=mels_of(nano, [noise(num_samples, seed=0)])[0], response_ids=response)

    told = num_packed_tokens(nano.prompt, duration_seconds=num_samples / 16_000, num_response_tokens=len(response))

    assert told == pack(nano, [example]).num_tokens


def test_batch_without_weight_keeps_everything_else(nano: AsrModel, examples: list[Example]) -> None:
    batch = pack(nano, examples[:2])

    empty = batch.without_weight()

    assert empty.weighted_rows == 0
    assert not empty.kl_weight_R.any()
    assert not empty.ce_weight_R.any()
    assert torch.equal(empty.input_ids_N, batch.input_ids_N)
    assert torch.equal(empty.rows_R, batch.rows_R)
    assert batch.weighted_rows == batch.num_rows
    assert batch.kl_weight_R.all()
