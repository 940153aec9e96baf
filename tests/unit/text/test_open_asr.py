import json
import random
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kaldialign
import pytest
from whisper_normalizer.english import EnglishTextNormalizer

from qad_dist.text.open_asr import (
    OPEN_ASR,
    WHISPER,
    count_open_asr_errors,
    count_whisper_errors,
    open_asr_english,
    whisper_english,
)
from qad_dist.text.wer import ErrorCounts, corpus

ASSETS = Path(__file__).parents[2] / "assets" / "open_asr"


def lines_of(name: str) -> list[dict[str, Any]]:
    # Not by splitlines: texts may hold what it takes for the end of a line.
    return [json.loads(line) for line in (ASSETS / name).open(encoding="utf-8", newline="\n")]


PAIRS = lines_of("pairs.jsonl")
SCORED = lines_of("scored.jsonl")
TEXTS = [pair[side] for pair in PAIRS for side in ("reference", "hypothesis")]


def test_the_pairs_are_those_that_were_scored() -> None:
    kinds = [pair["kind"] for pair in PAIRS]

    assert len(PAIRS) == len(SCORED) == 508
    assert (kinds.count("an4"), kinds.count("words"), kinds.count("mixtures")) == (165, 48, 120)


def test_open_asr_english_is_the_leaderboards_form() -> None:
    differing = [
        (pair[side], form, scored[side])
        for pair, scored in zip(PAIRS, SCORED, strict=True)
        for side in ("reference", "hypothesis")
        if (form := open_asr_english(pair[side])) != scored[side]
    ]

    assert differing == []


def test_open_asr_errors_are_the_leaderboards_utterance_by_utterance() -> None:
    differing = []
    for pair, scored in zip(PAIRS, SCORED, strict=True):
        counts = count_open_asr_errors(pair["reference"], pair["hypothesis"])
        found = counts and (counts.insertions, counts.deletions, counts.substitutions, counts.reference_length)
        if found != (tuple(scored[name] for name in ("ins", "del", "sub", "ref_len")) if scored["is_scored"] else None):
            differing.append((pair, found, scored))

    assert differing == []


def test_open_asr_errors_add_up_to_the_leaderboards_rate() -> None:
    total = json.loads((ASSETS / "total.json").read_text(encoding="utf-8"))

    scored = [count_open_asr_errors(pair["reference"], pair["hypothesis"]) for pair in PAIRS]
    counts = corpus(one for one in scored if one is not None)

    assert (counts.insertions, counts.deletions, counts.substitutions) == (total["ins"], total["del"], total["sub"])
    assert counts.rate is not None
    assert round(100 * counts.rate, 2) == total["wer"]
    assert len(scored) - scored.count(None) == total["utterances"]


def test_the_pairs_tell_the_two_forms_apart() -> None:
    by_hand = [pair for pair in PAIRS if pair["kind"] not in ("words", "mixtures", "rules")]

    differing = [pair for pair in by_hand if open_asr_english(pair["reference"]) != whisper_english(pair["reference"])]
    rates = [
        corpus(one for pair in by_hand if (one := count(pair["reference"], pair["hypothesis"]))).rate
        for count in (count_whisper_errors, count_open_asr_errors)
    ]

    assert len({pair["kind"] for pair in differing}) >= 7
    assert len(differing) >= 60
    assert rates[0] != rates[1]


def test_whisper_english_is_the_librarys_form() -> None:
    library = EnglishTextNormalizer()

    assert [text for text in TEXTS if whisper_english(text) != library(text)] == []


def test_whisper_english_is_the_librarys_form_of_random_texts() -> None:
    library = EnglishTextNormalizer()
    generator = random.Random(7)
    words = sorted({word for text in TEXTS for word in text.split()} | library.standardize_numbers.words)
    signs = ["", " ", "  ", "\t", "\u00a0", ".", ",", "'", "%", "$", "-", "(", ")", "[", "]", "\u0301", "½", "٣"]

    texts = [
        "".join(generator.choice(words) + generator.choice(signs) + " " for _ in range(generator.randint(0, 8)))
        for _ in range(1_500)
    ]

    assert [text for text in texts if whisper_english(text) != library(text)] == []


@pytest.mark.parametrize(
    ("text", "whisper", "open_asr"),
    [
        # By hand, from the rules: what Whisper's form does not know.
        ("Katherine's e-mail", "katherine is e mail", "catherine s email"),
        ("ah, kinda all right", "ah kind of all right", "kinda alright"),
        ("the B B C of a I", "the b b c of a i", "the bbc of a i"),
        ("cancellation", "cancellation", "cancelation"),
    ],
)
def test_forms_by_hand(text: str, whisper: str, open_asr: str) -> None:
    assert " ".join(whisper_english(text).split()) == whisper
    assert " ".join(open_asr_english(text).split()) == open_asr


def test_split_and_joined_words_are_no_errors_and_keep_the_words_of_the_reference() -> None:
    split = count_open_asr_errors("a white paper", "a whitepaper")
    joined = count_open_asr_errors("a whitepaper", "a white paper")

    assert (split, joined) == (ErrorCounts(hits=3), ErrorCounts(hits=2))
    assert count_whisper_errors("a white paper", "a whitepaper") == ErrorCounts(hits=1, substitutions=1, deletions=1)


def test_whisper_errors_are_those_between_words_of_the_librarys_form() -> None:
    library = EnglishTextNormalizer()
    differing = []
    for pair in PAIRS:
        reference, hypothesis = library(pair["reference"]).split(), library(pair["hypothesis"]).split()
        if not reference or reference == ["ignore", "time", "segment", "in", "scoring"]:
            expected = None
        else:
            plain = kaldialign.edit_distance(reference, hypothesis)  # another program than the one that counts here
            expected = plain["total"], plain["ref_len"]
        counts = count_whisper_errors(pair["reference"], pair["hypothesis"])
        if (counts and (counts.errors, counts.reference_length)) != expected:
            differing.append((pair, counts, expected))

    assert differing == []


@pytest.mark.parametrize("reference", ["", " ", "Um.", "[noise]", "Ignore time segment in scoring."])
def test_an_utterance_without_words_to_be_scored_is_left_out(reference: str) -> None:
    assert count_open_asr_errors(reference, "something") is None
    assert count_whisper_errors(reference, "something") is None


def test_an_empty_hypothesis_deletes_every_word() -> None:
    assert count_open_asr_errors("white paper", "") == ErrorCounts(deletions=2)
    assert count_whisper_errors("white paper", "uh") == ErrorCounts(deletions=2)


def test_a_number_too_long_for_the_library_stays_as_it_is_written() -> None:
    digits = "1" * 5_000

    with pytest.raises(AssertionError):
        EnglishTextNormalizer()(digits)
    assert whisper_english(f"The colour {digits}") == f"the color {digits}"
    assert open_asr_english(f"The flyer {digits}") == f"the flier {digits}"


def test_names_of_the_forms_tell_the_versions_of_their_rules() -> None:
    readme = (ASSETS / "README.md").read_text(encoding="utf-8")

    assert WHISPER.endswith(version("whisper-normalizer"))
    assert f"({OPEN_ASR.rpartition('_')[2]}-21)" in readme
