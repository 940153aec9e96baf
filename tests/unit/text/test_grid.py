import unicodedata

import pytest

from qad_dist.text.grid import WIDTH, Grid, as_markdown, as_text, escaped, visible

SMALL = Grid(["language", "hours", "worst"], [["Thai", "1.50", "a"], ["all", "12.25", "bc"]], has_total=True)


def test_text_aligns_numbers_to_the_right_and_sets_the_total_apart() -> None:
    assert as_text(SMALL).splitlines() == [
        "language | hours | worst",
        "---------+-------+------",
        "Thai     |  1.50 |     a",
        "---------+-------+------",
        "all      | 12.25 |    bc",
    ]


def test_columns_of_text_are_aligned_to_the_left() -> None:
    grid = Grid(SMALL.header, SMALL.rows, text_columns=frozenset({0, 2}))

    assert as_text(grid).splitlines()[2:] == ["Thai     |  1.50 | a", "all      | 12.25 | bc"]
    assert as_markdown(grid).splitlines()[1] == "|---|---:|---|"


def test_markdown_has_the_same_cells_and_a_bold_total() -> None:
    assert as_markdown(SMALL).splitlines() == [
        "| language | hours | worst |",
        "|---|---:|---:|",
        "| Thai | 1.50 | a |",
        "| **all** | **12.25** | **bc** |",
    ]


def test_long_cells_fold_within_the_width() -> None:
    grid = Grid(["reason", "languages"], [["loop", "many words " * 30]], text_columns=frozenset({0, 1}))

    lines = as_text(grid).splitlines()

    assert max(map(len, lines)) <= WIDTH
    assert " ".join(" ".join(lines[2:]).replace("|", " ").split()) == "loop " + "many words " * 29 + "many words"


def test_a_table_without_rows_has_its_header() -> None:
    assert as_text(Grid(["a", "b"], [])).splitlines()[0] == "a | b"


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("one\ttwo\r\n three\u2028four", "one two three four"),
        ("a\x00b\x07c\x1b[31md\x7f\x9b", "abc[31md"),  # no escape sequences for terminals
        ("a\u202eb\u2066c\u200ed\u061ce", "abcde"),  # nothing turns the direction of what follows
        ("a\u200bb\ufeffc\u00add", "abcd"),
        ("می\u200cرود", "می\u200cرود"),  # Persian is spelled with it
        ("क्\u200dष", "क्\u200dष"),
        ("\ud800a\ue000b\U000e0041c\uffff", "abc"),
        ("สวัสดี ครับ", "สวัสดี ครับ"),
    ],
)
def test_a_text_is_shown_without_what_cannot_be_seen(text: str, seen: str) -> None:
    assert visible(text, longest=100) == seen


def test_nothing_that_steers_is_left_of_all_of_unicode() -> None:
    seen = "".join(visible(chr(number), longest=9) for number in [*range(0x30000), *range(0xE0000, 0xE1000)])

    assert {unicodedata.category(character) for character in set(seen) - set("\u200c\u200d")}.isdisjoint(
        {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    )
    assert len(set(seen)) > 100_000


@pytest.mark.parametrize(
    ("text", "longest", "seen"),
    [
        ("abcdef", 6, "abcdef"),
        ("abcdefg", 6, "abcde…"),
        ("abcd efg", 6, "abcd…"),
        ("  abc  ", 3, "abc"),
        ("กำก็กี่กี่", 7, "กำก็…"),  # the vowel and the tone mark do not lose their letter, nor it them
        ("", 5, ""),
        ("\u0301" * 9, 5, "…"),
    ],
)
def test_a_long_text_is_cut_between_letters_with_their_marks(text: str, longest: int, seen: str) -> None:
    assert visible(text, longest=longest) == seen


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("a | b", r"a \| b"),
        ("*a* _b_ `c` ~d~", r"\*a\* \_b\_ \`c\` \~d\~"),
        ("<b>&amp;", r"\<b\>\&amp;"),
        ("[a](http://b)", r"\[a\]\(http\:\/\/b\)"),
        ("www.a.org, e.g. this.", r"www\.a\.org, e\.g. this."),
        ("a\\b", r"a\\b"),
        ("@someone #1 $x$ !", r"\@someone \#1 \$x\$ \!"),
        ("Wer? Я; 中。", "Wer? Я; 中。"),
    ],
)
def test_markdown_shows_a_text_as_it_is(text: str, markdown: str) -> None:
    assert escaped(text) == markdown
