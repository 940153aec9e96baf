"""Tables of utterances as a corpus of many languages has them, for the plan; without audio."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_AT_ONCE = 1_000_000


@dataclass(frozen=True, slots=True)
class Mix:
    """Columns of a table of utterances."""

    num_tokens: NDArray[np.int64]
    seconds: NDArray[np.float64]
    languages: NDArray[np.int32]


def make_mix(
    num_utterances: int, *, seed: int = 0, num_languages: int = 30, median_seconds: float | None = None
) -> Mix:
    """Utterances of 1 to 30 s with 13 tokens a second, 15 for the prompt, and a response.

    Args:
        num_utterances: At least 1.
        seed: Of sizes and languages.
        num_languages: Of unlike hours; each has its own tokens a second, about 3.3, and each utterance varies it.
        median_seconds: Of log-normal durations; None for equally many of each duration.
    """
    random = np.random.default_rng(seed)
    parts = random.dirichlet(np.full(num_languages, 0.5))
    rates = random.lognormal(np.log(3.1), 0.35, num_languages)
    mix = Mix(np.empty(num_utterances, np.int64), np.empty(num_utterances), np.empty(num_utterances, np.int32))
    for start in range(0, num_utterances, _AT_ONCE):
        rows = slice(start, min(start + _AT_ONCE, num_utterances))
        size = rows.stop - rows.start
        mix.languages[rows] = random.choice(num_languages, size, p=parts)
        if median_seconds is None:
            seconds = random.uniform(1, 30, size)
        else:
            seconds = np.clip(random.lognormal(np.log(median_seconds), 0.7, size), 1, 30)
        mix.seconds[rows] = np.round(seconds * 16_000) / 16_000
        response = mix.seconds[rows] * rates[mix.languages[rows]] * random.lognormal(0, 0.25, size)
        mix.num_tokens[rows] = np.ceil(13 * mix.seconds[rows]) + 15 + np.maximum(3, np.rint(response))
    return mix
