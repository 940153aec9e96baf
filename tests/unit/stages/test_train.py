"""What cannot be read teaches nothing; languages are mixed as told; the largest batches are tried first."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qad_dist.asr.dataset import LabelledSet
from qad_dist.asr.decoder import DecoderStack
from qad_dist.asr.load import AsrModel
from qad_dist.batch import Batch
from qad_dist.config import RunConfig
from qad_dist.config.augment import AugmentConfig
from qad_dist.config.train import TrainConfig
from qad_dist.distill.evaluate import evaluate
from qad_dist.distill.loop import accumulate_gradient
from qad_dist.distill.models import TeacherAndStudent
from qad_dist.distill.optim import choose_trainable
from qad_dist.distill.window import Window
from qad_dist.heldout import heldout_batches
from qad_dist.pairing import join_models
from qad_dist.runtime.world import World
from qad_dist.stages.train import _compiles
from qad_dist.training_data import Data, largest_micro_batches, training_plan
from shards.audio import encode_flac
from shards.read import Damaged, Shards
from shards.workers import Reader
from tests.helpers.damage import spoil
from tests.helpers.labelled import response_of, table_of
from tests.helpers.qwen import Samples
from tests.helpers.reading import write_shards
from tests.helpers.states import make_models


def run_of(**train: Any) -> RunConfig:
    return RunConfig.model_validate(
        {"run": "unused", "model": {"path": "unused"}, "pack": {"inputs": ["unused"]}, "train": train}
    )


class Backward:
    """An engine that only knows how to go backward."""

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        loss.backward()


class OneStep:
    """Batches of one step."""

    def __init__(self, *batches: Batch) -> None:
        self.batches = batches

    def micro_batches(self, step: int) -> Iterator[Batch]:
        return iter(self.batches)

    def num_rows(self, step: int) -> int:
        return sum(batch.num_rows for batch in self.batches)

    def audio_seconds(self, step: int) -> float:
        return 1.0


@pytest.fixture(scope="module")
def models(load_nano: Callable[..., AsrModel]) -> tuple[TeacherAndStudent, DecoderStack, AsrModel]:
    """The embedded teacher, and a student whose decoder is a fifth noise."""
    teacher, student = load_nano(), load_nano()
    random = torch.Generator().manual_seed(0)
    for parameter in student.decoder.layers.parameters():
        parameter += 0.2 * parameter.std() * torch.randn(parameter.shape, generator=random)
    stack = DecoderStack(student.decoder.layers)
    choose_trainable(stack, train_norms=False)
    return join_models(teacher, student, stack), stack, teacher


@pytest.fixture(scope="module")
def sound_and_spoilt(
    models: tuple[TeacherAndStudent, DecoderStack, AsrModel],
    clips: list[Samples],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[LabelledSet, LabelledSet]]:
    """Five spoken digits, and the same of which the second cannot be read."""
    folder = tmp_path_factory.mktemp("damage")
    seconds = {f"clip-{i}": len(clip) / 16_000 for i, clip in enumerate(clips[:5])}
    flacs = {f"clip-{i}.flac": encode_flac(clip) for i, clip in enumerate(clips[:5])}
    teacher, sets = models[2], []
    with ExitStack() as stack:
        for name in ("sound", "spoilt"):
            utterances = write_shards(folder / name, {"train-000000.tar": flacs}, seconds=seconds)
            if name == "spoilt":
                spoil(folder / name, utterances[1])
            rows = table_of([(utterance, response_of(3 + i)) for i, utterance in enumerate(utterances)])
            reader = stack.enter_context(Reader(Shards(folder / name)))
            sets.append(LabelledSet(rows, reader=reader, prompt=teacher.prompt, extractor=teacher.extractor))
        yield sets[0], sets[1]


def without(batch: Batch, place: int, lengths: list[int]) -> Batch:
    """The batch with the weights of one utterance taken away."""
    keep_R = torch.cat([torch.full((length,), float(i != place)) for i, length in enumerate(lengths)])
    return replace(
        batch,
        kl_weight_R=batch.kl_weight_R * keep_R,
        ce_weight_R=batch.ce_weight_R * keep_R,
        weighted_rows=int(keep_R.sum()),
    )


def gradient_of(models: tuple[TeacherAndStudent, DecoderStack, AsrModel], *batches: Batch) -> Tensor:
    joined, stack, _ = models
    stack.zero_grad()
    settings = TrainConfig(ce_weight=0.3)
    window = Window(torch.device("cpu"), settings)
    accumulate_gradient(Backward(), joined, OneStep(*batches), settings, step=0, window=window)  # type: ignore[arg-type]
    return torch.cat([p.grad.flatten() for p in stack.parameters() if p.grad is not None])


def test_step_with_damage_has_the_gradient_of_its_readable_rows_as_they_were_planned(models, sound_and_spoilt) -> None:
    sound, spoilt = sound_and_spoilt
    told: list[Damaged] = []
    first, second = sound.batches([[0, 1, 2], [3, 4]])
    damaged = list(spoilt.batches([[0, 1, 2], [3, 4]], on_damaged=told.append))

    found = gradient_of(models, *damaged)

    assert [one.key for one in told] == ["clip-1"]
    whole, expected = gradient_of(models, first, second), gradient_of(models, without(first, 1, [3, 4, 5]), second)
    # Silence in the place of the other audio is nothing to the rows of its neighbours: only sums are ordered otherwise.
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert float((found - whole).norm() / whole.norm()) > 0.05


def test_heldout_values_are_those_of_the_readable_utterances(models, sound_and_spoilt) -> None:
    sound, spoilt = sound_and_spoilt
    run = run_of(steps=60)
    world, budget = World(rank=0, local_rank=0, world_size=1), run.train.micro_batch_tokens
    told: list[Damaged] = []
    ((number, whole),) = heldout_batches(sound, run, world, token_budget=budget)
    place, lengths = whole.keys.index("clip-1"), [3 + int(key.removeprefix("clip-")) for key in whole.keys]

    found = evaluate(
        models[0], heldout_batches(spoilt, run, world, token_budget=budget, on_damaged=told.append), chunk_rows=64
    )

    expected = evaluate(models[0], [(number, without(whole, place, lengths))], chunk_rows=64)
    assert [one.key for one in told] == ["clip-1"]
    assert found.response_tokens == expected.response_tokens == sum(lengths) - 4
    assert found.kl_per_token == pytest.approx(expected.kl_per_token, rel=1e-4)
    assert found.ce_per_token == pytest.approx(expected.ce_per_token, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "german", "english"),
    [({}, 1, 9), ({"language_temperature": 100}, 5, 5), ({"max_hours_per_language": 3}, 1, 3)],
    ids=["as they come", "evenly", "capped"],
)
def test_plan_mixes_the_labelled_languages_as_the_settings_say(
    sound_and_spoilt, settings: dict[str, float], german: int, english: int
) -> None:
    """Ten utterances of an hour, English by their source, of which the teacher hears German in the third."""
    utterance, _ = sound_and_spoilt[0].rows[0]
    hour = replace(utterance, duration_seconds=3600.0, language="English")
    rows = [(replace(hour, key=f"hour-{i}"), response_of(4, "German" if i == 2 else None)) for i in range(10)]
    dataset = sound_and_spoilt[0]
    training = LabelledSet(table_of(rows), reader=dataset._reader, prompt=dataset._prompt, extractor=dataset._extractor)
    run = run_of(steps=60, micro_batch_tokens=100_000, **settings)

    epoch = training_plan(run, training).epoch(0)

    chosen = [index for step in epoch for indices in step for index in indices]
    assert (chosen.count(2), len(chosen) - chosen.count(2)) == (german, english)


SIZES = [(1.0 + (7 * number) % 9, 1 + (number * number) % 43) for number in range(60)]
"""Seconds and response tokens of utterances."""


class Asked(LabelledSet):
    """Remembers what batches are asked for instead of reading audio."""

    asked: tuple[list[int], ...] = ()

    def batches(self, chosen: Any, **_: Any) -> Iterator[Batch]:
        self.asked = tuple(chosen)
        return iter(())


def test_batches_that_are_tried_first_have_most_tokens_most_audio_and_most_response_tokens(sound_and_spoilt) -> None:
    dataset = sound_and_spoilt[0]
    utterance, _ = dataset.rows[0]
    rows = [
        (replace(utterance, key=f"of-{i}", duration_seconds=seconds), response_of(tokens))
        for i, (seconds, tokens) in enumerate(SIZES)
    ]
    parts = {"reader": dataset._reader, "prompt": dataset._prompt, "extractor": dataset._extractor}
    training = Asked(table_of(rows), **parts)
    for seed in range(100):  # until three micro-batches are the largest, each in its own way
        run = run_of(steps=60, micro_batch_tokens=256, micro_batches_per_step=2).model_copy(update={"seed": seed})
        plan = training_plan(run, training)
        filled = [indices for step in range(20) for indices in plan.step(step) if indices]
        sizes = [measures(training, indices) for indices in filled]
        places = {max(range(len(filled)), key=lambda place: sizes[place][way]) for way in range(3)}
        if len(places) == 3:
            break

    largest_micro_batches(Data(training=training, heldout=dataset, plan=plan), steps=20)

    assert len(places) == 3
    assert list(training.asked) == [filled[place] for place in sorted(places)]


def measures(training: LabelledSet, indices: list[int]) -> list[float]:
    return [
        float(training.num_tokens[indices].sum()),
        sum(SIZES[index][0] for index in indices),
        sum(SIZES[index][1] for index in indices),
    ]


def test_largest_batches_are_looked_for_among_the_steps_that_will_be_made(sound_and_spoilt) -> None:
    dataset = sound_and_spoilt[0]
    training = Asked(dataset.rows, reader=dataset._reader, prompt=dataset._prompt, extractor=dataset._extractor)
    plan = training_plan(run_of(steps=60, micro_batch_tokens=256, micro_batches_per_step=1), training)
    data = Data(training=training, heldout=dataset, plan=plan)

    largest_micro_batches(data, steps=1)

    assert list(training.asked) == plan.step(0)


def test_plan_has_the_altered_copies_as_entries_of_their_own(sound_and_spoilt) -> None:
    dataset = sound_and_spoilt[0]
    parts = {"reader": dataset._reader, "prompt": dataset._prompt, "extractor": dataset._extractor}
    training = LabelledSet(dataset.rows, **parts, augment=AugmentConfig(copies=2))
    run = run_of(steps=60, micro_batch_tokens=256)

    epoch = training_plan(run, training).epoch(0)

    chosen = sorted(index for step in epoch for indices in step for index in indices)
    assert chosen == list(range(3 * len(dataset.rows)))


def test_layers_are_compiled_where_told_or_on_gpus_unless_zero_3_shards_them(root) -> None:
    tables = torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1)
    cpu, gpu = (replace(make_models(*tables), device=torch.device(kind)) for kind in ("cpu", "cuda"))
    stages = {n: str(root / "configs" / "deepspeed" / f"zero{n}.json") for n in (1, 2, 3)}

    for path, expected in ((stages[1], True), (stages[2], True), (stages[3], False), (None, True)):
        assert _compiles(run_of(steps=60, deepspeed=path), gpu) is expected
        assert _compiles(run_of(steps=60, deepspeed=path), cpu) is False
        assert _compiles(run_of(steps=60, deepspeed=path, compile=True), cpu) is True
        assert _compiles(run_of(steps=60, deepspeed=path, compile=False), gpu) is False
