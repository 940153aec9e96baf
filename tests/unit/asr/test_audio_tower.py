"""The audio tower on many utterances at once against qwen-asr's, which runs them one by one."""

from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from torch import Tensor

from qad_dist.asr.audio_tower import encode, num_audio_tokens, window_lengths
from qad_dist.asr.load import AsrModel
from qad_dist.asr.reference import reference_audio_tokens
from tests.helpers.operators import count_operators
from tests.helpers.qwen import windows

# Below a chunk of 1 s, whole and broken chunks, a window of 8 s and beyond; three windows.
LENGTHS = [50, 51, 75, 99, 100, 101, 180, 800, 801, 2100]

# Outputs reach 8.6; float32 sums of the convolutions in another order differ by up to 8e-6.
TOLERANCE = 2e-5


def mels_of(lengths: list[int]) -> list[Tensor]:
    """Noise spectrograms, each of its own seed, so that a swapped or shifted utterance shows."""
    return [0.5 * torch.randn(128, n, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(lengths)]


def encode_all(model: AsrModel, mels: list[Tensor], audio_attention: str) -> list[Tensor]:
    lengths = [mel.shape[1] for mel in mels]
    states_PD = encode(model.audio_tower, torch.cat(mels, 1), torch.tensor(lengths), audio_attention=audio_attention)
    return list(states_PD.split([num_audio_tokens(length) for length in lengths]))


@pytest.fixture
def reference_tower(reference: Any) -> Any:
    return reference.thinker.audio_tower


@pytest.fixture
def windowed_tower(reference: Any) -> Generator[Any]:
    with windows(reference):
        yield reference.thinker.audio_tower


@torch.no_grad()
def run_reference(tower: Any, mel: Tensor) -> Tensor:
    return tower(mel, feature_lens=torch.tensor([mel.shape[1]])).last_hidden_state


@pytest.mark.parametrize(
    "lengths",
    [
        LENGTHS,
        LENGTHS[::-1],
        [180, 50, 800, 99, 2100, 51, 75, 100, 101, 801],
        [99],
        [50, 50],
    ],
    ids=["rising", "falling", "mixed", "one below a chunk", "two equal"],
)
def test_windowed_encoding_of_many_equals_the_reference_one_by_one(
    nano: AsrModel, windowed_tower: Any, lengths: list[int]
) -> None:
    mels = mels_of(lengths)

    states = encode_all(nano, mels, "windowed")

    for length, mel, found in zip(lengths, mels, states, strict=True):
        expected = run_reference(windowed_tower, mel)
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE, msg=lambda m, n=length: f"{n} frames: {m}")


def test_full_encoding_of_many_equals_the_reference_under_plain_sdpa(nano: AsrModel, reference_tower: Any) -> None:
    mels = mels_of(LENGTHS)

    states = encode_all(nano, mels, "full")

    for mel, found in zip(mels, states, strict=True):
        torch.testing.assert_close(found, run_reference(reference_tower, mel), rtol=0, atol=TOLERANCE)


def test_full_and_windowed_differ_only_beyond_eight_seconds(nano: AsrModel) -> None:
    mels = mels_of(LENGTHS)

    full, windowed = encode_all(nano, mels, "full"), encode_all(nano, mels, "windowed")

    differs = [bool((a - b).abs().max() > 100 * TOLERANCE) for a, b in zip(full, windowed, strict=True)]
    assert differs == [length > 800 for length in LENGTHS]


def test_neighbours_do_not_change_an_utterance(nano: AsrModel) -> None:
    own = mels_of([75, 180])
    loud = [5 * mel for mel in mels_of([2100, 51, 99])]

    alone = encode_all(nano, own, "windowed")
    among = encode_all(nano, [loud[0], own[0], loud[1], own[1], loud[2]], "windowed")

    torch.testing.assert_close(among[1], alone[0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(among[3], alone[1], rtol=0, atol=TOLERANCE)


def test_convolutions_in_parts_equal_convolutions_at_once(
    load_nano: Callable[..., AsrModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, mels = load_nano(), mels_of([250, 99, 801])
    whole = encode_all(model, mels, "windowed")
    monkeypatch.setattr(model.audio_tower, "conv_chunksize", 2)

    parts = encode_all(model, mels, "windowed")

    torch.testing.assert_close(parts, whole, rtol=0, atol=TOLERANCE)


def test_number_of_operators_does_not_depend_on_the_number_of_utterances(nano: AsrModel) -> None:
    """qwen-asr runs its tower once for each."""
    counts = []
    for number in (1, 8, 64):
        lengths = [LENGTHS[i % len(LENGTHS)] for i in range(6, 6 + number)]
        mels = mels_of(lengths)
        assert sum(-(-length // 100) for length in lengths) <= nano.audio_tower.conv_chunksize
        with count_operators() as operators:
            encode_all(nano, mels, "windowed")
        counts.append(operators.total())

    assert counts[0] == counts[1] == counts[2] > 100


def test_number_of_audio_tokens_is_that_of_qwen_asr_for_every_length() -> None:
    frames = torch.arange(1, 4001)

    ours = [num_audio_tokens(n) for n in frames.tolist()]

    assert ours == reference_audio_tokens(frames).tolist()
    assert ours[3000 - 1] == 30 * 13  # 13 a second


def test_windows_are_eight_seconds_and_never_reach_into_the_next_utterance() -> None:
    lengths = torch.tensor([2100, 50, 800, 801])

    # 2,100 frames are 273 tokens; 8 s are 104.
    assert window_lengths(lengths, window_frames=800).tolist() == [104, 104, 65, 7, 104, 104, 1]
    assert window_lengths(lengths, window_frames=None).tolist() == [273, 7, 104, 105]
