"""Utterances that cannot be read, on two ranks: each knows of all, and both stop or go on alike."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from qad_dist.asr.checkpoint import load_processor
from qad_dist.asr.dataset import LabelledSet, PlannedBatches
from qad_dist.asr.prompt import Prompt
from qad_dist.config.train import TrainConfig
from qad_dist.distill.checkpoint import Checkpoints, TrainingState
from qad_dist.distill.evaluate import Evaluation
from qad_dist.distill.loop import Hooks, train
from qad_dist.runtime.collectives import all_gather_objects
from qad_dist.runtime.quarantine import SharedQuarantine
from qad_dist.runtime.world import World
from shards.errors import ShardError
from shards.index import read_utterances
from shards.plan import Plan
from shards.quarantine import Quarantine
from shards.read import Damaged, Shards
from shards.workers import Reader
from tests.helpers.damage import spoil
from tests.helpers.labelled import response_of, table_of
from tests.helpers.loops import START
from tests.helpers.qwen import NANO
from tests.helpers.ranks import run_on_ranks
from tests.helpers.reading import write_tones
from tests.helpers.states import PlainEngine, make_models

STEPS, UTTERANCES, DAMAGED = 6, 20, (3, 8, 13)
VOCABULARY, WIDTH = 1_100, 4


def quarantine_of(folder: Path, rank: int, *, max_share: float) -> SharedQuarantine:
    path = folder / f"rank-{rank:03d}.jsonl"
    return SharedQuarantine(Quarantine(path, num_utterances=UTTERANCES, max_share=max_share))


def count_together(rank: int, world_size: int, folder: str) -> None:
    assert dist.get_world_size() == world_size == 2
    quarantine = quarantine_of(Path(folder), rank, max_share=0.15)

    def add(*names: str) -> None:
        for name in names:
            quarantine.add(Damaged(key=name, shard="s", reason=f"{name} is damaged"))

    assert quarantine.count() == 0
    add(*("ab" if rank == 0 else "bc"))
    assert quarantine.count() == quarantine.count() == 3  # b is one, whoever met it
    if rank == 1:
        add("d")
    with pytest.raises(ShardError, match=r"at most 3 of 20 utterances\) and 4: a \(a is damaged\), b") as told:
        quarantine.count()
    assert told.value.is_shared
    resumed = quarantine_of(Path(folder), rank, max_share=1.0)
    assert resumed.count() == 4


def train_on_damage(rank: int, world_size: int, folder: str, max_share: float, told: int | None) -> None:
    """Train to the end, where ``told`` are quarantined; or, where that is None, to an error of both ranks.

    Each rank makes its own steps: what is learned is nothing to these tests.
    """
    assert dist.get_world_size() == world_size == 2
    processor = load_processor(NANO)
    utterances = read_utterances(Path(folder) / "pack")
    rows = table_of([(utterance, response_of(2 + i % 5)) for i, utterance in enumerate(utterances)])
    random = torch.Generator().manual_seed(0)
    tables = [torch.randn(VOCABULARY, WIDTH, generator=random) for _ in range(3)]
    student_VD = nn.Parameter(tables[1])
    engine, lines = PlainEngine(table=student_VD), []
    quarantine = quarantine_of(Path(folder) / "quarantine", rank, max_share=max_share)
    hooks = Hooks(
        evaluate=lambda: Evaluation(
            kl_per_token=1.0, ce_per_token=1.0, agreement=0.5, response_tokens=8, kl_by_language={}
        ),
        count_words=lambda: None,
        keep_best=lambda *_: None,
        write=lambda step, values: lines.append((step, values)),
        write_bad=lambda *_: None,
        count_quarantined=quarantine.count,
    )

    with Reader(Shards(Path(folder) / "pack")) as reader:
        dataset = LabelledSet(
            rows, reader=reader, prompt=Prompt.from_processor(processor), extractor=processor.feature_extractor
        )
        plan = Plan(dataset.num_tokens, seed=0, token_budget=100, micro_batches_per_step=3)
        num_micro_batches = sum(-(-sum(map(bool, plan.step(step))) // world_size) for step in range(STEPS))
        world = World(rank=rank, local_rank=rank, world_size=world_size)
        with PlannedBatches(dataset, plan, world, steps=STEPS, on_damaged=quarantine.add) as batches:

            def run() -> TrainingState:
                return train(
                    engine,  # type: ignore[arg-type]
                    make_models(tables[0], student_VD, tables[2]),
                    batches,
                    TrainConfig(steps=STEPS, warmup_steps=1, log_every=1),
                    state=START,
                    checkpoints=Checkpoints(Path(folder) / "train", keep=2),
                    hooks=hooks,
                )

            if told is None:
                with pytest.raises(ShardError, match=r"^read\.max_quarantined_share must cover ") as error:
                    run()
                assert error.value.is_shared
                assert [step for step, values in lines if "kl" in values] == list(range(1, len(lines)))
                assert len(lines) - 1 < STEPS
            else:
                assert run().step == STEPS
                assert engine.calls.count("backward") + engine.calls.count("last") == num_micro_batches
                assert [values["quarantined"] for _, values in lines if "kl" in values][-1] == told
            # What is told is of both ranks, times included; but for the norm, which these engines do not share.
            shared = [(step, {k: v for k, v in values.items() if k != "gradient_norm"}) for step, values in lines]
            assert all(other == shared for other in all_gather_objects(shared))


def test_ranks_count_what_any_of_them_could_not_read_and_stop_together(tmp_path: Path) -> None:
    run_on_ranks(count_together, str(tmp_path), world_size=2, tmp_path=tmp_path)


@pytest.mark.parametrize(
    ("max_share", "told"), [(0.15, 3), (0.1, None)], ids=["to the end within the limit", "to an error above it"]
)
def test_training_on_damaged_shards_goes_alike_on_both_ranks(
    tmp_path: Path, max_share: float, told: int | None
) -> None:
    utterances = write_tones(tmp_path / "pack", UTTERANCES, per_shard=5)
    for number in DAMAGED:
        spoil(tmp_path / "pack", utterances[number])
    (tmp_path / "train").mkdir()

    run_on_ranks(train_on_damage, str(tmp_path), max_share, told, world_size=2, tmp_path=tmp_path)

    files = [path.read_text().splitlines() for path in sorted((tmp_path / "quarantine").iterdir())]
    assert len({line for lines in files for line in lines}) == 3
