"""Loops: text that a decoder repeats because it has lost the audio, and that nobody says so often. Pure: no I/O.

People repeat themselves too: "ha ha ha", "no no no no", 哈哈哈, ますます, anak-anak, a phone number with four fives,
a line of a song. So what counts is how much is said again at once. The cost is linear in the length of the text, as no
stretch longer than :data:`LONGEST_UNIT` is looked for.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from qad_dist.text.scripts import is_unspaced, words_worth

LONGEST_UNIT = 200
"""Tokens of the longest stretch whose repetition is seen: a long sentence in characters, a paragraph in words."""

MIN_COPIES = 3
"""A sentence said twice is a repetition for emphasis, an announcement or a dictation."""

_WORD, _NUMBER = 1.0, 0.5
_LONGEST_WORD = 40
# Tokens of the stretches that are new or not: about four words, in words and in characters.
_STRETCH_WORDS, _STRETCH_CHARACTERS = 4, 8
_MIN_STRETCHES = 24


@dataclass(frozen=True, slots=True)
class Units:
    """A text as what may repeat: words, and single characters where words are not spaced."""

    tokens: list[str]
    lengths: list[float]
    """In words' worth. A number has half of it: digits are read out one by one."""
    are_characters: bool
    """Whether most of the tokens are characters of a script without spaces."""


def units(normalized: str) -> Units:
    """Split a text.

    Args:
        normalized: From :func:`qad_dist.text.normalize.normalize`.
    """
    tokens: list[str] = []
    lengths: list[float] = []
    num_characters = 0
    for word in normalized.split():
        cuts = [0, *(i for i in range(1, len(word)) if is_unspaced(word[i]) or is_unspaced(word[i - 1])), len(word)]
        for start, end in pairwise(cuts):
            part = word[start:end]
            if is_unspaced(part[0]):
                num_characters += 1
                lengths.append(words_worth(part))
                tokens.append(part)
            elif len(part) > _LONGEST_WORD:  # no word, but a loop without spaces: lalalala, aaaaaaaa
                lengths += map(words_worth, part)
                tokens += part
            else:
                lengths.append(_NUMBER if part.isnumeric() else _WORD)
                tokens.append(part)
    return Units(tokens, lengths, are_characters=2 * num_characters > len(tokens))


def repeated_words(text: Units) -> float:
    """Most that is said again at once, in words' worth: of ``a b a b a b`` four words, as ``a b`` stands there first.

    A stretch counts only if it comes :data:`MIN_COPIES` times or more in a row, the last time perhaps cut short.
    """
    # Each token of a stretch comes as often as the stretch does: most texts have no three of anything.
    longest = min(LONGEST_UNIT, sum(number // MIN_COPIES for number in Counter(text.tokens).values()))
    if longest == 0:
        return 0.0
    places: dict[str, int] = {}
    tokens = np.array([places.setdefault(token, len(places)) for token in text.tokens])
    ends = np.concatenate([[0.0], np.cumsum(text.lengths)])
    most = max(_repeated(tokens, ends, period) for period in range(1, longest + 1))
    return round(most, 9)  # lengths such as 0.6 do not add up to whole numbers exactly


def new_share(text: Units) -> float:
    """Share of the stretches of about four words that do not stand in the text before; 1 for a short text.

    A loop whose rounds differ in a word or two has a low one, although none of its sentences is repeated at once.
    """
    length = _STRETCH_CHARACTERS if text.are_characters else _STRETCH_WORDS
    stretches = list(zip(*(text.tokens[start:] for start in range(length)), strict=False))
    return len(set(stretches)) / len(stretches) if len(stretches) >= _MIN_STRETCHES else 1.0


def _repeated(tokens: npt.NDArray[np.int64], ends: npt.NDArray[np.float64], period: int) -> float:
    """Most words' worth of tokens in a row that are the same as the one ``period`` before."""
    differing = np.flatnonzero(tokens[period:] != tokens[:-period])
    starts = np.concatenate([[0], differing + 1])
    stops = np.concatenate([differing, [len(tokens) - period]])
    enough = stops - starts >= (MIN_COPIES - 1) * period
    return float((ends[stops[enough] + period] - ends[starts[enough] + period]).max(initial=0.0))
