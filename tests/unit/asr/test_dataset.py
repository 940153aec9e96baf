"""Labelled sets and the batches of a plan: lengths known beforehand, every rank its share, no damage that spreads."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qad_dist.asr.collate import Example, collate
from qad_dist.asr.dataset import LabelledSet, PlannedBatches, languages_of, mels_ahead
from qad_dist.asr.load import AsrModel
from qad_dist.asr.mel import log_mels
from qad_dist.runtime.world import World
from shards.errors import ShardError
from shards.labelled import LabelledUtterance, Response
from shards.plan import Plan, plan_epoch
from shards.read import Damaged, Shards
from shards.workers import Reader
from tests.helpers.labelled import response_of, table_of
from tests.helpers.labelled_sets import SAMPLES, assert_equal, dataset_of


def test_lengths_are_those_of_the_real_batches(dataset: LabelledSet) -> None:
    assert len(dataset.rows) == len(SAMPLES)

    real = [dataset.batch([i]).num_tokens for i in range(len(dataset.rows))]

    assert dataset.num_tokens.tolist() == real
    assert len(set(real)) > 10
    assert dataset.batch([3, 0, 11]).num_tokens == real[3] + real[0] + real[11]


def test_rows_and_seconds_are_summed_over_utterances(dataset: LabelledSet) -> None:
    indices = [4, 2, 9]

    batch = dataset.batch(indices)

    assert dataset.num_rows(indices) == batch.num_rows
    samples = sum(round(dataset.rows[i][0].duration_seconds * 16_000) for i in indices)
    assert dataset.audio_seconds(indices) == pytest.approx(samples / 16_000)


def test_batch_has_each_utterances_own_audio_and_label(dataset: LabelledSet, packed: Path, nano: AsrModel) -> None:
    indices = [5, 1, 17]

    batch = dataset.batch(indices)

    assert batch.keys == tuple(dataset.rows[i][0].key for i in indices)
    assert batch.targets_R.tolist() == [token for i in indices for token in dataset.rows[i][1].token_ids]
    mels = batch.mel_MF.split(batch.mel_lengths_U.tolist(), dim=1)
    for i, mel in zip(indices, mels, strict=True):
        (expected,) = log_mels(Shards(packed).read([dataset.rows[i][0]]), nano.extractor)
        torch.testing.assert_close(mel, expected, rtol=0, atol=1e-6)


def test_language_is_the_detected_one_if_any_and_else_the_sources_or_the_other_way_round(
    rows: list[LabelledUtterance],
) -> None:
    told, untold = (replace(rows[0][0], language=language) for language in ("German", None))
    chosen = [
        *((told, response_of(1, "Dutch")), (told, response_of(1, None))),
        *((untold, response_of(1, "Dutch")), (untold, response_of(1, None))),
    ]

    found = {}
    for detected_first in (True, False):
        codes, names = languages_of(table_of(chosen), detected_first=detected_first)
        found[detected_first] = [names[code] for code in codes]
        assert names == sorted(set(found[detected_first]), key=lambda name: name or "")

    assert found == {True: ["Dutch", "German", "Dutch", None], False: ["German", "German", "Dutch", None]}


def test_fingerprint_is_of_all_that_decides_plans_and_batches(
    rows: list[LabelledUtterance], packed: Path, nano: AsrModel
) -> None:
    (first, one), (second, _), *rest = rows
    two = response_of(2)
    reader = Reader(Shards(packed))

    def fingerprint(*chosen: LabelledUtterance) -> str:
        return dataset_of(list(chosen), reader, nano).fingerprint()

    base = fingerprint((first, one), (second, two))
    others = {
        fingerprint((second, two), (first, one)),
        fingerprint((first, one)),
        fingerprint((first, two), (second, one)),
        fingerprint((first, one), (second, Response(two.token_ids + 1, "English"))),
        fingerprint((first, one), (rest[0][0], two)),
        fingerprint((first, one), (second, response_of(2, "German"))),
        fingerprint((first, one), (second, response_of(2, prompt_language="English"))),
        fingerprint((first, one), (second, response_of(2, ce_weight=0.0))),
        fingerprint((first, one), (replace(second, duration_seconds=second.duration_seconds + 1 / 16_000), two)),
    }
    assert len(others | {base}) == 10
    assert fingerprint((first, one), (second, Response(two.token_ids.copy(), "English"))) == base


def test_prompt_tells_the_language_that_the_teacher_was_told_and_the_run_s_context(
    rows: list[LabelledUtterance], packed: Path, nano: AsrModel
) -> None:
    told = [(rows[0][0], response_of(3, "German", prompt_language="German")), (rows[1][0], response_of(4, "German"))]
    prompt = nano.prompt.with_context("Ada, Grace")

    with Reader(Shards(packed), workers=0) as reader:
        dataset = LabelledSet(table_of(told), reader=reader, prompt=prompt, extractor=nano.extractor)
        batch = dataset.batch([0, 1])
        without_context = dataset_of(told, reader, nano)

    starts = batch.cu_seqlens_U1.tolist()
    tokenize = nano.prompt.tokenizer
    for i, tag in enumerate(("language German<asr_text>", "")):
        ids = batch.input_ids_N[starts[i] : starts[i + 1]].tolist()
        assert len(ids) == dataset.num_tokens[i]
        prompt_ids = ids[: len(ids) - 3 - i]
        assert tokenize.decode(prompt_ids).endswith(f"<|im_start|>assistant\n{tag}")
        assert "<|im_start|>system\nAda, Grace<|im_end|>" in tokenize.decode(prompt_ids)
    assert dataset.fingerprint() != without_context.fingerprint()


def test_rows_of_an_utterance_for_kl_only_have_no_weight_in_the_cross_entropy(
    rows: list[LabelledUtterance], packed: Path, nano: AsrModel
) -> None:
    chosen = [(rows[0][0], response_of(3)), (rows[1][0], response_of(2, ce_weight=0.0)), (rows[2][0], response_of(1))]

    with Reader(Shards(packed), workers=0) as reader:
        batch = dataset_of(chosen, reader, nano).batch([0, 1, 2])

    assert batch.ce_weight_R.tolist() == [1, 1, 1, 0, 0, 1]
    assert batch.kl_weight_R.tolist() == [1] * 6
    assert batch.weighted_rows == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_workers_packs_what_collating_all_at_once_gives(
    dataset: LabelledSet, rows: list[LabelledUtterance], packed: Path, nano: AsrModel, workers: int
) -> None:
    indices = [5, 1, 17, 3, 0, 18, 9, 2, 11]
    mels = log_mels(Shards(packed).read([rows[i][0] for i in indices]), nano.extractor)
    examples = [
        Example(key=rows[i][0].key, mel_MF=mel_MF, response_ids=rows[i][1].token_ids.tolist())
        for i, mel_MF in zip(indices, mels, strict=True)
    ]
    expected = [collate(examples, prompt=nano.prompt), dataset.batch([8]), dataset.batch([0, 4])]

    with Reader(Shards(packed), workers=workers) as reader:
        found = list(dataset_of(rows, reader, nano).batches([indices, [8], [0, 4]]))

    for batch, whole in zip(found, expected, strict=True):
        assert_equal(batch, whole)


def test_damaged_utterance_becomes_silence_without_weight_in_an_unchanged_batch(
    dataset: LabelledSet, spoilt: LabelledSet
) -> None:
    told: list[Damaged] = []
    indices = [5, 3, 0, 11, 8]
    (whole,) = dataset.batches([indices])

    (batch,) = spoilt.batches([indices], on_damaged=told.append)

    assert [damaged.key for damaged in told] == [spoilt.rows[3][0].key, spoilt.rows[11][0].key]
    assert_equal(batch, whole, but=("mel_MF", "kl_weight_R", "ce_weight_R", "weighted_rows"))
    lengths = [len(spoilt.rows[i][1].token_ids) for i in indices]
    for weight_R in (batch.kl_weight_R, batch.ce_weight_R):
        parts = weight_R.split(lengths)
        assert [part.unique().tolist() for part in parts] == [[1.0], [0.0], [1.0], [0.0], [1.0]]
    assert batch.weighted_rows == whole.weighted_rows - lengths[1] - lengths[3]
    pairs = zip(*(b.mel_MF.split(b.mel_lengths_U.tolist(), dim=1) for b in (batch, whole)), strict=True)
    for place, (found, sound) in enumerate(pairs):
        if place in (1, 3):
            assert found.unique().tolist() == [-1.5]  # (log10 of the smallest power, -10, and 4) / 4
        else:
            torch.testing.assert_close(found, sound, rtol=0, atol=1e-6)


def test_damaged_utterance_is_an_error_where_all_are_needed(spoilt: LabelledSet) -> None:
    batches = spoilt.batches([[5, 0], [8, 3]])

    assert next(batches).num_utterances == 2
    with pytest.raises(ShardError, match=f"utterance '{spoilt.rows[3][0].key}' must "):
        next(batches)


def test_log_mels_come_batch_by_batch_until_one_with_damage(
    dataset: LabelledSet, spoilt: LabelledSet, nano: AsrModel
) -> None:
    batches = [[dataset.rows[i][0] for i in indices] for indices in ([5, 0], [17], [8, 3, 2], [1])]
    expected = [log_mels(dataset._reader.read(batch), nano.extractor) for batch in batches]

    found = list(mels_ahead(dataset._reader, batches, nano.extractor))
    until_damage = mels_ahead(spoilt._reader, batches, nano.extractor)

    for mels, wanted in zip(found, expected, strict=True):
        assert [mel.numpy().tobytes() for mel in mels] == [mel.numpy().tobytes() for mel in wanted]
    assert [len(next(until_damage)) for _ in range(2)] == [2, 1]
    with pytest.raises(ShardError, match=f"utterance '{spoilt.rows[3][0].key}' must "):
        next(until_damage)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_together_run_the_plan_with_stand_ins_of_no_weight(dataset: LabelledSet, world_size: int) -> None:
    plan = Plan(dataset.num_tokens, seed=0, token_budget=256, micro_batches_per_step=4)
    ranks = [
        PlannedBatches(dataset, plan, World(rank=rank, local_rank=rank, world_size=world_size), steps=9)
        for rank in range(world_size)
    ]
    steps = len(plan_epoch(dataset.num_tokens, seed=0, epoch=0, token_budget=256, micro_batches_per_step=4))
    num_empty = 0
    stand_ins = 0
    seen: list[str] = []

    for step in range(steps):
        shares = [list(rank.micro_batches(step)) for rank in ranks]

        assert len({len(share) for share in shares}) == 1  # ZeRO's collectives need every rank
        weighted = [batch for share in shares for batch in share if batch.weighted_rows]
        filled = [indices for indices in plan.step(step) if indices]
        num_empty += -len(filled) % world_size
        assert sorted(batch.keys for batch in weighted) == sorted(
            tuple(dataset.rows[i][0].key for i in indices) for indices in filled
        )
        assert ranks[0].num_rows(step) == sum(batch.weighted_rows for batch in weighted)
        assert ranks[-1].audio_seconds(step) == pytest.approx(sum(map(dataset.audio_seconds, filled)))
        for share in shares:
            for batch in share:
                if not batch.weighted_rows:
                    stand_ins += 1
                    assert batch.num_rows > 0  # a real batch goes through the model
                    assert not batch.kl_weight_R.any()
                    assert not batch.ce_weight_R.any()
        seen += [key for batch in weighted for key in batch.keys]

    assert sorted(seen) == sorted(utterance.key for utterance, _ in dataset.rows)
    assert stand_ins == num_empty
    assert stand_ins or world_size not in (3, 5)


def test_first_micro_batches_of_a_rank_are_ranks_positions_of_the_step(dataset: LabelledSet) -> None:
    plan = Plan(dataset.num_tokens, seed=0, token_budget=256, micro_batches_per_step=4)
    step = plan.step(0)
    assert all(step)

    batches = list(PlannedBatches(dataset, plan, World(rank=1, local_rank=1, world_size=2), steps=1).micro_batches(0))

    expected = [tuple(dataset.rows[i][0].key for i in step[position]) for position in (1, 3)]
    assert [batch.keys for batch in batches] == expected


def test_damage_changes_neither_the_steps_nor_their_planned_rows(dataset: LabelledSet, spoilt: LabelledSet) -> None:
    plan = Plan(dataset.num_tokens, seed=0, token_budget=256, micro_batches_per_step=4)
    world, steps = World(rank=0, local_rank=0, world_size=1), 6
    told: set[str] = set()

    with (
        PlannedBatches(dataset, plan, world, steps=steps) as sound,
        PlannedBatches(spoilt, plan, world, steps=steps, on_damaged=lambda damaged: told.add(damaged.key)) as damaged,
    ):
        lost = 0
        for step in range(steps):
            assert damaged.num_rows(step) == sound.num_rows(step)
            for batch, whole in zip(damaged.micro_batches(step), sound.micro_batches(step), strict=True):
                assert_equal(batch, whole, but=("mel_MF", "kl_weight_R", "ce_weight_R", "weighted_rows"))
                lost += whole.weighted_rows - batch.weighted_rows

    assert told == {spoilt.rows[i][0].key for i in (3, 11)}
    assert lost >= sum(len(spoilt.rows[i][1].token_ids) for i in (3, 11))


def test_what_nobody_asked_for_is_not_waited_for(dataset: LabelledSet) -> None:
    """Training that ends early leaves a step that is being prepared."""
    plan = Plan(dataset.num_tokens, seed=0, token_budget=256, micro_batches_per_step=4)
    with PlannedBatches(dataset, plan, World(rank=0, local_rank=0, world_size=1), steps=9) as batches:
        assert next(batches.micro_batches(0)).num_rows
        pending = [future for futures in batches._pending.values() for future in futures]

    assert pending
    assert all(future.done() for future in pending)
