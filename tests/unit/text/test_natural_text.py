"""No filter objects, as they are set by default, to text that is right: written for this, or spoken in recordings."""

import json
import random
from pathlib import Path

import pytest
import soundfile

from qad_dist.config.filters import FiltersConfig
from qad_dist.text.accept import judge
from shards.schema import ENDED_BY_END_TOKEN, PseudoLabel
from tests.helpers.sentences import FAMILIES, sentences


def reasons(text: str, language: str, seconds: float) -> tuple[str, ...]:
    label = PseudoLabel(
        key="a",
        token_ids=(7,) * 8,
        text=text,
        language=language,
        token_logprobs=(-0.1,) * 8,
        mean_logprob=-0.1,
        ended_by=ENDED_BY_END_TOKEN,
        duration_seconds=seconds,
    )
    return judge(label, language=language, reference=None, filters=FiltersConfig()).reasons


def _syllables(text: str) -> float:
    """About how many syllables a text has, by counting what its script writes for one; digits are words of two."""
    number = 0.0
    for character in text.casefold():
        if character.isdigit():
            number += 2
        elif character.isalpha():
            number += next(per for start, per in reversed(_SYLLABLES_PER_LETTER) if character >= start)
    return max(number, 1.0)


# From the first letter of a block of Unicode: Latin, Greek, Cyrillic, Arabic, Devanagari, Thai, kana, Han, Hangul.
_SYLLABLES_PER_LETTER = [
    *(("\0", 0.38), ("Ͱ", 0.45), ("Ѐ", 0.42), ("؀", 0.5), ("ऀ", 0.8), ("฀", 0.45), ("Ḁ", 0.38)),
    *(("\u3040", 1.0), ("\u3400", 1.3), ("\uac00", 1.0)),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rate", [3.5, 5.0, 6.5, 8.5])
def test_no_filter_objects_to_a_correct_sentence(family: str, rate: float) -> None:
    """At 3.5 to 8.5 syllables a second, from slow readers to fast talkers, with up to two seconds of silence around."""
    rng = random.Random(rate)
    known = sentences(family)
    false_alarms = {}
    for sentence in known:
        seconds = max(0.3, _syllables(sentence.text) / rate) + rng.uniform(0, 2)
        if found := reasons(sentence.text, sentence.language, seconds):
            false_alarms[sentence] = (found, seconds)

    assert len(known) >= 200
    assert false_alarms == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_filter_objects_to_several_correct_sentences_in_one_utterance(family: str) -> None:
    """Ten different ones: the longest utterances, where the most words come again."""
    rng = random.Random(0)
    by_language: dict[str, list[str]] = {}
    for sentence in sentences(family, per_template=1):
        by_language.setdefault(sentence.language, []).append(sentence.text)
    for language, texts in by_language.items():
        for _ in range(20):
            text = " ".join(rng.sample(texts, min(10, len(texts))))
            assert reasons(text, language, _syllables(text) / 5.5) == ()


def test_no_filter_objects_to_the_transcripts_of_spoken_digits(root: Path) -> None:
    folder = root / "tests" / "assets" / "digits"
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]

    found = {reasons(row["text"], row["language"], soundfile.info(folder / row["audio"]).duration) for row in rows}

    assert len({row["language"] for row in rows}) == 29
    assert found == {()}


@pytest.mark.speech
@pytest.mark.parametrize("corpus", ["an4", "fsdd"])
def test_no_filter_objects_to_the_transcripts_of_human_speech(speech: Path, corpus: str) -> None:
    lines = (speech / corpus / "manifest.jsonl").read_text(encoding="utf-8").splitlines()

    found = {reasons(row["text"], row["language"], row["duration_seconds"]) for row in map(json.loads, lines)}

    assert len(lines) > 1000
    assert found == {()}
