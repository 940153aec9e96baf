"""Labels of real utterances by the real teacher: the same as clip by clip, whatever else is wrong or asked for."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from qad_dist.asr.labeller import ShardLabels, TorchLabeller
from qad_dist.asr.load import AsrModel
from qad_dist.asr.mel import log_mels
from qad_dist.asr.transcribe import transcribe
from qad_dist.config.label import LabelConfig
from shards.index import read_utterances
from shards.read import Shards
from shards.schema import ENDED_BY_END_TOKEN, ENDED_BY_LENGTH, UNREADABLE, Utterance
from shards.workers import Reader
from tests.helpers.digits import DigitsRun


@pytest.fixture(scope="module")
def utterances(digits: DigitsRun) -> list[Utterance]:
    """Those of one shard."""
    table = list(read_utterances(digits.pack))
    return [utterance for utterance in table if utterance.shard == table[0].shard]


@pytest.fixture
def reader(digits: DigitsRun) -> Iterator[Reader]:
    with Reader(Shards(digits.pack), workers=0) as reader:
        yield reader


def label(
    nano: AsrModel, reader: Reader, utterances: Sequence[Utterance], language: str | None = None, **settings: object
) -> ShardLabels:
    labeller = TorchLabeller(nano, reader, LabelConfig.model_validate(settings), longest_seconds=8)
    return labeller.label(utterances, [language] * len(utterances), on_step=lambda: None)


def test_labels_are_those_of_each_utterance_alone_and_in_its_order(nano, reader, utterances):
    found = label(nano, reader, utterances, batch_audio_seconds=4, slots=3).labels

    assert [one.key for one in found] == [utterance.key for utterance in utterances]
    for utterance, one in zip(utterances, found, strict=True):
        mels = log_mels(reader.read([utterance]), nano.extractor)
        [alone] = transcribe(nano, mels, max_response_tokens=448)
        assert one.token_ids == alone.token_ids
        assert one.token_logprobs == pytest.approx(alone.token_logprobs, abs=1e-4)
        assert one.mean_logprob == pytest.approx(np.mean(alone.token_logprobs), abs=1e-4)
        assert (one.text, one.language, one.ended_by) == (alone.text, alone.language, ENDED_BY_END_TOKEN)
        assert (one.prompt_language, one.error, one.duration_seconds) == (None, None, utterance.duration_seconds)


def test_told_language_is_written_down_and_its_tag_is_no_part_of_the_response(nano, reader, utterances):
    automatic = label(nano, reader, utterances)
    told = label(nano, reader, utterances, "German")

    tag = nano.prompt.tokenizer("language German<asr_text>")["input_ids"]
    assert {one.prompt_language for one in told.labels} == {"German"}
    assert {one.language for one in told.labels} == {"German"}
    german = [one for one in automatic.labels if one.language == "German"]
    assert german
    by_key = {one.key: one for one in told.labels}
    for one in german:  # the model told itself what it is told here
        assert one.token_ids == (*tag, *by_key[one.key].token_ids)


def test_hidden_states_give_the_log_probabilities_through_the_head(nano, reader, utterances):
    found = label(nano, reader, utterances, hidden_states=True, slots=3)

    assert found.hidden_TD is not None
    bits = torch.from_numpy(found.hidden_TD.view(np.int16)).view(torch.bfloat16)
    logprobs_TV = torch.log_softmax(bits.float() @ nano.head_weight_VD.float().T, dim=-1)
    tokens = torch.tensor([token for one in found.labels for token in one.token_ids])
    expected = torch.tensor([value for one in found.labels for value in one.token_logprobs])
    assert logprobs_TV.shape[0] == len(tokens)
    # bfloat16 has 8 bits.
    assert (logprobs_TV.gather(1, tokens[:, None]).squeeze(1) - expected).abs().max() < 0.1
    assert (logprobs_TV.gather(1, tokens.roll(1)[:, None]).squeeze(1) - expected).abs().max() > 1


def test_labels_do_not_depend_on_whether_hidden_states_are_kept(nano, reader, utterances):
    kept = label(nano, reader, utterances, hidden_states=True)

    assert kept.labels == label(nano, reader, utterances).labels
    assert label(nano, reader, utterances).hidden_TD is None


def test_utterance_that_cannot_be_read_is_marked_and_the_others_are_labelled(nano, reader, utterances, tmp_path: Path):
    expected = label(nano, reader, utterances, hidden_states=True)
    bad = 2
    hurt = [
        Utterance(**{**{name: getattr(one, name) for name in one.__slots__}, "audio_offset": 0})
        if place == bad
        else one
        for place, one in enumerate(utterances)
    ]

    found = label(nano, reader, hurt, hidden_states=True)

    marked = found.labels[bad]
    assert (marked.key, marked.ended_by, marked.token_ids) == (utterances[bad].key, UNREADABLE, ())
    assert marked.error == found.damaged[0].reason
    assert [one.key for one in found.damaged] == [utterances[bad].key]
    for place, (one, other) in enumerate(zip(found.labels, expected.labels, strict=True)):
        assert place == bad or one.token_ids == other.token_ids
    num_tokens = np.cumsum([0, *(one.num_tokens for one in expected.labels)])
    others = np.delete(expected.hidden_TD, np.s_[num_tokens[bad] : num_tokens[bad + 1]], axis=0)
    assert found.hidden_TD.shape == others.shape
    as_numbers = [
        torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float() for bits in (found.hidden_TD, others)
    ]
    assert torch.allclose(*as_numbers, atol=0.05)


def test_response_is_cut_at_the_limit_of_its_duration(nano, reader, utterances):
    found = label(nano, reader, utterances, max_tokens_per_second=0.001, max_response_tokens=8)

    assert {one.ended_by for one in found.labels if one.num_tokens == 8} <= {ENDED_BY_LENGTH, ENDED_BY_END_TOKEN}
    free = label(nano, reader, utterances)
    for one, other in zip(found.labels, free.labels, strict=True):
        assert one.token_ids == other.token_ids[:8]
        assert (one.ended_by == ENDED_BY_LENGTH) == (other.num_tokens > 8)
    assert any(one.ended_by == ENDED_BY_LENGTH for one in found.labels)


def test_no_utterances_give_no_labels(nano, reader):
    assert label(nano, reader, []) == ShardLabels(labels=[], hidden_TD=None, damaged=[])


def test_shards_that_follow_one_another_do_not_change_each_other(nano, reader, utterances):
    labeller = TorchLabeller(nano, reader, LabelConfig(slots=3, hidden_states=True), longest_seconds=8)
    first, second = utterances[:5], utterances[5:]

    def label_with(one: TorchLabeller, some: Sequence[Utterance]) -> ShardLabels:
        return one.label(some, [None] * len(some), on_step=lambda: None)

    before = label_with(labeller, first)
    between = label_with(labeller, second)
    after = label_with(labeller, first)

    assert after.labels == before.labels
    assert after.hidden_TD.tobytes() == before.hidden_TD.tobytes()
    alone = label(nano, reader, second, slots=3, hidden_states=True)
    assert between.labels == alone.labels


def test_each_step_of_the_decoding_is_told(nano, reader, utterances):
    steps = []
    labeller = TorchLabeller(nano, reader, LabelConfig(), longest_seconds=8)

    found = labeller.label(utterances, [None] * len(utterances), on_step=lambda: steps.append(1))

    assert len(steps) >= max(one.num_tokens for one in found.labels) - 1
