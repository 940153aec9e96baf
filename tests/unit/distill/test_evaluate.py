"""Evaluation: sums of each utterance; means over tokens, not over batches or utterances."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from qad_dist.batch import Batch
from qad_dist.distill.evaluate import UNKNOWN_LANGUAGE, Evaluation, compare, evaluate, summed
from shards.errors import ShardError
from tests.helpers.states import make_batch, make_models, pack

VOCABULARY, WIDTH = 13, 5


@pytest.fixture
def tables() -> tuple[Tensor, Tensor, Tensor]:
    """Teacher, student, head."""
    generator = torch.Generator().manual_seed(0)
    teacher_VD = torch.randn(VOCABULARY, WIDTH, generator=generator)
    student_VD = teacher_VD + 0.7 * torch.randn(VOCABULARY, WIDTH, generator=generator)
    return teacher_VD, student_VD, torch.randn(VOCABULARY, WIDTH, generator=generator)


@pytest.fixture
def batches() -> list[Batch]:
    """Of 1, 3 and 6 response tokens."""
    return [
        make_batch([4], [1], key="a"),
        make_batch([0, 1, 2], [3, 0, 9], key="b"),
        make_batch([7, 8, 9, 10, 11, 12], [1, 2, 3, 4, 5, 6], key="c"),
    ]


def expected_of(tables: tuple[Tensor, Tensor, Tensor], batches: list[Batch]) -> Evaluation:
    """All tokens side by side, in float64."""
    ids = torch.cat([batch.input_ids_N for batch in batches])
    targets = torch.cat([batch.targets_R for batch in batches])
    teacher_RV, student_RV = ((table.double()[ids] @ tables[2].double().T).log_softmax(-1) for table in tables[:2])
    return Evaluation(
        kl_per_token=float((teacher_RV.exp() * (teacher_RV - student_RV)).sum(-1).mean()),
        ce_per_token=float(-student_RV[torch.arange(len(ids)), targets].mean()),
        agreement=float((teacher_RV.argmax(-1) == student_RV.argmax(-1)).double().mean()),
        response_tokens=len(ids),
        kl_by_language={},
    )


def assert_close(found: Evaluation, expected: Evaluation) -> None:
    assert found.kl_per_token == pytest.approx(expected.kl_per_token, rel=1e-5)
    assert found.ce_per_token == pytest.approx(expected.ce_per_token, rel=1e-5)
    assert found.agreement == expected.agreement
    assert found.response_tokens == expected.response_tokens


def test_means_are_over_all_tokens(tables: tuple[Tensor, Tensor, Tensor], batches: list[Batch]) -> None:
    found = evaluate(make_models(*tables), enumerate(batches), chunk_rows=2)

    expected = expected_of(tables, batches)
    assert_close(found, expected)
    assert 0 < expected.agreement < 1


def test_batches_that_keep_the_ranks_together_do_not_count(
    tables: tuple[Tensor, Tensor, Tensor], batches: list[Batch]
) -> None:
    numbered = [(0, batches[0]), (-1, batches[1]), (1, batches[2])]

    found = evaluate(make_models(*tables), numbered, chunk_rows=100)

    assert_close(found, expected_of(tables, [batches[0], batches[2]]))


def test_order_of_arrival_does_not_change_a_bit(tables: tuple[Tensor, Tensor, Tensor]) -> None:
    """Sums are added in plan order, whichever rank had which batch. Distances from 1e-9 to 1e4 make order matter."""
    teacher_VD, student_VD, head_VD = tables
    spread_V1 = torch.logspace(-4, 4, VOCABULARY)[:, None]
    tables = (teacher_VD, teacher_VD + (student_VD - teacher_VD) * spread_V1, head_VD)
    generator = torch.Generator().manual_seed(1)
    batches = [
        make_batch(*torch.randint(VOCABULARY, (2, 1 + count % 5), generator=generator).tolist()) for count in range(300)
    ]
    numbered, models = list(enumerate(batches)), make_models(*tables)
    kls = [evaluate(models, [entry], chunk_rows=8) for entry in numbered]

    orders = [torch.randperm(300, generator=generator).tolist() for _ in range(5)]
    expected = evaluate(models, numbered, chunk_rows=8)
    assert all(evaluate(models, [numbered[i] for i in order], chunk_rows=8) == expected for order in orders)
    # Added as they come, they would not be equal.
    assert len({sum(kls[i].kl_per_token * kls[i].response_tokens for i in order) for order in orders}) > 1


def test_student_that_equals_its_teacher_is_at_distance_zero(
    tables: tuple[Tensor, Tensor, Tensor], batches: list[Batch]
) -> None:
    found = evaluate(make_models(tables[0], tables[0], tables[2]), enumerate(batches), chunk_rows=8)

    assert found.kl_per_token == 0
    assert found.agreement == 1


def test_metrics_carry_their_prefix_and_words_only_where_they_were_counted() -> None:
    evaluation = Evaluation(
        kl_per_token=0.5, ce_per_token=1.5, agreement=0.75, response_tokens=8, kl_by_language={"German": 0.25}
    )
    values = {
        "heldout_kl_per_token": 0.5,
        "heldout_ce_per_token": 1.5,
        "heldout_agreement": 0.75,
        "heldout_response_tokens": 8,
        "heldout_kl_per_token/German": 0.25,
    }

    assert evaluation.as_metrics("heldout_") == values
    decoded = replace(evaluation, word_error_rate=0.0)
    assert decoded.as_metrics("heldout_") == {**values, "heldout_word_error_rate": 0.0}


def test_each_utterance_has_its_own_sums_however_it_was_packed(
    tables: tuple[Tensor, Tensor, Tensor], batches: list[Batch]
) -> None:
    first, second, third = batches

    found = compare(make_models(*tables), [(0, pack(third, first)), (1, second)], chunk_rows=4)

    assert found.keys == ("c", "a", "b")
    assert found.tokens_U.tolist() == [6, 1, 3]
    for place, batch in enumerate((third, first, second)):
        expected = expected_of(tables, [batch])
        assert found.kl_U[place] / batch.num_rows == pytest.approx(expected.kl_per_token, rel=1e-5)
        assert found.ce_U[place] / batch.num_rows == pytest.approx(expected.ce_per_token, rel=1e-5)
        assert found.agreements_U[place] == round(expected.agreement * batch.num_rows)


def test_utterances_come_in_the_order_of_the_plan(tables: tuple[Tensor, Tensor, Tensor], batches: list[Batch]) -> None:
    found = compare(make_models(*tables), [(2, batches[0]), (0, batches[1]), (1, batches[2])], chunk_rows=4)

    assert found.keys == ("b", "c", "a")
    assert found.tokens_U.tolist() == [3, 6, 1]


def test_languages_have_means_over_their_own_tokens(
    tables: tuple[Tensor, Tensor, Tensor], batches: list[Batch]
) -> None:
    numbered = [(0, pack(batches[0], batches[1])), (1, batches[2])]
    languages = {"a": "German", "b": None, "c": "German", "d": "French"}  # of the last one there is no utterance

    found = evaluate(make_models(*tables), numbered, chunk_rows=4, languages=languages)

    expected = {
        "German": expected_of(tables, [batches[0], batches[2]]).kl_per_token,
        UNKNOWN_LANGUAGE: expected_of(tables, [batches[1]]).kl_per_token,
    }
    assert found.kl_by_language == pytest.approx(expected, rel=1e-5)
    assert_close(found, expected_of(tables, batches))


def test_language_of_which_nothing_can_be_read_is_left_out(
    tables: tuple[Tensor, Tensor, Tensor], batches: list[Batch]
) -> None:
    lost = batches[1].without_weight()

    compared = compare(make_models(*tables), [(0, batches[0]), (1, pack(lost, batches[2]))], chunk_rows=4)
    found = summed(compared, languages={"a": "German", "b": "French", "c": "German"})

    assert compared.tokens_U.tolist() == [1, 0, 6]
    assert list(found.kl_by_language) == ["German"]
    assert np.isfinite(found.kl_per_token)


def test_rows_without_weight_do_not_count_and_leave_the_others_as_they_are(
    tables: tuple[Tensor, Tensor, Tensor], batches: list[Batch]
) -> None:
    """As those of an utterance that could not be read, beside others in its batch."""
    whole = batches[2]
    weight_R = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    part = replace(whole, kl_weight_R=weight_R, ce_weight_R=weight_R, weighted_rows=4)
    read = make_batch([7, 8, 11, 12], [1, 2, 5, 6])

    found = evaluate(make_models(*tables), [(0, batches[0]), (1, part)], chunk_rows=100)

    assert_close(found, expected_of(tables, [batches[0], read]))


def test_set_of_which_nothing_can_be_read_is_an_error_of_all_ranks(
    tables: tuple[Tensor, Tensor, Tensor], batches: list[Batch]
) -> None:
    numbered = [(number, batch.without_weight()) for number, batch in enumerate(batches)]

    with pytest.raises(ShardError, match="^held-out utterances must be readable, got none that is; ") as caught:
        evaluate(make_models(*tables), numbered, chunk_rows=100)

    assert caught.value.is_shared
