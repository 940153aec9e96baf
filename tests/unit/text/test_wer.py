import random

import jiwer
import kaldialign
import pytest

from qad_dist.text.wer import ErrorCounts, corpus, count_errors


def edit_distance(reference: list[str], hypothesis: list[str]) -> int:
    """Levenshtein's recurrence, row by row; shares nothing with jiwer."""
    row = list(range(len(hypothesis) + 1))
    for i, wanted in enumerate(reference, start=1):
        diagonal, row[0] = row[0], i
        for j, found in enumerate(hypothesis, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (wanted != found))
    return row[-1]


def test_corpus_rate_divides_summed_errors_by_summed_words() -> None:
    one_word_wrong = count_errors("yes", "no", language="English")
    ten_words_right = count_errors("a b c d e f g h i j", "a b c d e f g h i j", language="English")

    total = corpus([one_word_wrong, ten_words_right])

    assert total == ErrorCounts(substitutions=1, deletions=0, insertions=0, hits=10)
    assert total.rate == pytest.approx(1 / 11)  # 0.09; the mean of the two rates would be 0.50


def test_counts_name_each_kind_of_error() -> None:
    counts = count_errors("the cat sat on the red mat", "the bat sat on red mat today", language="English")

    assert counts == ErrorCounts(substitutions=1, deletions=1, insertions=1, hits=5)
    assert (counts.reference_length, counts.errors, counts.rate) == (7, 3, 3 / 7)


def test_case_punctuation_and_unicode_form_are_not_errors() -> None:
    counts = count_errors("Ti\u1ebfng Vi\u1ec7t!", "tie\u0302\u0301ng, vie\u0323\u0302t", language="Vietnamese")

    assert counts == ErrorCounts(hits=2)


def test_chinese_is_counted_in_characters() -> None:
    assert count_errors("今天天气", "今天 天汽", language="Chinese") == ErrorCounts(substitutions=1, hits=3)
    assert count_errors("今天天气", "今天 天汽", language="Korean") == ErrorCounts(substitutions=1, insertions=1)


@pytest.mark.parametrize("reference", ["", "?!"])
def test_an_empty_reference_counts_every_word_of_the_hypothesis_as_inserted(reference: str) -> None:
    counts = count_errors(reference, "hello there", language="English")

    assert counts == ErrorCounts(insertions=2)
    assert counts.rate == 2.0  # what jiwer answers


def test_an_empty_hypothesis_deletes_every_word() -> None:
    assert count_errors("hello there", "…", language="English") == ErrorCounts(deletions=2)


def test_nothing_said_and_nothing_heard_has_no_rate_and_adds_nothing() -> None:
    silent = count_errors("", "", language="English")

    assert silent.rate is None
    assert corpus([]).rate is None
    assert corpus([silent, ErrorCounts(hits=3, deletions=1)]).rate == 0.25


@pytest.mark.parametrize("language", ["English", "Thai"])
def test_errors_equal_levenshtein_distance_on_random_words(language: str) -> None:
    generator = random.Random(5)

    for _ in range(200):
        reference = [generator.choice("กขคง") for _ in range(generator.randint(0, 12))]
        hypothesis = [generator.choice("กขคง") for _ in range(generator.randint(0, 12))]
        counts = count_errors(" ".join(reference), " ".join(hypothesis), language=language)
        assert counts.errors == edit_distance(reference, hypothesis)
        assert counts.reference_length == len(reference)
        assert counts.hits + counts.substitutions + counts.insertions == len(hypothesis)


# Few different words, so that many alignments are equally cheap; also texts of very unequal length.
@pytest.mark.parametrize(("language", "alphabet"), [("English", "ab"), ("English", "abcdefgh"), ("Chinese", "今天气")])
def test_errors_equal_those_of_jiwer_and_kaldialign_on_random_texts(language: str, alphabet: str) -> None:
    generator = random.Random(7)
    total, references, hypotheses = ErrorCounts(), [], []

    for _ in range(500):
        reference = generator.choices(alphabet, k=generator.randint(1, 30))
        hypothesis = generator.choices(alphabet, k=generator.randint(0, 30))
        counts = count_errors(" ".join(reference), " ".join(hypothesis), language=language)
        assert counts.errors == kaldialign.edit_distance(reference, hypothesis)["total"]
        # Of equally cheap alignments libraries take different ones, but all insert as many more than they delete.
        assert counts.insertions - counts.deletions == len(hypothesis) - len(reference)
        total, references, hypotheses = total + counts, [*references, reference], [*hypotheses, hypothesis]

    theirs = jiwer.process_words([" ".join(words) for words in references], [" ".join(words) for words in hypotheses])
    assert (total.substitutions, total.deletions, total.insertions, total.hits) == (
        theirs.substitutions,
        theirs.deletions,
        theirs.insertions,
        theirs.hits,
    )
    assert total.rate == theirs.wer
    assert total.rate == kaldialign.batch_error_rate(references, hypotheses)["err_rate"]


@pytest.mark.parametrize("language", ["English", "Japanese"])
def test_errors_against_an_empty_reference_are_those_of_kaldialign(language: str) -> None:
    counts = count_errors("", "a b c", language=language)

    assert counts.errors == kaldialign.edit_distance([], ["a", "b", "c"])["total"] == 3
