"""Altered copies in a labelled set: audio of their own, their utterances' responses, each once an epoch."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qad_dist.asr.augment import augment, choose_variant
from qad_dist.asr.dataset import LabelledSet, PlannedBatches
from qad_dist.asr.load import AsrModel
from qad_dist.asr.mel import log_mels
from qad_dist.config.augment import AugmentConfig
from qad_dist.runtime.world import World
from shards.labelled import LabelledUtterance
from shards.plan import Plan
from shards.read import Damaged, Shards
from shards.workers import Reader
from tests.helpers.labelled import response_of
from tests.helpers.labelled_sets import SAMPLES, assert_equal, dataset_of

COPIES = AugmentConfig(copies=2, noise_share=0.7)


@pytest.fixture(scope="module")
def augmented(packed: Path, rows: list[LabelledUtterance], nano: AsrModel) -> Iterator[LabelledSet]:
    """The set ``dataset``, with two copies of each utterance."""
    with Reader(Shards(packed)) as reader:
        yield dataset_of(rows, reader, nano, COPIES, seed=3)


def test_copies_have_the_lengths_of_their_real_batches_and_none_is_longer_than_the_longest_utterance(
    dataset: LabelledSet, augmented: LabelledSet
) -> None:
    count = len(SAMPLES)

    batches = list(augmented.batches([[i] for i in range(len(augmented))]))

    assert (len(augmented), len(dataset)) == (3 * count, count)
    assert augmented.utterance_of.tolist() == [*range(count)] * 3
    assert augmented.num_tokens.tolist() == [batch.num_tokens for batch in batches]
    assert augmented.num_tokens.max() == dataset.num_tokens.max()
    assert augmented.num_tokens[:count].tolist() == dataset.num_tokens.tolist()
    assert augmented.seconds[:count].tolist() == dataset.seconds.tolist()
    frames = (augmented.seconds * 16_000).round() // 160
    assert frames.tolist() == [int(batch.mel_lengths_U.sum()) for batch in batches]


def test_slow_copy_is_slow_only_where_that_leaves_it_shorter_than_the_longest_utterance(
    rows: list[LabelledUtterance], packed: Path, nano: AsrModel
) -> None:
    chosen = [(utterance, response_of(3)) for utterance, _ in rows]
    half = AugmentConfig(copies=1, speeds=(0.5,))

    with Reader(Shards(packed), workers=0) as reader:
        dataset = dataset_of(chosen, reader, nano, half)

    # Of 3 s at most, with equal responses: 1.5 s may become 3 s, and 2 s must not become 4 s.
    assert len(dataset) == 2 * len(SAMPLES)
    factors = dict(zip(SAMPLES, dataset.seconds[len(SAMPLES) :] / dataset.seconds[: len(SAMPLES)], strict=True))
    assert factors == pytest.approx({samples: 2.0 if samples <= 24_000 else 1.0 for samples in SAMPLES})


def test_entries_that_are_no_copies_are_packed_as_without_any(dataset: LabelledSet, augmented: LabelledSet) -> None:
    indices = [5, 1, 17, 3, 0, 18]

    assert_equal(augmented.batch(indices), dataset.batch(indices))


def test_copy_has_its_own_audio_beside_its_utterances_response_and_counts_in_the_kl_only(
    augmented: LabelledSet, packed: Path, nano: AsrModel
) -> None:
    count = len(SAMPLES)
    indices = [5, 5 + count, 5 + 2 * count, 2 + count]

    batch = augmented.batch(indices)

    assert batch.keys == ("tone-5", "tone-5~1", "tone-5~2", "tone-2~1")
    own = [list(augmented.rows[i % count][1].token_ids) for i in indices]
    assert batch.targets_R.tolist() == [token for ids in own for token in ids]
    assert batch.kl_weight_R.tolist() == [1.0] * batch.num_rows
    assert batch.ce_weight_R.tolist() == [1.0] * len(own[0]) + [0.0] * sum(map(len, own[1:]))
    assert augmented.num_rows(indices) == batch.num_rows == batch.weighted_rows
    assert augmented.audio_seconds(indices) == pytest.approx(augmented.seconds[indices].sum())
    mels = batch.mel_MF.split(batch.mel_lengths_U.tolist(), dim=1)
    for i, mel_MF in zip(indices, mels, strict=True):
        utterance = augmented.rows[i % count][0]
        (audio,) = Shards(packed).read([utterance])
        altered = augment(audio, choose_variant(utterance.key, i // count, COPIES, 3))
        assert len(altered) == round(augmented.seconds[i] * 16_000)
        torch.testing.assert_close(mel_MF, log_mels([altered], nano.extractor)[0], rtol=0, atol=1e-6)
    assert len({mel_MF.numpy().tobytes() for mel_MF in mels}) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_copies_do_not_depend_on_the_workers_or_on_what_they_are_packed_with(
    augmented: LabelledSet, rows: list[LabelledUtterance], packed: Path, nano: AsrModel, workers: int
) -> None:
    indices = [24, 5, 43, 40, 56]

    with Reader(Shards(packed), workers=workers) as reader:
        dataset = dataset_of(rows, reader, nano, COPIES, seed=3)
        batch, single = dataset.batches([indices, [43]])

    assert_equal(batch, augmented.batch(indices))
    own_MF = batch.mel_MF.split(batch.mel_lengths_U.tolist(), dim=1)[2]
    torch.testing.assert_close(single.mel_MF, own_MF, rtol=0, atol=1e-6)


def test_damaged_utterance_becomes_silence_in_its_copies_too(
    augmented: LabelledSet, rows: list[LabelledUtterance], spoilt: LabelledSet, nano: AsrModel
) -> None:
    told: list[Damaged] = []
    indices = [4, 3 + len(SAMPLES), 3 + 2 * len(SAMPLES)]

    (batch,) = dataset_of(rows, spoilt._reader, nano, COPIES, seed=3).batches([indices], on_damaged=told.append)

    assert {damaged.key for damaged in told} == {rows[3][0].key}
    assert_equal(batch, augmented.batch(indices), but=("mel_MF", "kl_weight_R", "ce_weight_R", "weighted_rows"))
    assert batch.weighted_rows == len(rows[4][1].token_ids)
    assert int(batch.kl_weight_R.sum()) == int(batch.ce_weight_R.sum()) == batch.weighted_rows
    for mel_MF in batch.mel_MF.split(batch.mel_lengths_U.tolist(), dim=1)[1:]:
        assert mel_MF.unique().tolist() == [-1.5]


def test_copies_have_the_language_of_their_utterance(
    rows: list[LabelledUtterance], packed: Path, nano: AsrModel
) -> None:
    chosen = [(rows[i][0], response_of(1, language)) for i, language in enumerate(("German", "Dutch", "German"))]

    codes, names = dataset_of(chosen, Reader(Shards(packed)), nano, COPIES).languages

    assert [names[code] for code in codes] == ["German", "Dutch", "German"] * 3


def test_fingerprint_is_of_how_copies_are_altered_if_there_are_any(
    rows: list[LabelledUtterance], packed: Path, nano: AsrModel
) -> None:
    reader = Reader(Shards(packed))

    def fingerprint(*, seed: int = 0, **settings: object) -> str:
        return dataset_of(rows, reader, nano, AugmentConfig.model_validate(settings), seed=seed).fingerprint()

    base = {"copies": 1}
    changes = [
        *({"copies": 2}, {"speeds": (0.9, 1.1)}, {"noise_share": 0.4}),
        *({"noise_snr_db": (10, 20)}, {"gain_db": (0, 0)}, {"seed": 1}),
    ]

    without = dataset_of(rows, reader, nano).fingerprint()
    assert {fingerprint(), fingerprint(noise_share=0.4, seed=1)} == {without}
    assert len({without, fingerprint(**base), *(fingerprint(**{**base, **change}) for change in changes)}) == 8


@pytest.mark.parametrize("world_size", [1, 3])
def test_each_copy_comes_once_an_epoch_on_any_number_of_ranks(augmented: LabelledSet, world_size: int) -> None:
    plan = Plan(augmented.num_tokens, seed=0, token_budget=256, micro_batches_per_step=4)
    steps = plan.num_steps(0)
    ranks = [
        PlannedBatches(augmented, plan, World(rank=rank, local_rank=rank, world_size=world_size), steps=steps)
        for rank in range(world_size)
    ]

    batches = []
    for step in range(steps):
        found = [batch for rank in ranks for batch in rank.micro_batches(step) if batch.weighted_rows]
        assert sum(batch.num_rows for batch in found) == ranks[0].num_rows(step)
        batches += found

    keys = [key for batch in batches for key in batch.keys]
    own = [utterance.key for utterance, _ in augmented.rows]
    assert sorted(keys) == sorted([*own, *(f"{key}~{copy}" for key in own for copy in (1, 2))])
    assert max(batch.num_tokens for batch in batches) <= 256
