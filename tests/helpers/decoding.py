"""What tests of the decoding ask for, and how they compare what they get."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qad_dist.asr.load import AsrModel
from qad_dist.asr.transcribe import Hypothesis, Request
from tests.helpers.qwen import Samples, mels_of


def requests_for(model: AsrModel, audios: Sequence[Samples], limit: int = 48) -> list[Request]:
    """Clips as requests in automatic mode."""
    return [Request(mel_MF, limit) for mel_MF in mels_of(model, audios)]


def in_batches(requests: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """The same, so many at a time."""
    return [requests[start : start + size] for start in range(0, len(requests), size)]


def in_order(found: Any) -> list[Hypothesis]:
    """What ``decode`` yields, by running number; each number once."""
    pairs = list(found)
    assert sorted(number for number, _ in pairs) == list(range(len(pairs)))
    return [hypothesis for _, hypothesis in sorted(pairs, key=lambda pair: pair[0])]


def assert_same(found: Sequence[Hypothesis], expected: Sequence[Hypothesis]) -> None:
    """Tokens are equal; of log-probabilities sums of other order may differ."""
    assert [hypothesis.token_ids for hypothesis in found] == [hypothesis.token_ids for hypothesis in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.token_logprobs, other.token_logprobs, rtol=0, atol=1e-4)
