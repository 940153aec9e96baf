"""Correct sentences in the model's 30 languages, grouped by script, and how long it takes to say them.

``tests/unit/text/sentences/<family>.txt`` holds a template a line, behind its language and a tab; ``[a|b]`` in it
stands for ``a`` or ``b``, and every choice gives a sentence that is right.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "unit" / "text" / "sentences"
FAMILIES = ("latin", "cyrillic", "greek", "arabic", "devanagari", "thai", "han", "japanese", "hangul")


@dataclass(frozen=True)
class Sentence:
    language: str
    text: str


def sentences(family: str, *, per_template: int = 24) -> list[Sentence]:
    """Sentences of a family of scripts, none twice; of each template so many as it has, at most ``per_template``."""
    found: dict[Sentence, None] = {}
    for line in (FOLDER / f"{family}.txt").read_text(encoding="utf-8").splitlines():
        language, _, template = line.partition("\t")
        found |= dict.fromkeys(Sentence(language, text) for text in _texts(template, per_template))
    return list(found)


def _texts(template: str, most: int) -> list[str]:
    parts = [part.split("|") for part in re.split(r"\[([^]]*)\]", template)]
    number = math.prod(map(len, parts))
    # Strides that share no factor with the number of texts visit each at most once, and all slots change.
    stride = next(step for step in range(max(1, number * 5 // 8), number + 2) if math.gcd(step, number) == 1)
    return [_text(parts, place * stride % number) for place in range(min(most, number))]


def _text(parts: list[list[str]], place: int) -> str:
    chosen = []
    for choices in parts:
        place, choice = divmod(place, len(choices))
        chosen.append(choices[choice])
    return "".join(chosen)
