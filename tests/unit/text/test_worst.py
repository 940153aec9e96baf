"""The worst utterances: which they are, how they are aligned, and that no text breaks out of its block."""

import json
import random
import time
import unicodedata
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from rich.cells import cell_len

from qad_dist.text.normalize import NORMALIZER, tokens
from qad_dist.text.wer import ErrorCounts, align_tokens, count_errors
from qad_dist.text.worst import LONGEST_TEXT, MOST_LINES, Case, Worst, worst_lines, worst_markdown, worst_utterances

SENTENCES = Path(__file__).parent / "sentences"
MARK = "\u200e"


def case_of(reference: str, *, key: str = "k", language: str | None = "English", **texts: str) -> Case:
    return Case(key=key, language=language, speaker="s1", duration_seconds=2.5, reference=reference, texts=texts)


def worst_of(reference: str, *, language: str | None = "English", **texts: str) -> list[Worst]:
    return worst_utterances([case_of(reference, language=language, **texts)], system="qad", number=1)


def block_of(markdown: str) -> list[str]:
    """Lines of the only block, as a Markdown parser finds it."""
    (block,) = [token.content for token in MarkdownIt().parse(markdown) if token.type == "fence"]
    return block.splitlines()


def aligned(reference: str, *, language: str | None = "English", **texts: str) -> list[str]:
    return block_of(worst_markdown(worst_of(reference, language=language, **texts), section="own"))


def cells_of(line: str) -> Iterator[tuple[int, str]]:
    """Column, by rich's widths, and text of what stands between spaces behind the label."""
    start = 0
    for place, text in enumerate(line.replace(MARK, "").split(" ")):
        if text and place:
            yield start, text
        start += cell_len(text) + 1


def test_alignment_pairs_tokens_and_leaves_none_opposite_what_is_inserted_or_deleted() -> None:
    pairs = align_tokens(
        ["the", "cat", "sat", "on", "the", "red", "mat"], ["the", "bat", "sat", "on", "red", "mat", "today"]
    )

    assert pairs == [
        ("the", "the"),
        ("cat", "bat"),
        ("sat", "sat"),
        ("on", "on"),
        ("the", None),
        ("red", "red"),
        ("mat", "mat"),
        (None, "today"),
    ]
    assert align_tokens([], ["a", "b"]) == [(None, "a"), (None, "b")]
    assert align_tokens(["a", "b"], []) == [("a", None), ("b", None)]
    assert align_tokens([], []) == []


@pytest.mark.parametrize("language", ["English", "Thai"])
def test_alignment_has_the_errors_that_are_counted_and_all_tokens_in_order(language: str) -> None:
    generator = random.Random(5)

    for _ in range(200):
        texts = [" ".join(generator.choices("กขคง", k=generator.randint(0, 12))) for _ in range(2)]
        reference, hypothesis = (tokens(text, language) for text in texts)
        pairs = align_tokens(reference, hypothesis)
        assert [wanted for wanted, _ in pairs if wanted is not None] == reference
        assert [found for _, found in pairs if found is not None] == hypothesis
        assert count_errors(*texts, language=language) == ErrorCounts(
            substitutions=sum(None not in pair and pair[0] != pair[1] for pair in pairs),
            deletions=sum(found is None for _, found in pairs),
            insertions=sum(wanted is None for wanted, _ in pairs),
            hits=sum(wanted == found for wanted, found in pairs),
        )


def test_utterances_come_by_errors_then_rate_then_key() -> None:
    cases = [
        case_of("a b c d", key="two-of-4", qad="a b x y", teacher="x y z w"),
        case_of("a b c d", key="right", qad="A, b c d!", teacher="x"),
        case_of("a b c", key="two-of-3-b", qad="a x y", teacher="a b c"),
        case_of("a b c", key="two-of-3-a", qad="a x y"),
        case_of("a b c d e f g h i j", key="three-of-10", qad="a b c d e f g", teacher=""),
        case_of("", key="three-of-0", qad="what is this"),
        case_of("a", key="one-of-1", qad="", teacher="a"),
    ]

    worst = worst_utterances(cases, system="qad", number=50)

    expected = ["three-of-0", "three-of-10", "two-of-3-a", "two-of-3-b", "two-of-4", "one-of-1"]
    assert [one.case.key for one in worst] == expected
    assert [one.counts["qad"].errors for one in worst] == [3, 3, 2, 2, 2, 1]
    assert worst[1].counts == {"qad": ErrorCounts(hits=7, deletions=3), "teacher": ErrorCounts(deletions=10)}
    assert worst_utterances(cases, system="qad", number=2) == worst[:2]
    assert worst_utterances(cases, system="qad", number=0) == []
    only_some = [case for case in cases if "teacher" in case.texts]
    assert worst_utterances(only_some, system="teacher", number=1)[0].case.key == "three-of-10"


def test_errors_are_counted_in_the_units_of_the_language() -> None:
    cases = [
        case_of("今天天气很好", key="z-characters", language="Chinese", qad="昨日"),
        case_of("今天天气很好", key="a-word", language="Korean", qad="昨日"),
    ]

    worst = worst_utterances(cases, system="qad", number=2)

    assert [(one.case.key, one.counts["qad"].errors) for one in worst] == [("z-characters", 6), ("a-word", 1)]


def test_system_and_teacher_stand_below_the_reference_with_marks() -> None:
    lines = aligned(
        "The cat sat on the red mat.",
        ptq="not shown",
        qad="the bat sat on red mat today ok",
        teacher="The cat sat down on the red mat",
    )

    assert lines == [
        "REF      the cat sat ***  on the red mat ***   **",
        "qad      the bat sat ***  on *** red mat today ok",
        "             S               D           I     I",
        "teacher  the cat sat down on the red mat ***   **",
        "                     I",
    ]


def test_the_teacher_is_not_shown_twice() -> None:
    worst = worst_utterances([case_of("a b", teacher="a c", qad="a b")], system="teacher", number=1)

    assert block_of(worst_markdown(worst, section="own")) == ["REF      a b", "teacher  a c", "           S"]


def test_characters_stand_without_gaps_and_wide_ones_count_two_columns() -> None:
    lines = aligned(
        "今天天气很好，iPhone店", language="Chinese", qad="天天气很好啊iphon店", teacher="今天天汽a好iphone店"
    )

    assert lines == [
        "REF      今天天气很好**iphone店",
        "qad      **天天气很好啊iphon*店",
        "         D           I      D",
        "teacher  今天天汽a 好**iphone店",
        "               S S",
    ]


def test_a_mark_that_is_counted_alone_stands_on_a_dotted_circle() -> None:
    lines = aligned("กี่", language="Thai", qad="กี")

    assert lines == ["REF  ก\u25ccี\u25cc่", "qad  ก\u25ccี*", "       D"]


def languages_of_sentences() -> Iterator[tuple[str, str]]:
    for path in sorted(SENTENCES.glob("*.txt")):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        language, _, sentence = first.partition("\t")
        yield language, "".join(" " if character in "[]|" else character for character in sentence)


@pytest.mark.parametrize(("language", "sentence"), list(languages_of_sentences()), ids=lambda text: text[:10])
def test_cells_of_a_column_begin_below_each_other_in_every_script(language: str, sentence: str) -> None:
    """By the widths of another library, of hypotheses in which every other word has lost its last letter."""
    words = sentence.split()
    hypothesis = " ".join(word[: len(word) - place % 2] for place, word in enumerate(words))

    lines = aligned(" ".join(words), language=None, qad=hypothesis)

    assert sum(line.startswith("REF") for line in lines) == len([line for line in lines if line.startswith("qad")])
    for number, line in enumerate(lines):
        if line.startswith("qad"):
            above, below = (dict(cells_of(text)) for text in (lines[number - 1], line))
            assert list(above) == list(below)
            marks = dict(cells_of(lines[number + 1])) if number + 1 < len(lines) else {}
            assert [start for start in above if above[start] != below[start]] == list(marks)


def test_right_to_left_words_stay_in_their_columns() -> None:
    """Unicode turns what stands between two right-to-left letters, unless a left-to-right one is among it (rule N1).

    Numbers of their own, as the Rumi ones of the second row are, count as right-to-left there.
    """
    lines = aligned("أسكن في دمشق منذ 15 سنة", language="Arabic", qad="أسكن في بغداد 𐹠 𐹡 15 سنة كاملة")

    assert [line.replace(MARK, "") for line in lines] == [
        "REF  أسكن في ***   دمشق منذ 15 سنة ***",
        "qad  أسكن في بغداد 𐹠    𐹡   15 سنة كاملة",
        "             I     S    S          I",
    ]
    turned = {"R", "AL", "AN"}
    for line in lines[:2]:
        for word, following in pairwise(line.split()):
            if unicodedata.bidirectional(following[0]) in turned:
                assert word[-1] == MARK or unicodedata.bidirectional(word[-1]) not in turned
    assert MARK not in "".join(aligned("a b", qad="a c"))


def test_long_alignments_are_wrapped_between_tokens() -> None:
    generator = random.Random(2)
    words = ["".join(generator.choices("abcdefgh中かक", k=generator.randint(1, 14))) for _ in range(60)]
    hypothesis = [word[::-1] for word in words]

    lines = aligned(" ".join(words), qad=" ".join(hypothesis))

    assert max(map(cell_len, lines)) <= 100
    assert max(map(cell_len, lines)) > 80
    # Nothing is lost but what is equal read from both ends.
    for label, expected in (("REF", words), ("qad", hypothesis)):
        assert [word for line in lines if line.startswith(label) for word in line.split()[1:]] == expected
    assert lines.count("") == sum(line.startswith("REF") for line in lines) - 1


def test_a_line_holds_exactly_what_fits() -> None:
    """Behind the 5 columns of the label: 95 wide."""
    full = " ".join(["abcd"] * 19)  # 94 columns

    assert sum(line.startswith("REF") for line in aligned(f"{full[:-4]}abcde", qad="x " * 19)) == 1
    assert sum(line.startswith("REF") for line in aligned(f"{full[:-4]}abcdef", qad="x " * 19)) == 2


def test_long_stretches_that_are_right_are_folded() -> None:
    words = [f"w{place}" for place in range(300)]
    wrong = dict(enumerate(words)) | {100: "x", 119: "y", 140: "z"}

    lines = aligned(" ".join(words), qad=" ".join(wrong.values()))

    told = " ".join(line[5:] for line in lines if line.startswith("qad"))
    around = " ".join(words[94:100])
    between = " ".join(words[101:119])
    after = f"{' '.join(words[120:126])} [8] {' '.join(words[134:140])}"
    assert " ".join(told.split()) == f"[94] {around} x {between} y {after} z {' '.join(words[141:147])} [153]"


def test_loops_and_gaps_are_folded_behind_their_first_20_words() -> None:
    words = [f"w{place}" for place in range(100, 200)]

    gap = aligned(" ".join(["so", *words, "end"]), qad="so end")
    loop = aligned("so end", qad=" ".join(["so", *["the", "red"] * 5000, "end"]))

    def row(lines: list[str], label: str) -> list[str]:
        return [text for line in lines if line.startswith(label) for text in line.split()[1:]]

    assert row(gap, "REF") == ["so", *words[:20], "[60]", *words[80:], "end"]
    assert row(gap, "qad") == ["so", *["***"] * 41, "end"]
    assert row(loop, "REF") == ["so", *["***"] * 41, "end"]
    assert row(loop, "qad") == ["so", *["the", "red"] * 10, "[9960]", *["the", "red"] * 10, "end"]
    assert " ".join(gap).split().count("D") == " ".join(loop).split().count("I") == 41


def test_what_is_not_shown_of_10_000_words_is_counted() -> None:
    """Substitutions are never folded; the thousand right words at the end are."""
    generator = random.Random(4)
    words, others = ([generator.choice(letters) * 5 for _ in range(10_000)] for letters in ("abcdef", "uvwxyz"))
    others[9_000:] = words[9_000:]

    start = time.process_time()
    markdown = worst_markdown(worst_of(" ".join(words), qad=" ".join(others), teacher=" ".join(words)), section="own")
    seconds = time.process_time() - start

    lines = block_of(markdown)
    shown = [word for line in lines if line.startswith("REF") for word in line.split()[1:]]
    assert sum(line.startswith("REF") for line in lines) == MOST_LINES == 8
    assert shown == words[: len(shown)]
    left_out = 10_000 - len(shown)
    assert markdown.endswith(f"\n\nNot shown: {left_out:,} words, with errors: qad {left_out - 1000:,}, teacher 0.\n")
    assert len(markdown) < 5_000
    assert seconds < 5  # 0.4 on one core; 10,000 by 10,000 steps of Python would take half a minute


def test_an_endless_word_is_cut() -> None:
    lines = aligned("hello there", qad=f"{'o' * 5000} t{chr(0x301) * 5000}")

    assert lines[0].split() == ["REF", "hello", "there"]
    assert lines[1].split() == ["qad", "o" * 23 + "\u2026", "\u2026"]  # no letter without its marks


def test_a_long_name_leaves_room_for_the_words() -> None:
    name = "whisper-large-v3-turbo-of-last-year"
    worst = worst_utterances([case_of("yes or no", **{name: "yes no no"})], system=name, number=1)

    lines = block_of(worst_markdown(worst, section="own"))

    assert lines[:2] == ["REF           yes or no", "whisper-lar\u2026  yes no no"]


def test_markdown_tells_each_utterance_and_the_errors_of_all_systems() -> None:
    cases = [
        case_of("the cat sat", key="utt-1", qad="the bat", ptq="", teacher="the cat sat"),
        Case(
            key="utt-2",
            language=None,
            speaker=None,
            duration_seconds=1,
            reference="yes",
            texts={"qad": "no", "a_b": "no"},
        ),
    ]

    markdown = worst_markdown(worst_utterances(cases, system="qad", number=5), section="own-full")

    lines = markdown.splitlines()
    assert [lines[0], lines[4]] == ["## own\\-full: most errors of qad", "### 1. utt\\-1"]
    assert lines[2].startswith(f"Text {NORMALIZER}. ")
    first = "English, 2.50 seconds, speaker s1. Errors in 3 words: "
    assert f"{first}qad 2 (1 S, 1 D, 0 I), teacher 0 (0 S, 0 D, 0 I), ptq 3 (0 S, 3 D, 0 I)." in lines
    assert "unknown, 1.00 seconds. Errors in 1 word: qad 1 (1 S, 0 D, 0 I), a\\_b 1 (1 S, 0 D, 0 I)." in lines
    assert markdown.count("### ") == 2
    assert markdown.endswith("```\n")


def test_no_errors_are_told_too() -> None:
    assert worst_of("yes", qad="Yes!") == []
    assert worst_markdown([], section="own") == "## own: most errors\n\nNo utterance has an error.\n"
    assert worst_lines([]) == []


HOSTILE = "```\n# title\n\x1b[31m\u202e <b>bold</b> [link](http://x) | `code` \u2028 \ud800 \x00~~~ ends"


def test_no_text_breaks_out_of_its_block_or_steers_a_terminal() -> None:
    hostile = Case(
        key=HOSTILE,
        language=HOSTILE,
        speaker=HOSTILE,
        duration_seconds=1.0,
        reference=HOSTILE,
        texts={"````": HOSTILE + " x", "teacher": HOSTILE + "\n```\n# y", HOSTILE: "z"},
    )

    markdown = worst_markdown(worst_utterances([hostile], system="````", number=1), section=HOSTILE)

    parsed = MarkdownIt().enable("table").parse(markdown)
    assert [token.tag for token in parsed if token.type == "heading_open"] == ["h2", "h3"]
    assert len([token for token in parsed if token.type == "fence"]) == 1
    inline: list[Any] = [child for token in parsed for child in token.children or []]
    assert {child.type for child in inline} <= {"text", "text_special", "code_inline"}
    assert [child.content for child in inline if child.type == "code_inline"] == ["***", "[12]"]
    steering = {
        character for character in markdown if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    }
    assert steering <= {"\n", MARK}
    markdown.encode()


def test_lines_are_json_of_counts_and_texts_as_written() -> None:
    long = "na " * 5000
    worst = worst_of("The cat, sat\u2028\x07 \u202eon.", qad=f"A cat \u200bsat. {long}", teacher="the cat sat on")

    (line,) = [json.loads(json.dumps(line, ensure_ascii=False)) for line in worst_lines(worst)]

    systems = line.pop("systems")
    assert line == {
        "key": "k",
        "language": "English",
        "speaker": "s1",
        "duration_seconds": 2.5,
        "unit": "WER",
        "reference_tokens": 4,
        "reference": "The cat, sat on.",
        "system": "qad",
    }
    hypothesis = systems["qad"].pop("hypothesis")
    counts = {"errors": 5001, "substitutions": 2, "deletions": 0, "insertions": 4999, "error_rate": 5001 / 4}
    assert systems["qad"] == counts
    start, _, rest = hypothesis.partition("\u2026")
    assert start.startswith("A cat sat. na na")
    assert len(start) + 1 in (LONGEST_TEXT, LONGEST_TEXT - 1)
    whole = len("A cat sat. " + "na " * 4999 + "na")
    assert rest == f" [{whole - len(start):,} more characters]"
    assert systems["teacher"]["errors"] == 0
    assert systems["teacher"]["hypothesis"] == "the cat sat on"


def test_lines_name_what_is_not_known_as_null_and_stay_encodable() -> None:
    case = Case(key="k", language=None, speaker=None, duration_seconds=1.0, reference="a", texts={"qad": HOSTILE})

    (line,) = worst_lines(worst_utterances([case], system="qad", number=1))

    assert (line["language"], line["speaker"], line["unit"]) == (None, None, "WER")
    encoded = json.dumps(line, ensure_ascii=False).encode()
    assert len(encoded.decode().splitlines()) == 1
    assert b"\\u" not in encoded
