"""Groups share a set out by its durations alone; what is decoded in them is what is decoded clip by clip."""

import numpy as np
import pytest

from qad_dist.asr.groups import GroupDecoder, plan_groups, utterance_limit
from qad_dist.asr.mel import log_mels
from qad_dist.asr.transcribe import transcribe
from qad_dist.config.score import ScoreConfig


def sizes(durations: list[float], **settings: object) -> list[list[list[int]]]:
    return plan_groups(np.array(durations), ScoreConfig.model_validate(settings), num_groups=4, smallest=3)


def test_every_utterance_is_in_one_group_the_longest_first() -> None:
    durations = np.random.default_rng(0).uniform(1, 20, 50).tolist()

    groups = sizes(durations)

    places = [place for group in groups for batch in group for place in batch]
    assert sorted(places) == list(range(50))
    longest = [max(durations[place] for batch in group for place in batch) for group in groups]
    assert longest == sorted(longest, reverse=True)
    assert [sum(map(len, group)) for group in groups] == [13, 13, 13, 11]


@pytest.mark.parametrize(
    ("number", "slots", "expected"), [(7, 128, [3, 3, 1]), (40, 5, [5] * 8), (2, 128, [2]), (100, 128, [25] * 4)]
)
def test_groups_have_neither_too_few_utterances_nor_too_many(number: int, slots: int, expected: list[int]) -> None:
    assert [sum(map(len, group)) for group in sizes([1.0] * number, slots=slots)] == expected


def test_batches_of_a_group_stay_below_the_audio_that_goes_through_the_model_at_once() -> None:
    groups = sizes([10.0] * 12, batch_audio_seconds=20.0)

    assert [len(batch) for group in groups for batch in group] == [2, 1] * 4


def test_a_limit_is_the_lower_of_two() -> None:
    settings = ScoreConfig(max_response_tokens=100, max_tokens_per_second=10)

    assert [utterance_limit(settings, seconds) for seconds in (0.05, 2.0, 60.0)] == [33, 52, 100]


def test_groups_are_transcribed_as_each_clip_alone(nano, clips) -> None:
    mels = log_mels(clips, nano.extractor)
    durations_U = np.array([len(clip) / 16_000 for clip in clips])
    settings = ScoreConfig(slots=5)
    groups = plan_groups(durations_U, settings, num_groups=64, smallest=8)
    assert max(sum(map(len, group)) for group in groups) == 5
    decoder = GroupDecoder(nano, settings, durations_U, [None] * len(clips), groups)

    found = {
        place: hypothesis.text
        for group in groups
        for place, hypothesis in decoder.decode([[(place, mels[place]) for place in batch] for batch in group])
    }

    alone = [transcribe(nano, [mel_MF], max_response_tokens=100)[0].text for mel_MF in mels]
    assert [found[place] for place in range(len(clips))] == alone


def test_what_the_model_is_told_reaches_it(nano, clips) -> None:
    mels, durations_U = log_mels(clips[:2], nano.extractor), np.array([len(clip) / 16_000 for clip in clips[:2]])
    decoder = GroupDecoder(nano, ScoreConfig(), durations_U, ["German", None], [[[0, 1]]])

    found = dict(decoder.decode([[(0, mels[0]), (1, mels[1])]]))

    assert found[0].language == "German"
    assert nano.prompt.tokenizer.decode(found[0].token_ids).startswith("language") is False
    assert nano.prompt.tokenizer.decode(found[1].token_ids).startswith("language")
