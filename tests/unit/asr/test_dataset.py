"""Labelled sets and the batches of a plan: lengths known beforehand, every rank its share."""

import threading
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from qad_dist.asr.collate import Example, collate
from qad_dist.asr.dataset import LabelledSet, PlannedBatches
from qad_dist.asr.load import AsrModel
from qad_dist.asr.mel import log_mel
from qad_dist.batch import Batch
from qad_dist.runtime.world import World
from shards.index import read_utterances
from shards.labelled import LabelledUtterance, Response
from shards.plan import Plan, plan_epoch
from shards.read import read_audio
from shards.schema import Recording, Utterance
from tests.helpers.packing import pack_tones
from tests.helpers.tones import write_tone

# Around half a second, around one, and odd numbers of samples.
SAMPLES = [
    *(1_600, 4_801, 7_999, 8_000, 8_001, 8_160, 15_839, 15_999, 16_000, 16_001),
    *(16_160, 20_001, 24_000, 31_999, 32_000, 33_333, 40_007, 47_999, 48_000),
]


def response_of(tokens: int) -> Response:
    return Response(np.arange(100, 100 + tokens, dtype=np.int32), "English")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tone for each length."""
    folder = tmp_path_factory.mktemp("dataset")
    recordings = [
        Recording(
            path=str(write_tone(folder / "audio" / f"{i}.wav", i, seconds=samples / 16_000)),
            key=f"tone-{i}",
            source="tones",
            speaker=f"s{i}",
        )
        for i, samples in enumerate(SAMPLES)
    ]
    pack_tones(recordings, folder / "pack", holdout=0)
    return folder / "pack"


@pytest.fixture(scope="module")
def dataset(packed: Path, nano: AsrModel) -> LabelledSet:
    rows = [(utterance, response_of(1 + i % 7)) for i, utterance in enumerate(read_utterances(packed))]
    return LabelledSet(rows, folder=packed, prompt=nano.prompt, extractor=nano.extractor)


def test_lengths_are_those_of_the_real_batches(dataset: LabelledSet) -> None:
    assert len(dataset.rows) == len(SAMPLES)

    real = [dataset.batch([i]).num_tokens for i in range(len(dataset.rows))]

    assert dataset.num_tokens == real
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
        assert torch.equal(mel, log_mel(read_audio(packed, dataset.rows[i][0]), nano.extractor))


def test_fingerprint_is_of_keys_and_responses_in_their_order(
    dataset: LabelledSet, packed: Path, nano: AsrModel
) -> None:
    (first, one), (second, _), *rest = dataset.rows
    two = response_of(2)

    def fingerprint(*rows: LabelledUtterance) -> str:
        return LabelledSet(rows, folder=packed, prompt=nano.prompt, extractor=nano.extractor).fingerprint()

    base = fingerprint((first, one), (second, two))
    others = {
        fingerprint((second, two), (first, one)),
        fingerprint((first, one)),
        fingerprint((first, two), (second, one)),
        fingerprint((first, one), (second, Response(two.token_ids + 1, "English"))),
        fingerprint((first, one), (rest[0][0], two)),
    }
    assert len(others | {base}) == 6
    assert fingerprint((first, one), (second, Response(two.token_ids.copy(), None))) == base


@pytest.mark.parametrize("threads", [1, 4])
def test_any_number_of_threads_packs_what_collating_all_at_once_gives(
    dataset: LabelledSet, packed: Path, nano: AsrModel, threads: int
) -> None:
    indices = [5, 1, 17, 3, 0, 18, 9, 2, 11]
    examples = [
        Example(
            key=utterance.key,
            mel_MF=log_mel(read_audio(packed, utterance), nano.extractor),
            response_ids=response.token_ids.tolist(),
        )
        for utterance, response in (dataset.rows[i] for i in indices)
    ]
    expected = collate(examples, prompt=nano.prompt)
    threaded = LabelledSet(dataset.rows, folder=packed, prompt=nano.prompt, extractor=nano.extractor, threads=threads)

    for chosen, whole in ((indices, expected), (indices[:1], dataset.batch(indices[:1]))):
        batch = threaded.batch(chosen)
        for field in fields(Batch):
            found, wanted = getattr(batch, field.name), getattr(whole, field.name)
            if isinstance(wanted, torch.Tensor):
                assert (found.dtype, found.shape, found.device) == (wanted.dtype, wanted.shape, wanted.device)
                assert found.numpy().tobytes() == wanted.numpy().tobytes(), field.name
            else:
                assert found == wanted


def test_utterances_are_read_by_as_many_threads_as_asked_for(
    dataset: LabelledSet, packed: Path, nano: AsrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(3)

    def wait_for_others(folder: Path, utterance: Utterance) -> np.ndarray:
        together.wait(timeout=30)
        return read_audio(folder, utterance)

    monkeypatch.setattr("qad_dist.asr.dataset.read_audio", wait_for_others)
    threaded = LabelledSet(dataset.rows, folder=packed, prompt=nano.prompt, extractor=nano.extractor, threads=3)

    assert threaded.batch([0, 1, 2]).keys == tuple(dataset.rows[i][0].key for i in range(3))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_together_run_the_plan_with_stand_ins_of_no_weight(dataset: LabelledSet, world_size: int) -> None:
    plan = Plan(dataset.num_tokens, seed=0, token_budget=256, micro_batches_per_step=4)
    ranks = [
        PlannedBatches(dataset, plan, World(rank=rank, local_rank=rank, world_size=world_size), steps=9)
        for rank in range(world_size)
    ]
    steps = len(plan_epoch(dataset.num_tokens, seed=0, epoch=0, token_budget=256, micro_batches_per_step=4))
    stand_ins = 0
    seen: list[str] = []

    for step in range(steps):
        shares = [list(rank.micro_batches(step)) for rank in ranks]

        assert len({len(share) for share in shares}) == 1  # ZeRO's collectives need every rank
        weighted = [batch for share in shares for batch in share if batch.weighted_rows]
        keys = sorted(batch.keys for batch in weighted)
        assert keys == sorted(tuple(dataset.rows[i][0].key for i in indices) for indices in plan.step(step) if indices)
        assert ranks[0].num_rows(step) == sum(batch.weighted_rows for batch in weighted)
        assert ranks[-1].audio_seconds(step) == pytest.approx(
            sum(dataset.audio_seconds(indices) for indices in plan.step(step))
        )
        for share in shares:
            for batch in share:
                if not batch.weighted_rows:
                    stand_ins += 1
                    assert batch.num_rows > 0  # a real batch goes through the model
                    assert not batch.kl_weight_R.any()
                    assert not batch.ce_weight_R.any()
        seen += [key for batch in weighted for key in batch.keys]

    assert sorted(seen) == sorted(utterance.key for utterance, _ in dataset.rows)
    assert (stand_ins > 0) == (world_size in (3, 5))


def test_first_micro_batches_of_a_rank_are_ranks_positions_of_the_step(dataset: LabelledSet) -> None:
    plan = Plan(dataset.num_tokens, seed=0, token_budget=256, micro_batches_per_step=4)
    step = plan.step(0)
    assert all(step)

    batches = list(PlannedBatches(dataset, plan, World(rank=1, local_rank=1, world_size=2), steps=1).micro_batches(0))

    expected = [tuple(dataset.rows[i][0].key for i in step[position]) for position in (1, 3)]
    assert [batch.keys for batch in batches] == expected
