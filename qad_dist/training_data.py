"""What a training learns from, what it is judged on, and in which order."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from qad_dist.asr.dataset import LabelledSet
from qad_dist.asr.load import AsrModel
from qad_dist.batch import Batch
from qad_dist.config import RunConfig
from qad_dist.heldout import heldout_set
from qad_dist.labelling import read_used_labels
from shards.mixture import Mixture
from shards.plan import Plan
from shards.schema import HELDOUT, TRAIN
from shards.stored_states import StoredStates
from shards.workers import Reader

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What is trained on, and what is held out."""

    training: LabelledSet
    heldout: LabelledSet
    plan: Plan


def load_data(run: RunConfig, teacher: AsrModel, reader: Reader) -> Data:
    """The labelled splits, and the plan of all steps."""
    stored = None
    if run.train.teacher == "cached":
        stored = StoredStates(run.stage_folder("pack"), run.stage_folder("label"))
    labelled = read_used_labels(run, TRAIN)
    rows = labelled.rows
    if run.train.sources:
        rows = rows.take(rows.utterances.places_of(run.train.sources, setting="train.sources"))
    training = LabelledSet(
        rows,
        reader=reader,
        prompt=teacher.prompt.with_context(run.label.context),
        extractor=teacher.extractor,
        augment=run.train.augment,
        seed=_seed(run),
        stored=stored,
    )
    heldout, held = heldout_set(run, teacher, reader, max_utterances=run.train.evaluate_utterances, stored=stored)
    for split, dataset, dropped in ((TRAIN, training, labelled.dropped), (HELDOUT, heldout, held.dropped)):
        log.info(
            "event=dataset split=%s utterances=%d copies=%d audio_hours=%.3f tokens=%d dropped=%s",
            *(split, len(dataset.rows), len(dataset) - len(dataset.rows), dataset.seconds.sum() / 3600),
            *(dataset.num_tokens.sum(), dict(dropped)),
        )
    return Data(training=training, heldout=heldout, plan=training_plan(run, training))


def training_plan(run: RunConfig, training: LabelledSet) -> Plan:
    """The steps of all ranks; tells how the languages are mixed, if not as they come."""
    codes, languages = training.languages
    mixture = Mixture(
        codes,
        training.seconds,
        temperature=run.train.language_temperature,
        max_hours_per_language=run.train.max_hours_per_language,
    )
    if run.train.language_temperature > 1 or run.train.max_hours_per_language is not None:
        for part in mixture.shares():
            log.info(
                "event=mixture language=%s audio_hours=%.3f hours_per_epoch=%.3f share=%.4f times=%.3f",
                *(languages[part.language], part.hours, part.hours_per_epoch, part.share, part.times),
            )
    return Plan(
        training.num_tokens,
        audio_seconds=training.seconds,
        mixture=mixture,
        seed=_seed(run),
        token_budget=run.train.micro_batch_tokens,
        micro_batches_per_step=run.train.micro_batches_per_step,
    )


def _seed(run: RunConfig) -> int:
    return run.seed if run.train.seed is None else run.train.seed


def largest_micro_batches(data: Data, steps: int) -> Iterator[Batch]:
    """Of the plan's micro-batches those with most tokens, most audio and most response tokens."""
    training = data.training
    filled = [indices for step in range(steps) for indices in data.plan.step(step) if indices]
    chosen = {
        max(range(len(filled)), key=lambda place: size(filled[place]))
        for size in (
            lambda indices: int(training.num_tokens[indices].sum()),
            training.audio_seconds,
            training.num_rows,
        )
    }
    return training.batches([filled[place] for place in sorted(chosen)], on_damaged=lambda _: None)
